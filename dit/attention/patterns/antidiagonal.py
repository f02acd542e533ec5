"""XAttention: blocks are scored by the antidiagonals of small squares of tokens (arXiv 2503.16428)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dit.attention.block_map import BlockMap, make_block_map
from dit.attention.grid import TokenGrid
from dit.attention.layout import Layout
from dit.attention.patterns import register_pattern
from dit.attention.patterns.layouts import choose_layouts, forced_visits
from dit.attention.patterns.scores import padded_blocks
from dit.attention.patterns.selection import choose_mass, softmax_known

SCORES_AT_ONCE = 2**24
"""Most scores between groups of tokens that are held at a time."""


@register_pattern("antidiagonal", paper="arXiv 2503.16428", online=True)
@torch.no_grad()
def antidiagonal(
    grid: TokenGrid,
    query: Tensor,
    key: Tensor,
    p: float = 0.9,
    *,
    stride: int = 16,
    layout: str | Layout = "raster",
    block: int = 128,
    tile: tuple[int, int, int] | None = None,
    diagonal: int | None = None,
    key_mask: Tensor | None = None,
) -> BlockMap:
    """Let each block see the best blocks until they hold a share of the mass, estimated by antidiagonals.

    Groups of `stride` neighboring tokens are scored by the sum of query s - 1 - a times key a over a, divided by
    sqrt(E) s (algorithm 1 of the paper, both for long prompts and for video). The softmax is over the groups of keys,
    and the score of a block is its sum over the groups in it. Here groups don't cross blocks: each block begins with a
    group of its own. Tokens that are missing from the last group of a block count as zeros, as in the authors' code;
    groups without a token are left out of the softmax. Their code also visits the first block everywhere, by the way
    in which it writes its mask; this doesn't.

    Args:
        grid: the tokens.
        query: (B, N, K, E), in the order of the sequence.
        key: likewise.
        p: share of the mass of each block of queries; with the block with which the sum passes it.
        stride: tokens s of a group.
        layout: see `pooled_topk`.
        block: tokens of a block.
        tile: (t, h, w), for layout "tile".
        diagonal: see `pooled_topk`.
        key_mask: bool, (B, N), False for tokens that don't count.

    Raises:
        ValueError: a stride below 1.
    """
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    blocks, _ = choose_layouts(grid, layout, block, None, tile, query.device)
    left, live = _groups(query, blocks, stride, key_mask, reverse=True)  # (B, K, n, g, s E), (B', 1, n, g)
    right, _ = _groups(key, blocks, stride, key_mask, reverse=False)
    batch, heads, count, groups = left.shape[:4]
    scale = query.shape[-1] ** -0.5 / stride
    right = right.flatten(2, 3).mT  # (B, K, s E, n g)
    dead = ~live.flatten(2, 3)[:, :, None]  # (B', 1, 1, n g)
    step = max(SCORES_AT_ONCE // (batch * heads * groups * right.shape[-1]), 1)
    mass = []
    for start in range(0, count, step):
        some = left[:, :, start : start + step]  # (B, K, r, g, s E)
        scores = (some.flatten(2, 3) * scale) @ right  # (B, K, r g, n g)
        probability = softmax_known(scores.masked_fill(dead, -torch.inf))  # (B, K, r g, n g)
        probability = probability.view(batch, heads, -1, groups, count, groups).sum(-1)  # (B, K, r, g, n)
        there = live[:, :, start : start + step, :, None]  # (B', 1, r, g, 1)
        mass.append(probability.masked_fill(~there, 0).sum(-2))  # (B, K, r, n)
    summed = torch.cat(mass, dim=2)  # (B, K, n, n)
    total = summed.nan_to_num(0).sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    visits = choose_mass(summed / total, p)
    forced = forced_visits(blocks, blocks, diagonal=diagonal, window=None, neighbours=False)
    return make_block_map(blocks, visits if forced is None else visits | forced)


def _groups(x: Tensor, layout: Layout, stride: int, mask: Tensor | None, *, reverse: bool) -> tuple[Tensor, Tensor]:
    """Return the tokens of each group side by side, (B, K, n, g, s E), and which groups have any, (B', 1, n, g)."""
    tokens, there = padded_blocks(x, layout, mask)  # (B, K, n, L, E), (B', 1, n, L)
    tokens = tokens.float().masked_fill(~there[..., None], 0)
    rest = -tokens.shape[3] % stride
    tokens = functional.pad(tokens, (0, 0, 0, rest)).unflatten(3, (-1, stride))  # (B, K, n, g, s, E)
    there = functional.pad(there, (0, rest)).unflatten(3, (-1, stride)).any(-1)  # (B', 1, n, g)
    return (tokens.flip(4) if reverse else tokens).flatten(4), there
