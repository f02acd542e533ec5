"""StepPolicy: at which steps of a run activations keep 16 bits; read and written as diffusers stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCHEMA_VERSION, KIND, INDEX_SPACE = 1, "first_last_n", "denoising_loop_iteration"
FULL, NATIVE = "a16", "native"
"""Modes of steps in diffusers' words: 16-bit activations, and those of the checkpoint."""


@dataclass(frozen=True)
class StepPolicy:
    """At which steps activations keep 16 bits.

    Attributes:
        first: steps at the beginning of a run.
        last: steps at its end.
        overlap: whether steps that are among both keep them too.

    Raises:
        ValueError: a number below 0.
    """

    first: int = 0
    last: int = 0
    overlap: bool = True

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} is {value!r}; use a number of steps, 0 or more")

    def is_full(self, step: int, steps: int) -> bool:
        """Return whether a step keeps 16-bit activations.

        Args:
            step: from 0.
            steps: of the run.
        """
        begins, ends = step < self.first, step >= steps - self.last
        return (begins or ends) and (self.overlap or not (begins and ends))

    def to_dict(self) -> dict[str, Any]:
        """Return it as diffusers' `diffusion_step_policy`, in the order of a saved configuration."""
        return {
            "default_mode": NATIVE,
            "first_steps": {"count": self.first, "mode": FULL},
            "index_space": INDEX_SPACE,
            "last_steps": {"count": self.last, "mode": FULL},
            "overlap": FULL if self.overlap else NATIVE,
            "reasoner": NATIVE,
            "schema_version": SCHEMA_VERSION,
            "scope": ["transformer"],
            "type": KIND,
        }

    @classmethod
    def from_dict(cls, policy: Mapping[str, Any]) -> StepPolicy:
        """Read a `diffusion_step_policy` as diffusers stores it.

        Args:
            policy: its fields.

        Raises:
            ValueError: a field is missing or has a value that isn't known; the message names it.
        """
        for name, known in (("schema_version", SCHEMA_VERSION), ("type", KIND), ("index_space", INDEX_SPACE),
                            ("default_mode", NATIVE)):  # fmt: skip
            if policy.get(name) != known:
                raise ValueError(f"diffusion_step_policy: {name} is {policy.get(name)!r:.60}, expected {known!r}")
        if "transformer" not in (policy.get("scope") or ()):
            raise ValueError(f"diffusion_step_policy: scope is {policy.get('scope')!r:.60}, expected ['transformer']")
        overlap = policy.get("overlap", FULL)
        if overlap not in (FULL, NATIVE):
            raise ValueError(f"diffusion_step_policy: overlap is {overlap!r:.60}, expected {FULL!r} or {NATIVE!r}")
        return cls(_count(policy, "first_steps"), _count(policy, "last_steps"), overlap == FULL)


def _count(policy: Mapping[str, Any], name: str) -> int:
    """Return the steps of a window of a policy."""
    window = policy.get(name)
    if not isinstance(window, Mapping) or window.get("mode") not in (FULL, NATIVE):
        raise ValueError(f"diffusion_step_policy: {name} is {window!r:.80}, expected a count and the mode {FULL!r}")
    count = window.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"diffusion_step_policy: the count of {name} is {count!r:.40}, expected 0 or more")
    return count if window["mode"] == FULL else 0
