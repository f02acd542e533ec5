"""`tessera info`: what is installed here, what it can do, and what stands in the way."""

import json
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apps.service.compute_profiles import attention_backends, memory_profiles, try_attention
from dit.layers.linear import linear, mkl_is_slow

PACKAGES = ("dit", "pipelines", "sampling", "apps")
HOME = Path(__file__).resolve().parents[2]
REPORTED = ("tessera", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "gradio")
GIB = 2**30


def run(json_output: bool = False) -> None:
    """Print the report.

    Args:
        json_output: Print one JSON object instead of tables.
    """
    report = collect()
    if json_output:
        Console(soft_wrap=True).print_json(json.dumps(report))
    else:
        show(report, Console())


def collect() -> dict[str, Any]:
    """Gather everything that the report says, as plain JSON values."""
    shadows = find_shadows()
    notes = [f"{name}: {text}" for name, text in shadows.items()]
    extras = installed_extras()
    if not extras:
        notes.append("tessera itself is not installed, only importable from here: run `pip install -e .`")
    return {
        "versions": {"python": platform.python_version(), **_versions(REPORTED)},
        "machine": {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
            "float32 products": "oneDNN (MKL leaves AVX-512 unused here)" if mkl_is_slow() else "as torch chooses",
        },
        "devices": [describe_device(device) for device in available_devices()],
        "attention": {} if "dit" in shadows else _attention(),
        "memory": {name: why or "works" for name, why in memory_profiles(str(available_devices()[0])).items()},
        "extras": {name: missing or "installed" for name, missing in extras.items()},
        "models": [] if "pipelines" in shadows else _builtin_models(),
        "warnings": notes,
    }


def available_devices() -> list[torch.device]:
    """List the devices that torch can use here, the fastest kind first."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    return [*devices, torch.device("cpu")]


def describe_device(device: torch.device) -> dict[str, Any]:
    """Describe one device: its name, its memory in GiB and how much faster bfloat16 is than float32 on it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    else:
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        memory = psutil.virtual_memory().total
    return {
        "device": str(device),
        "name": name,
        "memory_gib": round(memory / GIB, 1),
        "bfloat16_gain": round(bfloat16_gain(device), 2),
    }


def bfloat16_gain(device: torch.device, side: int = 512) -> float:
    """Time a square matrix product in both formats.

    Flags of the processor do not tell whether torch has a fast path for bfloat16; a product does.

    Args:
        device: Where to compute.
        side: Rows and columns of the matrices.

    Returns:
        float32 time divided by bfloat16 time; above 1 means that bfloat16 is worth choosing.
    """

    @torch.no_grad()
    def product_time(dtype: torch.dtype) -> float:
        matrix = torch.ones(side, side, device=device, dtype=dtype)
        start = time.perf_counter()
        linear(matrix, matrix)[0, 0].item()  # as networks multiply here; reading a value waits for the device
        return time.perf_counter() - start

    # In turns, and the shortest of each: a burst of other load hits both, and the best time escapes it.
    pairs = [(product_time(torch.float32), product_time(torch.bfloat16)) for _ in range(16)]
    return min(slow for slow, _ in pairs) / min(fast for _, fast in pairs)


def probe_attention(backend: str) -> str:
    """Run one small attention call with a backend, on the fastest device.

    Returns:
        'works on DEVICE', 'not installed', or the reason why the call failed.
    """
    device = available_devices()[0]
    return _told(try_attention(backend, device), device)


def _attention() -> dict[str, str]:
    """Say of every attention backend whether it works on the fastest device."""
    device = available_devices()[0]
    return {name: probe_attention(name) for name in attention_backends(str(device))}


def _told(reason: str, device: torch.device) -> str:
    if not reason:
        return f"works on {device}"
    return "not installed" if reason.endswith("is not installed") else f"fails on {device}: {reason}"


def installed_extras() -> dict[str, str]:
    """Map every extra of the distribution to its missing packages, or to '' when it is complete.

    Returns:
        The extras, or an empty mapping when the distribution is not installed.
    """
    try:
        requirements = metadata.requires("tessera") or []
    except metadata.PackageNotFoundError:
        return {}
    missing: dict[str, list[str]] = {}
    for requirement in requirements:
        match = re.match(r"""([\w.-]+).*extra == ["']([\w-]+)["']""", requirement)
        if match:
            package, extra = match.groups()
            missing.setdefault(extra, []).extend([] if _versions([package]) else [package])
    return {extra: "missing " + ", ".join(names) if names else "" for extra, names in missing.items()}


def find_shadows(providers: Mapping[str, Sequence[str]] | None = None, home: Path = HOME) -> dict[str, str]:
    """Find other packages that carry the name of one of ours.

    Other projects are called dit or pipelines too; installed beside us, they overwrite our files or are imported
    in our place, and everything after that fails in puzzling ways.

    Args:
        providers: Which distributions install which top-level package; those of this interpreter if None.
        home: The folder that our packages must come from.

    Returns:
        A warning with its remedy for every package concerned.
    """
    providers = metadata.packages_distributions() if providers is None else providers
    shadows = {}
    for package in PACKAGES:
        strangers = sorted({name for name in providers.get(package, ()) if name.lower() != "tessera"})
        if strangers:
            shadows[package] = (
                f"the distribution {', '.join(strangers)} installs a package of this name too; "
                f"run `pip uninstall {' '.join(strangers)}` and install tessera again"
            )
            continue
        spec = find_spec(package)
        places = [Path(place).resolve() for place in spec.submodule_search_locations or []] if spec else []
        if home / package not in places:
            found = ", ".join(map(str, places)) or "nowhere"
            shadows[package] = f"is imported from {found} instead of {home / package}; look at PYTHONPATH"
    return shadows


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print a report as one table a section.

    Args:
        report: What `collect` returned.
        console: Where to print.
    """
    for section in ("versions", "machine", "attention", "memory", "extras"):
        _print_rows(console, section, report.get(section) or {"unknown": ""})
    line = "{name}, {memory_gib} GiB, bfloat16 {bfloat16_gain} times as fast as float32"
    _print_rows(console, "devices", {row["device"]: line.format(**row) for row in report["devices"]})
    _print_rows(console, "models", dict.fromkeys(report["models"], "built in") or {"none": "built in"})
    for warning in report["warnings"]:
        console.print(f"[bold yellow]warning[/] {escape(warning)}")


def _print_rows(console: Console, title: str, rows: Mapping[str, Any]) -> None:
    """Print a heading and aligned name-value lines."""
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=14)
    for name, value in rows.items():
        table.add_row(f"  {name}", escape(str(value)))
    console.print(f"[bold]{title}[/]", table, sep="\n")


def _builtin_models() -> list[str]:
    """Name the models that ship with the package."""
    from pipelines import builtin_models

    return builtin_models()


def _versions(names: Sequence[str]) -> dict[str, str]:
    """Look up the versions of those distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
