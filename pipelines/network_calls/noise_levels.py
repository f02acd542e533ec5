"""The noise levels at which a pipeline makes its steps, read from a call of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.network_calls.watching import watch_scheduler


def euler_levels(pipe: Any, network: nn.Module, call: Mapping[str, Any], steps: int) -> Tensor:
    """Return the noise levels of a call of a pipeline of flow matching, whose steps are those of Euler.

    Pipelines choose the levels themselves: ours spreads them evenly, others shift them by the size of the image. What a
    scheduler gives when it is asked alone may be others.

    Args:
        pipe: of ours or of diffusers.
        network: of the pipeline.
        call: arguments of the pipeline's call, the prompt included.
        steps: of the call.

    Returns:
        (steps + 1,) float64 on the CPU, falling to 0.

    Raises:
        ValueError: the scheduler makes other steps than those of Euler, or more or fewer than `steps`.
    """
    watch_scheduler(pipe, network, call, steps)
    scheduler = copy.deepcopy(pipe.scheduler)
    name = type(scheduler).__name__
    levels = getattr(scheduler, "sigmas", None)
    if not isinstance(levels, Tensor) or len(levels) != steps + 1 or len(scheduler.timesteps) != steps:
        raise ValueError(
            f"{name} makes {len(scheduler.timesteps)} steps where {steps} are asked for: use "
            "FlowMatchEulerDiscreteScheduler"
        )
    scheduler.sigmas, scheduler.timesteps = levels.detach().cpu(), scheduler.timesteps.cpu()
    levels = scheduler.sigmas.double()  # (S + 1,)
    if not _steps_straight(scheduler, levels):
        raise ValueError(
            f"{name} doesn't step along the prediction (Euler's method): use FlowMatchEulerDiscreteScheduler, without "
            "stochastic_sampling"
        )
    return levels


def _steps_straight(scheduler: Any, levels: Tensor) -> bool:
    """Return whether every step moves a sample along the prediction, as far as the level falls."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 2, 2, generator=generator)
    for step, timestep in enumerate(scheduler.timesteps):
        predicted = torch.randn(sample.shape, generator=generator)
        moved = scheduler.step(predicted, timestep, sample, return_dict=False)[0]
        wanted = sample + float(levels[step + 1] - levels[step]) * predicted
        if not torch.allclose(moved, wanted, rtol=1e-3, atol=1e-4):
            return False
        sample = moved
    return True
