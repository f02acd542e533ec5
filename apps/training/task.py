"""What a training task is: the part of a run that knows what is learned.

The loop knows steps, optimizers and files; a task knows data, networks and losses. A new kind of training
(class-conditional, next-scale, LoRA) is one new class with these six methods and one row in `apps.training.tasks`.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from apps.training.config import ConfigError, TrainConfig, read_document, suggestion, validate_document
from apps.training.tasks import TASKS


@dataclass(frozen=True)
class TaskContext:
    """What the loop tells a task about where it runs.

    Attributes:
        device: Where the networks and the batches are.
        rank: Number of this process.
        world_size: Number of processes.
        autocast: Makes the mixed-precision context of the run, for forward passes outside `loss`.
        main_process_first: Makes a context that the first process passes before the others (to write caches).
    """

    device: torch.device
    rank: int
    world_size: int
    autocast: Callable[[], AbstractContextManager[Any]]
    main_process_first: Callable[[], AbstractContextManager[Any]]


class Task(Protocol):
    """One kind of training. Constructed as `TaskClass(config, context)`.

    Attributes:
        config_class: What its configuration files are validated against.
        smoke: Overrides that shrink its data for a rehearsal.
    """

    config_class: ClassVar[type[TrainConfig]]
    smoke: ClassVar[tuple[str, ...]]

    def modules(self) -> dict[str, nn.Module]:
        """The networks whose parameters with `requires_grad` are trained, averaged and saved."""
        ...

    def batch(self, index: int) -> dict[str, Any]:
        """Batch number `index` on the CPU: a pure function of (seed, index, rank), called from another thread.

        It must not touch the global random state: a resumed run asks for the same indices again.
        """
        ...

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss of a batch that is on the device, and detached scalars for the log."""
        ...

    def validate(self) -> dict[str, float]:
        """Deterministic measures on fixed data, noise and timesteps, with the weights the modules now carry."""
        ...

    def preview(self, path: Path) -> None:
        """Writes a grid of images that shows the present quality to a PNG file."""
        ...

    def export(self, folder: Path) -> None:
        """Writes the weights that the modules now carry as diffusers-style component folders."""
        ...


def task_class(kind: str) -> type[Task]:
    """The class of a kind of task.

    Raises:
        ConfigError: If the kind is unknown.
    """
    if kind not in TASKS:
        raise ConfigError(f"task.kind = {kind!r} is unknown; {suggestion(kind, TASKS)}")
    module, _, name = TASKS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def load_config(path: Path, overrides: list[str]) -> TrainConfig:
    """Reads a configuration file and validates it against the task that it names.

    Args:
        path: TOML file, or the `config.json` of an earlier run.
        overrides: `section.key=value` strings, applied in order.

    Returns:
        The configuration, an instance of the task's `config_class`.

    Raises:
        ConfigError: If anything in it cannot be used.
    """
    document = read_document(path, overrides)
    kind = document.get("task", {}).get("kind")
    if kind is None:
        raise ConfigError(f"{path} names no task; add [task] kind = one of {', '.join(sorted(TASKS))}")
    return validate_document(document, task_class(kind).config_class)
