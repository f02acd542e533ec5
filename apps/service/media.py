"""Clips: frames written as MP4 with the settings that reproduce them, and one still image that shows a clip."""

from __future__ import annotations

import base64
import importlib.util
import io
import math
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from apps.service.metadata import MetadataError, PictureSettings, mark_of, parse
from apps.service.provenance import finish_file
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


class ClipWriter:
    """Writes an MP4 file frame after frame, as they come; a context manager, at whose end the file is complete.

    Args:
        path: the file; an existing one is replaced.
        fps: frames a second.
        settings: what reproduces the clip, stored as the file's comment; None leaves it out.
        sound: what is heard; None writes no track.
        fragmented: write a file that players can open while it grows, whose end may be missing.
    """

    def __init__(
        self,
        path: Path,
        fps: float,
        settings: PictureSettings | None = None,
        sound: Sound | None = None,
        *,
        fragmented: bool = False,
    ) -> None:
        require_video()
        import av

        # A fragment for each frame, written at once, makes each frame watchable.
        flags = "frag_every_frame+empty_moov+default_base_moof" if fragmented else "faststart"
        options = {"movflags": flags, "flush_packets": "1"} if fragmented else {"movflags": flags}
        self._file = av.open(str(path), "w", format="mp4", options=options)
        if settings is not None:
            self._file.metadata["comment"] = settings.model_dump_json()
        self._fps, self._sound, self._fragmented = fps, sound, fragmented
        self._stream: Any = None
        self._track: Any = None
        self.frames = 0

    def append(self, frames: Iterable[Image.Image]) -> None:
        """Encode frames of one size; width and height even, as H.264 wants them."""
        import av

        for image in frames:
            stream = self._stream = self._stream or self._begin(image.size)
            self._file.mux(stream.encode(av.VideoFrame.from_image(image.convert("RGB"))))
            self.frames += 1

    def _begin(self, size: tuple[int, int]) -> Any:
        stream = self._file.add_stream("libx264", rate=Fraction(self._fps).limit_denominator(1000))
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": QUALITY, **_repeatable()}
        if self._fragmented:  # no frame waits for later ones
            stream.options |= {"tune": "zerolatency"}
        self._track = None if self._sound is None else add_track(self._file, self._sound)
        return stream

    def __enter__(self) -> ClipWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Complete the file; after an error, close it as it is."""
        try:
            if self._stream is not None:
                self._file.mux(self._stream.encode())
                if kind is None and self._sound is not None:
                    fill_track(self._file, self._track, self._sound, self.frames / self._fps)
        finally:
            self._file.close()


def _repeatable() -> dict[str, str]:
    """Return the options of x264 that make the same frames the same file on every call.

    Its AVX-512 code for macroblock trees (`mbtree_propagate_list`) takes eight blocks of a row at a time and does not
    mask those beyond it. Unless the width is a multiple of 128 pixels, what it reads behind the last row, memory that
    nobody has set, decides how finely blocks are quantized: frames differ by up to 30 levels from call to call. The
    AVX2 code stops at the end of a row; encoding takes about 4 % more time with it.
    """
    import torch

    return {"x264-params": "asm=avx2"} if torch.backends.cpu.get_cpu_capability() == "AVX512" else {}


def save_mp4(clip: Clip, path: Path, settings: PictureSettings | None, *, keep_settings: bool = True) -> Path:
    """Write a clip with its mark and its settings; the file appears complete or not at all.

    Args:
        clip: width and height even, as H.264 wants them.
        path: the file to write; an existing one is replaced.
        settings: what reproduces the clip, stored as the file's comment; None for a clip that was not generated here,
            which gets no mark either.
        keep_settings: write them too, and not the mark alone.

    Returns:
        `path`.

    Raises:
        ValueError: the name doesn't end in `.mp4`.
        ImportError: PyAV is not installed.
    """
    require_video()
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"{path.name!r} is no MP4 name; clips are written as '.mp4'.")
    partial = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with ClipWriter(partial, clip.fps, settings if keep_settings else None, clip.sound) as writer:
            writer.append(clip.frames)
        if settings is not None:
            finish_file(partial, "MP4", mark_of(settings))
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
