"""Sparse VideoGen: each head takes the mask of near frames or of near places, by what a few queries lose."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.grid import TokenGrid
from dit.attention.layout import Layout
from dit.attention.patterns import register_pattern
from dit.attention.patterns.scores import query_scores, sampled_queries
from dit.attention.patterns.sparse_videogen import svg_spatial, svg_temporal


@register_pattern("svg", paper="arXiv 2502.01776", online=True)
@torch.no_grad()
def svg(
    grid: TokenGrid,
    query: Tensor,
    key: Tensor,
    density: float = 0.25,
    *,
    value: Tensor | None = None,
    queries: int = 64,
    sink: bool = False,
    block: int = 128,
    key_mask: Tensor | None = None,
) -> BlockMap:
    """Give each sample and head the better of `svg_spatial` and `svg_temporal`, in its own order of tokens.

    Attention of some queries is computed with all keys and with either mask (Sparse VideoGen, arXiv 2502.01776,
    algorithm 1); the mask with the smaller squared error of the output is taken, the spatial one if they are equal. The
    queries are spread over the whole grid here; the authors draw them from its beginning. Blocks that a band cuts are
    visited whole.

    Args:
        grid: the tokens.
        query: (B, N, K, E), in the order of the sequence.
        key: likewise.
        density: of either mask, see `svg_spatial`.
        value: likewise; without it the mask is taken that keeps more of the queries' mass.
        queries: how many are tried.
        sink: see `svg_spatial`.
        block: tokens of a block.
        key_mask: bool, (B, N), False for keys that nobody may look at.

    Raises:
        ValueError: no query to try, or a density that the masks can't have.
    """
    if queries < 1:
        raise ValueError(f"queries is {queries}; try at least 1")
    spatial, temporal = _masks(grid, density, sink, block, str(query.device))
    rows = sampled_queries(grid, queries).to(query.device)  # (R,)
    scores = query_scores(query, key, rows, key_mask)  # (B, K, R, N)
    values = None if value is None else value.float().transpose(1, 2)  # (B, K, N, E)
    dense = scores.softmax(-1)  # (B, K, R, N)
    near, places = (_loss(scores, dense, values, _rows_of(one, rows)) for one in (spatial, temporal))  # (B, K)
    wins = (places < near)[..., None]  # (B, K, 1)
    layout = Layout(
        grid,
        torch.where(wins, temporal.queries.order, spatial.queries.order),
        spatial.queries.starts,
        spatial.queries.exact_blocks,
    )
    return BlockMap(layout, layout, torch.where(wins[..., None], temporal.visits, spatial.visits))


@lru_cache(maxsize=16)
def _masks(grid: TokenGrid, density: float, sink: bool, block: int, device: str) -> tuple[BlockMap, BlockMap]:
    return (
        svg_spatial(grid, density, sink, block).to(device),
        svg_temporal(grid, density, sink, block).to(device),
    )


def _rows_of(block_map: BlockMap, rows: Tensor) -> Tensor:
    """Return which keys some queries see through visited blocks, bool, (R, N)."""
    block = block_map.queries.block_of()[0, 0]  # (N,)
    return block_map.visits[0, 0][block[rows]][:, block]


def _loss(scores: Tensor, dense: Tensor, values: Tensor | None, seen: Tensor) -> Tensor:
    """Return what queries lose that see only some keys, (B, K): squared error of the output, or mass."""
    if values is None:
        return (dense * ~seen).sum((-2, -1))
    sparse = scores.masked_fill(~seen, -torch.inf).softmax(-1)  # (B, K, R, N)
    return ((sparse - dense) @ values).square().mean((-2, -1))
