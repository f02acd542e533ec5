"""StepPolicy: at which steps of a run activations keep 16 bits, over the same quantized weights.

The first steps decide what is seen, and errors of the last ones are corrected by no other step. A policy is a number of
steps at either end of a run, as diffusers stores it (`quantization_config.runtime.diffusion_step_policy`,
diffusers#14664), or ranges of noise levels, which hold for any number of steps. `dit.quant.step_choice` finds one by
calibration, `dit.quant.step_precision` follows one. Configurations are read without torch, so it is not imported here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

SCHEMA_VERSION = 1
WINDOWS, LEVELS = "first_last_n", "noise_levels"
"""Types of policies; the second is ours, which diffusers does not read."""
INDEX_SPACE = {WINDOWS: "denoising_loop_iteration", LEVELS: "sigma"}
FULL, NATIVE = "a16", "native"
"""Modes of steps in diffusers' words: 16-bit activations, and those of the checkpoint."""
REQUIRED = (
    "schema_version", "type", "index_space", "scope", "default_mode", "first_steps", "last_steps", "overlap", "reasoner"
)  # fmt: skip
"""Fields without which diffusers reads no policy."""
MOST_STEPS = 10_000


@dataclass(frozen=True)
class StepPolicy:
    """At which steps activations keep 16 bits.

    Attributes:
        first: steps at the beginning of a run.
        last: steps at its end.
        overlap: whether steps that are among both keep them too.
        levels: ranges (highest, lowest) of noise levels, both included, whose steps keep them as well.
        reasoner: "a16" or "native": precision of a language model in the same network; kept as it was read.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    first: int = 0
    last: int = 0
    overlap: bool = True
    levels: tuple[tuple[float, float], ...] = ()
    reasoner: str = NATIVE

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_STEPS:
                raise ValueError(f"{name} is {value!r}; use a number of steps from 0 to {MOST_STEPS}")
        for one in self.levels:
            if len(one) != 2 or not all(math.isfinite(level) and level >= 0 for level in one) or one[0] < one[1]:
                raise ValueError(f"levels holds {one!r}; use pairs (highest, lowest) of noise levels, 0 or more")
        if self.reasoner not in (FULL, NATIVE):
            raise ValueError(f"reasoner is {self.reasoner!r}; use {FULL!r} or {NATIVE!r}")

    def is_full(self, step: int, steps: int, sigma: float = math.nan) -> bool:
        """Return whether a step keeps 16-bit activations; a run of one step never does, as in diffusers.

        Args:
            step: from 0.
            steps: of the run.
            sigma: noise level, for policies by level; NaN is in no range.
        """
        if steps == 1:
            return False
        if any(low <= sigma <= high for high, low in self.levels):
            return True
        begins, ends = step < self.first, step >= steps - self.last
        return (begins or ends) and (self.overlap or not (begins and ends))

    def to_dict(self) -> dict[str, Any]:
        """Return it as `diffusion_step_policy`."""
        kind = LEVELS if self.levels else WINDOWS
        ranges = [{"from": high, "to": low, "mode": FULL} for high, low in self.levels]
        return {
            "schema_version": SCHEMA_VERSION,
            "type": kind,
            "index_space": INDEX_SPACE[kind],
            "scope": ["transformer"],
            "default_mode": NATIVE,
            "first_steps": {"count": self.first, "mode": FULL},
            "last_steps": {"count": self.last, "mode": FULL},
            "overlap": FULL if self.overlap else NATIVE,
            "reasoner": self.reasoner,
            **({"ranges": ranges} if ranges else {}),
        }

    @classmethod
    def from_dict(cls, policy: Mapping[str, Any]) -> StepPolicy:
        """Read a `diffusion_step_policy`; like diffusers, refuse what is incomplete.

        Args:
            policy: its fields.

        Raises:
            ValueError: a field is missing or has a value that isn't known; the message names it.
        """
        if not isinstance(policy, Mapping):
            raise ValueError(f"diffusion_step_policy is {policy!r:.80}, expected an object of its fields")
        missing = [name for name in REQUIRED if name not in policy]
        if missing:
            raise ValueError(f"diffusion_step_policy lacks {', '.join(missing)}; write it with StepPolicy.to_dict()")
        kind = policy["type"]
        if not isinstance(kind, str) or kind not in INDEX_SPACE:
            raise ValueError(f"diffusion_step_policy: type is {kind!r:.60}, expected {WINDOWS!r} or {LEVELS!r}")
        known = {"schema_version": SCHEMA_VERSION, "index_space": INDEX_SPACE[kind], "default_mode": NATIVE}
        for name, value in known.items():
            if policy[name] != value:
                raise ValueError(f"diffusion_step_policy: {name} is {policy[name]!r:.60}, expected {value!r}")
        if policy["scope"] != ["transformer"]:
            raise ValueError(f"diffusion_step_policy: scope is {policy['scope']!r:.60}, expected ['transformer']")
        if policy["overlap"] not in (FULL, NATIVE):
            raise ValueError(
                f"diffusion_step_policy: overlap is {policy['overlap']!r:.60}, expected {FULL} or {NATIVE}"
            )
        first, last = _count(policy, "first_steps"), _count(policy, "last_steps")
        return cls(first, last, policy["overlap"] == FULL, _ranges(policy, kind), policy["reasoner"])


def _count(policy: Mapping[str, Any], name: str) -> int:
    """Return the steps of a window."""
    window = policy[name]
    if not isinstance(window, Mapping) or window.get("mode") not in (FULL, NATIVE):
        raise ValueError(f"diffusion_step_policy: {name} is {window!r:.80}, expected a count and the mode {FULL!r}")
    count = window.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MOST_STEPS:
        raise ValueError(f"diffusion_step_policy: the count of {name} is {count!r:.40}, expected 0 to {MOST_STEPS}")
    return count if window["mode"] == FULL else 0


def _ranges(policy: Mapping[str, Any], kind: str) -> tuple[tuple[float, float], ...]:
    """Return the ranges of noise levels that keep 16 bits."""
    given = policy.get("ranges", [])
    if kind == WINDOWS and not given:
        return ()
    if kind == WINDOWS or not isinstance(given, list) or not given:
        raise ValueError(f"diffusion_step_policy: ranges is {given!r:.80}; the type {LEVELS!r} has some, others none")
    found: list[tuple[float, float]] = []
    for one in given:
        high, low = (one.get("from"), one.get("to")) if isinstance(one, Mapping) else (None, None)
        if not _is_number(high) or not _is_number(low) or one.get("mode") != FULL:
            raise ValueError(
                f"diffusion_step_policy: ranges holds {one!r:.80}, expected from, to and the mode {FULL!r}"
            )
        found.append((float(high), float(low)))
    return tuple(found)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
