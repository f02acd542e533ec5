"""PAROAttention: an order of the axes for each head, in which its attention lies in blocks, and masks of those."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap, make_block_map
from dit.attention.grid import TokenGrid
from dit.attention.layout import Layout, axes_layout, make_layout
from dit.attention.patterns import register_pattern


@register_pattern("paro", paper="arXiv 2506.16054")
def paro(grid: TokenGrid, axes: str | Sequence[str] = "thw", masks: Tensor | None = None, block: int = 64) -> BlockMap:
    """Reorder the axes of the grid for each head, and visit the blocks that a given mask keeps (PAROAttention).

    Args:
        grid: the tokens.
        axes: the order for all heads, or one for each, see `axes_layout`; "hwt" puts all frames of a place together.
        masks: bool, (n, n) or (K, n, n), which blocks of visual tokens are visited in that order, for all heads or
            each; None means all. Blocks of their own tokens always are.
        block: tokens of a block.

    Raises:
        ValueError: an unknown order, or masks that don't fit the blocks and heads.
    """
    orders = (axes,) if isinstance(axes, str) else tuple(axes)
    if not orders:
        raise ValueError("axes is empty; give an order such as 'thw', or one for each head")
    layout = _layout(grid, orders, block)
    count = layout.visual_count
    if masks is None:
        masks = torch.ones(count, count, dtype=torch.bool)
    masks = masks[(None,) * (3 - masks.ndim)]  # (K', n, n)
    heads = {len(orders), masks.shape[0]} - {1}
    if masks.shape[1:] != (count, count) or masks.dtype != torch.bool or len(heads) > 1:
        raise ValueError(
            f"masks are {masks.dtype} of shape {tuple(masks.shape)} for {len(orders)} orders; expected bool "
            f"(heads, {count}, {count}) for the {grid.visual_length} visual tokens in blocks of {block}, with one "
            "mask, one order, or as many of both"
        )
    return make_block_map(layout, (masks | torch.eye(count, dtype=torch.bool, device=masks.device))[None])


def _layout(grid: TokenGrid, orders: tuple[str, ...], block: int) -> Layout:
    """Return one layout for all heads, or one for each."""
    shared = [axes_layout(grid, one, block) for one in orders]
    if len(set(orders)) == 1:
        return shared[0]
    order = torch.cat([one.order for one in shared], dim=1)[..., : grid.visual_length]  # (1, K, T H W)
    sizes = shared[0].sizes[..., : shared[0].visual_count]  # (1, 1, n)
    return make_layout(grid, order - grid.visual_start, sizes, exact_block=block)
