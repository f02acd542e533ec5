"""Files as square images: reading, orientation, aspect ratio. Clips need PyAV."""

import importlib.util
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
CLIP_SUFFIXES = frozenset({".mp4", ".mov", ".webm", ".mkv", ".avi"})

Fit = Literal["crop", "pad", "stretch"]


def has_clip_reader() -> bool:
    """Tell whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


def read_frames(path: Path, count: int = 1) -> list[Image.Image]:
    """Decode an image, or some frames of a clip.

    Args:
        path: An image or a clip, told apart by the suffix.
        count: Frames, spread evenly over the clip; 1 is the one in the middle. An image is repeated.

    Returns:
        RGB images, turned upright as EXIF says; what is transparent is white; of an animation the first frame.

    Raises:
        ValueError: If the file holds no image or frame.
        OSError: If it cannot be read.
    """
    if path.suffix.lower() in CLIP_SUFFIXES:
        return _clip_frames(path, count)
    with Image.open(path) as file:
        return [_to_rgb(ImageOps.exif_transpose(file))] * count


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image to RGB, what is transparent to white.

    Raises:
        ValueError: If its numbers have no known range.
    """
    if image.mode.startswith("I;16"):  # convert() would cut 16 bits off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} have no known range; save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _clip_frames(path: Path, count: int) -> list[Image.Image]:
    import av

    try:
        # Two passes: containers that know their number of frames often know it wrongly.
        with av.open(str(path)) as file:
            total = sum(1 for _ in file.decode(video=0))
        if not total:
            raise ValueError("no frames")
        middle = (np.arange(count) + 0.5) * total / count
        wanted = middle.astype(int).tolist()
        found = {}
        with av.open(str(path)) as file:
            for number, frame in enumerate(file.decode(video=0)):
                if number in wanted:
                    found[number] = frame.to_image()
    except (av.FFmpegError, IndexError) as error:  # an index error: no video stream
        raise ValueError(f"no readable clip: {error}") from error
    return [found[number] for number in wanted]


def to_square(image: Image.Image, side: int, fit: Fit) -> Tensor:
    """Scale an image to a square.

    Args:
        image: RGB.
        side: Side R of the square in pixels.
        fit: `crop` scales the shorter side to R and keeps the centre of the longer one; `pad` scales the longer side to
            R and adds white on both sides of the shorter one; `stretch` ignores the aspect ratio.

    Returns:
        uint8, (3, R, R).
    """
    return to_size(image, side, side, fit)


def to_size(image: Image.Image, height: int, width: int, fit: Fit) -> Tensor:
    """Scale an image to a rectangle.

    Args:
        image: RGB.
        height: H of the rectangle in pixels.
        width: W of the rectangle in pixels.
        fit: `crop` scales the image until it covers the rectangle and keeps the centre; `pad` scales it until it lies
            in the rectangle and adds white on two sides; `stretch` ignores the aspect ratio.

    Returns:
        uint8, (3, H, W).
    """
    resample = Image.Resampling.LANCZOS  # widens with the scale, so that nothing aliases
    if fit == "crop":
        image = ImageOps.fit(image, (width, height), resample)
    elif fit == "pad":
        image = ImageOps.pad(image, (width, height), resample, color="white")
    else:
        image = image.resize((width, height), resample)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
