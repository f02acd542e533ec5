"""From what stands on the page to requests, and from the settings of an image back to the page. Pure functions."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from apps.service import limits
from apps.service.metadata import PictureSettings
from apps.service.model_pool import LoadedModel
from apps.service.option_values import Lora, StepCache
from apps.service.request_error import RequestError
from apps.service.requests import OPTIONS, SHORT_FOR, TASKS, AnyRequest
from apps.service.uploads import UploadError, read_upload
from apps.studio import controls, lora_rows
from apps.studio.page_values import PageError, Values, filled
from apps.studio.strings import Strings
from apps.studio.tabs import TABS

AUTO, CUSTOM = "auto", "custom"
RANDOM, FIXED = "random", "fixed"
MODELS_OWN = {"steps", "guidance", "temperature", "top_k", "top_p"}
"""Fields whose controls show the model's own defaults, once it is loaded."""
MASK_HEAD = "data:image/png;base64,"


def form_to_request(values: Values, tasks: tuple[str, ...], overrides: Mapping[str, Any] | None = None) -> AnyRequest:
    """Make the request that the page asks for.

    Args:
        values: what stands on the page; the mask and the source by their hashes.
        tasks: what the chosen model can do; empty if that isn't known yet.
        overrides: fields of the request that replace those of the page, such as those of a line of a file.

    Raises:
        PageError: something is missing.
        ValueError: something is out of range, or overridden though the task has no such field.
    """
    tab = TABS.get(values["mode"], TABS["text"])
    kind = TASKS[tab.task(values, tasks)]
    fields = {**controls.to_fields(values, (*controls.SHARED, *tab.places)), **_composed(values), **tab.fields(values)}
    known = {name: value for name, value in fields.items() if name in kind.model_fields}
    known |= dict.fromkeys(_decided_by_acceleration(known) & known.keys())
    if values.get("fitted", values["model"]) != values["model"]:  # the controls don't show this model's defaults yet
        known = {name: value for name, value in known.items() if name not in MODELS_OWN or value != _start(name)}
    return kind.model_validate({**known, **(overrides or {})})


def _start(name: str) -> Any:
    """Return what the control of a field shows before a model is loaded."""
    control = OPTIONS[name].option.control
    return None if control is None else control.start


def _decided_by_acceleration(fields: Mapping[str, Any]) -> set[str]:
    """Return the options that a part of the acceleration decides, of those whose controls always hold a value."""
    parts = getattr(fields.get("acceleration"), "parts", {})
    keeps_all = fields.get("kv_policy") in (None, OPTIONS["kv_policy"].option.idle)
    decided = {"few_step": {"steps", "guidance"}, "kv_cache": set(SHORT_FOR["kv_cache"]) if keeps_all else set()}
    asked = [*parts, *(["kv_cache"] if fields.get("profile") else [])]  # a profile decides that too
    return set().union(*(names for part, names in decided.items() if part in asked))


def _composed(values: Values) -> dict[str, Any]:
    """Read the shared options that take several controls, or one of another name."""
    width, height = read_size(values["shape"], values["width"], values["height"])
    cache = {"preset": values["step_cache"], "amount": values["cache_amount"] or None} if values["step_cache"] else None
    return {
        "prompt": values["prompt"],
        "model": values["model"],
        "width": width,
        "height": height,
        "seed": filled(values["seed"]) if values["seed_mode"] == FIXED else None,
        "batch_size": _no_more(filled(values["batch_size"]), values["num_images"]),
        "loras": lora_rows.read(values),
        "step_cache": cache,
    }


def _no_more(value: object, most: object) -> object:
    """Return the lesser of two numbers; the first one if either is none, which the checks of the request refuse."""
    if isinstance(value, int | float) and isinstance(most, int | float) and most >= 1:
        return min(value, most)
    return value


def read_size(shape: str, width: object, height: object) -> tuple[object, object]:
    """Return width and height from the size controls; None for the model's, or the image's, own.

    Raises:
        RequestError: the shape is neither `auto`, `custom` nor `WIDTHxHEIGHT`.
    """
    if shape == AUTO:
        return None, None
    if shape == CUSTOM:
        return filled(width), filled(height)
    first, _, second = str(shape).partition("x")
    if not (first.isdecimal() and second.isdecimal() and len(shape) < 12):
        raise RequestError("form", "The size is not understood; choose one of the list.", field="size", value=shape)
    return int(first), int(second)


def read_mask(text: str) -> Image.Image:
    """Read the mask that the brush hands over.

    Raises:
        PageError: there is none.
        UploadError: it is no image.
    """
    if not text:
        raise PageError("brush.nothing")
    try:
        data = base64.b64decode(str(text).removeprefix(MASK_HEAD), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UploadError("mask.form", "The mask is no image.") from error
    return read_upload(data).convert("L").point([0] * 128 + [255] * 128)


def size_choices(
    words: Strings, side: int, width: int, multiple: int, offered: Sequence[tuple[int, int]] = ()
) -> list[tuple[str, str]]:
    """Return the size presets of a model as (label, value), the value being `auto`, `WIDTHxHEIGHT` or `custom`.

    Args:
        words: of the page.
        side: default height, pixels.
        width: default width, pixels.
        multiple: of which sides are, pixels.
        offered: width and height of all that the model generates; empty for any.
    """
    long = max(round(side * 1.25 / multiple), 1) * multiple
    sizes = {"size.portrait": (side, long), "size.landscape": (long, side)}
    if offered:  # those in between a square and a strip, nearest in area to the model's own
        tall = [(w, h) for w, h in offered if 1.2 <= h / w <= 1.6]
        wide = [(w, h) for w, h in offered if 1.2 <= w / h <= 1.6]
        found = {"size.portrait": tall, "size.landscape": wide}
        area = side * width
        sizes = {key: min(some, key=lambda one: abs(one[0] * one[1] - area)) for key, some in found.items() if some}
    named = [(f"{words(key)} {w} \u00d7 {h}", f"{w}x{h}") for key, (w, h) in sizes.items()]
    return [(f"{words('size.auto')} {width} \u00d7 {side}", AUTO), *named, (words("size.custom"), CUSTOM)]


def settings_to_form(settings: PictureSettings) -> dict[str, Any]:
    """Return what the page holds for the settings of an image: those that generate it again, bit for bit.

    Args:
        settings: of an image; untrusted, but checked.

    Returns:
        Values by component; `mode` among them. The model is left out: the page may not have it.
    """
    mode = tab_of(settings)
    # One of a batch comes with its company, which moved its last bits.
    before = settings.pick if settings.batch_size > 1 and settings.pick is not None else 0
    count = settings.batch_size if settings.pick is not None else 1
    found = {name: getattr(settings, name) for name in PictureSettings.model_fields}
    shown = {
        **controls.to_values({**found, "style": None, "scheduler": settings.sampler}),
        **_show_composed(settings.step_cache, settings.loras),
        "mode": mode,
        "prompt": settings.prompt,
        "shape": CUSTOM,
        "width": settings.width,
        "height": settings.height,
        "seed_mode": FIXED,
        "seed": (settings.seed - before) % (limits.MAX_SEED + 1),
        "num_images": count,
        "batch_size": count,
        **TABS[mode].show(settings),
    }
    return {name: value for name, value in shown.items() if value is not None}


def request_to_form(request: AnyRequest) -> dict[str, Any]:
    """Return what the page holds for the shared settings of a request, the reverse of `form_to_request`.

    Args:
        request: untrusted, but checked.

    Returns:
        Values by component. The model is left out: the page may not have it.
    """
    found = {name: getattr(request, name) for name in type(request).model_fields}
    width, height = found.get("width"), found.get("height")
    size = {"shape": AUTO} if width is None else {"shape": CUSTOM, "width": width, "height": height}
    shown = {
        **controls.to_values(found),
        **_show_composed(found.get("step_cache"), request.loras),
        **size,
        "prompt": found.get("prompt"),
        "seed_mode": FIXED if request.seed is not None else RANDOM,
        "seed": request.seed,
    }
    return {name: value for name, value in shown.items() if value is not None}


def _show_composed(cache: StepCache | None, loras: Sequence[Lora]) -> dict[str, Any]:
    """Return what the controls hold of options that take several."""
    return {
        "step_cache": cache.preset if cache else "",
        "cache_amount": (cache.amount or 0) if cache else 0,
        **lora_rows.show(loras),
    }


def tab_of(settings: PictureSettings) -> str:
    """Return the tab that generates what an image is."""
    if settings.task.startswith("next_scale"):
        return "scales" if settings.image is None else "inpaint"
    if settings.frames is not None and settings.task in TABS["video"].tasks:
        return "video"
    return next(name for name, tab in TABS.items() if settings.task in tab.tasks)


def least_side(model: LoadedModel) -> int:
    """Return the smallest side that is allowed and that the model's grid fits."""
    return -(-32 // model.multiple) * model.multiple
