"""The two ends: every pair, and none."""

import torch

from dit.attention.block_map import BlockMap, make_block_map
from dit.attention.grid import TokenGrid
from dit.attention.layout import raster_layout
from dit.attention.patterns import register_pattern


@register_pattern("dense")
def dense(grid: TokenGrid, block: int = 128) -> BlockMap:
    """Let every token see all tokens.

    Args:
        grid: the tokens.
        block: tokens of a block.
    """
    layout = raster_layout(grid, block)
    return make_block_map(layout, torch.ones(layout.visual_count, layout.visual_count, dtype=torch.bool))


@register_pattern("skip", paper="arXiv 2506.03065")
def skip(grid: TokenGrid, block: int = 128) -> BlockMap:
    """Let visual tokens see nothing but exact ones (Sparse-vDiT's skipped heads): without those they get zeros.

    Args:
        grid: the tokens.
        block: tokens of a block.
    """
    layout = raster_layout(grid, block)
    return make_block_map(layout, torch.zeros(layout.visual_count, layout.visual_count, dtype=torch.bool))
