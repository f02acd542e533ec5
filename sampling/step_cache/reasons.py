"""Reasons why a step cache computes a call, as values: a key, its arguments, and English."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TEXTS: Mapping[str, str] = {
    "no_step_context": "no step context",
    "gradients": "gradients are on",
    "edges": "the first {first:g} and last {last} steps are always computed",
    "max_skips": "no more than {most} steps in a row are skipped",
    "anchor": "{mechanism} refreshes at the step",
    "gate": "the gate {gate} asked for the step",
    "nothing_to_forecast_from": "nothing computed yet to forecast from",
    "branch_not_called": "the branch was not called in the step before",
    "shapes_changed": "the inputs changed their shape",
    "step_not_found": "its step was not found ({reason})",
}
"""English by key."""

FAILURES = (
    "no_step_context",
    "gradients",
    "nothing_to_forecast_from",
    "branch_not_called",
    "shapes_changed",
    "step_not_found",
)
"""Keys of the reasons that are no decision of the cache: it would have skipped, or could not decide."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a call is computed.

    Attributes:
        key: of `TEXTS`.
        values: what the text is filled with, as pairs.
    """

    key: str
    values: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, key: str, **values: Any) -> Reason:
        """Make a reason of a key and its values."""
        return cls(key, tuple(values.items()))

    def __str__(self) -> str:
        return TEXTS[self.key].format(**dict(self.values))
