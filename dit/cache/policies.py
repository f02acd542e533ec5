"""Eviction policies: which tokens of a layer stay when the budget is exceeded. Pure functions on token indices.

Window keeps the newest, streaming (arXiv 2309.17453) the oldest few and the newest. SnapKV (arXiv 2404.14469)
scores by the attention of the last queries; PyramidKV too. ScaleKV (arXiv 2505.19602) uses queries spread over the
current map, one at the centre of each of W patches, and always keeps their own tokens. We score with the queries that
attention really uses, normalised and rotated, and with softmax weights; the released code scores with raw
projections and sums of logits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.cache.plan import CachePlan
from dit.layers.scales import Grid

MAX_WINDOW_FRACTION = 0.5
"""Largest fraction of a layer's capacity that the observing queries' own tokens may take."""

TIE_BREAK = 1e-3
"""Weight of a token's own score, added to the maximum over its neighbours to break ties."""


def select_tokens(plan: CachePlan, query: Tensor, keys: Tensor, capacity: int, grid: Grid | None) -> Tensor:
    """Choose the tokens that stay.

    Args:
        plan: policy and settings.
        query: of the current scale, (B, K, N, E), final.
        keys: of history and current scale, (B, K, M, E), final; the current scale's are the last N.
        capacity: how many stay, below M.
        grid: rows and columns of the current scale, if its N tokens are a whole map.

    Returns:
        Ascending indices, (B, K, capacity), int64.
    """
    batch, heads, length, _ = keys.shape
    if plan.policy == "window":
        chosen = newest_positions(length, capacity, keys.device)  # (c,)
    elif plan.policy == "streaming":
        chosen = sinks_and_newest(length, capacity, plan.sinks, keys.device)  # (c,)
    else:
        count = query.shape[2]
        spread = plan.policy == "scalekv"
        # attention of the observation queries on all keys
        observers = (
            spread_positions(grid, count, plan.observe) if spread else newest_positions(count, min(plan.observe, count))
        )  # (W,)
        observers = observers.to(keys.device)
        scores = attention_mass(query[:, :, observers], keys)  # (B, K, M)
        # keep the best, and always the newest observers themselves
        always = observers[-math.floor(capacity * MAX_WINDOW_FRACTION) :] if capacity > 1 else observers[:0]  # (W',)
        return topk_positions(smooth_scores(scores, plan.pool), capacity, always + length - count)  # (B, K, c)
    return chosen.expand(batch, heads, -1)  # (B, K, c)


def newest_positions(length: int, count: int, device: torch.device | None = None) -> Tensor:
    """Return the last `count` of `length` indices, (count,)."""
    return torch.arange(length - count, length, device=device)


def sinks_and_newest(length: int, capacity: int, sinks: int, device: torch.device | None = None) -> Tensor:
    """Return the first few and the last few, `capacity` together, (capacity,)."""
    first = min(sinks, capacity // 2)
    return torch.cat([torch.arange(first, device=device), newest_positions(length, capacity - first, device)])


def spread_positions(grid: Grid | None, count: int, observe: int) -> Tensor:
    """Return positions of queries spread over a map: the centres of about `observe` equal patches.

    Args:
        grid: rows and columns of the map; None spreads them evenly over the row.
        count: tokens of the map.
        observe: how many are wanted; a map that has fewer gives all.

    Returns:
        Ascending indices, (W,), W <= observe.
    """
    if count <= observe:
        return torch.arange(count)
    if grid is None or grid[0] * grid[1] != count:
        return _centres(count, observe)
    rows = min(max(round(math.sqrt(observe * grid[0] / grid[1])), 1), grid[0], observe)
    columns = min(observe // rows, grid[1])
    return (_centres(grid[0], rows)[:, None] * grid[1] + _centres(grid[1], columns)).flatten()  # (W,)


def _centres(length: int, parts: int) -> Tensor:
    """Return the middle indices of equal parts of a row, as the released code takes them."""
    part = length // parts
    return torch.arange(parts) * part + (part - 1) // 2


def attention_mass(query: Tensor, keys: Tensor) -> Tensor:
    """Return how much attention each key gets from some queries.

    Args:
        query: (B, K, W, E).
        keys: (B, K, M, E).

    Returns:
        Sum of the softmax weights, (B, K, M), float32.
    """
    logits = (query @ keys.mT).float() * query.shape[-1] ** -0.5  # (B, K, W, M)
    return logits.softmax(-1).sum(2)  # (B, K, M)


def smooth_scores(scores: Tensor, width: int) -> Tensor:
    """Return the maximum over `width` neighbours, (B, K, M): neighbours of what matters tend to matter."""
    return F.max_pool1d(scores, width, stride=1, padding=width // 2) + TIE_BREAK * scores


def topk_positions(scores: Tensor, capacity: int, always: Tensor) -> Tensor:
    """Return the indices of the highest scores, after those that always stay.

    Args:
        scores: (B, K, M).
        capacity: how many stay.
        always: indices that stay, (W',), at most `capacity`.

    Returns:
        Ascending indices, (B, K, capacity).
    """
    scores = scores.clone()
    scores[..., always] = torch.inf
    return scores.topk(capacity, dim=-1).indices.sort(-1).values  # (B, K, c)
