"""Named settings: what a tuning of the model found for them, what ships with it, or a starting point of its family."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit.runtime.artifacts import ArtifactError
from pipelines.acceleration import AccelerationConfig
from pipelines.tuning.conditions import Conditions
from pipelines.tuning.goals import Goal
from pipelines.tuning.record import TUNING_FILE, Choice, TuningRecord, record_path

NAMED_GOALS: dict[str, Goal] = {
    "balanced": Goal("psnr", 30.0),
    "faithful": Goal("psnr", 40.0),
    "fastest": Goal("psnr", 24.0),
    "low-memory": Goal("psnr", 30.0, least_memory=True),
}
"""What the names of `profile` mean, as goals."""
NAMES = tuple(NAMED_GOALS)

STARTING_POINTS: dict[str, dict[str, Any]] = {
    "balanced": {"step_cache": {"preset": "fbcache", "params": {"threshold": 0.08}}},
    "faithful": {"step_cache": {"preset": "fbcache", "params": {"threshold": 0.04}}},
    "fastest": {"step_cache": {"preset": "taylorseer", "params": {"every": 4}}},
}
"""For pipelines of families that diffusers has and no tuning is known of; not verified on any checkpoint."""
SMALLER: dict[str, Any] = {"quantization": {"bits": "w8a8"}}
"""For pipelines of which no tuning for "low-memory" is known."""
FAMILIES = (
    "Flux", "Flux2", "QwenImage", "ZImage", "StableDiffusion3", "PixArt", "Sana", "Wan", "LTX", "LTX2", "HunyuanVideo",
    "HunyuanVideo15", "CogVideoX", "Mochi", "Chroma", "CogView4", "HiDreamImage", "Lumina2", "AuraFlow",
)  # fmt: skip
"""Beginnings of the names of their pipelines."""


@dataclass(frozen=True)
class Found:
    """A setting for a name, and where it is from.

    Attributes:
        choice: the setting.
        origin: file, "family" for a starting point, or "general" for what suits all.
        record: that the setting is of; None for a starting point.
        notes: what the user should know, a sentence each.
    """

    choice: Choice
    origin: str
    record: TuningRecord | None = None
    notes: tuple[str, ...] = ()


def find_profile(pipe: Any, name: str, conditions: Conditions) -> Found:
    """Return the setting that a name or a file means for a pipeline.

    Args:
        pipe: of ours or diffusers.
        name: one of `NAMES`, or a file of the tuner.
        conditions: of its usual calls.

    Raises:
        ValueError: no setting of this name is known for the model; the message says what to do.
        ArtifactError: the file is of another model, or names files elsewhere.
        FileNotFoundError: there is no such file.
    """
    if name not in NAMES:
        if not name.endswith(".json"):
            raise ValueError(f"profile is {name!r}; use {', '.join(NAMES)}, or a file of tessera tune ending in .json")
        record = TuningRecord.load(name)
        _check(record, conditions, name)
        if not record.profiles:
            raise ArtifactError(f"{name} holds no setting: no combination reached its goal; see its measurements")
        chosen = next(iter(record.profiles.values()))
        _check_files(chosen, Path(name))
        return Found(chosen, name, record, _notes(record, conditions))
    for path in _files(pipe, conditions):
        record = TuningRecord.load(path)
        if name in record.profiles and not _refusals(record, conditions):
            _check_files(record.profiles[name], path)
            return Found(record.profiles[name], str(path), record, _notes(record, conditions))
    if name == "low-memory":
        note = (
            "8-bit weights and activations save memory everywhere; likeness is not verified here: tessera tune measures"
        )
        return Found(Choice(SMALLER), "general", None, (note,))
    family = next((one for one in FAMILIES if type(pipe).__name__.startswith(one)), None)
    if family is None:
        raise ValueError(
            f"profile is {name!r}, and no tuning of this {type(pipe).__name__} is known; run tessera tune MODEL, or "
            "give speed_up a goal such as quality='psnr>=30'"
        )
    note = (
        f"the setting is a starting point for {family} pipelines and verified on no checkpoint: tessera tune measures"
    )
    return Found(Choice(STARTING_POINTS[name]), "family", None, (note,))


def find_goal(pipe: Any, goal: Goal, conditions: Conditions) -> tuple[Choice, TuningRecord, Path] | None:
    """Return the setting that a saved tuning on this machine found for a goal, if there is one.

    Args:
        pipe: of ours or diffusers.
        goal: what has to hold.
        conditions: of its usual calls.

    Raises:
        ArtifactError: the setting names files elsewhere.
    """
    for path in _files(pipe, conditions):
        record = TuningRecord.load(path)
        if record.conditions.differences(conditions):
            continue
        held = [one for one in (*record.profiles.values(), *record.front) if _meets(one, goal)]
        if goal.threshold is None and goal.latency is not None:
            best = max(held, key=lambda one: one.quality.get(goal.metric, 0.0), default=None)
        else:
            named = record.profiles.get(goal.text())
            best = named or min(held, key=lambda one: -(one.gain or 0.0), default=None)
        if best is not None:
            _check_files(best, path)
            return best, record, path
    return None


def _meets(choice: Choice, goal: Goal) -> bool:
    quality = choice.quality.get(goal.metric)
    known = choice.seconds is not None and choice.memory is not None and quality is not None
    return known and goal.is_met(quality or 0.0, choice.seconds or 0.0, choice.memory or 0)


def _files(pipe: Any, conditions: Conditions) -> list[Path]:
    """Return the files that may hold a tuning: the user's own, then that of the model's folder."""
    folder = Path(getattr(pipe, "name_or_path", None) or "")
    places = [record_path(pipe, conditions), *([folder / TUNING_FILE] if folder.name else [])]
    return [path for path in dict.fromkeys(places) if path.is_file()]


def _refusals(record: TuningRecord, conditions: Conditions) -> list[str]:
    """Return why settings of a record can't be used here; other calls and machines only change what they gain."""
    ignored = ("scheduler", "dtype")
    found = record.conditions.differences(conditions, any_machine=True, any_call=True)
    return [one for one in found if one.split()[0] not in ignored]


def _check(record: TuningRecord, conditions: Conditions, name: str) -> None:
    refusals = _refusals(record, conditions)
    if refusals:
        raise ArtifactError(f"{name} does not fit this pipeline: {'; '.join(refusals)}. Tune it with tessera tune.")


def _check_files(choice: Choice, path: Path) -> None:
    """Refuse a setting of a tuning that names what the tuner never does: files elsewhere, or models of the hub.

    Tunings come with models of anybody. The tuner names files beside its own, and those of the model by their names.

    Raises:
        ArtifactError: it names something else.
    """
    folder = path.parent.resolve()
    for field, named in AccelerationConfig.from_dict(choice.parts).files().items():
        file = Path(str(named))
        if file.name != str(named) and file.parent.resolve() != folder:
            raise ArtifactError(
                f"{path} names {str(named)!r:.200} as {field}; a tuning may name files of its own folder ({folder}) "
                "alone. Make it anew with tessera tune, or give speed_up these parts as config if you trust them."
            )


def _notes(record: TuningRecord, conditions: Conditions) -> tuple[str, ...]:
    """Return what differs from the tuning without making its setting useless."""
    found = record.conditions.differences(conditions)
    return (f"tuned under other conditions, so gain and likeness may differ: {'; '.join(found)}",) if found else ()
