"""Where a call of the network stands: which run, step, noise level and branch. A value, set by whoever loops.

Networks and mechanisms read it with `current_coordinates()`; they never count calls and know nothing of schedulers.
Our loops say it with `coordinates_scope`; for diffusers' pipelines `sampling.resolve` finds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True, slots=True)
class Coordinates:
    """The place of one call of a network within one run of a sampler.

    Args:
        run: which run; unique in the process, see `next_run`. State of another run is void.
        step: index among the run's calls of the model a branch makes, from 0. A solver that asks twice a step (Heun)
            has two entries a step.
        num_steps: how many such entries the run has.
        sigma: noise level. Flow matching: share of noise in [0, 1]. Diffusion: noise over signal, as the `sigmas` of
            diffusers' schedulers. It falls during a run; NaN where the scheduler does not tell.
        timestep: as in the scheduler's table, before the model's own scaling.
        branch: "cond", "uncond", "all" (the branches of guidance share the batch), or another name of a context.
        scale: index of the scale in next-scale models, else None.
        is_exact: False where the step was matched by a rounded timestep rather than said or confirmed.

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


_CURRENT: ContextVar[Coordinates | None] = ContextVar("coordinates", default=None)
_RUNS = count(1)


def current_coordinates() -> Coordinates | None:
    """Return the coordinates of the call being made; None where nobody said them."""
    return _CURRENT.get()


@contextmanager
def coordinates_scope(coordinates: Coordinates | None) -> Iterator[Coordinates | None]:
    """Say the coordinates of all calls made inside the `with` block; None takes them back.

    Args:
        coordinates: the place of the calls.

    Yields:
        The same coordinates.
    """
    token = _CURRENT.set(coordinates)
    try:
        yield coordinates
    finally:
        _CURRENT.reset(token)


def next_run() -> int:
    """Return a number for a new run, never given before in this process."""
    return next(_RUNS)
