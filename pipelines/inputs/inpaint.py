"""Inpainting without training: the kept part is noised and blended in after every step, and restored at the end.

After each step of a flow the latents outside the mask are replaced by `(1 - sigma) * data + sigma * noise` of the
original, with one noise for the whole run, so that the network always sees the kept part as it would be at that noise
level (the replacement of arXiv 2201.09865, algorithm 1, here for rectified flows and without its resampling). At the
end the kept pixels are laid over the decoded image: they are the original's, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MaskInput = Image.Image | np.ndarray | Tensor
"""White, or 1, is generated; black, or 0, is kept."""


@dataclass(frozen=True, slots=True)
class InpaintRegion:
    """What a run of inpainting keeps.

    Attributes:
        pixels: the original, (B, 3, H, W) in [-1, 1].
        mask: where to generate, (B, 1, H, W), bool.
        latents: the original's, with the masked part filled in smoothly, (B, C, h, w).
        noise: of the run, (B, C, h, w).
    """

    pixels: Tensor
    mask: Tensor
    latents: Tensor
    noise: Tensor

    @property
    def cells(self) -> Tensor:
        """Latent cells that are generated because the mask touches them, (B, 1, h, w), bool."""
        return touched_cells(self.mask, self.latents.shape[-2], self.latents.shape[-1])

    def blend(self, latents: Tensor, sigma: float | Tensor) -> Tensor:
        """Replace the kept cells of latents (B, C, h, w) by the original at noise level `sigma`, 0 to 1."""
        kept = torch.lerp(self.latents, self.noise, sigma)  # (B, C, h, w)
        return torch.where(self.cells, latents, kept)

    def composite(self, pixels: Tensor) -> Tensor:
        """Replace the kept pixels of decoded images (B, 3, H, W) in about [-1, 1] by the original's."""
        return torch.where(self.mask.to(pixels.device), pixels, self.pixels.to(pixels))


def read_mask(mask: MaskInput, height: int, width: int) -> Tensor:
    """Turn a mask into one truth value a pixel.

    Args:
        mask: PIL image, float array (H, W) or (H, W, 1), or tensor (H, W), (1, H, W), (B, 1, H, W) in [0, 1].
        height: pixels to which it is resized, without smoothing.
        width: pixels.

    Returns:
        (B, 1, H, W), bool, True where to generate.

    Raises:
        TypeError: not a mask.
        ValueError: values outside [0, 1], or nothing to generate.
    """
    if isinstance(mask, Image.Image):
        values = torch.from_numpy(np.array(mask.convert("L"), dtype=np.float32) / 255)[None, None]  # (1, 1, H, W)
    elif isinstance(mask, np.ndarray | Tensor):
        values = torch.as_tensor(mask).float()
        if isinstance(mask, np.ndarray) and values.ndim == 3 and values.shape[-1] == 1:
            values = values[..., 0]  # (H, W)
        if not 2 <= values.ndim <= 4 or (values.ndim > 2 and values.shape[-3] != 1):
            raise ValueError(f"mask_image has the shape {tuple(values.shape)}: pass (H, W) or (B, 1, H, W).")
        values = values.reshape(-1, 1, *values.shape[-2:])  # (B, 1, H, W)
    else:
        raise TypeError(f"mask_image must be a PIL image, an array or a tensor, got {type(mask).__name__}.")
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError("mask_image has values outside [0, 1] (or NaN): divide 8-bit values by 255.")
    found = F.interpolate(values, size=(height, width), mode="nearest-exact") >= 0.5  # (B, 1, H, W)
    if not found.any():
        raise ValueError("mask_image is black everywhere, so nothing would be generated: make white what changes.")
    return found


def touched_cells(mask: Tensor, rows: int, columns: int) -> Tensor:
    """Return which latent cells a mask (B, 1, H, W) touches: (B, 1, rows, columns), bool."""
    return F.adaptive_max_pool2d(mask.float(), (rows, columns)) > 0


def fill_in(pixels: Tensor, mask: Tensor) -> Tensor:
    """Fill the masked part smoothly from around it, so that what was there leaves no trace in the latents.

    Averages of known pixels are taken at ever coarser levels and brought back down where nothing finer is known.

    Args:
        pixels: (B, 3, H, W).
        mask: (B, 1, H, W), True on what is unknown.

    Returns:
        (B, 3, H, W), equal to `pixels` outside the mask; zero everywhere if nothing is known.
    """
    known = (~mask).to(pixels)  # (B, 1, H, W)
    return torch.where(mask, _fill(pixels * known, known), pixels)


def _fill(total: Tensor, weight: Tensor) -> Tensor:
    """Divide sums (B, 3, H, W) by their weights (B, 1, H, W), from coarser levels where a weight is 0."""
    if min(total.shape[-2:]) == 1:
        return total / weight.clamp(min=1e-6)
    coarse = _fill(F.avg_pool2d(total, 2, ceil_mode=True), F.avg_pool2d(weight, 2, ceil_mode=True))
    coarse = F.interpolate(coarse, size=total.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(weight > 0, total / weight.clamp(min=1e-6), coarse)


def keep_pixels(original: Image.Image, generated: Image.Image, mask: Image.Image) -> Image.Image:
    """Composite the kept pixels of an image onto a generated one of the same size.

    Args:
        original: RGB.
        generated: RGB.
        mask: white where `generated` shows.

    Returns:
        RGB; outside the mask equal to `original`.

    Raises:
        ValueError: sizes differ.
    """
    if not original.size == generated.size == mask.size:
        raise ValueError(f"sizes differ: original {original.size}, generated {generated.size}, mask {mask.size}.")
    hard = mask.convert("L").point([0] * 128 + [255] * 128)
    return Image.composite(generated.convert("RGB"), original.convert("RGB"), hard)
