"""Clips that people hand in: decoded, checked, and kept as one image of all frames below each other.

So a clip has a name as images have (see `apps.service.uploads`), and its frames come back as they were, bit by bit.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from apps.service import limits
from apps.service.media import require_video
from apps.service.uploads import Source, UploadError, UploadStore

CODECS = frozenset({"h264", "hevc", "mpeg4", "vp8", "vp9", "av1", "libdav1d", "gif"})
"""Codecs that are read of clips of unknown origin."""
CONTAINERS = ("mp4", "webm", "gif")
MAX_PIXELS = 2**25
"""Of all frames of a clip: 134 MB as they are decoded, a few times that while they are kept."""


@dataclass(frozen=True, slots=True)
class ReceivedClip:
    """A clip that was handed in.

    Attributes:
        name: hash of the image of its frames.
        frames: their number.
        size: their width and height.
        notes: what of it was left out, a sentence each, as images have them, see `apps.service.events.Picture`.
    """

    name: str
    frames: int
    size: tuple[int, int]
    notes: tuple[str, ...] = ()


def receive_clip(uploads: UploadStore, data: Source, owner: str = "local") -> ReceivedClip:
    """Decode a clip of unknown origin and keep it.

    Args:
        uploads: where it is kept.
        data: the file, or its content: MP4, WebM or GIF.
        owner: who hands it in.

    Returns:
        What was kept.

    Raises:
        UploadError: too large, no clip, or PyAV is not installed.
    """
    with uploads.decoding:
        frames, is_cut = read_clip(data)
        name = uploads.add(join_frames(frames), owner, is_cut=is_cut)
        return ReceivedClip(name, len(frames), frames[0].size, (cut_note(),) if is_cut else ())


def cut_note() -> str:
    """Say that a clip was too long to be kept whole."""
    most = limits.MAX_FRAMES
    return f"The clip that was handed in is longer than {most} frames; the first {most} are used."


def read_clip(data: Source) -> tuple[list[Image.Image], bool]:
    """Decode a clip of unknown origin.

    Args:
        data: see `receive_clip`.

    Returns:
        Its frames, RGB, and whether more follow; of longer clips there are the first `limits.MAX_FRAMES`.

    Raises:
        UploadError: too large, no clip, or PyAV is not installed.
    """
    with _opened(data) as file:
        size = file.seek(0, io.SEEK_END)
        if size > limits.MAX_UPLOAD_BYTES:
            raise UploadError(
                "upload.bytes",
                f"The clip has {size} bytes; at most {limits.MAX_UPLOAD_BYTES} are taken.",
                value=size,
                most=limits.MAX_UPLOAD_BYTES,
            )
        file.seek(0)
        return _video(file)


def last_frames(clip: Path, count: int) -> list[Image.Image]:
    """Return the last frames of a clip that was made here, of whatever size and length.

    Raises:
        UploadError: it can't be read any more.
    """
    require_video()
    import av

    try:
        with av.open(str(clip), format="mp4") as container:
            frames = deque(container.decode(video=0), maxlen=count)
            return [frame.to_image() for frame in frames]
    except (OSError, av.FFmpegError) as error:
        raise _no_clip() from error


def join_frames(frames: list[Image.Image]) -> Image.Image:
    """Return one image of frames of one size below each other; see `split_frames`."""
    width, height = frames[0].size
    joined = Image.new("RGB", (width, height * len(frames)))
    for i, frame in enumerate(frames):
        joined.paste(frame, (0, i * height))
    return joined


def split_frames(joined: Image.Image, count: int) -> list[Image.Image]:
    """Return the frames that `join_frames` joined.

    Raises:
        UploadError: the image isn't one of so many frames.
    """
    height, rest = divmod(joined.height, count)
    if rest or height == 0:
        raise _no_clip()
    return [joined.crop((0, i * height, joined.width, (i + 1) * height)) for i in range(count)]


@contextmanager
def _opened(data: Source) -> Iterator[Any]:
    if isinstance(data, bytes):
        yield io.BytesIO(data)
    elif isinstance(data, Path):
        with data.open("rb") as file:
            yield file
    else:
        yield data


def _video(file: Any) -> tuple[list[Image.Image], bool]:
    try:
        require_video()
    except ImportError as error:
        raise UploadError("upload.clip", str(error)) from error
    import av

    for form in CONTAINERS:
        file.seek(0)
        try:
            with av.open(file, format=form) as container:
                stream = container.streams.video[0]
                codec = stream.codec_context
                if codec is None or codec.name not in CODECS:
                    raise _no_clip()
                # What a frame says of its size within the stream goes before what the container says.
                codec.options = {"max_pixels": str(limits.MAX_SIDE**2)}
                codec.thread_count = 1
                _check_size(stream.width, stream.height, 1)
                return _decoded(container, stream)
        except (IndexError, av.FFmpegError, ValueError, OSError) as error:
            if isinstance(error, UploadError):
                raise
    raise _no_clip()


def _decoded(container: Any, stream: Any) -> tuple[list[Image.Image], bool]:
    """Decode the frames of a video, each of the size that it said at first, and find out whether more follow."""
    frames: list[Image.Image] = []
    decoding = container.decode(stream)
    for frame in islice(decoding, limits.MAX_FRAMES):
        if (frame.width, frame.height) != (stream.width, stream.height):
            raise _no_clip()
        _check_size(frame.width, frame.height, len(frames) + 1)
        frames.append(frame.to_image())
    if not frames:
        raise _no_clip()
    return frames, len(frames) == limits.MAX_FRAMES and _goes_on(decoding)


def _goes_on(decoding: Iterator[Any]) -> bool:
    """Return whether frames follow; what can't be decoded counts as some, because nothing of it is kept."""
    import av

    try:
        return next(decoding, None) is not None
    except av.FFmpegError:
        return True


def _check_size(width: int, height: int, frames: int) -> None:
    """Refuse clips that take too much memory, before they are decoded.

    Raises:
        UploadError: the clip is too large.
    """
    if max(width, height) > limits.MAX_SIDE:
        raise UploadError(
            "upload.side",
            f"The clip has {width} x {height} pixels; at most {limits.MAX_SIDE} along a side are taken.",
            value=f"{width} x {height}",
            most=limits.MAX_SIDE,
        )
    if width * height * frames > MAX_PIXELS:
        raise UploadError(
            "upload.pixels",
            f"The clip has more than {MAX_PIXELS} pixels in all its frames; send fewer or smaller frames.",
            value=f"{width} x {height} x {frames}",
            most=MAX_PIXELS,
        )


def _no_clip() -> UploadError:
    return UploadError("upload.clip", "This is no clip that can be read; send MP4 (H.264), WebM or GIF.")
