"""Lay an image out for a model that changes a part of it: larger than it was, or in the shape that the model generates.

Whatever a model keeps of the canvas is the image's own, so an image that needs no scaling keeps its pixels bit for
bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from apps.service.option_values import Expand

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True, slots=True)
class PaddedImage:
    """An image on its canvas.

    Attributes:
        image: RGB; what lies beyond the image repeats its edge, for models that see what they replace.
        mask: L; white where to generate.
    """

    image: Image.Image
    mask: Image.Image


def expanded_size(size: Size, expand: Expand | None) -> Size:
    """Return the size of an image with what is added to its sides."""
    left, top, right, bottom = _margins(size, expand)
    return size[0] + left + right, size[1] + top + bottom


def pad_for_outpainting(
    image: Image.Image, mask: Image.Image | None, size: Size, expand: Expand | None, keep_shape: bool
) -> PaddedImage:
    """Lay an image out.

    Args:
        image: RGB.
        mask: white where to generate, of any size in the image's shape; None for nothing inside the image.
        size: of the canvas.
        expand: what is added to the sides.
        keep_shape: fit the image in without changing its shape, and generate what stays free; else stretch it, which
            is for canvases of about its shape.

    Returns:
        The image, scaled only if it must be, and the mask with all that lies beyond the image added to it.
    """
    box = canvas_box(image.size, size, expand, keep_shape)
    inner = box[2] - box[0], box[3] - box[1]
    padded = Image.new("L", size, 255)
    marked = Image.new("L", inner, 0) if mask is None else mask.convert("L").resize(inner, Image.Resampling.NEAREST)
    padded.paste(marked, box[:2])
    scaled = image.convert("RGB")
    scaled = scaled if scaled.size == inner else scaled.resize(inner, Image.Resampling.LANCZOS)
    free = ((box[1], size[1] - box[3]), (box[0], size[0] - box[2]), (0, 0))
    return PaddedImage(Image.fromarray(np.pad(np.asarray(scaled), free, mode="edge")), padded)


def canvas_box(picture: Size, canvas: Size, expand: Expand | None, keep_shape: bool) -> tuple[int, int, int, int]:
    """Return where an image lies on its canvas: left, top, right, bottom. See `pad_for_outpainting`.

    Args:
        picture: size of the image.
        canvas: size of the canvas.
        expand: what is added to the sides.
        keep_shape: whether the image keeps its shape.
    """
    left, top, _, _ = _margins(picture, expand)
    width, height = expanded_size(picture, expand)
    across, down = canvas[0] / width, canvas[1] / height
    if keep_shape:
        across = down = min(across, down)
    # What is free beyond the margins is shared out evenly.
    x = round(left * across + (canvas[0] - width * across) / 2)
    y = round(top * down + (canvas[1] - height * down) / 2)
    right, bottom = x + max(round(picture[0] * across), 1), y + max(round(picture[1] * down), 1)
    return x, y, min(right, canvas[0]), min(bottom, canvas[1])


def soft_mask(mask: Image.Image, grow: int = 0, blur: int = 0) -> Image.Image:
    """Grow a mask and give it a soft edge.

    Args:
        mask: L; white where to generate.
        grow: pixels by which it grows, measured straight to the nearest pixel of the mask.
        blur: width of the edge around the grown mask, pixels.

    Returns:
        L; 255 on the grown mask, falling smoothly to 0 beyond `grow + blur` pixels from the mask.
    """
    inside = np.asarray(mask.convert("L")) >= 128  # (H, W)
    if not grow and not blur:
        return Image.fromarray(inside.astype(np.uint8) * 255)
    beyond = np.clip(_distances(inside, grow + blur + 1) - grow, 0, None)  # (H, W), from the grown mask
    share = np.clip(1 - beyond / (blur + 1), 0, 1)
    smooth = share * share * (3 - 2 * share)
    return Image.fromarray(np.where(beyond > blur, 0, np.rint(255 * smooth)).astype(np.uint8))


def blend(original: Image.Image, result: Image.Image, alpha: Image.Image) -> Image.Image:
    """Blend a result into the image that it was made from.

    Args:
        original: RGB.
        result: RGB, of the same size.
        alpha: L; where it is 0 the original's pixels stay bit-identical, where it is 255 the result's.
    """
    return Image.composite(result.convert("RGB"), original.convert("RGB"), alpha)


def mask_of(alpha: Image.Image) -> Image.Image:
    """Return the mask of all pixels that a blend changes, white on black."""
    return alpha.point([0] + [255] * 255)


def _distances(inside: np.ndarray, most: int) -> np.ndarray:
    """Return the distance of each pixel to the nearest one inside, up to `most`.

    The exact Euclidean distance in two passes: along the rows, then over the rows above and below.

    Args:
        inside: (H, W), bool.
        most: pixels; larger distances are returned as this or more.
    """
    height, width = inside.shape
    columns = np.arange(width)
    far = 4 * (most + width)
    left = np.maximum.accumulate(np.where(inside, columns, -far), axis=1)
    right = np.minimum.accumulate(np.where(inside, columns, far)[:, ::-1], axis=1)[:, ::-1]
    along = np.minimum(np.minimum(columns - left, right - columns), most).astype(np.int64) ** 2  # (H, W)
    nearest = along.copy()
    for rows in range(1, min(most, height)):
        nearest[rows:] = np.minimum(nearest[rows:], along[:-rows] + rows * rows)
        nearest[:-rows] = np.minimum(nearest[:-rows], along[rows:] + rows * rows)
    return np.sqrt(nearest)


def _margins(size: Size, expand: Expand | None) -> tuple[int, int, int, int]:
    """Return what is added left, above, right and below, in pixels of the image."""
    if expand is None:
        return 0, 0, 0, 0
    width, height = size
    return (
        round(expand.left * width),
        round(expand.top * height),
        round(expand.right * width),
        round(expand.bottom * height),
    )
