"""The options of `tessera generate` as they were given; light, because `--help` imports this."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, create_model

from apps.service.declared import DeclaredOption
from apps.service.requests import OPTIONS


def _several(value: Any) -> Any:
    """Take one value of an option that may be repeated, as lines of a file have it."""
    return value if value is None or isinstance(value, list | tuple) else (value,)


class GenerateOptions(BaseModel):
    """What was said on the command line; None was not said.

    Options that the command line has as requests have them are added by `make_options`.

    Attributes:
        prompt: what to generate; a class for a model of classes.
        model: built-in name, folder, single file or hub id.
        size: `128`, or `WIDTHxHEIGHT` such as `160x128`.
        image: file of an image to start from.
        last_image: file of an image that a clip ends with.
        video: file of a clip to complete.
        mask: file of a mask, white where to generate.
        dtype: data type of the weights.
        lora: files of LoRAs, or PEFT's folders.
        lora_scale: of each; 1 is as trained.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str | None = None
    model: str | None = None
    size: str | None = None
    image: Path | None = None
    mask: Path | None = None
    last_image: Path | None = None
    video: Path | None = None
    dtype: str | None = None
    lora: Annotated[tuple[Path, ...] | None, BeforeValidator(_several)] = None
    lora_scale: Annotated[tuple[float, ...] | None, BeforeValidator(_several)] = None

    def value(self, name: str) -> Any:
        """Return an option by its name on the command line; None if it was not said."""
        return getattr(self, name, None)

    def changed(self, **values: Any) -> GenerateOptions:
        """Return a copy with other values of some options."""
        return self.model_copy(update=values)


DERIVED = {one.flag: one for one in OPTIONS.values() if one.option.panel}
"""Options that the command line has as requests have them, by their names there."""
NEEDS = {
    **{one.flag: one.option.needs for one in DERIVED.values() if one.option.needs in {"image", "video", *DERIVED}},
    "mask": "image",
}
"""Options that mean nothing without another one."""


def command_type(one: DeclaredOption) -> Any:
    """Return the type of an option on the command line and in files of prompts: a value of several parts is a text."""
    return one.type if one.type in (int, float, bool) else str


_fields: dict[str, Any] = {name: (command_type(one) | None, None) for name, one in DERIVED.items()}
_AllOptions = create_model("GenerateOptions", __base__=GenerateOptions, __module__=__name__, **_fields)


def make_options(**values: Any) -> GenerateOptions:
    """Return the options of a command.

    Args:
        **values: by their names on the command line, with underscores.

    Raises:
        pydantic.ValidationError: an unknown option, or a value of another type; ranges are checked by the request.
    """
    return _AllOptions.model_validate(values)
