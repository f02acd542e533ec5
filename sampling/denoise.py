"""The denoising loop: predict, guide, step, callback, for images, classes and clips.

One function with nothing of a pipeline in it, in the manner of the samplers of Karras et al. (arXiv 2206.00364,
Algorithm 1); a pipeline says by functions what differs: how its network is called and how two branches are guided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from dit.runtime.step_context import next_run, step_scope
from sampling.sigma_schedule import SigmaSchedule

State = dict[str, Any]
"""Tensors of a run by name, which a step callback may replace: "latents" (B, C, h, w) or (B, C, T, h, w), float32, and
what the network is conditioned on."""


class CachedNetwork(Protocol):
    """A network whose calls caches of diffusers tell apart by name."""

    def cache_context(self, name: str) -> AbstractContextManager[Any]:
        """Enter the named context."""
        ...


class RunControl(Protocol):
    """Observes a run and may end it; our pipelines do."""

    def begin_step(self, timestep: Tensor) -> bool:
        """Record the timestep; return False to stop before it."""
        ...

    def end_step(self, step: int, timestep: Tensor, state: State) -> State:
        """Call back after a step; return the state to continue with."""
        ...

    @property
    def finish_now(self) -> bool:
        """Whether the run ends with the present estimate of the result."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Denoiser:
    """What a denoising run asks of a model.

    Attributes:
        network: is called within its cache context.
        predict: `(state, timestep, guides)` -> the network's output in float32, (B, C', h, w); with `guides` both
            branches in one batch, (2B, C', h, w), the unconditional half first.
        guide: `(uncond, cond)` -> the guided prediction, each (B, C', h, w).
        guides: noise level sigma -> whether this step needs both branches.
        to_scheduler: prediction -> what the scheduler's step takes.
        estimate: `(scheduler output, prediction, latents, timestep)` -> the present estimate of the finished latents.
        restore: `(latents, sigma)` -> the latents with what inpainting keeps blended in at that noise level; None keeps
            nothing.
    """

    network: CachedNetwork
    predict: Callable[[State, Tensor, bool], Tensor]
    guide: Callable[[Tensor, Tensor], Tensor]
    guides: Callable[[float], bool]
    estimate: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    to_scheduler: Callable[[Tensor], Tensor] = field(default=lambda prediction: prediction)
    restore: Callable[[Tensor, float], Tensor] | None = None


def denoise(
    state: State,
    timesteps: Tensor,
    scheduler: Any,
    model: Denoiser,
    control: RunControl,
    step_arguments: Mapping[str, Any] | None = None,
) -> Tensor | None:
    """Take latents through the timesteps of a scheduler.

    Args:
        state: where the run starts; "latents" (B, C, ..., h, w), float32.
        timesteps: (S,), the scheduler's last ones.
        scheduler: of diffusers or ours, with its timesteps set.
        model: predicts.
        control: is called at every step and may end the run.
        step_arguments: of the scheduler's step, such as a generator.

    Returns:
        The denoised latents, (B, C, ..., h, w), float32; None if the run was stopped before its end.
    """
    run, levels = next_run(), SigmaSchedule.of(scheduler).last(len(timesteps))
    for step, timestep in enumerate(timesteps):
        if not control.begin_step(timestep):
            return None
        latents = state["latents"]  # (B, C, ..., h, w)

        # predict: both branches in one batch, or the conditional one alone
        guides = model.guides(levels.sigmas[step])
        branch, context = ("all", "guided") if guides else ("cond", "cond")
        with step_scope(levels.at(run, step, branch)), model.network.cache_context(context):
            prediction = model.predict(state, timestep, guides)  # (2B, C', ..., h, w) or (B, C', ..., h, w)

        # guide
        if guides:
            prediction = model.guide(*prediction.chunk(2))  # (B, C', ..., h, w)
        prediction = model.to_scheduler(prediction)

        # step
        output = scheduler.step(prediction, timestep, latents, **(step_arguments or {}))
        state["denoised_latents"] = model.estimate(output, prediction, latents, timestep)  # (B, C, ..., h, w)
        state["latents"] = output.prev_sample.float()  # (B, C, ..., h, w)

        # keep what inpainting keeps
        if model.restore is not None:
            following = levels.sigmas[step + 1] if step + 1 < len(levels) else 0.0
            state["latents"] = model.restore(state["latents"], following)
            state["denoised_latents"] = model.restore(state["denoised_latents"], 0.0)

        # callback, and an early end
        state = control.end_step(step, timestep, state)
        if control.finish_now:
            return state["denoised_latents"]
    return state["latents"]
