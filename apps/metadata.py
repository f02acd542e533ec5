"""The settings that reproduce a picture, written into its PNG file and read back as untrusted text.

A picture carries one `tessera` text chunk: JSON of `PictureSettings`. Reading trusts nothing: the text is capped,
parsed as JSON and checked against the schema; it can name neither a path nor a class to load.
"""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import Annotated, Literal

from PIL import Image, PngImagePlugin
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apps import limits

CHUNK = "tessera"
"""Keyword of the text chunk."""

Scalar = bool | int | float | str | None
ShortText = Annotated[str, Field(max_length=200)]


class PictureSettings(BaseModel):
    """Everything needed to paint one picture again.

    Attributes:
        schema_version: of this record.
        prompt: the text that was painted.
        negative_prompt: the text that was kept away from.
        seed: of this picture's noise, drawn on the CPU in float32.
        steps: denoising steps.
        guidance: guidance scale.
        height: pixels.
        width: pixels.
        frames: of a clip; None for a picture.
        fps: frames a second of a clip.
        model: name of the model in the list it was chosen from; never a path.
        fingerprint: hash of the model's structure and weights, 16 hex digits.
        scheduler: class name and config values of the scheduler.
        device: kind of device, such as `cpu`; another kind rounds differently.
        dtype: number format of the weights.
        versions: of the packages that computed it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    prompt: str = Field(max_length=limits.MAX_PROMPT_CHARS)
    negative_prompt: str = Field(default="", max_length=limits.MAX_PROMPT_CHARS)
    seed: int = Field(ge=0, le=limits.MAX_SEED)
    steps: int = Field(ge=1, le=limits.MAX_STEPS)
    guidance: float = Field(ge=0, le=limits.MAX_GUIDANCE)
    height: int = Field(ge=1, le=limits.MAX_SIDE)
    width: int = Field(ge=1, le=limits.MAX_SIDE)
    frames: int | None = Field(default=None, ge=1, le=limits.MAX_FRAMES)
    fps: float | None = Field(default=None, gt=0, le=240)
    model: ShortText
    fingerprint: str = Field(pattern=r"^[0-9a-f]{16}$")
    scheduler: dict[ShortText, Scalar | list[Scalar]] = Field(default_factory=dict, max_length=100)
    device: ShortText = "cpu"
    dtype: ShortText = "float32"
    versions: dict[ShortText, ShortText] = Field(default_factory=dict, max_length=20)


class MetadataError(ValueError):
    """A picture carries no settings of ours, or settings that don't pass the checks."""


def save_png(image: Image.Image, path: Path, settings: PictureSettings) -> Path:
    """Write a picture with its settings; the file appears complete or not at all.

    Args:
        image: the picture.
        path: the file to write; an existing one is replaced.
        settings: what reproduces the picture.

    Returns:
        `path`.

    Raises:
        ValueError: the name doesn't end in `.png`; no other format keeps the settings.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path.name!r} is no PNG name; settings are kept in PNG files only. Use '.png'.")
    text = PngImagePlugin.PngInfo()
    text.add_itxt(CHUNK, settings.model_dump_json())
    partial = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with partial.open("xb") as file:
            image.save(file, format="PNG", pnginfo=text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_png(path: Path) -> PictureSettings:
    """Read the settings of a picture of any origin.

    Args:
        path: a PNG file.

    Returns:
        The checked settings.

    Raises:
        MetadataError: no PNG, no settings in it, too long, or outside the schema.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(CHUNK)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's three ways to say "no PNG"
        raise MetadataError(f"{path.name!r} is not a readable PNG picture.") from error
    if not isinstance(text, str):
        raise MetadataError(f"{path.name!r} carries no settings; only pictures painted by tessera do.")
    return parse(text)


def parse(text: str) -> PictureSettings:
    """Check settings given as JSON text.

    Args:
        text: JSON of unknown origin, at most `limits.MAX_METADATA_BYTES` in UTF-8.

    Returns:
        The checked settings.

    Raises:
        MetadataError: too long, no JSON, or outside the schema.
    """
    size = len(text.encode("utf-8", errors="replace"))
    if size > limits.MAX_METADATA_BYTES:
        raise MetadataError(f"The settings take {size} bytes; at most {limits.MAX_METADATA_BYTES} are read.")
    try:
        return PictureSettings.model_validate_json(text)
    except (ValidationError, RecursionError) as error:
        raise MetadataError(f"The settings don't pass the checks ({_wrong_fields(error)}).") from error


def _wrong_fields(error: Exception) -> str:
    """Name the fields that failed, cut and cleaned: the names come from the untrusted text too."""
    items = error.errors() if isinstance(error, ValidationError) else []
    names = {".".join(map(str, item["loc"])) for item in items} - {""}
    return ", ".join(sorted(re.sub(r"[^\w.]", "?", name)[:40] for name in names)[:8]) or "the text as a whole"
