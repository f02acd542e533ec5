"""What a fine-tuning would do, without doing it: files and their sizes, parameters, memory."""

import contextlib
import json
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from apps.training.checkpoint import trained_parameters
from apps.training.task import TaskContext, task_class
from pipelines.loading.memory import peak_memory

MIB = 2**20
CLEAR_PEAK = Path("/proc/self/clear_refs")
STATES = {"adamw": 2, "muon": 2, "sgd_sai": 1, "prodigy": 4, "schedule_free": 2}
"""Optimizer -> tensors that it keeps for each parameter."""


def report(config: Any, console: Console, as_json: bool = False) -> dict[str, float]:
    """Load the model and the files, try the largest batch once, and show what a run would need.

    Args:
        config: Of a fine-tuning.
        console: Where to.
        as_json: Print one line, a JSON object, instead of text; see `_facts`.

    Returns:
        The estimate: "loaded", "batch" (forward and backward pass), "optimizer" and "total", MiB.

    Raises:
        ConfigError: As the run itself would.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = config.run.mixed_precision
    context = TaskContext(
        device=device,
        rank=0,
        world_size=1,
        autocast=lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        main_process_first=contextlib.nullcontext,
        is_dry_run=True,
    )
    kind: Any = task_class(config.task.kind)
    task = kind(config, context)
    parameters = trained_parameters(task.modules())
    count = sum(parameter.numel() for parameter in parameters.values())
    loaded, peak = _memory_of_a_batch(task, context)
    kept = 4 * count * (STATES[config.optimizer.name] + 1)  # float32; also the averaged weights
    estimate = {"loaded": loaded / MIB, "batch": (peak - loaded) / MIB, "optimizer": kept / MIB}
    estimate["total"] = sum(estimate.values())
    if as_json:
        facts = json.dumps(_facts(task, config, device, count, estimate))
        console.print(facts, soft_wrap=True, markup=False, highlight=False)
        return estimate
    if task.sizes():
        console.print(_sizes(task, config))
    if task.ahead():
        console.print(task.ahead())
    layers, run = len(getattr(task, "adapted", ())), config.run
    console.print(f"{count:,} parameters are trained, in {layers} layers; {run.steps} steps of {run.batch_size}")
    parts = ", ".join(f"{name} {value:,.0f}" for name, value in estimate.items() if name != "total")
    console.print(f"memory about {estimate['total']:,.0f} MiB on {device.type} ({parts})")
    return estimate


def _memory_of_a_batch(task: Any, context: TaskContext) -> tuple[int, int]:
    """Run a forward and a backward pass of the largest batch, whose gradients are thrown away.

    A count of the tensors that autograd keeps would miss what is held for a moment only, and what allocators keep back.

    Returns:
        Bytes that were held before, and at most.
    """
    batch = task.to_device(task.largest_batch())
    loaded = _begin_peak(context.device)
    with context.autocast():
        loss, _ = task.loss(batch)
    loss.backward()
    for module in task.modules().values():
        module.zero_grad(set_to_none=True)
    return loaded, max(_peak(context.device), loaded)


def _begin_peak(device: torch.device) -> int:
    """Forget the highest use of memory so far, and return the present one, bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if CLEAR_PEAK.exists():
        CLEAR_PEAK.write_text("5")  # proc(5): resets the peak of the resident size
    return psutil.Process().memory_info().rss


def _peak(device: torch.device) -> int:
    """Return the highest use of memory since `_begin_peak`, bytes; of the whole process where that can't be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()


def _facts(task: Any, config: Any, device: torch.device, parameters: int, memory: dict[str, float]) -> dict[str, Any]:
    """Return the report as values: sizes in pixels, memory in MiB."""
    batch = config.run.batch_size
    return {
        "name": config.run.name,
        "device": device.type,
        "parameters": parameters,
        "layers": len(getattr(task, "adapted", ())),
        "steps": config.run.steps,
        "batch_size": batch,
        "files": [
            {"frames": frames, "height": height, "width": width, "files": count, "batches": -(-count // batch)}
            for (frames, height, width), count in task.sizes().items()
        ],
        "ahead": task.ahead(),
        "memory_mib": {name: round(value, 1) for name, value in memory.items()},
    }


def _sizes(task: Any, config: Any) -> Table:
    """Return a table of files by size."""
    table = Table(title=f"{config.run.name}: files", title_justify="left")
    for name in ("frames", "height", "width", "files", "batches an epoch"):
        table.add_column(name, justify="right")
    for (frames, height, width), count in task.sizes().items():
        batches = -(-count // config.run.batch_size)
        table.add_row(str(frames), str(height), str(width), str(count), str(batches))
    return table
