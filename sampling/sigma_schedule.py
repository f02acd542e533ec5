"""Timesteps and noise levels of a run, read from any scheduler into plain Python numbers (no device sync later)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dit.runtime.step_context import StepContext

MIN_ALPHA_CUMPROD = 2.0**-24
"""Least `alphas_cumprod` taken for a finite noise level, where a schedule starts at pure noise."""


def scheduler_of(target: Any) -> Any:
    """Return the scheduler that sets a pipeline's timesteps.

    Args:
        target: a pipeline, or a network, which has none.

    Returns:
        Its component `scheduler`; where there is none of that name, as in pipelines with a scheduler for each kind of
        latents, the first component that has timesteps. None if there is none at all.
    """
    if isinstance(target, nn.Module):
        return None
    own = getattr(target, "scheduler", None)
    if own is not None:
        return own
    components = getattr(target, "components", {})
    return next((part for part in components.values() if hasattr(part, "set_timesteps")), None)


@dataclass(frozen=True)
class SigmaSchedule:
    """Timestep and noise level of each model call of a run.

    Args:
        timesteps: as the scheduler gives them.
        sigmas: noise levels, see `StepContext.sigma`.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    @classmethod
    def of(cls, scheduler: Any) -> SigmaSchedule:
        """Read the schedule of a scheduler whose timesteps are set.

        Args:
            scheduler: of diffusers or `sampling.schedulers`.

        Raises:
            ValueError: it has no timesteps yet.
        """
        if getattr(scheduler, "timesteps", None) is None:
            raise ValueError(f"{type(scheduler).__name__} has no timesteps yet: call set_timesteps first")
        timesteps = torch.as_tensor(scheduler.timesteps).cpu()  # (S,)
        if scheduler.config.get("prediction_type") == "trigflow":
            timesteps = timesteps[:-1]  # the last angle is where the run ends
        return cls(tuple(timesteps.double().tolist()), _sigmas(scheduler, timesteps))

    def last(self, count: int) -> SigmaSchedule:
        """Return the schedule of a run that visits only the last `count` entries, as image-to-image does."""
        first = len(self) - count
        return SigmaSchedule(self.timesteps[first:], self.sigmas[first:])

    def by_sigma(self) -> SigmaSchedule:
        """Return the schedule with its noise levels as timesteps; NaN where the scheduler has none."""
        return SigmaSchedule(self.sigmas, self.sigmas)

    def by_noise_fraction(self) -> SigmaSchedule:
        """Return the schedule with the noise fraction, sigma / (1 + sigma), as timesteps."""
        return SigmaSchedule(tuple(sigma / (1 + sigma) for sigma in self.sigmas), self.sigmas)

    def at(self, run: int, step: int, branch: str = "all", is_exact: bool = True) -> StepContext:
        """Return the step context of an entry.

        Args:
            run: number of the run.
            step: index of the entry.
            branch: see `StepContext.branch`.
            is_exact: see `StepContext.is_exact`.
        """
        sigma, timestep = self.sigmas[step], self.timesteps[step]
        return StepContext(run, step, len(self), sigma, timestep, branch, is_exact=is_exact)

    def __len__(self) -> int:
        return len(self.timesteps)


def _sigmas(scheduler: Any, timesteps: torch.Tensor) -> tuple[float, ...]:
    """Return the noise levels of the timesteps (S,); NaN where the scheduler has none."""
    # vars(): attribute look-up on a diffusers scheduler falls through to its config, with a warning
    own, count = vars(scheduler), len(timesteps)
    sigmas, signal = own.get("sigmas"), own.get("alphas_cumprod")
    if sigmas is not None and len(sigmas) in (count, count + 1):
        levels = torch.as_tensor(sigmas).cpu().double()[:count]  # (S,)
        if scheduler.config.get("invert_sigmas"):
            levels = 1.0 - levels
    elif scheduler.config.get("prediction_type") == "trigflow":
        largest = math.atan(MIN_ALPHA_CUMPROD**-0.5)
        levels = timesteps.double().clamp(max=largest).tan()  # (S,), x = cos(t) data + sin(t) noise
    elif signal is not None:
        kept = signal.cpu().double()[timesteps.long()].clamp(min=MIN_ALPHA_CUMPROD)  # (S,)
        levels = ((1.0 - kept) / kept).sqrt()
    else:
        levels = torch.full((count,), math.nan)
    return tuple(levels.tolist())
