"""What a request leaves open, resolved in one place: by its preset, by the option's default, by the model's.

The prompt is put into its style here too. Data type and offload are not options of a call but of how a model is loaded,
see `apps.service.compute_profiles.load_options_of`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from apps.service import limits
from apps.service.masked_area import area_box, mask_edge
from apps.service.model_pool import LoadedModel
from apps.service.named_settings import Preset, preset_values
from apps.service.option_values import parse_timeline, write_timeline
from apps.service.options import MaskOptions
from apps.service.outpaint import expanded_size
from apps.service.request_error import RequestError
from apps.service.requests import DECIDED_BY_PROFILE, OPTIONS, SHORT_FOR, AnyRequest, VideoCompletionRequest
from apps.service.styles import apply_style
from apps.service.uploads import UploadStore


def resolve_defaults(request: AnyRequest, model: LoadedModel, uploads: UploadStore) -> AnyRequest:
    """Replace what a request leaves open by its preset and the model's defaults, and put its prompt into its style.

    Args:
        request: what was asked.
        model: gives the defaults.
        uploads: the image to start from gives the size.

    Raises:
        ValueError: the model can't do the task, or not with these settings.
    """
    accepted = model.accepts(request.task)
    fields = type(request).model_fields
    values: dict[str, Any] = {"model": model.key, "style": None, "preset": None}
    decided = _decided(request)
    # 1. the preset, for what the request doesn't say itself
    request = with_preset(request)
    # 2. the default of the option, else of the model; not of what a part of its acceleration decides
    for name in fields:
        if getattr(request, name) is None and name not in decided:
            values[name] = default_of(name, model, accepted)
    few_step = None if request.acceleration is None else request.acceleration.few_step
    if few_step is not None:
        values |= {"steps": few_step.number_of_steps, "guidance": few_step.settings.guidance}
    # 3. what depends on several fields
    values |= _size(request, model, uploads)
    values |= _frames(request, model)
    values |= _upscale(request, values, model)
    values |= _texts(request)
    return request.model_copy(update={name: value for name, value in values.items() if name in fields})


def _decided(request: AnyRequest) -> set[str]:
    """Return the options that parts of the acceleration, or a profile, decide."""
    decided = {name for part in _parts(request) for name in SHORT_FOR.get(part, ())}
    if "few_step" in _parts(request):
        decided.add("step_cache")  # which a few-step preset can't have
    if request.profile is not None:
        decided.update(DECIDED_BY_PROFILE)
    return decided


def with_preset(request: AnyRequest, own: Mapping[str, Preset] | None = None) -> AnyRequest:
    """Return a request with what its preset says of what it leaves open, and without the preset.

    Args:
        request: what was asked.
        own: presets of the user, beside the built-in ones.

    Raises:
        RequestError: no such preset, or it sets what the request has no field for.
    """
    if request.preset is None:
        return request
    decided, fields = _decided(request), type(request).model_fields
    preset = {n: value for n, value in preset_values(request.preset, fields, own).items() if n not in decided}
    left_open = {name: value for name, value in preset.items() if getattr(request, name) in (None, ())}
    return request.model_copy(update={**left_open, "preset": None})


def _parts(request: AnyRequest) -> Collection[str]:
    return () if request.acceleration is None else request.acceleration.parts


def default_of(name: str, model: LoadedModel, accepted: frozenset[str] | None = None) -> Any:
    """Return what an option is where nobody says: its own default if the call takes it, else the model's.

    Args:
        name: of the field.
        model: gives the default.
        accepted: argument names of the task's call; None for those of the main task.

    Returns:
        A number, a word or None.
    """
    if name == "guidance":
        return model.guidance
    if name == "steps":
        return model.steps
    option = OPTIONS[name].option if name in OPTIONS else None
    if option is None or not option.argument:
        return None
    if option.default is not None:
        accepted = model.accepts(model.tasks[0]) if accepted is None else accepted
        return option.default if option.argument in accepted else None
    default = model.defaults.get(option.argument)
    return default if isinstance(default, int | float | str) else None


def _texts(request: AnyRequest) -> dict[str, str]:
    """Return prompt and negative prompt, put into the style of the request if it has one.

    Raises:
        RequestError: a style for an image of a class.
    """
    prompt, negative = getattr(request, "prompt", None), getattr(request, "negative_prompt", "")
    if request.style is None:
        return {"negative_prompt": negative.strip()}
    if prompt is None:
        raise RequestError(
            "setting", "Styles are for prompts; leave the style out for an image of a class.", field="style"
        )
    styled, negative = apply_style(request.style, prompt, negative, getattr(request, "prompt_syntax", None))
    timeline = getattr(request, "timeline", None)
    if timeline is None:
        return {"prompt": styled, "negative_prompt": negative}
    later = [(frame, apply_style(request.style, text, "")[0]) for frame, text in parse_timeline(timeline)]
    written = write_timeline(later)
    if len(written) > limits.MAX_PROMPT_CHARS:
        message = (
            f"The timeline has {len(written)} characters in this style, and at most {limits.MAX_PROMPT_CHARS} are read."
        )
        raise RequestError("timeline.long", message, field="timeline", value=len(written), most=limits.MAX_PROMPT_CHARS)
    return {"prompt": styled, "negative_prompt": negative, "timeline": written}


def _frames(request: AnyRequest, model: LoadedModel) -> dict[str, int | None]:
    """Return the number of frames of a clip, if the model makes clips."""
    asked = getattr(request, "frames", None)
    for field in ("frames", "fps"):
        if getattr(request, field, None) is not None and model.frames is None:
            raise RequestError(
                "setting",
                f"The model {model.key!r} generates images, not clips; leave out {field}.",
                field=field,
            )
    if "frames" not in type(request).model_fields:
        return {}
    if not isinstance(request, VideoCompletionRequest) or model.frames is None:
        return {"frames": asked or model.frames}
    if request.video_mask is not None:
        return {"frames": asked or request.video_frames}
    frames = asked or model.frames  # all that is given is kept, so that the clip can only become longer
    request.check_missing(frames)
    return {"frames": frames}


def _upscale(request: AnyRequest, values: Mapping[str, Any], model: LoadedModel) -> dict[str, int | None]:
    """Settle by how much the image is enlarged: None for not at all.

    Args:
        request: what was asked.
        values: what has been settled, the size and the number of frames among it.
        model: gives the size if the request has none.

    Raises:
        RequestError: the result would be too large.
    """
    scale = None if request.upscale == 1 else request.upscale
    size = values.get("width") or model.width, values.get("height") or model.side
    limits.check_upscaled(*size, scale, values.get("frames"))
    return {"upscale": scale}


def _size(request: AnyRequest, model: LoadedModel, uploads: UploadStore) -> dict[str, int | None]:
    """Settle the size: what was left open is filled in, unless the pipeline takes no size.

    Raises:
        ValueError: another size than the only one of such a pipeline was asked for.
    """
    if "width" not in type(request).model_fields:
        return {}
    asked = getattr(request, "width"), getattr(request, "height")  # noqa: B009
    takes_one = {"height", "width"} <= model.accepts(request.task) or getattr(request, "image", None) is not None
    if takes_one:
        width, height = open_size(request, model, uploads) if asked[0] is None else asked
        return {"width": width, "height": height}
    if asked[0] is not None and asked != (model.width, model.side):
        raise ValueError(
            f"width and height: the model {model.key!r} generates images of one size, not {asked[0]} x {asked[1]}; "
            f"leave them out, or give {model.width} x {model.side}."
        )
    return {"width": None, "height": None}


def open_size(request: AnyRequest, model: LoadedModel, uploads: UploadStore) -> tuple[int, int]:
    """Return width and height of a request without a size: the model's, in the shape of the image handed in.

    Where only a masked area is generated, in the shape of that.
    """
    name = getattr(request, "image", None)
    if name is None:
        return model.width, model.side
    if isinstance(request, MaskOptions) and request.mask is not None and request.mask_padding is not None:
        edge = request.mask_grow or 0, request.mask_blur or 0
        left, top, right, bottom = area_box(
            mask_edge(uploads.get(request.mask), uploads.size(name), *edge), request.mask_padding, None
        )
        return fit_size((right - left, bottom - top), model)
    return fit_size(expanded_size(uploads.size(name), getattr(request, "expand", None)), model)


def fit_size(size: tuple[int, int], model: LoadedModel) -> tuple[int, int]:
    """Find a size for an image handed in.

    Args:
        size: its width and height.
        model: was trained for an area and takes multiples of something.

    Returns:
        The image's own width and height if the model can generate that well, else about its shape in the model's area.
        Of a model with a list of sizes the one nearest in shape, and among equals in area.
    """
    width, height = size
    if model.sizes:
        return min(model.sizes, key=lambda one: _distance(one, size))
    area, multiple = model.side * model.width, model.multiple
    is_in_range = min(size) >= limits.MIN_SIDE and max(size) <= limits.MAX_SIDE
    if is_in_range and width % multiple == height % multiple == 0 and area / 2 <= width * height <= 2 * area:
        return size
    scale = math.sqrt(area / (width * height))
    least = -(-32 // multiple) * multiple
    most = limits.MAX_SIDE // multiple * multiple
    return (
        min(max(round(width * scale / multiple) * multiple, least), most),
        min(max(round(height * scale / multiple) * multiple, least), most),
    )


def _distance(one: tuple[int, int], other: tuple[int, int]) -> tuple[float, float]:
    """Return how far two sizes are apart in shape and, rounded shapes being equal, in area; on logarithmic scales."""
    (width, height), (others_width, others_height) = one, other
    shape = math.log(width / height) - math.log(others_width / others_height)
    return round(abs(shape), 2), abs(math.log(width * height) - math.log(others_width * others_height))
