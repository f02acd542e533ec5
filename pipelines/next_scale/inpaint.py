"""Inpainting with a next-scale model, without training (arXiv 2404.02905, section 5.3).

After each scale is drawn, the tokens of what should stay are replaced by the image's own, so that the network generates
the rest to fit. Tokens cannot hold every pixel, so at the end the kept pixels are laid over the result: they are the
original's, bit for bit. The image is encoded with its masked part filled in smoothly: nothing of it shines through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.layers.scales import Grid
from pipelines.inputs.inpaint import fill_in


@dataclass(frozen=True)
class InpaintTokens:
    """What a run keeps.

    Attributes:
        pixels: the original, (B, 3, H, W) in [-1, 1].
        mask: where to generate, (B, 1, H, W), bool.
        tokens: the original's, of each scale: (B, N) entries or (B, N, d) bits.
        kept: which of them stay, of each scale: (B, N), bool.
        codebook: (V, C) of tokenizers that have one, else None.
    """

    pixels: Tensor
    mask: Tensor
    tokens: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    codebook: Tensor | None

    @classmethod
    def read(cls, vae: Any, pixels: Tensor, mask: Tensor, grids: Sequence[Grid], flexible: bool) -> InpaintTokens:
        """Encode what stays.

        Args:
            vae: `MultiScaleVQ` or `MultiScaleBSQ`.
            pixels: (B, 3, H, W) in [-1, 1].
            mask: where to generate, (B, 1, H, W), bool.
            grids: schedule of scales.
            flexible: whether the tokenizer takes the schedule.
        """
        filled = fill_in(pixels, mask)  # (B, 3, H, W)
        codes = vae.quantize(filled, grids) if flexible else vae.quantize(filled)
        quantizer = getattr(vae, "quantizer", None)
        codebook = None if quantizer is None else quantizer.codebook.weight
        return cls(pixels, mask, tuple(codes.indices), tuple(kept_tokens(mask, grid) for grid in grids), codebook)

    def token_override(self, tokens: Tensor, scale: int, rows: Tensor) -> Tensor:
        """Put the original's tokens back where they stay.

        Args:
            tokens: as drawn: (B, N), (B, N, d), or mixed codebook entries (B, N, C).
            scale: index of the scale; all tokens of the first stay, they hold the image's mood.
            rows: which images these are, (B,).

        Returns:
            Like `tokens`.
        """
        own, kept = self.tokens[scale][rows], self.kept[scale][rows]  # (B, N, ...), (B, N)
        if scale == 0:
            kept = torch.ones_like(kept)
        if tokens.is_floating_point() and self.codebook is not None:
            own = F.embedding(own, self.codebook.to(tokens.dtype))  # (B, N, C)
        kept = kept if tokens.ndim == 2 else kept[..., None]  # (B, N) or (B, N, 1)
        return torch.where(kept, own.to(tokens.dtype), tokens)

    def composite(self, pixels: Tensor, rows: Tensor) -> Tensor:
        """Replace the kept pixels of decoded images (B, 3, H, W) in about [-1, 1] by the original's."""
        rows = rows.to(self.mask.device)
        return torch.where(self.mask[rows].to(pixels.device), pixels, self.pixels[rows].to(pixels))


def kept_tokens(mask: Tensor, grid: Grid) -> Tensor:
    """Return the tokens of a map that are mostly unmasked, (B, N), bool, for a mask (B, 1, H, W)."""
    generated = F.adaptive_avg_pool2d(mask.float(), grid)  # (B, 1, h, w)
    return (generated < 0.5).flatten(1)  # (B, N)
