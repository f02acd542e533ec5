"""Parts that exclude each other, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.acceleration.texts import AccelerationError

STEPS = ("few_step", "step_cache", "guidance_cache", "parallel")
"""Parts for pipelines that denoise in steps."""
SCALES = ("kv_cache", "next_scale")
"""Parts for pipelines that generate scale by scale."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two parts that cannot go together.

    Attributes:
        first: name of a part.
        second: name of another.
        reason: why, the end of a sentence.
        holds: whether two values of them are concerned; by default all are.
    """

    first: str
    second: str
    reason: str
    holds: Callable[[Any, Any], bool] = lambda first, second: True


CONFLICTS = (
    Conflict("few_step", "step_cache", "the few steps of a distilled model differ too much to forecast one of another"),
    Conflict("few_step", "guidance_cache", "few-step presets run without an unconditional branch to leave out"),
    Conflict(
        "few_step",
        "parallel",
        "few-step presets run without a second branch for the other process",
        lambda few_step, parallel: parallel.kind == "guidance",
    ),
    Conflict(
        "guidance_cache",
        "parallel",
        "both decide where and whether a branch of guidance is computed",
        lambda guidance_cache, parallel: parallel.kind == "guidance",
    ),
    Conflict(
        "offload",
        "compile",
        "the hook of each layer breaks the compiled graph, so nothing larger than a layer is compiled",
        lambda offload, compile: offload.mode == "sequential",
    ),
    Conflict(
        "attention",
        "parallel",
        "a plan needs whole sequences, and context parallelism divides them",
        lambda attention, parallel: attention.backend is None and parallel.kind == "context",
    ),
    *(
        Conflict(
            "attention",
            scales,
            "plans and patterns are for denoising networks, next-scale models choose their keys themselves",
            lambda attention, scales: attention.backend is None,
        )
        for scales in SCALES
    ),
    *(
        Conflict(steps, scales, f"no pipeline has both: {steps} is for denoising steps, {scales} for scales")
        for steps in STEPS
        for scales in SCALES
    ),
)
"""Everything else goes together: caches below guidance, both below parallelism, all of them compiled."""


def check_together(parts: Mapping[str, Any]) -> None:
    """Refuse parts that cannot go together.

    Args:
        parts: by name.

    Raises:
        AccelerationError: it names both and the reason.
    """
    for conflict in CONFLICTS:
        first, second = parts.get(conflict.first), parts.get(conflict.second)
        if first is not None and second is not None and conflict.holds(first, second):
            raise AccelerationError(
                "refused.together", first=conflict.first, second=conflict.second, reason=conflict.reason
            )
