"""Generate the masked area of an image only: cut it out, enlarge it to the size of the model, put it back.

So a small part of a large image is generated with all pixels that the model has, and the image keeps its size. In
diffusers this is `padding_mask_crop`, in other programs "only masked".
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from apps.service.outpaint import Size, blend, canvas_box, mask_of, pad_for_outpainting, soft_mask

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels; the last two are just beyond."""


@dataclass(frozen=True, slots=True)
class MaskedArea:
    """A masked area that was cut out.

    Attributes:
        original: RGB, the whole image.
        box: of the area in it.
        alpha: L, of the original's size; how much of the result shows.
        inner: where the area lies on the canvas that is generated.
        image: RGB, the canvas.
        mask: L, of the canvas; white where to generate.
    """

    original: Image.Image
    box: Box
    alpha: Image.Image
    inner: Box
    image: Image.Image
    mask: Image.Image

    def put_back(self, generated: Image.Image) -> Image.Image:
        """Return the whole image with the generated area in it; beyond the mask every pixel stays as it was.

        Args:
            generated: RGB, of the canvas's size, or an enlarged one.
        """
        size, scale = (self.box[2] - self.box[0], self.box[3] - self.box[1]), generated.width / self.image.width
        left, top, right, bottom = (round(one * scale) for one in self.inner)
        area = generated.convert("RGB").crop((left, top, right, bottom))
        area = area if area.size == size else area.resize(size, Image.Resampling.LANCZOS)
        whole = self.original.copy()
        whole.paste(blend(self.original.crop(self.box), area, self.alpha.crop(self.box)), self.box[:2])
        return whole


def mask_edge(mask: Image.Image, size: Size, grow: int, blur: int) -> Image.Image:
    """Return how much of a result shows on each pixel of an image, 0 to 255.

    Args:
        mask: white where to generate, of any size in the image's shape.
        size: of the image.
        grow: pixels of the image by which the mask grows.
        blur: width of its soft edge, pixels of the image.
    """
    marked = mask.convert("L")
    marked = marked if marked.size == size else marked.resize(size, Image.Resampling.NEAREST)
    return soft_mask(marked, grow, blur)


def area_box(alpha: Image.Image, padding: int, shape: Size | None) -> Box:
    """Find the box around a mask.

    Args:
        alpha: L; not 0 where the image changes.
        padding: pixels that are added on every side, as far as the image goes.
        shape: width and height whose shape the box gets, as far as the image goes; None for any.

    Returns:
        Left, top, right and bottom, of at least one pixel.
    """
    found = alpha.getbbox() or (0, 0, *alpha.size)
    left, top = max(found[0] - padding, 0), max(found[1] - padding, 0)
    right, bottom = min(found[2] + padding, alpha.width), min(found[3] + padding, alpha.height)
    if shape is None:
        return left, top, right, bottom
    width, height = right - left, bottom - top
    left, right = _widen(left, right, round(height * shape[0] / shape[1]), alpha.width)
    top, bottom = _widen(top, bottom, round(width * shape[1] / shape[0]), alpha.height)
    return left, top, right, bottom


def cut_out(image: Image.Image, alpha: Image.Image, size: Size, padding: int) -> MaskedArea:
    """Cut the masked area of an image out and enlarge it to the size that is generated.

    Args:
        image: RGB.
        alpha: L, of the image's size; see `mask_edge`.
        size: of the canvas; where the image is too small for an area of its shape, the rest of the canvas repeats the
            edge of the area and is dropped afterwards.
        padding: pixels of the image around the mask that are seen, though not changed.
    """
    box = area_box(alpha, padding, size)
    cropped, marked = image.convert("RGB").crop(box), mask_of(alpha).crop(box)
    padded = pad_for_outpainting(cropped, marked, size, None, keep_shape=True)
    return MaskedArea(
        original=image.convert("RGB"),
        box=box,
        alpha=alpha,
        inner=canvas_box(cropped.size, size, None, keep_shape=True),
        image=padded.image,
        mask=padded.mask,
    )


def _widen(low: int, high: int, wanted: int, most: int) -> tuple[int, int]:
    """Widen a range about its middle to a length, moved into 0 to `most` and cut there."""
    more = max(min(wanted, most) - (high - low), 0)
    start = min(max(low - more // 2, 0), most - (high - low) - more)
    return start, start + (high - low) + more
