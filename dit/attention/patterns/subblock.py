"""SubBlock: the mass of a pair of blocks is estimated by the means of smaller cells of both.

Published as code in sglang (multimodal_gen, subblock_sparse), without a paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap, make_block_map
from dit.attention.grid import TokenGrid
from dit.attention.layout import Layout
from dit.attention.patterns import register_pattern
from dit.attention.patterns.layouts import choose_layouts, forced_visits
from dit.attention.patterns.scores import block_means, cell_starts, score_means
from dit.attention.patterns.selection import budget, choose_top

SCORES_AT_ONCE = 2**24
"""Most scores between cells that are held at a time."""


@register_pattern("subblock", online=True)
@torch.no_grad()
def subblock(
    grid: TokenGrid,
    query: Tensor,
    key: Tensor,
    keep: float = 0.25,
    *,
    query_cells: int = 4,
    key_cells: int = 4,
    multiple: int = 8,
    layout: str | Layout = "raster",
    block: int = 64,
    key_block: int | None = None,
    tile: tuple[int, int, int] | None = None,
    diagonal: int | None = None,
    key_mask: Tensor | None = None,
) -> BlockMap:
    """Let each block of queries see the blocks of keys with the largest sums of exponentials between cells.

    The score of a pair of blocks is log sum exp over their cells a and b of the score between the means of a and b, an
    estimate of its part of the softmax's denominator. Cells without a token are left out; a cell that isn't full weighs
    as much as one that is. Means are float32 here, bfloat16 in sglang.

    Args:
        grid: the tokens.
        query: (B, N, K, E), in the order of the sequence.
        key: likewise.
        keep: share of the visual blocks of keys that are visited, rounded up.
        query_cells: cells of a block of queries. More of them than of a block of keys' are worse than one.
        key_cells: cells of a block of keys.
        multiple: the number of visited blocks is rounded up to a multiple of it.
        layout: see `pooled_topk`.
        block: tokens of a block of queries.
        key_block: tokens of a block of keys; None means as `block`.
        tile: (t, h, w), for layout "tile".
        diagonal: see `pooled_topk`; the published rule has none.
        key_mask: bool, (B, N), False for tokens that don't count.

    Raises:
        ValueError: cells or a multiple below 1.
    """
    if min(query_cells, key_cells, multiple) < 1:
        raise ValueError(
            f"query_cells, key_cells and multiple must be at least 1, got {query_cells}, {key_cells}, {multiple}"
        )
    queries, keys = choose_layouts(grid, layout, block, key_block, tile, query.device)
    scores = cell_scores(query, key, queries, keys, query_cells, key_cells, key_mask)  # (B, K, n, m)
    visits = choose_top(scores, budget(keys.visual_count, keep, "ceil", multiple))
    forced = forced_visits(queries, keys, diagonal=diagonal, window=None, neighbours=False)
    return make_block_map(queries, visits if forced is None else visits | forced, keys=keys)


def cell_scores(
    query: Tensor,
    key: Tensor,
    queries: Layout,
    keys: Layout,
    query_cells: int,
    key_cells: int,
    mask: Tensor | None = None,
) -> Tensor:
    """Return log sum exp of the scores between the cells of visual blocks, (B, K, n, m), float32; see `subblock`."""
    means, counts = block_means(query, queries, mask, cell_starts(queries, query_cells))  # (B, K, n a, E)
    key_means, key_counts = block_means(key, keys, mask, cell_starts(keys, key_cells))  # (B, K, m b, E)
    means, counts = means.unflatten(2, (-1, query_cells)), counts.unflatten(-1, (-1, query_cells))  # (B, K, n, a, E)
    scale = query.shape[-1] ** -0.5
    step = max(SCORES_AT_ONCE // (means.shape[0] * means.shape[1] * query_cells * key_means.shape[2]), 1)
    parts = []
    for start in range(0, means.shape[2], step):
        some = means[:, :, start : start + step]  # (B, K, r, a, E)
        scores = score_means(some.flatten(2, 3), key_means, key_counts, scale)  # (B, K, r a, m b)
        empty = counts[..., start : start + step, :].flatten(-2) == 0  # (B', K', r a)
        scores = scores.masked_fill_(empty[..., None], -torch.inf)
        scores = scores.unflatten(-1, (-1, key_cells)).unflatten(2, (-1, query_cells))  # (B, K, r, a, m, b)
        largest = scores.amax((-3, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).min)  # (B, K, r, 1, m, 1)
        parts.append((scores - largest).exp_().sum((-3, -1)).log_() + largest[..., 0, :, 0])  # (B, K, r, m)
    return torch.cat(parts, dim=2)
