"""The file of a tuning: all measurements, what was chosen, and what they hold for; a second run goes on from it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dit.runtime.artifacts import ArtifactError
from dit.runtime.json_files import read_object
from pipelines.tuning.conditions import Conditions
from pipelines.tuning.measurement import Measurement

FORMAT = "tessera-tuning-1"
TUNING_FILE = "tuning.json"
"""Name of the file in a model's folder."""


@dataclass(frozen=True)
class Choice:
    """A setting, and what was predicted and measured of it.

    Attributes:
        parts: of the `AccelerationConfig`, plain values.
        gain: how many times as fast as the plain run, measured on prompts that no table saw; None if not verified.
        quality: mean of each metric on these prompts.
        predicted_gain: by the cost model.
        predicted_quality: mean of the goal's metric by the error model.
        reached: share of the prompts that reach the goal's threshold.
        seconds: of a request, by the clock that counts (processor time on a CPU with one thread).
        memory: bytes of weights and working memory.
        warm_up: seconds before the first request is answered.
        pays_after: requests until the warm-up is paid back; None if never.
        part_gains: part -> how many times as fast it is alone, "predicted" in the combination and "measured" alone.
        goal: that it was chosen for, as text.
        metric: of the goal.
    """

    parts: dict[str, Any]
    gain: float | None = None
    quality: dict[str, float] = field(default_factory=dict)
    predicted_gain: float | None = None
    predicted_quality: float | None = None
    reached: float | None = None
    seconds: float | None = None
    memory: int | None = None
    warm_up: float | None = None
    pays_after: float | None = None
    part_gains: dict[str, dict[str, float]] = field(default_factory=dict)
    goal: str = ""
    metric: str = "psnr"

    @property
    def is_verified(self) -> bool:
        """Whether it was run on prompts that no table saw."""
        return self.gain is not None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


@dataclass
class TuningRecord:
    """What is known of one pipeline, called in one way, on one machine.

    Attributes:
        conditions: what it holds for.
        learned: prompts of the tables.
        held_out: prompts of verifications.
        seed: of the first prompt.
        versions: of torch, diffusers, tessera.
        baseline: of the plain run: "wall" and "process" seconds, "network_share", "memory", "breakdown", "other_dtype".
        measurements: all, in order.
        solvers: fewer steps of other solvers.
        left_out: technique -> why none of it was tried.
        front: settings that no other dominates in time, likeness and memory, verified.
        profiles: name, or a goal as text -> setting.
    """

    conditions: Conditions
    learned: list[Any] = field(default_factory=list)
    held_out: list[Any] = field(default_factory=list)
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    baseline: dict[str, Any] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    solvers: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    front: list[Choice] = field(default_factory=list)
    profiles: dict[str, Choice] = field(default_factory=dict)

    def found(self, key: str, purpose: str) -> Measurement | None:
        """Return an earlier measurement, if there is one.

        Args:
            key: of the parts, see `candidates.key_of`.
            purpose: see `Measurement`.
        """
        return next((one for one in self.measurements if one.key == key and one.purpose == purpose), None)

    def save(self, path: Path) -> None:
        """Write the file anew, at once or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {
            "format": FORMAT,
            "conditions": self.conditions.to_dict(),
            "learned": self.learned,
            "held_out": self.held_out,
            "seed": self.seed,
            "versions": self.versions,
            "baseline": self.baseline,
            "measurements": [one.to_dict() for one in self.measurements],
            "solvers": self.solvers,
            "left_out": dict(self.left_out),
            "front": [one.to_dict() for one in self.front],
            "profiles": {name: one.to_dict() for name, one in self.profiles.items()},
        }
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
        unfinished.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TuningRecord:
        """Read a file.

        Raises:
            FileNotFoundError: there is none.
            ArtifactError: it is no tuning, or of another version.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no tuning at {file}; make one with tessera tune MODEL --output {file}")
        try:
            values = read_object(file)
        except ValueError as reason:
            raise ArtifactError(str(reason)) from reason
        if values.pop("format", None) != FORMAT:
            raise ArtifactError(f"{file} is no tuning of the format {FORMAT!r}: run tessera tune")
        try:
            return cls.from_values(values)
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as reason:
            raise ArtifactError(f"{file} can't be read ({reason!s:.300}): run tessera tune anew") from reason

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> TuningRecord:
        """Make a record of plain values.

        Raises:
            TypeError: an unknown field, or one of another type.
            KeyError: one is missing.
            AttributeError: `profiles` is no object.
            OverflowError: a number is out of range.
        """
        made = {
            "conditions": Conditions.from_dict(values["conditions"]),
            "measurements": [Measurement.from_dict(one) for one in values.get("measurements", ())],
            "front": [_read_choice(one) for one in values.get("front", ())],
            "profiles": {name: _read_choice(one) for name, one in values.get("profiles", {}).items()},
        }
        return cls(**{**values, **made})


def _read_choice(values: Mapping[str, Any]) -> Choice:
    """Make a setting of plain values.

    Raises:
        TypeError: an unknown field, or one that is read later is of another type.
    """
    choice = Choice(**values)
    for name in ("parts", "quality", "part_gains"):
        if not isinstance(getattr(choice, name), dict):
            raise TypeError(f"{name} of a setting is a {type(getattr(choice, name)).__name__} instead of an object")
    numbers = [*choice.quality.values(), choice.gain, choice.seconds, choice.memory]
    if not all(one is None or isinstance(one, int | float) for one in numbers):
        raise TypeError("quality, gain, seconds or memory of a setting is no number")
    return choice


def record_path(pipe: Any, conditions: Conditions) -> Path:
    """Return where the tuning of a pipeline is kept: beside its weights, or in the user's cache folder.

    Args:
        pipe: its folder is taken if it is one, may be written to, and is no built-in model's.
        conditions: tell apart the files in the cache folder.
    """
    folder = Path(getattr(pipe, "name_or_path", None) or "")
    if folder.name and folder.is_dir() and os.access(folder, os.W_OK) and not _is_builtin(folder):
        return folder / TUNING_FILE
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tessera" / f"tuning-{_digest(conditions)}.json"


def _is_builtin(folder: Path) -> bool:
    return Path(__file__).resolve().parents[1] / "pretrained" in folder.resolve().parents


def _digest(conditions: Conditions) -> str:
    text = json.dumps(conditions.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
