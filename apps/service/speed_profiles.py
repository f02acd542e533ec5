"""Named settings of speed in requests: what a tuning on this server, or of the model's maker, found for them."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from apps.service.option_values import SERVED
from apps.service.request_error import RequestError
from pipelines.acceleration import PartReport, Reason
from pipelines.info.record import PipelineInfo

logger = logging.getLogger(__name__)

_CONDITIONS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Pipeline -> what it is tuned for with its usual arguments; its weights are looked at once."""


@dataclass(frozen=True, slots=True)
class ResolvedProfile:
    """What a name means for a model.

    Attributes:
        parts: of an acceleration; may name files of a tuning, which were checked.
        report: where they are from, and what was measured of them.
    """

    parts: Mapping[str, Any]
    report: PartReport


def resolve_profile(name: str, pipe: Any, info: PipelineInfo, arguments: Mapping[str, Any]) -> ResolvedProfile:
    """Return what a named setting means for a call.

    Args:
        name: of `pipelines.tuning.profiles`.
        pipe: whose call it is.
        info: what it is.
        arguments: of the call, which a tuning may have been made for or not.

    Raises:
        RequestError: nothing is known for the model, or its file can't be used.
    """
    from dit.runtime.artifacts import ArtifactError
    from dit.runtime.hooks import AttachError
    from pipelines.tuning.profiles import find_profile

    try:
        conditions = _conditions_of(pipe, info, arguments)
        found = find_profile(pipe, name, conditions)
    except (ValueError, AttachError, ArtifactError) as error:
        raise RequestError(
            "profile",
            f"No setting {name!r} is known for this model; tune it (tessera tune, or the tab Speed), or leave profile "
            f"out: {error}",
            value=name,
        ) from error
    parts = _served(found.choice.parts)
    reasons = []
    if unserved := sorted(found.choice.parts.keys() - parts.keys()):
        reasons.append(Reason("why.profile_unserved", {"names": ", ".join(unserved)}))
    if found.record is not None and (others := found.record.conditions.differences(conditions)):
        reasons.append(Reason("why.profile_conditions", {"names": ", ".join(one.split()[0] for one in others)}))
    choice = found.choice
    key, values = "profile.start", {"name": name}
    if choice.gain is not None:
        quality = choice.quality.get(choice.metric)
        key = "profile.psnr" if choice.metric == "psnr" else "profile.ssim"
        values |= {"gain": choice.gain, "quality": float("nan") if quality is None else quality}
    return ResolvedProfile(parts, PartReport("profile", key, values, bool(parts), tuple(reasons)))


def known_profiles(pipe: Any, names: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Return the settings that tunings of a pipeline have found, as plain values; none of its starting points.

    Args:
        pipe: in memory.
        names: of profiles.
    """
    from dit.runtime.artifacts import ArtifactError
    from dit.runtime.hooks import AttachError
    from pipelines.info.inspection import info_of
    from pipelines.tuning.profiles import find_profile

    known: dict[str, Mapping[str, Any]] = {}
    for name in names:
        try:
            found = find_profile(pipe, name, _conditions_of(pipe, info_of(pipe), {}))
        except (ValueError, AttachError, ArtifactError) as error:
            logger.info("no setting %r is known for a %s: %s", name, type(pipe).__name__, error)
            continue
        if found.record is not None:
            known[name] = {**found.choice.to_dict(), "parts": _served(found.choice.parts)}
    return known


def _served(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts that requests may have."""
    return {name: value for name, value in parts.items() if name in SERVED}


def _conditions_of(pipe: Any, info: PipelineInfo, arguments: Mapping[str, Any]) -> Any:
    """Return what a tuning has to be for to hold for a call, as `pipelines.tuning.conditions.Conditions`."""
    from pipelines.tuning.conditions import Conditions
    from pipelines.tuning.workload import Workload

    usual = _CONDITIONS.get(pipe)
    if usual is None:
        usual = _CONDITIONS[pipe] = Conditions.of(Workload(pipe, ["a prompt"]))
    frames, height, width = usual.shape
    guidance = arguments.get(info.guidance_argument)
    return replace(
        usual,
        steps=arguments.get(info.arguments.get("steps", "num_inference_steps")) or usual.steps,
        guidance=usual.guidance if guidance is None else float(guidance),
        shape=(
            int(arguments.get(info.frames_argument) or frames),
            int(arguments.get("height") or height),
            int(arguments.get("width") or width),
        ),
    )
