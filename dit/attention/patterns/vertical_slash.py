"""MInference: columns and diagonals of blocks, by the attention of a few queries (arXiv 2407.02490)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap, make_block_map
from dit.attention.grid import TokenGrid
from dit.attention.layout import Layout
from dit.attention.patterns import register_pattern
from dit.attention.patterns.layouts import choose_layouts, diagonal_visits
from dit.attention.patterns.scores import query_scores, sampled_queries
from dit.attention.patterns.selection import budget, choose_top


@register_pattern("vertical_slash", paper="arXiv 2407.02490", online=True)
@torch.no_grad()
def vertical_slash(
    grid: TokenGrid,
    query: Tensor,
    key: Tensor,
    verticals: float = 0.1,
    slashes: float = 0.05,
    *,
    queries: int = 64,
    layout: str | Layout = "raster",
    block: int = 128,
    key_mask: Tensor | None = None,
) -> BlockMap:
    """Visit the columns and the diagonals of blocks with most of the attention of a few queries.

    MInference (arXiv 2407.02490) estimates both by the last 64 queries of a prompt, token by token, under a causal
    mask. Here they are of blocks, diagonals lie on both sides, and the queries are spread over the grid.

    Args:
        grid: the tokens.
        query: (B, N, K, E), in the order of the sequence.
        key: likewise.
        verticals: share of the n visual blocks of keys that all queries see, at least one.
        slashes: share of the 2 n - 1 diagonals of visual blocks, at least one; the main one is always visited.
        queries: how many are tried.
        layout: see `pooled_topk`.
        block: tokens of a block.
        key_mask: bool, (B, N), False for keys that nobody may look at.

    Raises:
        ValueError: no query to try, or a share outside 0 to 1.
    """
    if queries < 1:
        raise ValueError(f"queries is {queries}; try at least 1")
    blocks, _ = choose_layouts(grid, layout, block, None, None, query.device)
    rows = sampled_queries(grid, queries).to(query.device)  # (R,)
    mass = query_scores(query, key, rows, key_mask).softmax(-1)  # (B, K, R, N)
    place = blocks.block_of()[0, 0]  # (N,)
    count = blocks.visual_count
    by_block = mass.new_zeros(*mass.shape[:3], blocks.count).index_add_(-1, place, mass)[..., :count]  # (B, K, R, n)
    columns = choose_top(by_block.sum(-2), budget(count, verticals))  # (B, K, n)
    index = torch.arange(count, device=query.device)
    offset = index - place[rows][:, None] + count - 1  # (R, n)
    along = mass.new_zeros(*mass.shape[:2], 2 * count - 1)
    along = along.index_add_(-1, offset.flatten(), by_block.flatten(-2))  # (B, K, 2 n - 1)
    diagonals = choose_top(along, budget(2 * count - 1, slashes))  # (B, K, 2 n - 1)
    visits = columns[:, :, None] | diagonals[:, :, index - index[:, None] + count - 1]  # (B, K, n, n)
    return make_block_map(blocks, visits | diagonal_visits(blocks, blocks, 0))
