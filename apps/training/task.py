"""The protocol of training tasks: the part of a run that knows what is learned.

The loop knows steps, optimizers and files; a task knows data, networks and losses. A new kind of training
(class-conditional, next-scale, LoRA) is one new class with these six methods and one row in `apps.training.tasks`.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from apps.training.config import (
    ConfigError,
    RunConfig,
    TrainConfig,
    apply_overrides,
    new_name,
    parse_override,
    read_document,
    suggestion,
    validate_document,
    with_new_names,
)
from apps.training.data.base import BatchAddress
from apps.training.data.config import SourceSection
from apps.training.tasks import OLD_NAMES, TASKS


@dataclass(frozen=True)
class TaskContext:
    """Where a task runs: device, processes, precision.

    Attributes:
        device: Where the networks and the batches are.
        rank: Number of this process.
        world_size: Number of processes.
        autocast: Makes the mixed-precision context of the run, for forward passes outside `loss`.
        main_process_first: Makes a context that the first process passes before the others (to write caches).
        is_dry_run: Nothing is trained: what takes long to compute ahead needs the right shape and no values.
    """

    device: torch.device
    rank: int
    world_size: int
    autocast: Callable[[], AbstractContextManager[Any]]
    main_process_first: Callable[[], AbstractContextManager[Any]]
    is_dry_run: bool = False

    def address(self, run: RunConfig, index: int) -> BatchAddress:
        """Return the address of batch number `index` of this process."""
        step = index // run.gradient_accumulation_steps
        return BatchAddress(run.seed, index, run.batch_size, step, self.rank, self.world_size)


class Task(Protocol):
    """One kind of training. Constructed as `TaskClass(config, context)`.

    Attributes:
        config_class: What its configuration files are validated against.
        smoke: Overrides that shrink its data for a rehearsal.
    """

    config_class: ClassVar[type[TrainConfig]]
    smoke: ClassVar[tuple[str, ...]]

    def modules(self) -> dict[str, nn.Module]:
        """Return the networks whose parameters with `requires_grad` are trained, averaged and saved."""
        ...

    def batch(self, index: int) -> dict[str, Any]:
        """Return batch number `index` on the CPU: a pure function of (seed, index, rank), called from another thread.

        It must not touch the global random state: a resumed run asks for the same indices again.
        """
        ...

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss of a batch that is on the device, and detached scalars for the log."""
        ...

    def validate(self) -> dict[str, float]:
        """Return measures on fixed data, noise and timesteps, with the weights that the modules now carry."""
        ...

    def preview(self, path: Path) -> None:
        """Write a grid of images that shows the present quality to a PNG file."""
        ...

    def export(self, folder: Path) -> None:
        """Write the weights that the modules now carry as diffusers-style component folders."""
        ...


@runtime_checkable
class ComparesCheckpoints(Protocol):
    """A task that keeps what it trained at every save and tells which of it is best."""

    def score(self, step: int) -> dict[str, float]:
        """Keep what the modules now carry, and return how good it is."""
        ...

    def choose(self, log: Path) -> str:
        """Mark the best of what was kept, by the scores in `log.jsonl`, and return what to say about it."""
        ...


def task_class(kind: str) -> type[Task]:
    """Return the class of a kind of task.

    Raises:
        ConfigError: If the kind is unknown.
    """
    kind = OLD_NAMES.get(kind, kind)
    if kind not in TASKS:
        raise ConfigError(f"task.kind = {kind!r} is unknown; {suggestion(kind, TASKS)}")
    module, _, name = TASKS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def rehearsal(config: TrainConfig) -> tuple[str, ...]:
    """Return overrides that shrink the data of a configuration, for a rehearsal of its run."""
    data, unused = getattr(config, "data", None), set()
    if isinstance(data, SourceSection) and data.kind != data.world:
        unused = {f"data.{name}" for name in data.world_fields}
    return tuple(each for each in task_class(config.task.kind).smoke if each.partition("=")[0] not in unused)


def load_config(path: Path, overrides: list[str]) -> TrainConfig:
    """Read a configuration file and validate it against the task that it names.

    Args:
        path: TOML file, or the `config.json` of an earlier run.
        overrides: `section.key=value` strings, applied in order.

    Returns:
        The configuration, an instance of the task's `config_class`.

    Raises:
        ConfigError: If anything in it cannot be used.
    """
    document, changes = read_document(path), [parse_override(override) for override in overrides]
    kind = apply_overrides(document, changes).get("task", {}).get("kind")
    if kind is None:
        raise ConfigError(f"{path} names no task; add [task] kind = one of {', '.join(sorted(TASKS))}")
    config_class = task_class(kind).config_class
    # Old names of settings first: an override with the old name must replace a value with the new one.
    changes = [new_name(change, config_class) for change in changes]
    document = apply_overrides(with_new_names(document, config_class), changes)
    document["task"]["kind"] = OLD_NAMES.get(kind, kind)
    return validate_document(document, config_class)
