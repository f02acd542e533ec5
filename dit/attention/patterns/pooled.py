"""Blocks chosen by the scores between means of blocks: the largest, those with most of the mass, or both.

Most published predictors are one of these three with another layout, guard or rounding; `presets` names them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap, make_block_map
from dit.attention.grid import TokenGrid
from dit.attention.layout import Layout
from dit.attention.patterns import register_pattern
from dit.attention.patterns.layouts import choose_layouts, forced_visits
from dit.attention.patterns.scores import block_scores, self_similarity
from dit.attention.patterns.selection import Rounding, budget, check_share, choose_mass, choose_top, softmax_known


@register_pattern("pooled_topk", paper="arXiv 2509.24006", online=True)
@torch.no_grad()
def pooled_topk(
    grid: TokenGrid,
    query: Tensor,
    key: Tensor,
    keep: float = 0.25,
    *,
    rounding: Rounding = "ceil",
    on_top: bool = False,
    layout: str | Layout = "raster",
    block: int = 128,
    key_block: int | None = None,
    tile: tuple[int, int, int] | None = None,
    diagonal: int | None = None,
    window: tuple[int, int, int] | None = None,
    neighbours: bool = False,
    similarity: float | None = None,
    key_mask: Tensor | None = None,
) -> BlockMap:
    """Let each block of queries see the blocks of keys whose mean its own mean scores highest.

    The rule of SLA (arXiv 2509.24006) and VSA (arXiv 2505.13389) without their further branches.

    Args:
        grid: the tokens.
        query: (B, N, K, E), in the order of the sequence.
        key: likewise.
        keep: share of the visual blocks of keys that are visited, at least one; of equal scores the first blocks.
        rounding: of their number, see `selection.budget`.
        on_top: what is visited anyway isn't counted, and `keep` is a share of the others.
        layout: one of `layouts.LAYOUTS`, or a layout of the grid; all heads share it.
        block: tokens of a block of queries.
        key_block: tokens of a block of keys; None means as `block`.
        tile: (t, h, w), for layout "tile".
        diagonal: visit the block itself, and so many blocks on both sides of it in the order; None visits none.
        window: visit tiles at most half as many as this away along each axis, for layout "tile".
        neighbours: visit blocks with a token beside one of the block's.
        similarity: least mean cosine of the tokens of a block; a block below it is poorly told by its mean: as queries
            it visits all, as keys it is visited by all, and it doesn't compete (SpargeAttn). None asks for nothing.
        key_mask: bool, (B, N), False for tokens that don't count.
    """

    def choose(scores: Tensor, forced: Tensor | None) -> Tensor:
        if not on_top or forced is None:
            return choose_top(scores, budget(scores.shape[-1], keep, rounding))
        counts = [budget(free, keep, rounding) if free else 0 for free in (~forced).sum(-1).tolist()]
        count = torch.tensor(counts, device=scores.device)[:, None]  # (n, 1)
        return choose_top(scores.masked_fill(forced, -torch.inf), count)

    return _pooled(
        grid, query, key, choose, layout, block, key_block, tile, diagonal, window, neighbours, similarity, key_mask
    )


@register_pattern("pooled_topp", paper="arXiv 2502.18137", online=True)
@torch.no_grad()
def pooled_topp(
    grid: TokenGrid,
    query: Tensor,
    key: Tensor,
    p: float = 0.9,
    *,
    crossing: bool = True,
    least: float = 0.0,
    layout: str | Layout = "raster",
    block: int = 128,
    key_block: int | None = None,
    tile: tuple[int, int, int] | None = None,
    diagonal: int | None = None,
    window: tuple[int, int, int] | None = None,
    neighbours: bool = False,
    similarity: float | None = None,
    key_mask: Tensor | None = None,
) -> BlockMap:
    """Let each block of queries see the best blocks of keys until they hold a share of the mass between means.

    The rule of SpargeAttn (arXiv 2502.18137) and of NABLA (arXiv 2507.13546).

    Args:
        grid: the tokens.
        query: (B, N, K, E), in the order of the sequence.
        key: likewise.
        p: share of the softmax over the means of the visual blocks.
        crossing: see `selection.choose_mass`.
        least: share of the blocks that are visited at least, rounded down, one at least.
        layout: as the rest, see `pooled_topk`.
        block: see there.
        key_block: see there.
        tile: see there.
        diagonal: see there.
        window: see there.
        neighbours: see there.
        similarity: see there.
        key_mask: see there.
    """

    def choose(scores: Tensor, forced: Tensor | None) -> Tensor:
        fewest = budget(scores.shape[-1], least, "floor")
        return choose_mass(softmax_known(scores), p, crossing=crossing, least=fewest)

    return _pooled(
        grid, query, key, choose, layout, block, key_block, tile, diagonal, window, neighbours, similarity, key_mask
    )


@register_pattern("topk_topp", paper="arXiv 2602.13515", online=True)
@torch.no_grad()
def topk_topp(
    grid: TokenGrid,
    query: Tensor,
    key: Tensor,
    keep: float = 0.03,
    p: float = 0.2,
    *,
    rounding: Rounding = "ceil",
    layout: str | Layout = "raster",
    block: int = 128,
    key_block: int | None = 64,
    tile: tuple[int, int, int] | None = None,
    diagonal: int | None = None,
    window: tuple[int, int, int] | None = None,
    neighbours: bool = False,
    similarity: float | None = None,
    key_mask: Tensor | None = None,
) -> BlockMap:
    """Visit what `pooled_topk` or `pooled_topp` visits (SpargeAttention2, arXiv 2602.13515).

    The first keeps enough where the mass is spread, the second where few blocks hold it. Jenga's rule, the larger of
    both numbers of blocks, is the same.

    Args:
        grid: the tokens.
        query: (B, N, K, E), in the order of the sequence.
        key: likewise.
        keep: see `pooled_topk`.
        p: see `pooled_topp`, with the block with which the sum passes it.
        rounding: of the number of blocks that `keep` is.
        layout: as the rest, see `pooled_topk`; layouts with blocks of their own need `key_block=None`.
        block: see there.
        key_block: see there.
        tile: see there.
        diagonal: see there.
        window: see there.
        neighbours: see there.
        similarity: see there.
        key_mask: see there.
    """
    check_share("keep", keep)

    def choose(scores: Tensor, forced: Tensor | None) -> Tensor:
        return choose_mass(softmax_known(scores), p, least=budget(scores.shape[-1], keep, rounding))

    return _pooled(
        grid, query, key, choose, layout, block, key_block, tile, diagonal, window, neighbours, similarity, key_mask
    )


def _pooled(
    grid: TokenGrid,
    query: Tensor,
    key: Tensor,
    choose: Callable[[Tensor, Tensor | None], Tensor],
    layout: str | Layout,
    block: int,
    key_block: int | None,
    tile: tuple[int, int, int] | None,
    diagonal: int | None,
    window: tuple[int, int, int] | None,
    neighbours: bool,
    similarity: float | None,
    key_mask: Tensor | None,
) -> BlockMap:
    """Score the means of blocks, have visits chosen by them, and add those that are forced."""
    queries, keys = choose_layouts(grid, layout, block, key_block, tile, query.device)
    forced = forced_visits(queries, keys, diagonal=diagonal, window=window, neighbours=neighbours)  # (n, m)
    scores = block_scores(query, key, queries, keys, mask=key_mask)  # (B, K, n, m)
    if similarity is None:
        visits = choose(scores, forced)
    else:
        loose = ~(self_similarity(query, queries, key_mask) > similarity)  # (B, K, n); NaN is loose
        loose_keys = ~(self_similarity(key, keys, key_mask) > similarity)  # (B, K, m)
        scores = scores.masked_fill(loose_keys[..., None, :], -torch.inf)
        visits = choose(scores, forced) | loose[..., None] | loose_keys[..., None, :]
    return make_block_map(queries, visits if forced is None else visits | forced, keys=keys)
