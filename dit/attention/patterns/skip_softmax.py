"""Skipped softmax: tiles of keys that add next to nothing to any query of a block (BLASST, arXiv 2512.12087)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap, make_block_map
from dit.attention.grid import TokenGrid
from dit.attention.layout import Layout
from dit.attention.patterns import register_pattern
from dit.attention.patterns.layouts import choose_layouts
from dit.attention.patterns.tiles import QueryRows, exact_scores, tile_scores


@register_pattern("skip_softmax", paper="arXiv 2512.12087", online=True)
@torch.no_grad()
def skip_softmax(
    grid: TokenGrid,
    query: Tensor,
    key: Tensor,
    threshold: float = 0.01,
    *,
    layout: str | Layout = "raster",
    block: int = 128,
    key_block: int | None = None,
    tile: tuple[int, int, int] | None = None,
    key_mask: Tensor | None = None,
) -> BlockMap:
    """Visit the tiles whose largest score comes close enough to the largest one so far, for any query of the block.

    A tile is skipped if for all queries i of a block max_j s_ij - m_i < ln(threshold), m_i being the largest score up
    to and with this tile. Every score is computed for that, here and in kernels that skip in this way, which at best
    halves their time. So this is a statistic: what sparsity a layer and head would bear. It depends on the order of the
    tiles: exact tokens come first, then the visual tiles in the layout's order.

    Args:
        grid: the tokens.
        query: (B, N, K, E), in the order of the sequence.
        key: likewise.
        threshold: lambda, more than 0 and at most 1; published calibrations make it inverse to the number of keys.
        layout: see `pooled_topk`.
        block: queries of a block.
        key_block: keys of a tile; None means as `block`.
        tile: (t, h, w), for layout "tile".
        key_mask: bool, (B, N), False for keys that nobody may look at.

    Raises:
        ValueError: a threshold outside its range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; use more than 0 and at most 1")
    queries, keys = choose_layouts(grid, layout, block, key_block, tile, query.device)
    rows, scale = QueryRows(queries), query.shape[-1] ** -0.5
    visits = []
    for some, scores in tile_scores(query, key, rows, keys, scale, key_mask):
        peaks = scores.amax(-1)  # (B, K, r, L, m)
        running = peaks
        if grid.exact_length:
            first = exact_scores(rows.pick(query, some) * scale, key, grid, key_mask).amax(-1, keepdim=True)
            running = torch.maximum(peaks, first)  # (B, K, r, L, m)
        # comparisons with NaN are false: what can't be judged is visited
        skipped = (peaks - running.cummax(-1).values < math.log(threshold)) | peaks.isneginf()
        visits.append((~skipped & rows.there[some][..., None]).any(3))  # (B, K, r, m)
    return make_block_map(queries, torch.cat(visits, dim=2), keys=keys)
