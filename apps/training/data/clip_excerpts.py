"""Excerpts of clips: which frames, at which rate. Clips need PyAV.

Frames are chosen by their times and not by their numbers, for phones record at a rate that varies. A clip is decoded
twice, since containers that know their number of frames often know it wrongly, and keeps only one frame in memory.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from apps.training.data.decode import CLIP_SUFFIXES, read_frames


@dataclass(frozen=True)
class FileFacts:
    """What is known of a file once it was decoded.

    Attributes:
        height, width: In pixels, upright.
        frames: Of a clip; 1 of an image.
        seconds: How long a clip plays; 0 of an image.
    """

    height: int
    width: int
    frames: int = 1
    seconds: float = 0.0

    @property
    def frame_rate(self) -> float:
        """Mean frames a second; 0 of what does not move."""
        return self.frames / self.seconds if self.seconds else 0.0

    def has_excerpt(self, count: int, frame_rate: float | None) -> bool:
        """Tell whether `count` frames at a rate lie in the clip; without a rate, whether it has as many."""
        if frame_rate is None or count == 1:
            return self.frames >= count
        # The last frame may be half a frame's time away from where it should be.
        return self.seconds > 0 and (self.frames - 0.5) / self.frame_rate >= (count - 1) / frame_rate


def inspect_file(path: Path) -> list[Any]:
    """Decode a whole file and return its `FileFacts` as a JSON value.

    Raises:
        ValueError: If the file holds no image or frame.
        OSError: If it cannot be read.
    """
    if not is_clip(path):
        width, height = read_frames(path)[0].size
        return list(astuple(FileFacts(height, width)))
    times, height, width = [], 0, 0
    for time, frame in _decode(path):
        if not times:
            height, width = frame.height, frame.width
            if frame.rotation % 180:  # lies on its side
                height, width = width, height
        times.append(time)
    if not times:
        raise ValueError("no frames")
    count = len(times)
    seconds = (times[-1] - times[0]) * count / (count - 1) if count > 1 else 0.0
    return list(astuple(FileFacts(height, width, count, seconds)))


def is_clip(path: Path) -> bool:
    """Tell a clip from an image by its suffix."""
    return path.suffix.lower() in CLIP_SUFFIXES


def read_excerpt(path: Path, count: int, frame_rate: float | None) -> Iterator[Image.Image]:
    """Decode frames of a clip, or the one of an image.

    Args:
        path: An image, which gives a single frame, or a clip.
        count: Frames of a clip; 1 is the one in the middle.
        frame_rate: Frames a second of the excerpt, which lies in the middle of the clip; None spreads the frames evenly
            over the whole clip.

    Yields:
        RGB images, upright.

    Raises:
        ValueError: If the file holds no image or frame.
        OSError: If it cannot be read.
    """
    if not is_clip(path):
        yield read_frames(path)[0]
        return
    times = np.array([time for time, _ in _decode(path)])  # (N,) in seconds
    if not len(times):
        raise ValueError("no frames")
    repeats = np.bincount(chosen_frames(times, count, frame_rate), minlength=len(times))  # (N,)
    for repeat, (_, frame) in zip(repeats, _decode(path), strict=True):
        if repeat:
            yield from [_upright(frame)] * int(repeat)


def chosen_frames(times: np.ndarray, count: int, frame_rate: float | None) -> np.ndarray:
    """Choose frames of a clip, see `read_excerpt`.

    Args:
        times: Of all frames in seconds, ascending, (N,).
        count: T.
        frame_rate: Frames a second, or None.

    Returns:
        Numbers of the frames, ascending, (T,); one is repeated where the clip has no other near that time.
    """
    if frame_rate is None or count == 1:
        return ((np.arange(count) + 0.5) * len(times) / count).astype(int)  # (T,)
    spare = max(times[-1] - times[0] - (count - 1) / frame_rate, 0.0)
    # From a frame on, so that an excerpt at the clip's own rate has the clip's own frames.
    first = np.searchsorted(times, times[0] + spare / 2 + 1e-6, side="right") - 1
    wanted = times[first] + np.arange(count) / frame_rate  # (T,)
    return np.abs(times[None] - wanted[:, None]).argmin(axis=1)  # (T, N) -> (T,)


def _decode(path: Path) -> Iterator[tuple[float, Any]]:
    """Yield the frames of a clip with their times in seconds.

    Raises:
        ValueError: If it holds no readable clip.
    """
    import av

    try:
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            for number, frame in enumerate(file.decode(stream)):
                rate = float(stream.average_rate or 1)  # frames without a time have numbers only
                yield (number / rate if frame.time is None else float(frame.time)), frame
    except (av.FFmpegError, IndexError) as error:  # an index error: no video stream
        raise ValueError(f"no readable clip: {error}") from error


def _upright(frame: Any) -> Image.Image:
    """Turn a frame as its clip says; phones record upright clips lying on their side."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
