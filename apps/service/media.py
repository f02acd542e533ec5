"""Clips: frames written as MP4 with the settings that reproduce them, and one still image that shows a clip."""

from __future__ import annotations

import base64
import importlib.util
import io
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from apps.service.metadata import MetadataError, PictureSettings, parse
from apps.service.sound import Sound, add_track, fill_track

STILLS = 4
"""Frames that the still image of a clip shows side by side."""
QUALITY = "18"
"""Constant rate factor of H.264: visually close to lossless."""


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames in order.

    Attributes:
        frames: RGB images of one size.
        fps: frames a second.
        sound: what is heard meanwhile; None for a clip without a track.
    """

    frames: tuple[Image.Image, ...]
    fps: float
    sound: Sound | None = None

    @property
    def seconds(self) -> float:
        """How long it plays."""
        return len(self.frames) / self.fps


def require_video() -> None:
    """Check that clips can be written.

    Raises:
        ImportError: PyAV is not installed.
    """
    if importlib.util.find_spec("av") is None:
        raise ImportError("Writing clips needs PyAV: pip install 'tessera[studio]'.")


def clip_of(picture: Path, settings: PictureSettings) -> Path | None:
    """Return the file of the clip that an image shows some frames of; None for an image, or if the file is gone."""
    file = picture.with_suffix(".mp4")
    return file if settings.frames is not None and file.is_file() else None


def contact_strip(frames: Sequence[Image.Image], count: int = STILLS) -> Image.Image:
    """Lay evenly spaced frames side by side, the first and the last one among them.

    Args:
        frames: of a clip, all of one size.
        count: how many to show at most.

    Returns:
        One image as high as a frame.
    """
    shown = [frames[round(i)] for i in np.linspace(0, len(frames) - 1, min(count, len(frames)))]
    width, height = shown[0].size
    strip = Image.new("RGB", (width * len(shown), height))
    for i, frame in enumerate(shown):
        strip.paste(frame, (i * width, 0))
    return strip


def clip_uri(frames: Sequence[Image.Image], fps: float) -> str:
    """Return frames as the data URI of an animated WebP file, which browsers play as an image.

    Args:
        frames: RGB images of one size.
        fps: frames a second.
    """
    buffer, (first, *rest) = io.BytesIO(), frames
    options = {"duration": round(1000 / fps), "loop": 0, "quality": 85, "method": 0}
    first.save(buffer, format="WEBP", save_all=True, append_images=rest, **options)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def candidate_sheet(images: Sequence[Image.Image], most: int = 16) -> Image.Image:
    """Lay images of one size out in rows, about as many rows as columns.

    Args:
        images: at least one.
        most: how many are shown; the first ones.
    """
    shown = list(images[:most])
    columns = math.ceil(math.sqrt(len(shown)))
    width, height = shown[0].size
    gap = max(width // 64, 1)
    rows = math.ceil(len(shown) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for place, image in enumerate(shown):
        row, column = divmod(place, columns)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet


def save_mp4(clip: Clip, path: Path, settings: PictureSettings | None) -> Path:
    """Write a clip with its settings; the file appears complete or not at all.

    Args:
        clip: width and height even, as H.264 wants them.
        path: the file to write; an existing one is replaced.
        settings: what reproduces the clip, stored as the file's comment; None leaves it out.

    Returns:
        `path`.

    Raises:
        ValueError: the name doesn't end in `.mp4`.
        ImportError: PyAV is not installed.
    """
    require_video()
    import av

    if path.suffix.lower() != ".mp4":
        raise ValueError(f"{path.name!r} is no MP4 name; clips are written as '.mp4'.")
    partial = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "faststart"}) as file:
            if settings is not None:
                file.metadata["comment"] = settings.model_dump_json()
            stream = file.add_stream("libx264", rate=Fraction(clip.fps).limit_denominator(1000))
            stream.width, stream.height = clip.frames[0].size
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": QUALITY}
            track = None if clip.sound is None else add_track(file, clip.sound)
            for image in clip.frames:
                file.mux(stream.encode(av.VideoFrame.from_image(image.convert("RGB"))))
            file.mux(stream.encode())
            if clip.sound is not None:
                fill_track(file, track, clip.sound, clip.seconds)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_mp4(path: Path) -> PictureSettings:
    """Read the settings of a clip of any origin; see `apps.service.metadata.read_picture`.

    Raises:
        MetadataError: no MP4, no settings in it, too long, or outside the schema.
        ImportError: PyAV is not installed.
    """
    require_video()
    import av

    try:
        with av.open(str(path), format="mp4") as file:
            text = file.metadata.get("comment")
    except (OSError, ValueError, av.FFmpegError) as error:
        raise MetadataError("settings.form", f"{path.name!r} is not a readable MP4 file.", file=path.name) from error
    if text is None:
        raise MetadataError(
            "settings.none", f"{path.name!r} carries no settings; only clips made by tessera do.", file=path.name
        )
    return parse(text)
