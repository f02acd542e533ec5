"""Sliding Tile Attention: tiles of the grid see the tiles around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap, make_block_map
from dit.attention.grid import TokenGrid
from dit.attention.layout import tile_counts, tile_layout
from dit.attention.patterns import register_pattern
from dit.attention.patterns.neighborhood import sides


@register_pattern("sliding_tile", paper="arXiv 2502.04507")
def sliding_tile(grid: TokenGrid, window: int | Sequence[int] = 3, tile: int | Sequence[int] = (6, 8, 8)) -> BlockMap:
    """Let every tile see a window of whole tiles around it (Sliding Tile Attention), moved inwards at the ends.

    Along an axis of n tiles with window w, tile i sees the tiles j with |min(max(i, w // 2), n - 1 - w // 2) - j| <=
    w // 2: w of them, and one more for an even w, as the authors do (their plans name the whole of an even axis that
    way). Tiles at the far ends may be incomplete.

    Args:
        grid: the tokens.
        window: (t, h, w) in tiles; one number for all; larger than the axis means all of it.
        tile: (t, h, w) in tokens; one number for all.

    Raises:
        ValueError: a number below 1, or not one or three numbers.
    """
    window, tile = sides("window", window), sides("tile", tile)
    t, h, w = (_near(count, width) for count, width in zip(tile_counts(grid, tile), window, strict=True))
    visits = t[:, None, None, :, None, None] & h[:, None, None, :, None] & w[:, None, None, :]
    return make_block_map(tile_layout(grid, tile), visits.flatten(3).flatten(0, 2))


def _near(count: int, window: int) -> Tensor:
    """Return which tiles of an axis see which, bool (count, count)."""
    place = torch.arange(count)
    reach = min(window, count) // 2
    centre = place.clamp(min=reach).clamp(max=count - 1 - reach)
    return (centre[:, None] - place).abs() <= reach
