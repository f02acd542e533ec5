"""What the parts of an acceleration did, as values; `texts` makes sentences of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.acceleration.texts import ENGLISH, render


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a part did nothing, or less than was asked for.

    Attributes:
        key: of a table of texts such as `texts.ENGLISH`.
        values: what its sentence is filled with.
    """

    key: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PartReport:
    """What a part did.

    Attributes:
        part: its name, a field of `AccelerationConfig`.
        key: of a table of texts such as `texts.ENGLISH`.
        values: what its sentence is filled with.
        is_active: whether it did or does something.
        reasons: why it did not; for an active part, where it did less than was asked for.
    """

    part: str
    key: str
    values: dict[str, Any]
    is_active: bool
    reasons: tuple[Reason, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        reasons = [{"key": reason.key, "values": reason.values} for reason in self.reasons]
        return {
            "part": self.part,
            "key": self.key,
            "values": self.values,
            "is_active": self.is_active,
            "reasons": reasons,
        }

    def text(self, texts: Mapping[str, str] = ENGLISH) -> str:
        """Return a sentence without a period.

        Args:
            texts: sentences by key.
        """
        done = render(self.key, self.values, texts)
        if not self.reasons:
            return done
        why = "; ".join(render(reason.key, reason.values, texts) for reason in self.reasons)
        return render("report.partly" if self.is_active else "report.inactive", {"done": done, "why": why}, texts)


@dataclass(frozen=True, slots=True)
class AccelerationReport:
    """What an acceleration did.

    Attributes:
        parts: one of each part that was asked for, in the order in which they were applied.
    """

    parts: tuple[PartReport, ...]

    def __getitem__(self, part: str) -> PartReport:
        """Return the report of a part by its name."""
        return next(one for one in self.parts if one.part == part)

    @property
    def inactive(self) -> tuple[PartReport, ...]:
        """Those that were asked for and did nothing."""
        return tuple(one for one in self.parts if not one.is_active)

    def to_dict(self) -> list[dict[str, Any]]:
        """Return plain values, for JSON."""
        return [one.to_dict() for one in self.parts]

    def text(self, texts: Mapping[str, str] = ENGLISH) -> str:
        """Return a line for each part.

        Args:
            texts: sentences by key; another language has a table of the same keys.
        """
        return "\n".join(one.text(texts) for one in self.parts)
