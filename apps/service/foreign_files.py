"""The settings of image files of any program: ours where they are there, else what other programs wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from pydantic import ValidationError

from apps.service import limits
from apps.service.media import read_mp4
from apps.service.metadata import MetadataError, PictureSettings, read_picture, read_sidecar
from apps.service.metadata_dialects import read_dialects
from apps.service.recipe import Note, fields_of

UNKNOWN = "0" * 16
"""Fingerprint of weights that nobody knows."""
FORMATS = ("PNG", "WEBP", "JPEG")


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """The settings of a file.

    Attributes:
        settings: that pass our checks; of a foreign file those that have a like here.
        program: that wrote them, '' for ours.
        notes: what could not be kept.
    """

    settings: PictureSettings
    program: str = ""
    notes: tuple[Note, ...] = ()


def read_file(path: Path) -> ReadSettings:
    """Read the settings of an image, a clip, or the JSON file beside one.

    Args:
        path: of any origin; PNG, WebP, JPEG, GIF, MP4 or JSON.

    Raises:
        MetadataError: there are none, or ours do not pass the checks.
        ImportError: it is a clip, and PyAV is not installed.
        OSError: it can't be read.
    """
    kind = path.suffix.lower()
    if kind == ".json":
        return ReadSettings(read_sidecar(path))
    if kind == ".mp4":
        return ReadSettings(read_mp4(path))
    try:
        return ReadSettings(read_picture(path))
    except MetadataError as error:
        if error.key not in ("settings.none", "settings.form"):
            raise
        foreign = read_foreign(path)
        if foreign is None:
            raise
        return foreign


def read_foreign(path: Path) -> ReadSettings | None:
    """Read what another program wrote into an image.

    Args:
        path: a PNG, WebP or JPEG file of any origin.

    Returns:
        Settings and what could not be kept; None if there is nothing that can be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            recipe, shown = read_dialects(image), image.size
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, EOFError, Image.DecompressionBombError):
        return None  # Pillow's ways to say that a file, or its EXIF, is broken
    if recipe is None or shown[0] * shown[1] > limits.MAX_UPLOAD_PIXELS:
        return None
    fields = fields_of(recipe, shown)
    try:
        settings = PictureSettings.model_validate({**fields, "fingerprint": UNKNOWN})
    except ValidationError:  # a value that no check above knows: nothing of it can be trusted
        return None
    return ReadSettings(settings, recipe.program, tuple(recipe.notes))
