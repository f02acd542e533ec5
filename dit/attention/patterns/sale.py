"""SALE: scores of all tokens are estimated in four bits, and blocks kept that hold a large one (arXiv 2505.24179)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap, make_block_map
from dit.attention.grid import TokenGrid
from dit.attention.layout import Layout
from dit.attention.patterns import register_pattern
from dit.attention.patterns.layouts import choose_layouts, diagonal_visits
from dit.attention.patterns.scores import padded_blocks
from dit.attention.patterns.tiles import QueryRows, exact_scores, tile_scores


@register_pattern("sale", paper="arXiv 2505.24179", online=True)
@torch.no_grad()
def sale(
    grid: TokenGrid,
    query: Tensor,
    key: Tensor,
    threshold: float = 0.004,
    *,
    local: int = 1,
    sinks: int = 1,
    layout: str | Layout = "raster",
    block: int = 64,
    key_block: int | None = 32,
    tile: tuple[int, int, int] | None = None,
    key_mask: Tensor | None = None,
) -> BlockMap:
    """Visit blocks in which some token's weight, estimated in four bits, reaches a threshold.

    The blocks around the block itself, the first blocks and exact tokens are always visited. The sum of their exact
    exponentials is what the estimate of every other one is divided by (relative attention score): block j is kept if
    exp(s'_ij) >= threshold sum_near exp(s_ij) for any of its pairs of tokens. Queries and keys are taken from their
    means over the sequence and rounded to -7 ... 7 token by token, as in the authors' code; what the mean of the
    queries adds to a score is exact.

    All scores are computed for that, in four bits on a GPU; here the rounded numbers are multiplied as float32, which
    takes as long as attention. On a CPU this is an estimate to compare others with.

    Args:
        grid: the tokens.
        query: (B, N, K, E), in the order of the sequence.
        key: likewise.
        threshold: relative attention score of blocks that are kept, more than 0.
        local: blocks of keys on both sides of the block itself that are always visited.
        sinks: first visual blocks of keys that are always visited.
        layout: see `pooled_topk`; layouts with blocks of their own need `key_block=None`.
        block: tokens of a block of queries.
        key_block: tokens of a block of keys; None means as `block`.
        tile: (t, h, w), for layout "tile".
        key_mask: bool, (B, N), False for tokens that don't count.

    Raises:
        ValueError: a threshold that isn't positive, or negative numbers of blocks.
    """
    if threshold <= 0 or min(local, sinks) < 0:
        raise ValueError(
            f"threshold must be more than 0, local and sinks at least 0, got {threshold}, {local} and {sinks}"
        )
    queries, keys = choose_layouts(grid, layout, block, key_block, tile, query.device)
    near = diagonal_visits(queries, keys, local).clone()  # (n, m)
    near[:, :sinks] = True
    rows, scale = QueryRows(queries), query.shape[-1] ** -0.5
    centre = _mean(key, key_mask)  # (B, 1, K, E)
    level = _near_level(grid, query, key.float() - centre, rows, keys, near, key_mask)  # (B, K, n, L)
    level = level + math.log(threshold)
    estimates = _rounded_query(query, key_mask), _rounded_key(query, key.float() - centre, key_mask)  # (B, N, K, E + 1)
    visits = []
    for some, scores in tile_scores(*estimates, rows, keys, scale, key_mask):
        # comparisons with NaN are false: what can't be judged is visited
        large = ~(scores.amax(-1) < level[:, :, some, :, None]) & rows.there[some][..., None]  # (B, K, r, L, m)
        visits.append(large.any(3))
    return make_block_map(queries, torch.cat(visits, dim=2) | near, keys=keys)


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of the tokens of the sequence that count, (B, 1, K, E), float32."""
    if mask is None:
        return x.float().mean(1, keepdim=True)
    there = mask[:, :, None, None]  # (B, N, 1, 1)
    return x.float().masked_fill(~there, 0).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)


def _four_bits(x: Tensor) -> Tensor:
    """Round each token to fifteen equal steps from minus to plus its largest number."""
    step = x.abs().amax(-1, keepdim=True) / 7
    return (x / step.masked_fill(step == 0, 1)).round() * step


def _rounded_query(query: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rounded queries and a one, whose product with `_rounded_key` is the estimate, (B, N, K, E + 1)."""
    rounded = _four_bits(query.float() - _mean(query, mask))
    return torch.cat([rounded, torch.ones_like(rounded[..., :1])], dim=-1)


def _rounded_key(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rounded keys, and their exact products with the mean of the queries, (B, N, K, E + 1)."""
    shift = (_mean(query, mask) * key).sum(-1, keepdim=True)  # (B, N, K, 1)
    return torch.cat([_four_bits(key), shift], dim=-1)


def _near_level(
    grid: TokenGrid, query: Tensor, key: Tensor, rows: QueryRows, keys: Layout, near: Tensor, mask: Tensor | None
) -> Tensor:
    """Return log sum exp of each query's scores with the keys of near blocks and exact tokens, (B, K, n, L)."""
    tokens, there = padded_blocks(key, keys, mask)  # (B, K, m, M, E), (B', 1, m, M)
    most = int(near.sum(-1).max())
    _, index = near.to(torch.int8).sort(dim=-1, descending=True, stable=True)
    index = index[:, :most]  # (n, f), near blocks first
    gone = ~(there[:, :, index] & near.gather(1, index)[:, :, None])  # (B', 1, n, f, M)
    levels = []
    for block in range(len(index)):
        picked = rows.pick(query, slice(block, block + 1)) * query.shape[-1] ** -0.5  # (B, K, 1, L, E)
        scores = picked[:, :, 0] @ tokens[:, :, index[block]].flatten(2, 3).mT  # (B, K, L, f M)
        scores = scores.masked_fill(gone[:, :, block].flatten(2)[:, :, None], -torch.inf)
        if grid.exact_length:
            scores = torch.cat([scores, exact_scores(picked, key, grid, mask)[:, :, 0]], dim=-1)
        levels.append(scores.logsumexp(-1))  # (B, K, L)
    return torch.stack(levels, dim=2)
