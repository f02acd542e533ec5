"""The schedulers that a request may choose among, made from a model's own so that shift and training range stay."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, field
from typing import Any

from apps.service.request_error import RequestError

Scheduler = Any
"""A diffusers `SchedulerMixin`; its import takes seconds."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to walk from noise to image.

    Attributes:
        module: where its class lives.
        name: of the class.
        flow: for networks that predict a flow's velocity, else for those that predict noise.
        changes: configuration values that differ from the model's own.
    """

    module: str
    name: str
    flow: bool
    changes: dict[str, Any] = field(default_factory=dict)


_MULTISTEP = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
_FIXED_VARIANCE = {"variance_type": None}

CHOICES: dict[tuple[str, bool], Choice] = {
    ("euler", True): Choice("diffusers", "FlowMatchEulerDiscreteScheduler", True),
    ("heun", True): Choice("diffusers", "FlowMatchHeunDiscreteScheduler", True),
    ("sde", True): Choice("sampling.schedulers", "FlowMatchSDEScheduler", True),
    ("dpm++", True): Choice("diffusers", "DPMSolverMultistepScheduler", True, _MULTISTEP),
    ("unipc", True): Choice("diffusers", "UniPCMultistepScheduler", True, _MULTISTEP),
    ("ddim", False): Choice("diffusers", "DDIMScheduler", False),
    ("ddpm", False): Choice("diffusers", "DDPMScheduler", False),
    ("dpm++", False): Choice("diffusers", "DPMSolverMultistepScheduler", False, _FIXED_VARIANCE),
    ("unipc", False): Choice("diffusers", "UniPCMultistepScheduler", False, _FIXED_VARIANCE),
}
"""By the name that people choose and by whether the model is a flow."""


def _is_flow(scheduler: Scheduler) -> bool:
    """Return whether a scheduler is one for velocities of a flow."""
    from sampling.diffusion_targets import is_flow  # brings torch, which whoever has a scheduler has imported

    return is_flow(scheduler)


def scheduler_names(scheduler: Scheduler | None) -> list[str]:
    """Return the choices that fit a model's scheduler; none for a model without one."""
    return [] if scheduler is None else [name for name, flow in CHOICES if flow == _is_flow(scheduler)]


def make_scheduler(own: Scheduler, name: str | None) -> Scheduler:
    """Make a scheduler for one request: a fresh one, because what a run leaves in it must not reach the next.

    Args:
        own: the model's.
        name: one of `scheduler_names(own)`; None makes one like the model's.

    Raises:
        ValueError: the name doesn't fit the model.
    """
    if name is None:
        return type(own).from_config(own.config)
    choice = CHOICES.get((name, _is_flow(own)))
    if choice is None:
        raise RequestError(
            "choice",
            f"The scheduler {name!r} doesn't fit this model; choose among {scheduler_names(own)}.",
            field="scheduler",
            value=name,
            choices=", ".join(scheduler_names(own)),
        )
    found = getattr(importlib.import_module(choice.module), choice.name)
    if isinstance(own, found):
        return found.from_config(own.config)
    if not choice.flow:
        return found.from_config(own.config, **choice.changes)
    # The classes for flows call the same things differently, so that `from_config` would lose the shift.
    shift = own.config.get("shift", own.config.get("flow_shift", 1.0))
    wanted = {"num_train_timesteps": own.config.num_train_timesteps, "shift": shift, "flow_shift": shift}
    known = inspect.signature(found.__init__).parameters
    return found(**choice.changes, **{key: value for key, value in wanted.items() if key in known})
