"""The settings that reproduce an image, written into its PNG, WebP or GIF file and read back as untrusted text.

A PNG carries one `tessera` text chunk, a WebP the EXIF description, a GIF a comment: JSON of `PictureSettings`; beside
it stands what other programs read, see `apps.service.metadata_dialects`. Reading trusts nothing: the text is capped,
parsed as JSON and checked against the schema; it can name neither a path nor a class to load. With or without them a
generated file is marked as such, see `apps.service.provenance`.
"""

from __future__ import annotations

import io
import json
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image, PngImagePlugin
from pydantic import Field, ValidationError, model_validator

from apps.service import limits, xmp
from apps.service.metadata_dialects import add_to_exif, add_to_png, write_dialects
from apps.service.option_values import SchedulerName
from apps.service.options import (
    ClassLabel,
    ClipLength,
    CompletionOptions,
    NegativePrompt,
    NextScaleOptions,
    PromptOptions,
    SharedOptions,
    SourceClip,
    StepOptions,
    Strength,
)
from apps.service.provenance import Provenance, finish_file, generated_by, packet
from apps.service.request_error import RequestError
from apps.service.requests import SHORT_FOR, TASKS, AnyRequest

CHUNK = "tessera"
"""Keyword of the text chunk."""
DESCRIPTION = 0x010E
"""EXIF tag ImageDescription, which keeps the settings of a WebP file."""
FORMATS: dict[str, xmp.Kind] = {".png": "PNG", ".webp": "WEBP"}
GIF_BEGINNING = 2 * limits.MAX_METADATA_BYTES
ANIMATIONS: dict[str, xmp.Kind] = {".gif": "GIF", ".webp": "WEBP"}

Scalar = bool | int | float | str | None
ShortText = Annotated[str, Field(max_length=200)]
WholeSide = Annotated[int, Field(ge=1, le=limits.MAX_UPLOAD_SIDE)]
Task = Literal[
    "text_to_image", "image_to_image", "inpaint", "video_completion", "class_to_image", "next_scale_class",
    "next_scale_text",
]  # fmt: skip


class PictureSettings(PromptOptions, NextScaleOptions, CompletionOptions, StepOptions, SharedOptions):
    """Everything needed to generate one image again: the options that it inherits, and what stands here.

    Attributes:
        schema_version: of this record; 1 knew text to image only, 2 neither expanding nor memory nor attention, 3
            counted the guidance of next-scale class models from 0, which is 1 now. Older ones are translated when read.
        task: what was asked for.
        prompt: the text that was generated; empty for an image of a class.
        negative_prompt: the text that was kept away from.
        prompt_template: the prompt before its alternatives were chosen, see `apps.service.prompt_texts`.
        negative_prompt_template: the negative prompt before that.
        seed: of this image's noise, drawn on the CPU in float32.
        height: pixels, before upscaling.
        width: pixels, before upscaling.
        fps: frames a second of a clip.
        model: name of the model in the list it was chosen from; never a path.
        fingerprint: hash of the model's structure and weights, 16 hex digits.
        scheduler: class name and config values of the scheduler.
        device: kind of device, such as `cpu`; another kind rounds differently.
        dtype: data type of the weights.
        versions: of the packages that computed it.
        sampler: the scheduler that was chosen instead of the model's own.
        strength: how much of the image was changed.
        label: number or name of the class.
        video: hash of the clip that was completed.
        video_frames: frames of that.
        batch_size: images that were generated at once.
        pick: which of them this is.
        upscaler_fingerprint: hash of the upscaler's weights, 16 hex digits; None if nothing was upscaled.
        whole: width and height of the image into which a masked area was put back; None where all was generated.
    """

    schema_version: Literal[1, 2, 3, 4] = 4
    task: Task = "text_to_image"
    prompt: str = Field(default="", max_length=limits.MAX_PROMPT_CHARS)
    negative_prompt: NegativePrompt = ""
    prompt_template: str | None = Field(default=None, max_length=limits.MAX_PROMPT_CHARS)
    negative_prompt_template: str | None = Field(default=None, max_length=limits.MAX_PROMPT_CHARS)
    seed: int = Field(ge=0, le=limits.MAX_SEED)
    height: int = Field(ge=1, le=limits.MAX_SIDE)
    width: int = Field(ge=1, le=limits.MAX_SIDE)
    fps: float | None = Field(default=None, gt=0, le=240)
    model: ShortText
    fingerprint: str = Field(pattern=r"^[0-9a-f]{16}$")
    scheduler: dict[ShortText, Scalar | list[Scalar]] = Field(default_factory=dict, max_length=100)
    device: ShortText = "cpu"
    dtype: ShortText = "float32"
    versions: dict[ShortText, ShortText] = Field(default_factory=dict, max_length=20)
    sampler: SchedulerName | None = None
    strength: Strength = None
    label: ClassLabel | None = None
    video: SourceClip | None = None
    video_frames: ClipLength | None = None
    batch_size: int = Field(default=1, ge=1, le=limits.MAX_BATCH)
    pick: int | None = Field(default=None, ge=0, lt=limits.MAX_BATCH)
    upscaler_fingerprint: str | None = Field(default=None, pattern=r"^[0-9a-f]{16}$")
    whole: tuple[WholeSide, WholeSide] | None = None

    @property
    def shown_size(self) -> tuple[int, int]:
        """Width and height of the image, or of a clip's frames, as it was written: upscaled, if it was."""
        scale = self.upscale or 1
        return self.whole or (self.width * scale, self.height * scale)

    @model_validator(mode="before")
    @classmethod
    def _translate(cls, data: Any) -> Any:
        """Translate a record of an older version, so that it reproduces the same image today."""
        if not isinstance(data, dict) or data.get("schema_version", 4) not in (1, 2, 3):
            return data
        changed: dict[str, Any] = {"schema_version": 4}
        guidance = data.get("guidance")
        if (
            data.get("task") == "next_scale_class"
            and isinstance(guidance, int | float)
            and not isinstance(guidance, bool)
            and guidance >= 0
        ):
            changed["guidance"] = guidance + 1
        return {**data, **changed}


def mark_of(asked: PictureSettings | AnyRequest) -> Provenance:
    """Return the mark of an image or a clip that was generated with settings, or for a request."""
    sources = (getattr(asked, name, None) for name in ("image", "mask", "last_image", "video"))
    return generated_by(asked.model or "", has_source=any(one is not None for one in sources))


def request_from_settings(settings: PictureSettings, **changes: Any) -> AnyRequest:
    """Return the request that generates an image again.

    Args:
        settings: as stored in the image.
        **changes: fields of the request to set differently.

    Raises:
        ValueError: the settings don't make a request, such as inpainting without a mask.
    """
    kind = TASKS[settings.task]
    values: dict[str, Any] = {
        name: getattr(settings, name)
        for name in kind.model_fields
        if hasattr(settings, name) and name not in ("scheduler", "model")
    }
    values |= {"scheduler": settings.sampler, "model": settings.model}
    values |= {"num_images": 1, "batch_size": 1}
    if settings.batch_size > 1 and settings.pick is not None:  # its neighbours first: they have a part in its rounding
        first = (settings.seed - settings.pick) % (limits.MAX_SEED + 1)
        values |= {"num_images": settings.batch_size, "batch_size": settings.batch_size, "seed": first}
    for part, names in SHORT_FOR.items():  # on record is what such a part decided
        if settings.acceleration is not None and part in settings.acceleration.parts:
            values |= dict.fromkeys(names)
    known = {name: value for name, value in {**values, **changes}.items() if name in kind.model_fields}
    if known.get("upscale") in (None, 1) and "upscaler" not in changes:  # nothing is upscaled this time
        known["upscaler"] = None
    return kind.model_validate(known)


class MetadataError(RequestError):
    """An image carries no settings of ours, or settings that don't pass the checks."""


def save_picture(
    image: Image.Image,
    path: Path,
    settings: PictureSettings | None,
    *,
    keep_settings: bool = True,
    is_fast: bool = False,
) -> Path:
    """Write an image with its mark and its settings; the file appears complete or not at all.

    Args:
        image: the image.
        path: the file to write, `.png` or `.webp` (without loss); an existing one is replaced.
        settings: what reproduces the image; None for an image that was not generated here, which gets no mark either.
        keep_settings: write them too, and not the mark alone.
        is_fast: compress little, for files that are read by us only.

    Returns:
        `path`.

    Raises:
        ValueError: another ending; no other format keeps image and settings as they are.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(
            f"{path.name!r} is no PNG or WebP name; other formats lose the settings. Use '.png' or '.webp'."
        )
    partial = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with partial.open("xb") as file:
            options = _saving_options(kind, settings, keep_settings) | ({"compress_level": 1} if is_fast else {})
            image.save(file, format=kind, **options)
        if settings is not None:
            finish_file(partial, kind, mark_of(settings))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def save_animation(
    frames: Sequence[Image.Image],
    fps: float,
    path: Path,
    settings: PictureSettings | None,
    *,
    keep_settings: bool = True,
) -> Path:
    """Write a clip with its mark as an animation that plays for ever; the file appears complete or not at all.

    Args:
        frames: RGB images of one size.
        fps: frames a second; the formats count in whole milliseconds, GIF in hundredths of a second.
        path: the file to write, `.gif` (256 colours a frame) or `.webp`; an existing one is replaced.
        settings: what reproduces the clip; None for a clip that was not generated here, which gets no mark either.
        keep_settings: write them too, and not the mark alone.

    Returns:
        `path`.

    Raises:
        ValueError: another ending.
    """
    kind = ANIMATIONS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path.name!r} is no GIF or WebP name; clips are written as '.mp4', '.gif' or '.webp'.")
    first, *rest = frames
    options: dict[str, Any] = {"duration": round(1000 / fps), "loop": 0, "save_all": True, "append_images": rest}
    if kind == "WEBP":
        options |= _saving_options(kind, settings, keep_settings) | {"lossless": False, "quality": 90, "method": 4}
    elif settings is not None and keep_settings:
        options["comment"] = settings.model_dump_json().encode()
    partial = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with partial.open("xb") as file:
            first.save(file, format=kind, **options)
        if settings is not None:
            finish_file(partial, kind, mark_of(settings))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def sidecar_path(picture: Path) -> Path:
    """Return the file that settings beside an image stand in."""
    return picture.with_name(f"{picture.name}.json")


def save_sidecar(settings: PictureSettings, picture: Path) -> Path:
    """Write the settings of an image beside it; the file appears complete or not at all.

    Args:
        settings: of the image.
        picture: its file; the JSON file has its whole name and `.json` behind, so that no two share one.

    Returns:
        The JSON file, which `--settings` takes as it takes the image.
    """
    path = sidecar_path(picture)
    partial = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        partial.write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_sidecar(path: Path) -> PictureSettings:
    """Read the settings that `save_sidecar` wrote, or a file of any origin in its place.

    Raises:
        MetadataError: too long, no JSON, or outside the schema.
    """
    with path.open("rb") as file:
        text = file.read(limits.MAX_METADATA_BYTES + 1).decode("utf-8", errors="replace")
    return parse(text)


def _saving_options(kind: xmp.Kind, settings: PictureSettings | None, keep_settings: bool) -> dict[str, Any]:
    """Return what `Image.save` needs for settings and mark in a format, and for no loss."""
    text, exif = PngImagePlugin.PngInfo(), Image.Exif()
    if settings is not None and keep_settings:
        text.add_itxt(CHUNK, settings.model_dump_json())
        exif[DESCRIPTION] = json.dumps(settings.model_dump(mode="json"))  # ASCII, as EXIF wants it
        dialects = write_dialects(settings)
        add_to_png(dialects, text)
        add_to_exif(dialects, exif)
    options: dict[str, Any] = {"pnginfo": text} if kind == "PNG" else {"lossless": True, "exact": True, "exif": exif}
    return options if settings is None else options | xmp.pillow_options(kind, packet(mark_of(settings)), text)


def read_picture(path: Path) -> PictureSettings:
    """Read the settings of an image of any origin.

    Args:
        path: a PNG, WebP or GIF file.

    Returns:
        The checked settings.

    Raises:
        MetadataError: no such image, no settings in it, too long, or outside the schema.
    """
    try:
        with _opened(path) as image:
            text = _settings_text(image)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's three ways to say "no PNG"
        raise MetadataError(
            "settings.form", f"{path.name!r} is not a readable PNG, WebP or GIF image.", file=path.name
        ) from error
    except Image.DecompressionBombError as error:
        raise MetadataError(
            "upload.claims",
            f"{path.name!r} claims to have more pixels than are read.",
            most=limits.MAX_UPLOAD_PIXELS,
        ) from error
    if not isinstance(text, str):
        raise MetadataError(
            "settings.none", f"{path.name!r} carries no settings; only images generated by tessera do.", file=path.name
        )
    return parse(text)


def _opened(path: Path) -> Image.Image:
    """Open an image; of a GIF only its beginning, where our comment stands: Pillow reads comments in quadratic time."""
    with path.open("rb") as file:
        is_gif = file.read(4) == b"GIF8"
        file.seek(0)
        source = io.BytesIO(file.read(GIF_BEGINNING)) if is_gif else path
    return Image.open(source, formats=["GIF"] if is_gif else list(FORMATS.values()))


def _settings_text(image: Image.Image) -> object:
    """Return what stands in an opened file where we write settings."""
    if image.format == "PNG":
        return image.info.get(CHUNK)
    if image.format == "WEBP":
        return image.getexif().get(DESCRIPTION)
    comment = image.info.get("comment", b"")
    return comment.decode("utf-8") if isinstance(comment, bytes) and comment.startswith(b"{") else None


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
        raise MetadataError(
            "settings.bytes",
            f"The settings take {size} bytes; at most {limits.MAX_METADATA_BYTES} are read.",
            value=size,
            most=limits.MAX_METADATA_BYTES,
        )
    try:
        return PictureSettings.model_validate_json(text)
    except (ValidationError, RecursionError) as error:
        wrong = _wrong_fields(error)
        raise MetadataError("settings.checks", f"The settings don't pass the checks ({wrong}).", names=wrong) from error


def _wrong_fields(error: Exception) -> str:
    """Name the fields that failed, cut and cleaned: the names come from the untrusted text too."""
    items = error.errors() if isinstance(error, ValidationError) else []
    names = {".".join(map(str, item["loc"])) for item in items} - {""}
    return ", ".join(sorted(re.sub(r"[^\w.]", "?", name)[:40] for name in names)[:8]) or "the text as a whole"
