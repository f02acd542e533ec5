"""`tessera bench`: how fast things are here, measured in turns, with what they were measured on.

`tessera bench generate` times an image at the default settings and its parts; a file may hold several models.
`tessera bench costs` times single operations, for solvers that weigh one way of computing against another.
`tessera bench start` times importing the library beside importing diffusers alone, in fresh processes.
`tessera bench released` times our VAR beside its authors' code.
`tessera bench cache` compares step caches and fewer steps at equal cost, with rivals in the same run, and draws them
beside the JSON file; `tessera bench cache-time` times what ours saves; `tessera bench cache-transfer` carries a profile
to other prompts, sizes, guidance and schedulers.
`tessera bench clips` measures a step cache on clips, and the time and memory of longer ones.
`tessera bench lora-style` measures whether a LoRA teaches a style, and draws before, after and truth beside the file;
`tessera bench lora-object` and `lora-motion` the same of an object and a motion that the model has never drawn.
`tessera bench style-control` measures what a network learns of that style that is shown pairs of drawings.
`tessera bench attention` times dense and block-sparse attention on a CPU, with rivals in the same run.
`tessera bench attention-plan` searches a plan of sparse attention for the model of clips and measures it end to end.
`tessera bench attention-gpu` times the Triton kernel of sparse attention beside a GPU's best dense attention.
`tessera bench attention-corrections` says how near corrections bring sparse attention to dense attention.
`tessera bench quantization` times quantized layers and a block of DiT-XL on a CPU, with rivals in the same run;
`tessera bench quantization-gpu` does so on a GPU;
`tessera bench quantization-quality` compares what built-in models generate with quantized networks, ours and others'.
`tessera bench quantization-mixed` compares mixed precision by measuring with other choices of formats at equal bytes.
`tessera bench speed-up` compares what `speed_up` reaches with single techniques, fewer steps and other libraries;
`tessera bench speed-up-shapes` compares what the tuner predicts for a network of published size with real runs.
`tessera bench training` trains several configurations, or reads what they have logged, and compares validation losses.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from apps.benchmarks.costs import bench_costs
from apps.benchmarks.end_to_end import bench_image, medians
from apps.benchmarks.next_scale import Asked, bench_kv, bench_search, bench_shortcuts, show_tables
from apps.benchmarks.reference_var import bench_released
from apps.benchmarks.runs import add_run, has_ratios
from apps.environment import describe_machine
from apps.service.devices import resolve_device
from apps.service.usage import UsageError, checking
from apps.service.writable import check_writable
from dit.runtime.timing import measure

IMPORTS = {
    "diffusers": "from diffusers import ModelMixin, DiffusionPipeline",
    "diffusers + pipelines": "from diffusers import ModelMixin, DiffusionPipeline; import pipelines",
}


def run(
    what: str,
    *,
    model: str | None = None,
    repeats: int = 7,
    prompts: int = 64,
    output: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    smoke: bool = False,
    lora: Path | None = None,
    trigger: str | None = None,
    json_output: bool = False,
    names: Sequence[str] = (),
    steps: int | None = None,
    guidance: float | None = None,
    beside: Path | None = None,
) -> dict[str, Any]:
    """Run a benchmark, print it, and write it as JSON if asked.

    Args:
        what: a key of `BENCHMARKS`.
        model: built-in name, folder or hub id; None is what the benchmark is meant for.
        repeats: counted rounds.
        prompts: images to compare, for benchmarks of quality.
        output: JSON file.
        device: where to run; "auto" is the best there is.
        dtype: of the weights; "auto" suits the device.
        smoke: one round only, to see that it runs.
        lora: file of a LoRA, for lora-style, lora-object and lora-motion.
        trigger: what asks for what it learned: words behind the prompts, or the name of the object; None takes that of
            the benchmark.
        json_output: print JSON instead of a table.
        names: configuration files, for training; tables, for quantization.
        steps: of generating, for lora-style and lora-object; None is the model's own.
        guidance: the same.
        beside: file of a LoRA that is on all the time, such as one for few steps.

    Returns:
        The report.

    Raises:
        ValueError: an unknown benchmark, or one that the settings aren't for.
    """
    what = OLD_NAMES.get(what, what)
    if what not in BENCHMARKS:
        raise UsageError(f"no benchmark {what!r}: choose one of {', '.join(BENCHMARKS)}")
    if what not in CHOOSES_STEPS and (steps, guidance, beside) != (None, None, None):
        raise UsageError(
            f"{what} takes no --steps, --guidance or --beside; leave them out: they are for "
            f"{' and '.join(CHOOSES_STEPS)}"
        )
    if output is not None:
        check_writable(output)
    if device != "auto":
        with checking():
            resolve_device(device)
    place, precision = (None if value == "auto" else value for value in (device, dtype))
    rounds, images = (1, min(prompts, 2)) if smoke else (repeats, prompts)
    asked = Asked(model, rounds, images, place, precision, smoke, lora, trigger, output, names, steps, guidance, beside)
    report = {"benchmark": what, **BENCHMARKS[what](asked)}
    if output is not None:
        _write(report, output)
        if what == "cache":
            from apps.benchmarks.plot import plot

            title = f"{report['steps']} steps, {report['prompts']} prompts: PSNR to the uncached run"
            plot(report["rows"], output.with_suffix(".png"), title)
    console = Console(soft_wrap=True)
    if json_output:
        console.print_json(data=report)
    elif "tables" in report:
        show_tables(report, console)
    else:
        _show(report, console)
    return report


def bench_start(asked: Asked) -> dict[str, Any]:
    """Time imports in fresh processes."""
    comparison = measure({name: _in_fresh_process(code) for name, code in IMPORTS.items()}, asked.repeats)
    ours, theirs = comparison.timings["diffusers + pipelines"], comparison.timings["diffusers"]
    added = statistics.median(a - b for a, b in zip(ours.wall, theirs.wall, strict=True))
    return {
        "machine": describe_machine(torch.device("cpu"), torch.float32),
        "ratio": round(comparison.ratio("diffusers + pipelines", "diffusers"), 3),
        "seconds": {**medians(comparison), "added by pipelines": round(added, 3)},
    }


def bench_cache(asked: Asked) -> dict[str, Any]:
    """Compare step caches with rivals; see `apps.benchmarks.step_cache`."""
    from apps.benchmarks import step_cache as implementation

    model = asked.model or "stickers"
    return implementation.bench_cache(model, asked.repeats, asked.device, asked.dtype, asked.prompts)


def bench_transfer(asked: Asked) -> dict[str, Any]:
    """Carries the profile of a step cache to other settings; see `apps.benchmarks.profile_transfer`."""
    from apps.benchmarks import profile_transfer as implementation

    return implementation.bench_transfer(asked.model or "stickers", asked.repeats, asked.device, asked.dtype)


def bench_cache_time(asked: Asked) -> dict[str, Any]:
    """Time what a step cache saves; see `apps.benchmarks.step_cache`."""
    from apps.benchmarks import step_cache as implementation

    return implementation.bench_time(asked.model or "stickers", asked.repeats, asked.device, asked.dtype)


def bench_clips(asked: Asked) -> dict[str, Any]:
    """Measure clips; see `apps.benchmarks.clips`."""
    from apps.benchmarks import clips as implementation

    return implementation.bench_clips(asked)


def bench_lora_style(asked: Asked) -> dict[str, Any]:
    """Measure a LoRA of a style; see `apps.benchmarks.lora_style`."""
    from apps.benchmarks import lora_style as implementation

    return implementation.bench_lora_style(asked)


def bench_style_control(asked: Asked) -> dict[str, Any]:
    """Find out what pairs of drawings tell of a style; see `apps.benchmarks.style_control`."""
    from apps.benchmarks import style_control as implementation

    return implementation.bench_style_control(asked)


def bench_lora_object(asked: Asked) -> dict[str, Any]:
    """Measure a LoRA of a new object; see `apps.benchmarks.lora_object`."""
    from apps.benchmarks import lora_object as implementation

    return implementation.bench_lora_object(asked)


def bench_lora_motion(asked: Asked) -> dict[str, Any]:
    """Measure a LoRA of a new motion; see `apps.benchmarks.lora_motion`."""
    from apps.benchmarks import lora_motion as implementation

    return implementation.bench_lora_motion(asked)


def bench_attention(asked: Asked) -> dict[str, Any]:
    """Time dense and block-sparse attention; see `apps.benchmarks.attention`."""
    from apps.benchmarks import attention as implementation

    return implementation.bench_attention(asked)


def bench_attention_plan(asked: Asked) -> dict[str, Any]:
    """Search a plan of sparse attention and try it; see `apps.benchmarks.attention_plan`."""
    from apps.benchmarks import attention_plan as implementation

    return implementation.bench_attention_plan(asked)


def bench_attention_corrections(asked: Asked) -> dict[str, Any]:
    """Compare corrections of sparse attention; see `apps.benchmarks.attention_corrections`."""
    from apps.benchmarks import attention_corrections as implementation

    return implementation.bench_attention_corrections(asked)


def bench_quantization(asked: Asked) -> dict[str, Any]:
    """Time quantized layers; see `apps.benchmarks.quantization`."""
    from apps.benchmarks import quantization as implementation

    return implementation.bench_quantization(asked)


def bench_quantization_quality(asked: Asked) -> dict[str, Any]:
    """Compare what quantized networks generate; see `apps.benchmarks.quantization_quality`."""
    from apps.benchmarks import quantization_quality as implementation

    return implementation.bench_quality(asked)


def bench_quantization_mixed(asked: Asked) -> dict[str, Any]:
    """Compare choices of formats at equal bytes; see `apps.benchmarks.quantization_mixed`."""
    from apps.benchmarks import quantization_mixed as implementation

    return implementation.bench_mixed(asked)


def bench_attention_gpu(asked: Asked) -> dict[str, Any]:
    """Measure the Triton kernel of sparse attention; see `apps.benchmarks.attention_gpu`."""
    from apps.benchmarks import attention_gpu as implementation

    return implementation.bench_attention_gpu(asked)


def bench_quantization_gpu(asked: Asked) -> dict[str, Any]:
    """Time quantized layers and blocks on a GPU; see `apps.benchmarks.quantization_gpu`."""
    from apps.benchmarks import quantization_gpu as implementation

    return implementation.bench_quantization_gpu(asked)


def bench_speed_up(asked: Asked) -> dict[str, Any]:
    """Compare what the tuner found with what is put together by hand; see `apps.benchmarks.speed_up`."""
    from apps.benchmarks import speed_up as implementation

    return implementation.bench_speed_up(asked)


def bench_speed_up_shapes(asked: Asked) -> dict[str, Any]:
    """Compare predictions of the tuner with real runs; see `apps.benchmarks.speed_up_shapes`."""
    from apps.benchmarks import speed_up_shapes as implementation

    return implementation.bench_speed_up_shapes(asked)


def bench_training(asked: Asked) -> dict[str, Any]:
    """Compare the losses of runs; see `apps.benchmarks.training`."""
    from apps.benchmarks import training as implementation

    return implementation.bench_training(asked)


BENCHMARKS: Mapping[str, Callable[[Asked], dict[str, Any]]] = {
    "image": bench_image,
    "start": bench_start,
    "costs": bench_costs,
    "cache": bench_cache,
    "cache-time": bench_cache_time,
    "cache-transfer": bench_transfer,
    "clips": bench_clips,
    "kv": bench_kv,
    "shortcuts": bench_shortcuts,
    "search": bench_search,
    "released": bench_released,
    "lora-style": bench_lora_style,
    "style-control": bench_style_control,
    "lora-object": bench_lora_object,
    "lora-motion": bench_lora_motion,
    "attention": bench_attention,
    "attention-plan": bench_attention_plan,
    "attention-corrections": bench_attention_corrections,
    "attention-gpu": bench_attention_gpu,
    "quantization": bench_quantization,
    "quantization-gpu": bench_quantization_gpu,
    "quantization-quality": bench_quantization_quality,
    "quantization-mixed": bench_quantization_mixed,
    "speed-up": bench_speed_up,
    "speed-up-shapes": bench_speed_up_shapes,
    "training": bench_training,
}

CHOOSES_STEPS = ("lora-style", "lora-object", "speed-up-shapes")
"""Benchmarks whose images are generated at steps, and guidance, that can be chosen."""

OLD_NAMES = {"paint": "image"}
"""Benchmarks by their names in earlier versions."""


def _in_fresh_process(code: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def _write(report: dict[str, Any], output: Path) -> None:
    """Write a report as JSON; runs with ratios, and reports of single models, go beside what the file holds."""
    if has_ratios(report):
        report = add_run(report, json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {})
    elif "model" in report:
        own = {name: value for name, value in report.items() if name not in ("benchmark", "model")}
        held = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
        before = str(held.get("benchmark"))
        is_same = OLD_NAMES.get(before, before) == report["benchmark"]
        others = held.get("models", {}) if is_same else {}
        report = {"benchmark": report["benchmark"], "models": {**others, report["model"]: own}}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _show(report: dict[str, Any], console: Console) -> None:
    machine = report["machine"]
    table = Table(title=f"{report['benchmark']} on {machine['device']}, {machine['dtype']}", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("seconds (median)", justify="right")
    for name, seconds in report["seconds"].items():
        table.add_row(name, f"{seconds:.3f}")
    console.print(table)
    for name in sorted(set(report) - {"benchmark", "machine", "seconds", "rows"}):
        console.print(f"{name}: {report[name]}")
