"""`speed_up`: one call that makes a pipeline faster, by a setting, a profile, or a goal.

handle = speed_up(pipe, quality="psnr>=30")
images = pipe("a red apple").images
print(handle.report().text())
handle.undo()
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from dit.runtime.json_files import read_object
from pipelines.acceleration import AccelerationConfig
from pipelines.info.inspection import info_of
from pipelines.tuning.conditions import Conditions
from pipelines.tuning.goals import Goal
from pipelines.tuning.handle import SpeedUpHandle
from pipelines.tuning.profiles import Found, find_goal, find_profile
from pipelines.tuning.prompts import divide, usual_prompts
from pipelines.tuning.record import Choice, TuningRecord, record_path
from pipelines.tuning.reports import SpeedUpReport
from pipelines.tuning.workload import Workload

__all__ = ["SpeedUpHandle", "SpeedUpReport", "speed_up"]

MINUTES = 10.0
"""Most time that tuning for a goal takes; `tessera tune --minutes` takes another."""

GivenConfig = AccelerationConfig | Mapping[str, Any] | str | PathLike[str]


def speed_up(
    pipe: Any,
    config: GivenConfig | None = None,
    *,
    quality: str | None = None,
    latency: float | None = None,
    memory: str | int | None = None,
    profile: str | None = None,
) -> SpeedUpHandle:
    """Make a pipeline faster until the handle takes it back.

    One of three: `config` applies a given setting; `profile` a named or tuned one; `quality`, `latency` and `memory`
    are goals, for which a saved tuning of this model, machine, size and number of steps is used, or the tuner runs
    (minutes; the file is kept, see `pipelines.tuning.record.record_path`). Number of steps, size, scheduler and
    guidance are those of the pipeline's usual calls. Everything is undone bit-exactly.

    Args:
        pipe: of ours or diffusers: images, clips, or scale by scale.
        config: an `AccelerationConfig`, its values, or a JSON file of them.
        quality: least likeness to the plain run, mean over prompts: "psnr>=30" (decibels) or "ssim>=0.95".
        latency: most seconds of a request.
        memory: most memory of weights and work, such as "8GB".
        profile: "fastest", "balanced", "faithful", "low-memory", or a file of `tessera tune`.

    Returns:
        The handle: `report()` says what each part did and gained, `undo()` takes all back; also a context manager.

    Raises:
        ValueError: not exactly one of the three ways, a value that is not understood, an empty setting, or a goal that
            no setting reaches.
        AccelerationError: parts can't go together, or the pipeline can't have one.
        ArtifactError: a file of another model.

    Example:
        >>> from pipelines import load_pipeline, speed_up
        >>> pipe = load_pipeline("stickers")
        >>> with speed_up(pipe, {"step_cache": "budget=0.35"}) as fast:
        ...     image = pipe("a red apple").images[0]
    """
    has_goal = not (quality is None and latency is None and memory is None)
    if (config is not None) + (profile is not None) + has_goal != 1:
        raise ValueError(
            f"speed_up got config={config!r}, profile={profile!r}, quality={quality!r}, latency={latency!r}, "
            f"memory={memory!r}; give config, or profile, or goals (quality, latency, memory)"
        )
    if config is not None:
        return _applied(pipe, _read(config), None)
    if profile is not None:
        found = find_profile(pipe, profile, _conditions(pipe))
        return _applied(pipe, AccelerationConfig.from_dict(found.choice.parts), found)
    goal = Goal.parse(quality, latency, memory)
    found = _saved(pipe, goal) or _tuned(pipe, goal)
    return _applied(pipe, AccelerationConfig.from_dict(found.choice.parts), found)


def _applied(pipe: Any, config: AccelerationConfig, found: Found | None) -> SpeedUpHandle:
    """Apply a setting.

    Raises:
        ValueError: it is empty.
    """
    if not config.parts:
        accepted = ", ".join(name for name in AccelerationConfig.model_fields if name != "version")
        raise ValueError(f"config is empty, so there is nothing to attach; set at least one of {accepted}")
    return SpeedUpHandle(pipe, config, found)


def _read(config: GivenConfig) -> AccelerationConfig:
    """Return a setting of any form.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no setting.
    """
    if isinstance(config, AccelerationConfig):
        return config
    if isinstance(config, Mapping):
        return AccelerationConfig.from_dict(config)
    if not Path(config).is_file():
        raise FileNotFoundError(
            f"no setting at {str(config)!r}; give a JSON file of an AccelerationConfig, or a profile"
        )
    return AccelerationConfig.from_dict(read_object(Path(config)))


def _conditions(pipe: Any) -> Conditions:
    return Conditions.of(Workload(pipe, usual_prompts_of(pipe)))


def usual_prompts_of(pipe: Any) -> list[Any]:
    """Return the prompts that a pipeline is tuned with where none are named."""
    return usual_prompts(info_of(pipe))


def _saved(pipe: Any, goal: Goal) -> Found | None:
    """Return what an earlier tuning found."""
    known = find_goal(pipe, goal, _conditions(pipe))
    if known is None:
        return None
    choice, record, path = known
    return Found(choice, str(path), record)


def _tuned(pipe: Any, goal: Goal) -> Found:
    """Tune the pipeline for a goal.

    Raises:
        ValueError: no setting reaches it.
    """
    from pipelines.tuning.tuner import Tuner

    learned, held_out = divide(usual_prompts_of(pipe))
    path = record_path(pipe, _conditions(pipe))
    record = Tuner(pipe, learned, held_out, path, minutes=MINUTES).run({goal.text(): goal})
    choice = record.profiles.get(goal.text())
    if choice is None:
        raise ValueError(
            f"no setting reaches {goal.text()} on this machine: {_nearest(record, goal)}; ask for less, or run tessera "
            f"tune with more minutes ({path} keeps what was measured)"
        )
    return Found(choice, str(path), record)


def _nearest(record: TuningRecord, goal: Goal) -> str:
    """Return what came nearest to a goal, as text."""
    front: list[Choice] = record.front
    if not front:
        return "no acceleration was faster than the plain run"
    fastest = front[0]
    return f"the fastest verified one is {fastest.gain:.2f}x at {fastest.quality.get(goal.metric, 0):.2f} {goal.metric}"
