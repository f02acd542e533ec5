"""What a fine-tuning would do, without doing it: files and their sizes, parameters, memory."""

import contextlib
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from apps.training.checkpoint import trained_parameters
from apps.training.data.base import BatchAddress
from apps.training.task import TaskContext, task_class

MIB = 2**20
STATES = {"adamw": 2, "muon": 2, "sgd_sai": 1, "prodigy": 4, "schedule_free": 2}
"""Optimizer -> tensors that it keeps for each parameter."""


def report(config: Any, console: Console) -> dict[str, float]:
    """Load the model and the files, run one forward pass, and show what a run would need.

    Args:
        config: Of a fine-tuning.
        console: Where to.

    Returns:
        The estimate: "loaded", "adapters", "activations" and "total", MiB.

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
    )
    kind: Any = task_class(config.task.kind)
    task = kind(config, context)
    parameters = trained_parameters(task.modules())
    count = sum(parameter.numel() for parameter in parameters.values())
    loaded = _memory_now(device)
    activations = saved_activations(task, context, BatchAddress(config.run.seed, 0, config.run.batch_size))
    # weights are loaded already; gradients, the optimizer's tensors and the averaged weights come on top
    adapters = 4 * count * (1 + STATES[config.optimizer.name] + 1)
    estimate = {
        "loaded": loaded / MIB,
        "adapters": adapters / MIB,
        "activations": activations / MIB,
        "total": (loaded + adapters + activations) / MIB,
    }
    console.print(_sizes(task, config))
    layers = len(getattr(task, "adapted", ()))
    console.print(
        f"{count:,} parameters are trained, in {layers} layers; {config.run.steps} steps of {config.run.batch_size}"
    )
    parts = ", ".join(f"{name} {value:,.0f}" for name, value in estimate.items() if name != "total")
    console.print(f"memory about {estimate['total']:,.0f} MiB on {device.type} ({parts})")
    return estimate


def saved_activations(task: Any, context: TaskContext, address: BatchAddress) -> int:
    """Run one forward pass of a batch and count what autograd keeps for the backward pass, bytes.

    Parameters don't count, nor does a storage that several operations keep.
    """
    owned = {
        parameter.untyped_storage().data_ptr()
        for module in task.modules().values()
        for parameter in module.parameters()
    }
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = task.batch(address.index)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context.autocast():
        loss, _ = task.loss(task.to_device(batch))
    held = sum(kept.values())
    del loss
    return held


def _memory_now(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def _sizes(task: Any, config: Any) -> Table:
    """Return a table of files by size."""
    table = Table(title=f"{config.run.name}: files", title_justify="left")
    for name in ("frames", "height", "width", "files", "batches an epoch"):
        table.add_column(name, justify="right")
    for (frames, height, width), count in task.data.histogram().items():
        batches = -(-count // config.run.batch_size)
        table.add_row(str(frames), str(height), str(width), str(count), str(batches))
    return table
