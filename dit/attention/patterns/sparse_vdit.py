"""The modes of Sparse-vDiT's heads: one diagonal, one for each frame, and vertical stripes.

The authors published no code: the paper (section 3) shows the shapes, the exact rules here are ours. Blocks are visited
whole. The fourth mode is `skip`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap, make_block_map
from dit.attention.grid import TokenGrid
from dit.attention.layout import Layout, raster_layout
from dit.attention.patterns import register_pattern


@register_pattern("diagonal", paper="arXiv 2506.03065")
def diagonal(grid: TokenGrid, share: float = 1.0, block: int = 128) -> BlockMap:
    """Let every block see the blocks around it (Sparse-vDiT).

    Visited are blocks with tokens i and j, by their place in the sequence, for which |i - j| <= int(share H W) // 2.

    Args:
        grid: the tokens.
        share: width of the band, in frames.
        block: tokens of a block.

    Raises:
        ValueError: a negative share.
    """
    return _diagonals(grid, share, 0, block)


@register_pattern("multi_diagonal", paper="arXiv 2506.03065")
def multi_diagonal(grid: TokenGrid, share: float = 0.0625, frames: int | None = None, block: int = 128) -> BlockMap:
    """Let every block see those around its place in all frames (Sparse-vDiT): diagonals that lie a frame apart.

    Visited are blocks with tokens i and j for which |i - j - k H W| <= int(share H W) // 2, with a whole number k from
    -frames to frames.

    Args:
        grid: the tokens.
        share: width of each diagonal, in frames.
        frames: how many frames before and behind are seen; None means all.
        block: tokens of a block.

    Raises:
        ValueError: a negative share or number of frames.
    """
    return _diagonals(grid, share, grid.frames if frames is None else frames, block)


@register_pattern("vertical_stripe", paper="arXiv 2506.03065")
def vertical_stripe(
    grid: TokenGrid, share: float = 0.05, columns: Sequence[int] | None = None, block: int = 128
) -> BlockMap:
    """Let all tokens see a few blocks of keys, and their own block (Sparse-vDiT).

    Args:
        grid: the tokens.
        share: so many of the blocks, at least one, spread evenly, if no columns are given.
        columns: visual tokens, by their index in raster order, whose blocks are seen.
        block: tokens of a block.

    Raises:
        ValueError: a share outside 0 to 1, or a column outside the grid.
    """
    layout = raster_layout(grid, block)
    count = layout.visual_count
    if columns is None:
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share}; give a part of the blocks, 0 to 1")
        stripes = max(round(share * count), 1)
        seen = (2 * torch.arange(stripes) + 1) * count // (2 * stripes)
    else:
        if not columns or min(columns) < 0 or max(columns) >= grid.visual_length:
            raise ValueError(f"columns is {columns}; give indices of visual tokens, 0 to {grid.visual_length - 1}")
        seen = torch.tensor(columns) // block
    visits = torch.eye(count, dtype=torch.bool)
    visits[:, seen] = True
    return make_block_map(layout, visits)


def _diagonals(grid: TokenGrid, share: float, frames: int, block: int) -> BlockMap:
    if share < 0 or frames < 0:
        raise ValueError(f"share and frames must be at least 0, got {share} and {frames}")
    layout = raster_layout(grid, block)
    reach = int(share * grid.height * grid.width) // 2
    return make_block_map(layout, _near_a_multiple(layout, reach, frames))


def _near_a_multiple(layout: Layout, reach: int, most: int) -> Tensor:
    """Return the blocks with tokens whose distance is nearly a multiple of a frame, bool (n, n)."""
    frame = layout.grid.height * layout.grid.width
    bounds = layout.starts[0, 0, : layout.visual_count + 1]  # (n + 1,)
    first, last = bounds[:-1], bounds[1:] - 1
    least = first[:, None] - last - reach  # (n, n), the distances i - j of two blocks are at least this, and
    greatest = last[:, None] - first + reach  # (n, n) at most this
    low = -(-least).div(frame, rounding_mode="floor")  # the first multiple from `least` on
    high = greatest.div(frame, rounding_mode="floor")
    return torch.maximum(low, torch.tensor(-most)) <= torch.minimum(high, torch.tensor(most))
