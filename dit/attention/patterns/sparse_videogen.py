"""The two masks of Sparse VideoGen: a band of near frames, and a band of near places at all times."""

import math

import torch

from dit.attention.band import BandRule
from dit.attention.block_map import BlockMap, make_rule_map
from dit.attention.grid import TokenGrid
from dit.attention.layout import axes_layout
from dit.attention.patterns import register_pattern


@register_pattern("svg_spatial", paper="arXiv 2502.01776")
def svg_spatial(grid: TokenGrid, density: float = 0.25, sink: bool = False, block: int = 128) -> BlockMap:
    """Let every token see a band in the order of the sequence: its own frame and near ones (Sparse VideoGen).

    Tokens see those at a distance below W = floor(m H W / block) block, with m from `band_frames`. With `sink`, as the
    authors do for Wan, W is rounded up instead and itself within the band, and the first H W tokens are seen by all.

    Args:
        grid: the tokens.
        density: wished share of pairs, exact tokens included. Rounding makes it a little less; the sink comes on top.
        sink: see above.
        block: tokens of a block, and what the band is rounded to; it is at least one block.

    Raises:
        ValueError: a density that exact tokens exceed by themselves, or above 1.
    """
    return _band(grid, "thw", density, sink, block)


@register_pattern("svg_temporal", paper="arXiv 2502.01776")
def svg_temporal(grid: TokenGrid, density: float = 0.25, sink: bool = False, block: int = 128) -> BlockMap:
    """Let every token see its own place and near ones in all frames (Sparse VideoGen): a band place by place.

    The band of `svg_spatial`, among tokens in the order row, column, frame. The sink is, as in the authors' code, of
    the first H W tokens in this order too: the first places of all frames, not the first frame.

    Args:
        grid: the tokens.
        density: wished share of pairs, see `svg_spatial`.
        sink: see `svg_spatial`.
        block: tokens of a block, and what the band is rounded to; it is at least one block.

    Raises:
        ValueError: a density that exact tokens exceed by themselves, or above 1.
    """
    return _band(grid, "hwt", density, sink, block)


def band_frames(grid: TokenGrid, density: float) -> float:
    """Return the half width of a band that has a density, in frames (`sparsity_to_width` of the authors).

    With N tokens of which L are exact, p = (density N^2 - 2 N L) / N^2 is left for the band, whose half width then is
    N (1 - sqrt(1 - p)) tokens.

    Args:
        grid: the tokens.
        density: share of pairs, exact tokens included.

    Raises:
        ValueError: a density that exact tokens exceed by themselves, or above 1.
    """
    exact = 2 * grid.exact_length / grid.length
    if not exact < density <= 1:
        raise ValueError(f"density is {density}; exact tokens alone make {exact:.3f}: give more than that, at most 1")
    width = grid.length * (1 - math.sqrt(1 - (density - exact)))
    return width / (grid.height * grid.width)


def _band(grid: TokenGrid, axes: str, density: float, sink: bool, block: int) -> BlockMap:
    layout = axes_layout(grid, axes, block)
    frame = grid.height * grid.width
    blocks = band_frames(grid, density) * frame / block
    width = block * max(math.ceil(blocks) if sink else math.floor(blocks), 1)
    order = layout.order[0, 0, : grid.visual_length] - grid.visual_start  # (T H W,)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    rule = BandRule(places, width if sink else width - 1, frame if sink else 0)
    return make_rule_map(layout, rule)
