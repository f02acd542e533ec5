"""Sol-Attn: a block is visited if its score stands out among those of the row (arXiv 2607.24027)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap, make_block_map
from dit.attention.grid import TokenGrid
from dit.attention.layout import Layout
from dit.attention.patterns import register_pattern
from dit.attention.patterns.layouts import choose_layouts, diagonal_visits
from dit.attention.patterns.scores import block_means, visual_pairs
from dit.attention.patterns.selection import check_share, known_scores

BISECTIONS = 40
"""Halvings of the range of thresholds; float32 has no finer one."""


@register_pattern("sol", paper="arXiv 2607.24027", online=True)
@torch.no_grad()
def sol(
    grid: TokenGrid,
    query: Tensor,
    key: Tensor,
    tau: float = 1.0,
    *,
    density: float | None = None,
    deviation: Literal["diagonal", "exact"] = "diagonal",
    diagonal: int = 1,
    layout: str | Layout = "morton",
    block: int = 64,
    key_block: int | None = None,
    tile: tuple[int, int, int] | None = None,
    key_mask: Tensor | None = None,
) -> BlockMap:
    """Let each block of queries see the blocks of keys that score more than tau deviations above the row's mean.

    With c = log2(e) / sqrt(E), the means q of the queries' and k_j of the keys' blocks, block j is visited if
    c q k_j > c q mean_j(k_j) + tau sqrt(v + 1e-6); v = c^2 sum_e q_e^2 var_j(k_je) for "diagonal", c^2 q cov_j(k) q for
    "exact". So how many blocks are visited depends on the row. Neighbors in the order are visited too. What isn't
    visited should be stood for by one pooled term a block: the correction "pooled_tail".

    Args:
        grid: the tokens.
        query: (B, N, K, E), in the order of the sequence.
        key: likewise.
        tau: deviations above the mean.
        density: share of the visual pairs of tokens that all samples and heads together should visit; tau is then
            found by bisection, and the one given isn't used. Neighbors count, so there is a least density.
        deviation: which estimate v of the variance of the row's scores.
        diagonal: blocks on both sides of a block in the order that it visits.
        layout: see `pooled_topk`.
        block: tokens of a block of queries.
        key_block: tokens of a block of keys; None means as `block`.
        tile: (t, h, w), for layout "tile".
        key_mask: bool, (B, N), False for tokens that don't count.

    Raises:
        ValueError: a density outside 0 to 1, or an unknown deviation.
    """
    queries, keys, visits, _ = _choose(
        grid, query, key, tau, density, deviation, diagonal, layout, block, key_block, tile, key_mask
    )
    return make_block_map(queries, visits, keys=keys)


@torch.no_grad()
def sol_tau(grid: TokenGrid, query: Tensor, key: Tensor, density: float, **params: Any) -> float:
    """Return the tau at which `sol` visits a share of all visual pairs: to be found once, and kept.

    Args:
        grid: the tokens.
        query: (B, N, K, E), in the order of the sequence.
        key: likewise.
        density: see `sol`.
        **params: the others of `sol`.
    """
    return float(_choose(grid, query, key, density=density, **params)[3])


def _choose(
    grid: TokenGrid,
    query: Tensor,
    key: Tensor,
    tau: float = 1.0,
    density: float | None = None,
    deviation: str = "diagonal",
    diagonal: int = 1,
    layout: str | Layout = "morton",
    block: int = 64,
    key_block: int | None = None,
    tile: tuple[int, int, int] | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Layout, Layout, Tensor, Tensor | float]:
    """Return the blocks of queries and keys, the visits (B, K, n, m), and the threshold; see `sol`."""
    queries, keys = choose_layouts(grid, layout, block, key_block, tile, query.device)
    heights, unknown = _heights(query, key, queries, keys, deviation, key_mask)  # (B, K, n, m)
    forced = diagonal_visits(queries, keys, diagonal) | unknown  # (B, K, n, m)
    threshold = tau if density is None else _bisect(heights, forced, visual_pairs(queries, keys), density)
    return queries, keys, (heights > threshold) | forced, threshold


def _heights(
    query: Tensor,
    key: Tensor,
    queries: Layout,
    keys: Layout,
    deviation: str,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return how many deviations each score is above its row's mean, and where that can't be said, (B, K, n, m)."""
    if deviation not in ("diagonal", "exact"):
        raise ValueError(f"deviation is {deviation!r}; use 'diagonal' or 'exact'")
    scale = query.shape[-1] ** -0.5 * 1.4426950408889634
    means, _ = block_means(query, queries, mask)  # (B, K, n, E)
    key_means, counts = block_means(key, keys, mask)  # (B, K, m, E), (B', K', m)
    live = (counts > 0)[..., None]  # (B', K', m, 1)
    number = live.sum(-2, keepdim=True).clamp(min=1)  # (B', K', 1, 1)
    centre = (key_means * live).sum(-2, keepdim=True) / number  # (B, K, 1, E)
    apart = (key_means - centre) * live  # (B, K, m, E)
    if deviation == "diagonal":
        variance = means.square() @ (apart.square().sum(-2, keepdim=True) / number).mT  # (B, K, n, 1)
    else:
        variance = ((means @ (apart.mT @ apart / number)) * means).sum(-1, keepdim=True).clamp(min=0)  # (B, K, n, 1)
    heights = (means * scale) @ apart.mT / (variance * scale**2 + 1e-6).sqrt()  # (B, K, n, m)
    known, unknown = known_scores(heights)
    return known.masked_fill(~live.mT, -torch.inf), unknown


def _bisect(heights: Tensor, forced: Tensor, pairs: Tensor, density: float) -> Tensor:
    """Return the threshold at which just no more than a density of the pairs is visited, ()."""
    check_share("density", density)
    pairs = pairs.expand_as(heights)
    allowed = density * pairs.sum(dtype=torch.float64) * (1 + 1e-9)
    always = (pairs * forced).sum(dtype=torch.float64)
    free = pairs * ~forced  # (B, K, n, m)
    finite = heights.isfinite()
    least, high = heights.masked_fill(~finite, torch.inf).amin() - 1, heights.masked_fill(~finite, -torch.inf).amax()
    low = least
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        too_many = always + (free * (heights > middle)).sum(dtype=torch.float64) > allowed
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    everything = always + free.sum(dtype=torch.float64) <= allowed
    return torch.where(everything, least, high)
