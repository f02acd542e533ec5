"""The step context of a network call: run, step, noise level and branch, set by the sampling loop.

Networks and mechanisms read it with `current_step()`; they never count calls and know nothing of schedulers. Our loops
set it with `step_scope`; for diffusers' pipelines `sampling.step_tracker` finds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True, slots=True)
class StepContext:
    """Position of one call of a network within one run of a sampler.

    Args:
        run: which run; unique in the process, see `next_run`. State kept for another run is discarded.
        step: index among the run's calls of the model a branch makes, from 0. A solver that asks twice a step (Heun)
            has two entries a step.
        num_steps: how many such entries the run has.
        sigma: noise level. Flow matching: fraction of noise in [0, 1]. Diffusion: noise over signal, as the `sigmas` of
            diffusers' schedulers. It falls during a run; NaN where the scheduler has none.
        timestep: as in the scheduler's table, before the model's own scaling.
        branch: "cond", "uncond", "all" (the branches of guidance share the batch), or another name of a context.
        scale: index of the scale in next-scale models, else None.
        is_exact: False where the step was matched by a rounded timestep rather than set or confirmed.

    Raises:
        ValueError: `step` lies outside [0, num_steps).
    """

    run: int
    step: int
    num_steps: int
    sigma: float
    timestep: float
    branch: str = "all"
    scale: int | None = None
    is_exact: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.step < self.num_steps:
            raise ValueError(f"step {self.step} is outside the run: expected 0 to {self.num_steps - 1}")


_CURRENT: ContextVar[StepContext | None] = ContextVar("step_context", default=None)
_RUNS = count(1)


def current_step() -> StepContext | None:
    """Return the step context of the call being made; None where none was set."""
    return _CURRENT.get()


@contextmanager
def step_scope(context: StepContext | None) -> Iterator[StepContext | None]:
    """Set the step context of all calls made inside the `with` block; None unsets it.

    Args:
        context: step and branch of the calls.

    Yields:
        The same context.
    """
    token = _CURRENT.set(context)
    try:
        yield context
    finally:
        _CURRENT.reset(token)


def next_run() -> int:
    """Return a number for a new run, never given before in this process."""
    return next(_RUNS)
