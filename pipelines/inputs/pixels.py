"""Images as callers give them to pixels in [-1, 1]."""

from __future__ import annotations

from typing import Any

import numpy as np
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

ImageInput = Image.Image | np.ndarray | Tensor | list[Image.Image] | list[np.ndarray] | list[Tensor]


def read_pixels(image: ImageInput, height: int, width: int, processor: VaeImageProcessor) -> Tensor:
    """Read and resize images; transparent parts become white.

    Args:
        image: PIL image, float array (H, W, 3) or tensor (3, H, W) in [0, 1], a batch or a list of them.
        height: pixels to which they are resized.
        width: pixels.
        processor: resizes.

    Returns:
        (P, 3, H, W) in [-1, 1], float32.

    Raises:
        TypeError: not an image.
        ValueError: values outside [0, 1].
    """
    is_batch = isinstance(image, list | tuple) or (isinstance(image, Tensor | np.ndarray) and image.ndim == 4)
    images = list(image) if is_batch else [image]  # type: ignore[arg-type]
    for one in images or [None]:
        if not isinstance(one, Image.Image) and not _is_float_array(one):
            raise TypeError(
                "image must be a PIL image, a float array or tensor in [0, 1], or a list of them, "
                f"got {type(one).__name__}."
            )
    flat: Any = [_on_white(one) if isinstance(one, Image.Image) else one for one in images]
    pixels = processor.preprocess(flat, height, width)  # (P, 3, H, W) in [-1, 1]
    if not pixels.abs().max() <= 1.001:
        raise ValueError("image has values outside [0, 1] (or NaN): divide 8-bit values by 255.")
    return pixels.float()


def _is_float_array(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating)


def _on_white(image: Image.Image) -> Image.Image:
    """Composite an image with transparency on white; PIL alone would turn it black."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
