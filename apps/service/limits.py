"""What a request may ask for: the server's own limits, checked again behind every widget, flag and file.

Widgets can be by-passed by anyone who can send an HTTP request, so nothing else in `apps` decides what is too much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from apps.service.request_error import RequestError

MAX_PROMPT_CHARS = 2_000
MIN_SIDE = 32
MAX_SIDE = 2_048
MAX_PIXELS = 2_048 * 1_024
SIDE_MULTIPLE = 8
MAX_STEPS = 200
MAX_GUIDANCE = 31.0
"""30 more than none, as old records of next-scale class models have it."""
MAX_PICTURES = 16
MAX_FRAMES = 257
MAX_SEED = 2**32 - 1
"""Seeds fit 32 bits: every random generator in use takes them, and a person can still type them."""
MAX_BATCH = 8
"""Images generated at once."""
MAX_CANDIDATES = 16
"""That a search may generate for one image."""
MAX_LORAS = 4
"""On a model at once."""
MAX_MASK_GROW = 128
"""Pixels that the mask of inpainting may grow on every side."""
MAX_MASK_BLUR = 64
"""Pixels that the soft edge of a mask may be wide."""
MAX_MASK_PADDING = 512
"""Pixels around a masked area that a model may see when only that area is generated."""
MAX_UPSCALE = 4
"""Pixels a side that an upscaler may make of one."""
MAX_UPSCALED_PIXELS = 4_096 * 4_096
"""Of an upscaled image, or frame; not more than of an image handed in, so that one can be started from."""
MAX_UPSCALED_CLIP = 2**27
"""Pixels of all frames of an upscaled clip together, which are in memory at once (400 MB)."""
MAX_UPLOAD_BYTES = 20 * 1_024 * 1_024
MAX_UPLOADS_BYTES = 5 * MAX_UPLOAD_BYTES
"""Of files that are handed in together, such as photos to train on."""
MAX_UPLOAD_PIXELS = 4_096 * 4_096
MAX_UPLOAD_SIDE = 16_384
"""Of an image handed in; counted before it is decoded."""
MAX_SAVES = 20
"""That a fine-tuning may make of its adapters, and as many previews: each is a file that stays."""
MAX_METADATA_BYTES = 64 * 1_024
"""Of the settings stored in one image; read files are refused above it before they are parsed."""


GB = 1024 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadQuota:
    """What one user may keep of the images handed in; beyond it the least recently used ones go.

    Attributes:
        pictures: how many.
        bytes: of their files.
        seconds: how long one is kept after its last use.
    """

    pictures: int = 1_024  # two sets to train on of 200 images, each with a caption, and as many others
    bytes: int = 4 * GB
    seconds: float = 30 * 24 * 3_600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Limits of one running engine.

    Attributes:
        queue: how many requests may wait or run at once; a user with less than an equal part of it gets in beyond it.
        queue_per_user: how many of them may be one user's.
        seconds: wall-clock limit of one request, loading of the model excluded.
        attempts: how often a request is begun that was running when the process died.
        loaded_models: how many models stay in memory; the least recently used one leaves first.
        streams_per_user: how many event streams of jobs one user may read at once.
        hang_seconds: a job that makes no step for so long, or goes on so long after its limit, is reported as hanging.
    """

    queue: int = 128
    queue_per_user: int = 96  # a whole grid and a file of prompts
    attempts: int = 3
    seconds: float = 3_600.0
    loaded_models: int = 2
    streams_per_user: int = 16
    hang_seconds: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuningLimits:
    """Limits of the fine-tuning on a server.

    Attributes:
        minutes: that a training may take from its start, or from being resumed; it then saves and stops.
        batch_pixels: resolution squared times batch size.
        user_bytes: that the runs of one user may take.
        all_bytes: that all runs may take.
    """

    minutes: float = 240.0
    batch_pixels: int = 4 * 1_024 * 1_024
    user_bytes: int = 10 * GB
    all_bytes: int = 50 * GB


def fine_tuning_limits(minutes: float, megapixels: float, user_gb: float, gb: float) -> FineTuningLimits:
    """Return the limits that the options of a server stand for; a megapixel is 1024 x 1024 pixels.

    Raises:
        ValueError: one is no number above 0.
    """
    given = {"minutes": minutes, "megapixels": megapixels, "user-gb": user_gb, "gb": gb}
    for name, value in given.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"--train-{name} is {value}; give a number above 0.")
    return FineTuningLimits(
        minutes=minutes,
        batch_pixels=round(megapixels * 1_024 * 1_024),
        user_bytes=round(user_gb * GB),
        all_bytes=round(gb * GB),
    )


def check_size(height: int, width: int) -> None:
    """Check an image size before any model is asked.

    Args:
        height: pixels.
        width: pixels.

    Raises:
        RequestError: a side is out of range or no multiple of `SIDE_MULTIPLE`, or the area is too large.
    """
    for name, side in (("height", height), ("width", width)):
        if not MIN_SIDE <= side <= MAX_SIDE:
            raise RequestError(
                "range",
                f"{name} is {side} pixels; choose {MIN_SIDE} to {MAX_SIDE}.",
                field=name,
                value=side,
                lowest=MIN_SIDE,
                highest=MAX_SIDE,
            )
        if side % SIDE_MULTIPLE:
            nearest = round(side / SIDE_MULTIPLE) * SIDE_MULTIPLE
            raise RequestError(
                "multiple",
                f"{name} is {side} pixels; choose a multiple of {SIDE_MULTIPLE}, such as {nearest}.",
                field=name,
                value=side,
                multiple=SIDE_MULTIPLE,
                nearest=nearest,
            )
    if height * width > MAX_PIXELS:
        raise RequestError(
            "area",
            f"{width} x {height} is {height * width} pixels; choose at most {MAX_PIXELS}.",
            width=width,
            height=height,
            pixels=height * width,
            most=MAX_PIXELS,
        )


def check_upscaled(width: int, height: int, upscale: int | None, frames: int | None = None) -> None:
    """Check the size of what an upscaler would give.

    Args:
        width: pixels before.
        height: pixels before.
        upscale: pixels a side of a pixel; None for no upscaling.
        frames: of a clip; None for an image.

    Raises:
        RequestError: too many pixels; it says how far this size can be upscaled.
    """
    area, count = width * height, frames or 1
    most = MAX_UPSCALED_PIXELS if count == 1 else min(MAX_UPSCALED_PIXELS, MAX_UPSCALED_CLIP // count)
    scale = upscale or 1
    if scale == 1 or area * scale**2 <= most:
        return
    highest = max(math.isqrt(most // area), 1)
    of_frames = "" if count == 1 else f" in {count} frames"
    raise RequestError(
        "upscaled",
        f"upscale is {scale}, which makes {area * scale**2} pixels of {width} x {height}{of_frames}, and at most "
        f"{most} are accepted; choose 1 to {highest}, or a smaller size.",
        field="upscale",
        value=scale,
        lowest=1,
        highest=highest,
    )


def inside(path: Path, root: Path) -> Path:
    """Return `path` with links followed, if it lies inside `root`.

    Args:
        path: a path of unknown origin.
        root: the folder that must hold it.

    Raises:
        ValueError: the path leads out of the folder.
    """
    real = path.resolve()
    if not real.is_relative_to(root.resolve()):
        raise ValueError(f"{path.name!r} is not inside the folder {root.name!r}.")
    return real


def output_folder(folder: Path) -> Path:
    """Create the folder that receives images and that the studio serves to its visitors.

    Args:
        folder: created if absent; everything in it can be read by anyone who can open the page.

    Returns:
        The absolute path.

    Raises:
        ValueError: the folder is the root, a home folder, the working folder or one that holds them.
    """
    real = folder.expanduser().resolve()
    for broad in (Path.home().resolve(), Path.cwd().resolve()):
        if broad.is_relative_to(real):
            raise ValueError(
                f"{folder} is too broad for an output folder: the studio would show all of it. "
                f"Choose a folder for images alone, such as {folder / 'outputs'}."
            )
    real.mkdir(parents=True, exist_ok=True)
    return real
