"""A flow solver of second order for one call a step: Adams-Bashforth with steps of any length."""

from __future__ import annotations

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

__all__ = ["FlowMatchAB2Scheduler", "SchedulerMixin"]


class FlowMatchAB2Scheduler(FlowMatchEulerDiscreteScheduler):
    """Adams-Bashforth 2 along a flow: `x' = x + h (v + h / (2 g) (v - w))`, with w the velocity a distance g before.

    The grid, the shift and all options of the configuration are those of `FlowMatchEulerDiscreteScheduler`; the first
    step is Euler's, and so is the last, whose line through the two velocities would only add noise.

    Attributes:
        forecast_output: set by who makes the velocities (a step cache) where the one of the step was forecast from
            earlier ones. Such a velocity is used but never becomes history: a slope between a forecast and a computed
            velocity would repeat the forecast's own error.

    Example:
        >>> pipe.scheduler = FlowMatchAB2Scheduler.from_config(pipe.scheduler.config)
    """

    forecast_output: bool = False

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Set the timesteps as `FlowMatchEulerDiscreteScheduler.set_timesteps` does, and forget the last run."""
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)  # pyright: ignore[reportArgumentType]
        self.forecast_output = False
        self._history: tuple[Tensor, float] | None = None

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """Step towards the data.

        Args:
            model_output: the velocity `noise - data`, (B, C, H, W).
            timestep: the entry of `timesteps` that the model was called with.
            sample: (B, C, H, W).
            generator: not used; the solver draws no noise.
            return_dict: return an object rather than a tuple.

        Returns:
            The next sample, in the dtype of `model_output`.
        """
        if self.step_index is None:
            self._init_step_index(timestep)  # pyright: ignore[reportArgumentType]
        index, levels = self.step_index or 0, torch.as_tensor(self.sigmas)  # (), (S + 1,)
        sigma, after = float(levels[index]), float(levels[index + 1])
        velocity, length = model_output.float(), after - sigma  # (B, C, H, W)
        slope = torch.zeros_like(velocity)
        if self._history is not None and index + 2 < len(levels):
            before, there = self._history
            slope = (velocity - before) / (sigma - there)  # (B, C, H, W)
        if not self.forecast_output:
            self._history = velocity, sigma
        previous = sample.float() + length * (velocity + 0.5 * length * slope)  # (B, C, H, W)
        self._step_index = index + 1
        previous = previous.to(model_output.dtype)
        if not return_dict:
            return (previous,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=previous)  # pyright: ignore[reportArgumentType]
