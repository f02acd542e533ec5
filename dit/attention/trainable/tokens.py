"""Visual tokens of a sequence as images, and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dit.attention.grid import TokenGrid


def visual_tokens(x: Tensor, grid: TokenGrid) -> Tensor:
    """Return the visual tokens of a sequence: (B, N, ...) to (B, T H W, ...)."""
    return x[:, grid.visual_start : grid.visual_start + grid.visual_length]


def with_visual(x: Tensor, visual: Tensor, grid: TokenGrid) -> Tensor:
    """Return a sequence with other visual tokens: (B, N, ...) and (B, T H W, ...) to (B, N, ...)."""
    return torch.cat([x[:, : grid.visual_start], visual, x[:, grid.visual_start + grid.visual_length :]], dim=1)


def convolve_frames(value: Tensor, convolution: nn.Module, grid: TokenGrid) -> Tensor:
    """Convolve the values of each frame; exact tokens get zeros.

    Args:
        value: (B, N, K, E); channels of the convolution are those of all heads side by side.
        convolution: keeps the size of an image.
        grid: the tokens.

    Returns:
        (B, N, K, E).
    """
    batch, _, heads, width = value.shape
    frames = visual_tokens(value, grid).reshape(batch * grid.frames, grid.height, grid.width, heads * width)
    convolved = convolution(frames.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B T, H, W, D)
    return with_visual(torch.zeros_like(value), convolved.reshape(batch, -1, heads, width), grid)
