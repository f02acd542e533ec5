"""Report of a sped-up pipeline: a row for each part with what it did, its predicted and its measured gain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.acceleration import AccelerationReport
from pipelines.tuning.breakdown import FASTER
from pipelines.tuning.profiles import Found
from pipelines.tuning.solvers import winner

HEAD = ("part", "predicted", "measured", "what it did")


@dataclass(frozen=True)
class SpeedUpReport:
    """What an acceleration did and gained.

    Attributes:
        acceleration: what each part did, or why it did nothing.
        predicted: part, or "all" -> how many times as fast a request should be.
        measured: part, or "all" -> how many times as fast it was: by `handle.measure` here, else when it was tuned.
        quality: metric -> mean over the prompts that verified the setting; empty if it is not verified.
        predicted_quality: metric -> mean that the tables promised.
        origin: file of the setting, "family" or "general" for a starting point, empty for one that the caller gave.
        notes: what the user should know, a sentence each.
    """

    acceleration: AccelerationReport
    predicted: Mapping[str, float]
    measured: Mapping[str, float]
    quality: Mapping[str, float]
    predicted_quality: Mapping[str, float]
    origin: str
    notes: tuple[str, ...]

    @classmethod
    def of(cls, acceleration: AccelerationReport, found: Found | None, measured: Mapping[str, float]) -> SpeedUpReport:
        """Bring together what was reported, tuned and measured.

        Args:
            acceleration: of the parts.
            found: where the setting is from.
            measured: gains on this machine now; they go before those of the tuning.
        """
        if found is None:
            return cls(acceleration, {}, dict(measured), {}, {}, "", notes_on(found, measured))
        choice = found.choice
        predicted = {name: gains["predicted"] for name, gains in choice.part_gains.items()}
        tuned = {name: gains["measured"] for name, gains in choice.part_gains.items()}
        promised = {}
        if choice.predicted_gain is not None:
            predicted["all"] = choice.predicted_gain
        if choice.gain is not None:
            tuned["all"] = choice.gain
        if choice.predicted_quality is not None:
            promised[choice.metric] = choice.predicted_quality
        notes = notes_on(found, measured)
        return cls(acceleration, predicted, {**tuned, **measured}, choice.quality, promised, found.origin, notes)

    @property
    def inactive(self) -> tuple[str, ...]:
        """Names of parts that did nothing."""
        return tuple(one.part for one in self.acceleration.inactive)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "parts": self.acceleration.to_dict(),
            "predicted": dict(self.predicted),
            "measured": dict(self.measured),
            "quality": dict(self.quality),
            "predicted_quality": dict(self.predicted_quality),
            "origin": self.origin,
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """Return a table, and notes below it."""
        rows = [HEAD]
        rows += [(one.part, *self._gains(one.part), one.text()) for one in self.acceleration.parts]
        rows.append(("all", *self._gains("all"), self._likeness()))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
                 for row in rows]  # fmt: skip
        lines.insert(1, "-" * len(lines[0]))
        return "\n".join([*lines, *(f"note: {one}" for one in self.notes)])

    def _gains(self, name: str) -> tuple[str, str]:
        found = (table.get(name) for table in (self.predicted, self.measured))
        first, second = ("-" if gain is None else f"{gain:.2f}x" for gain in found)
        return first, second

    def _likeness(self) -> str:
        """Return the likeness to the plain run as text."""
        if not self.quality:
            return "likeness to the plain run not verified"
        parts = []
        for name, value in self.quality.items():
            digits, unit = (1, " dB") if name == "psnr" else (3, "")
            promised = self.predicted_quality.get(name)
            said = "" if promised is None else f" (predicted {promised:.{digits}f})"
            parts.append(f"{name} {value:.{digits}f}{unit}{said}")
        return ", ".join(parts) + " to the plain run"


def notes_on(found: Found | None, measured: Mapping[str, float]) -> tuple[str, ...]:
    """Return what users should know of a setting, a sentence each.

    Args:
        found: where it is from; None for one that the caller gave.
        measured: gains on this machine now.
    """
    if found is None:
        return () if measured else ("gains are not known: handle.measure(prompt) times requests with and without",)
    choice, notes = found.choice, list(found.notes)
    if choice.warm_up is not None and choice.pays_after is not None and choice.pays_after >= 1:
        notes.append(f"{choice.warm_up:.1f} s of warm-up are paid back after {choice.pays_after:.0f} requests")
    if choice.reached is not None:
        notes.append(f"{choice.reached:.0%} of the prompts reach {choice.goal}; the mean does")
    if found.record is None:
        return tuple(notes)
    other = found.record.baseline.get("other_dtype") or {}
    if other and other["ratio"] < FASTER:
        notes.append(f"in {other['dtype']} a network call takes {other['ratio']:.2f} of the time: load the model in it")
    if choice.gain is not None:
        rival = winner(found.record.solvers, choice.quality.get("psnr", 100.0), 1 / choice.gain)
        if rival is not None:
            notes.append(
                f"{rival['steps']} steps of {rival['solver']} would be faster ({1 / rival['share']:.2f}x) and as near "
                f"({rival['psnr']:.1f} dB)"
            )
    return tuple(notes)
