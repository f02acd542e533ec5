"""What the options of `tessera generate` ask for: read, and checked as far as that is possible without a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from apps.commands.given_options import DERIVED, NEEDS, GenerateOptions, command_type, make_options
from apps.service.foreign_files import ReadSettings, read_file
from apps.service.metadata import PictureSettings, request_from_settings
from apps.service.model_pool import abilities_on_disk
from apps.service.named_settings import load_presets, preset_values
from apps.service.option_text import as_label, parse_size
from apps.service.option_values import IMAGE_FIELDS
from apps.service.requests import OPTIONS, REQUEST, TASKS, AnyRequest, explain
from apps.service.styles import load_styles
from apps.service.usage import UsageError, checking
from apps.service.validation import explain_item
from pipelines import builtin_models, builtin_upscalers

DEFAULT_SEED = 0
"""The same words give the same image, unless a seed is given."""
DEFAULT_SYNTAX = "dynamic"
"""How prompts that are typed are read, see `apps.service.prompt_texts`."""
ANY_IMAGE = "0" * 64
"""Stands for an image that is read later."""
FIRST_TASKS = ("text_to_image", "class_to_image", "next_scale_text", "next_scale_class")
"""What a model may do first, if its folder doesn't tell."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[0-9a-f]{40})?")
SIZES = ("width", "height")
"""Fields that the command line has as one option, `size`."""


def check_options(options: GenerateOptions, source: str, recorded: PictureSettings | None = None) -> AnyRequest | None:
    """Check all that can be checked before a model is loaded.

    Args:
        options: of the command.
        source: name of the model.
        recorded: settings of an image, for all that the options leave open.

    Returns:
        A request as the options ask for it, with stand-ins for images; None with the settings of an image, whose
        request can be made without the model.

    Raises:
        UsageError: an unknown name, a value out of range or of another form, or options that don't go together.
    """
    for name, other in NEEDS.items():
        if options.value(name) is not None and options.value(other) is None and getattr(recorded, other, None) is None:
            raise UsageError(f"{_flag(name)} goes with {_flag(other)}; give both or neither.")
    with checking():
        values = asked(options)
    for name, offered in (("style", load_styles()), ("preset", load_presets())):
        wanted = options.value(name)
        if wanted is not None and wanted not in offered:
            raise UsageError(f"There is no {name} {wanted!r}; choose among {', '.join(offered)}.")
    if recorded is not None:
        return None
    values |= {name: ANY_IMAGE for name in IMAGE_FIELDS if options.value(name) is not None}
    values |= {"video_frames": 1} if "video" in values else {}
    problems = []
    for first in abilities_on_disk(source).tasks[:1] or FIRST_TASKS:
        try:
            return complete(values, options.prompt, task_of(values, first))
        except UsageError as error:
            problems.append(error)
    raise problems[0]


def asked(options: GenerateOptions) -> dict[str, Any]:
    """Return the fields of a request that the options set; without the prompt, and what is read from files.

    Raises:
        ValueError: a size, an expansion or a step cache is of another form or out of range.
    """
    width, height = parse_size(options.size)
    said = {"width": width, "height": height, "dtype": options.dtype}
    for name, one in DERIVED.items():
        value = options.value(name)
        said[one.name] = one.from_text(value) if isinstance(value, str) else value
    return {name: value for name, value in said.items() if value is not None}


def task_of(values: dict[str, Any], first: str) -> str:
    """Return the task of a request: by the images that it starts from, else what its model does first."""
    if "mask" in values or "expand" in values:  # next-scale models change parts of images in the tasks they have
        return first if first.startswith("next_scale") else "inpaint"
    if "video" in values:
        return "video_completion"
    return "image_to_image" if "image" in values else first


def complete(values: dict[str, Any], prompt: str | None, task: str) -> AnyRequest:
    """Make a request of its fields.

    Args:
        values: all but the prompt.
        prompt: text, or the number or name of a class.
        task: what is asked for.

    Raises:
        UsageError: a field is missing, out of range, or one that the task doesn't have.
    """
    if prompt is None:
        raise UsageError("There is nothing to generate: give a prompt, or --settings with an image.")
    takes_class = task in ("class_to_image", "next_scale_class")
    subject = {"label": as_label(prompt)} if takes_class else {"prompt": prompt, "prompt_syntax": DEFAULT_SYNTAX}
    try:
        return REQUEST.validate_python({"seed": DEFAULT_SEED, **subject, **values, "task": task})
    except ValidationError as error:
        raise UsageError(_sentence(explain(error))) from None


def complete_again(values: dict[str, Any], prompt: str | None, recorded: PictureSettings, model: str) -> AnyRequest:
    """Make a request of the settings of an image.

    Args:
        values: fields that differ.
        prompt: text, or the number or name of a class; None is that of the settings.
        recorded: the settings.
        model: key of the model.

    Raises:
        UsageError: a field is out of range, or one that the task doesn't have.
    """
    kind = TASKS[recorded.task]
    if "preset" in values:  # it was said now, so it goes before what the image had
        with checking():
            values = preset_values(values["preset"], kind.model_fields) | values
        del values["preset"]
    if prompt is not None:
        typed = {"prompt": prompt, "prompt_syntax": DEFAULT_SYNTAX, **values}  # what was typed now is read as such
        values = typed if recorded.label is None else {**values, "label": as_label(prompt)}
    unknown = sorted(set(values) - set(kind.model_fields))
    if unknown:
        names = ", ".join(map(_flag, unknown))
        raise UsageError(f"{names}: the settings are of {recorded.task}, which has no such setting; leave it out.")
    try:
        return request_from_settings(recorded, **values, model=model)
    except ValidationError as error:
        items = error.errors(include_url=False, include_input=False)
        raise UsageError(_sentence("; ".join(explain_item(item, kind) for item in items))) from None


def _sentence(text: str) -> str:
    """End a text with one full stop; the messages of our own checks have theirs."""
    return f"{text.removesuffix('.')}."


def read_line(values: dict[str, Any]) -> dict[str, Any]:
    """Check the types of options that come from JSON; numbers may stand for a size and for the prompt of a class.

    Raises:
        UsageError: an option is of another type.
    """
    plain = {"size", "prompt"}
    texts = {
        name: str(one) if name in plain and isinstance(one, int) and not isinstance(one, bool) else one
        for name, one in values.items()
    }
    try:
        read = make_options(**texts)
    except ValidationError as error:
        names = sorted({str(item["loc"][0]) for item in error.errors()})
        hints = ", ".join(f"{name} ({_type_name(name)})" for name in names if name in make_options().model_dump())
        raise UsageError(f"values of another type: {hints}") from error
    return {name: read.value(name) for name in values}


def _type_name(name: str) -> str:
    """Say what an option takes."""
    one = DERIVED.get(name)
    kind = float if name == "lora_scale" else str if one is None else command_type(one)
    return kind.__name__


def _flag(name: str) -> str:
    """Return the option that sets a field."""
    flag = "size" if name in SIZES else OPTIONS[name].flag if name in OPTIONS else name
    return f"--{flag.replace('_', '-')}"


def named_model(recorded: PictureSettings) -> str:
    """Return the model that settings name: a built-in one or a hub id, never something on this machine.

    Raises:
        ValueError: another name; the folder must be named by who runs the command, not by a file of unknown origin.
    """
    is_hub_id = HUB_ID.fullmatch(recorded.model) is not None
    if recorded.model in builtin_models() or (is_hub_id and not Path(recorded.model).exists()):
        return recorded.model
    raise ValueError(
        f"The settings name the model {recorded.model!r}, which is neither built in nor a hub id; give its folder or "
        "file with --model."
    )


def named_upscaler(recorded: PictureSettings, options: GenerateOptions) -> str | None:
    """Return the upscaler that settings name, if it is needed: a built-in one or a hub id; see `named_model`.

    Raises:
        ValueError: another name.
    """
    name = recorded.upscaler
    if name is None or options.value("upscale") == 1:
        return None
    if name in builtin_upscalers() or (HUB_ID.fullmatch(name) is not None and not Path(name).exists()):
        return name
    raise ValueError(
        f"The settings name the upscaler {name!r}, which is neither built in nor a hub id; give its folder with "
        "--upscaler, or --upscale 1 for the image as it was before."
    )


def read_settings(file: Path) -> PictureSettings:
    """Read the settings of an image, a clip or a JSON file, see `read_any_settings`."""
    return read_any_settings(file).settings


def read_any_settings(file: Path) -> ReadSettings:
    """Read the settings of an image, a clip or a JSON file, of ours or of another program.

    Raises:
        MetadataError: it carries none that pass the checks.
        OSError: it can't be read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"No file {str(file)!r} to take the settings from.")
    return read_file(file)
