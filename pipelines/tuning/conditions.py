"""What a tuning is valid for: the model, how it is called, and the machine. Found again, or refused with the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dit.runtime.artifacts import model_fingerprint, scheduler_fingerprint
from dit.runtime.cost_model import machine_key
from dit.runtime.hooks import find_networks
from pipelines.tuning.workload import Workload
from sampling.sigma_schedule import scheduler_of

MACHINE = ("machine", "device")
"""Fields that only matter for times, not for what images look like."""
CALL = ("steps", "shape", "guidance", "arguments")
"""Fields that say how the pipeline is called."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What was held fixed while a pipeline was tuned.

    Attributes:
        pipeline: class of the pipeline.
        architecture: fingerprint of the first denoising network's class, configuration and shapes.
        weights: fingerprint of its values.
        scheduler: fingerprint of the scheduler; empty without one.
        shape: of the result: frames, height, width in pixels.
        steps: denoising steps, or scales of a next-scale model.
        guidance: scale; None without one.
        arguments: others that calls were given, as text.
        dtype: of the network's weights.
        machine: processor, threads and version of torch, see `dit.runtime.cost_model.machine_key`.
        device: where the network ran.
    """

    pipeline: str
    architecture: str
    weights: str
    scheduler: str
    shape: tuple[int, int, int]
    steps: int | None
    guidance: float | None
    arguments: dict[str, str]
    dtype: str
    machine: str
    device: str

    @classmethod
    def of(cls, work: Workload) -> Conditions:
        """Describe requests on a pipeline, without making one.

        Args:
            work: the requests.

        Raises:
            AttachError: the pipeline has no network that denoises.
            ValueError: its weights are not in memory.
        """
        pipe, info, call = work.pipe, work.info, dict(work.call)
        network = next(iter(find_networks(pipe).values()))
        architecture, weights = model_fingerprint(network)
        scheduler = scheduler_of(pipe)
        has_scheduler = scheduler is not None and hasattr(scheduler, "config")
        names = {"steps": info.arguments.get("steps", "num_inference_steps"), "guidance": info.guidance_argument}
        taken = {name: call.pop(argument, None) for name, argument in names.items()}
        shape = tuple(int(call.pop(name, 0) or default or 1) for name, default in _sizes(info).items())
        frames, height, width = shape
        steps = taken["steps"] or info.steps or (len(info.grids) or None)
        guidance = info.guidance if taken["guidance"] is None else taken["guidance"]
        device = torch.device(getattr(pipe, "_execution_device", None) or pipe.device)
        return cls(
            pipeline=type(pipe).__name__,
            architecture=architecture,
            weights=weights,
            scheduler=scheduler_fingerprint(scheduler) if has_scheduler else "",
            shape=(frames, height, width),
            steps=steps,
            guidance=None if guidance is None else float(guidance),
            arguments={name: repr(value) for name, value in sorted(call.items())},
            dtype=str(next(network.parameters()).dtype).removeprefix("torch."),
            machine=machine_key(device.type),
            device=device.type,
        )

    def differences(self, other: Conditions, *, any_machine: bool = False, any_call: bool = False) -> list[str]:
        """Return what differs, as text; empty if a result for one holds for the other.

        Args:
            other: what is at hand.
            any_machine: times don't matter.
            any_call: nor do steps, sizes and guidance.
        """
        ignored = {*(MACHINE if any_machine else ()), *(CALL if any_call else ())}
        mine, theirs = asdict(self), asdict(other)
        return [
            f"{name} is {theirs[name]!r} here, and was {mine[name]!r}"
            for name in mine
            if name not in ignored and not _equal(mine[name], theirs[name])
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Conditions:
        """Read what `to_dict` wrote.

        Raises:
            TypeError: a field is missing or unknown.
            ValueError: the shape has not three sides.
        """
        frames, height, width = (int(side) for side in values["shape"])
        return cls(**{**values, "shape": (frames, height, width)})


def _sizes(info: Any) -> dict[str, int | None]:
    """Return the default size of a result by the arguments that set it."""
    return {info.frames_argument: info.frames, "height": info.height, "width": info.width}


def _equal(first: Any, second: Any) -> bool:
    both_numbers = isinstance(first, float) and isinstance(second, float)
    return math.isclose(first, second) if both_numbers else first == second
