"""What a result was measured on: part of every report."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dit import __version__


def describe_machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Describe hardware, versions and the commit of the checkout.

    Args:
        device: where the measured model ran.
        dtype: of its weights.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": name,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "tessera": __version__,
        "commit": _commit(),
    }


def _processor() -> str:
    """Return the processor's name, family, and whether it has AVX-512, where the system tells; ratios depend on all.

    Clouds name several generations alike: AMD's family 25 (Zen 4) computes AVX-512 at half the rate of 26.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = found.get("model name") or platform.processor() or platform.machine()
    family = f", family {found['cpu family']}" if "cpu family" in found else ""
    return name + family + (", AVX-512" if "avx512f" in found.get("flags", "").split() else "")


def _commit() -> str | None:
    """Return the commit of the checkout that runs, or None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return result.stdout.strip() or None
