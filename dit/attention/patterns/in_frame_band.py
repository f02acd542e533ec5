"""Re-ttention's mask: a band around the token's place in its frame, in all frames."""

import torch

from dit.attention.band import BandRule
from dit.attention.block_map import BlockMap, make_rule_map
from dit.attention.grid import TokenGrid
from dit.attention.layout import axes_layout
from dit.attention.patterns import register_pattern


@register_pattern("in_frame_band", paper="arXiv 2505.22918")
def in_frame_band(grid: TokenGrid, share: float = 0.03125, block: int = 128) -> BlockMap:
    """Let every token see a band around its own place in all frames (Re-ttention), exactly.

    A token at place i of its H W, counted row by row, sees the places j with |i - j| <= int(share H W) // 2 of each
    frame; at the ends of a frame the band is cut off. Of images it is a band of the whole sequence. Blocks hold all
    frames of a few places, so the blocks that a token sees lie side by side.

    Args:
        grid: the tokens.
        share: width of the band, of the frame.
        block: tokens of a block.

    Raises:
        ValueError: a share outside 0 to 2.
    """
    if not 0 <= share <= 2:
        raise ValueError(f"share is {share}; it is the width of a band in frames, from 0 (own place) to 2 (everything)")
    places = grid.height * grid.width
    rule = BandRule(torch.arange(grid.visual_length) % places, int(places * share) // 2)
    return make_rule_map(axes_layout(grid, "hwt", block), rule)
