"""Calls of a pipeline without guidance, as fine-tuning needs them: one branch, one sample for each prompt."""

from __future__ import annotations

from typing import Any

from pipelines.info.inspection import info_of
from pipelines.info.record import PipelineInfo
from pipelines.network_calls.recording import NetworkCall, learn_call
from pipelines.network_calls.watching import CallNotUnderstood

NEUTRAL: dict[str, float] = {
    "guidance_scale": 1.0,
    "true_cfg_scale": 1.0,
    "audio_guidance_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_rescale": 0.0,
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
}
"""Arguments of calls -> the value at which they do nothing."""


def learn_unguided_call(
    pipe: Any,
    height: int,
    width: int,
    num_frames: int | None = None,
    guidance: float | None = None,
    options: dict[str, Any] | None = None,
    network: Any = None,
) -> NetworkCall:
    """Learn how a pipeline calls its network where nothing is guided.

    Args:
        pipe: of ours or of diffusers.
        height: of the image, pixels.
        width: of the image, pixels.
        num_frames: of the clip; None for images.
        guidance: what a network that takes the guidance scale as an input is told; None is the pipeline's default.
        options: further arguments of its call.
        network: of the pipeline; None is its `transformer`.

    Returns:
        See `learn_call`; `record` takes `prompt_arguments(...)`.

    Raises:
        CallNotUnderstood: see `learn_call`.
    """
    info = info_of(pipe)
    call = {name: value for name, value in NEUTRAL.items() if name in info.parameters}
    if info.guidance_kind == "distilled":
        call.pop(info.guidance_argument, None)
        if guidance is not None:
            call[info.guidance_argument] = guidance
    call |= {**info.fixed, **size_arguments(info, height, width, num_frames), **(options or {})}
    name, value = prompt_argument(info, "")
    call[name] = value
    try:
        return learn_call(pipe, call, name, network)
    except CallNotUnderstood:
        if info.guidance_kind != "classifier_free" or info.guidance_argument in (options or {}):
            raise
        # Some guide at 1 as well, e.g. Z-Image.
        return learn_call(pipe, {**call, info.guidance_argument: 0.0}, name, network)


def prompt_argument(info: PipelineInfo, caption: str) -> tuple[str, Any]:
    """Return the name and the value of the argument that takes a caption; a class, where the pipeline makes classes.

    Args:
        info: of the pipeline.
        caption: text, or the name or number of a class; empty is the class of no class.

    Raises:
        ValueError: the caption is no class of the pipeline.
    """
    if "label" not in info.arguments:
        return info.arguments.get("prompt", "prompt"), caption
    return info.arguments["label"], [_class_number(info, caption)]


def size_arguments(info: PipelineInfo, height: int, width: int, num_frames: int | None = None) -> dict[str, int]:
    """Return the arguments that say how large the result is; pipelines of one size take none."""
    sizes = {"height": height, "width": width}
    found = {info.arguments.get(name, name): value for name, value in sizes.items()}
    if info.frames is not None and num_frames is not None:
        found[info.frames_argument] = num_frames
    return {name: value for name, value in found.items() if name in info.parameters}


def _class_number(info: PipelineInfo, caption: str) -> int:
    if not caption.strip():
        return len(info.labels)
    if caption in info.label_ids:
        return info.label_ids[caption]
    if caption.isdecimal() and int(caption) in info.labels:
        return int(caption)
    some = ", ".join(list(info.label_ids)[:4])
    raise ValueError(
        f"the caption {caption!r} is no class of this model: give a number from 0 to {len(info.labels) - 1}"
        + (f", or a name such as {some}" if some else "")
    )
