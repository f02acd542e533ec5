"""Draft attention: the largest scores between means of patches of a frame, over all rows of a head at once."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from dit.attention.block_map import BlockMap, make_block_map
from dit.attention.frame_blocks import frame_layout
from dit.attention.grid import TokenGrid
from dit.attention.layout import Layout, tile_layout
from dit.attention.patterns import register_pattern
from dit.attention.patterns.scores import block_means, padded_blocks, score_means
from dit.attention.patterns.selection import budget, choose_top, known_scores, softmax_known


@register_pattern("draft", paper="arXiv 2505.14708", online=True)
@torch.no_grad()
def draft(
    grid: TokenGrid,
    query: Tensor,
    key: Tensor,
    keep: float = 0.2,
    *,
    form: Literal["connected", "patches"] = "connected",
    block: int = 64,
    patch: tuple[int, int] = (8, 16),
    jensen: bool = False,
    largest: float = 0.0,
    tails: int = 0,
    anchors: bool = False,
    layout: Layout | None = None,
    key_mask: Tensor | None = None,
) -> BlockMap:
    """Visit the pairs of blocks with the largest probabilities of a whole head: rows may get few blocks or many.

    DraftAttention (arXiv 2505.14708) pools patches of a frame and takes a softmax over each row of scores of their
    means. Its newer form, code in comfy-kitchen, has connected blocks of equal size instead, for frames of any size,
    and better estimates. A row left without a block gets its own one; both published codes give it zeros then. Means
    and probabilities are float32 here, float16 there.

    Args:
        grid: the tokens.
        query: (B, N, K, E), in the order of the sequence.
        key: likewise.
        keep: share of the pairs of visual blocks of a head; of equal probabilities the first pairs.
        form: "connected" blocks and max(1, floor(keep n^2 + 1/2)) pairs, or "patches" of a frame and, as there, the
            pairs not below the int((1 - keep) n^2)-th smallest, which is one more.
        block: most tokens of a connected block.
        patch: (h, w) of patches.
        jensen: add max(0, mean(q^2) mean(k^2) - mean(q)^2 mean(k)^2) / (2 E), summed over E, to the scores.
        largest: weight of a second softmax, over scores of the largest queries and keys of blocks in each channel.
        tails: 0, 1 or 2 keys of each block, those farthest from its mean, that are scored by themselves; the block's
            score is then log sum exp over them and its other keys, which their mean stands for.
        anchors: visit all blocks of the same frame that share an edge with the block, and so many fewer others.
        layout: blocks of your own, instead of `form`'s; anchors need `form`'s.
        key_mask: bool, (B, N), False for tokens that don't count.

    Raises:
        ValueError: an unknown form, options that exclude each other, or more anchors than pairs to keep.
    """
    _check(form, jensen, largest, tails, anchors, layout)
    blocks = _blocks(grid, form, block, patch) if layout is None else layout
    blocks = blocks.to(query.device)
    probability = _probability(query, key, blocks, jensen, largest, tails, key_mask)  # (B, K, n, n)
    count = blocks.visual_count
    pairs = count * count
    kept = budget(pairs, keep, "nearest")
    if form == "patches":
        kept = min(pairs - int(round((1 - keep) * pairs, 9)) + 1, pairs)
    ranked, unknown = known_scores(probability)
    if anchors:
        fixed = edge_visits(blocks).to(query.device)  # (n, n)
        if int(fixed.sum()) > kept:
            raise ValueError(f"there are {int(fixed.sum())} anchors, but keep={keep} is {kept} pairs; keep more")
        ranked = ranked.masked_fill(fixed, 2.0)  # above every probability
    visits = choose_top(ranked.flatten(2), kept).view_as(ranked) | unknown
    itself = torch.eye(count, dtype=torch.bool, device=query.device)
    return make_block_map(blocks, visits | (itself & ~visits.any(-1, keepdim=True)))


def edge_visits(layout: Layout) -> Tensor:
    """Return which visual blocks have tokens of one frame that share an edge, or are the same, bool, (n, n)."""
    grid = layout.grid
    block = layout.block_of()[0, 0, grid.visual_start : grid.visual_start + grid.visual_length].view(grid.shape)
    visits = torch.eye(layout.visual_count, dtype=torch.bool)
    for one, other in ((block[:, 1:], block[:, :-1]), (block[:, :, 1:], block[:, :, :-1])):
        visits[one.flatten(), other.flatten()] = True
        visits[other.flatten(), one.flatten()] = True
    return visits


def _blocks(grid: TokenGrid, form: str, block: int, patch: tuple[int, int]) -> Layout:
    return frame_layout(grid, block) if form == "connected" else tile_layout(grid, (1, patch[0], patch[1]))


def _probability(
    query: Tensor, key: Tensor, blocks: Layout, jensen: bool, largest: float, tails: int, mask: Tensor | None
) -> Tensor:
    """Return the estimated share of each row of blocks that each block has, (B, K, n, n), float32."""
    scale = query.shape[-1] ** -0.5
    means, _ = block_means(query, blocks, mask)  # (B, K, n, E)
    key_means, counts = block_means(key, blocks, mask)  # (B, K, n, E), (B', K', n)
    if tails:
        return softmax_known(_tail_scores(means, key, key_means, counts, blocks, tails, mask))
    scores = score_means(means, key_means, counts, scale)  # (B, K, n, n)
    if jensen:
        squares, _ = block_means(query.float().square(), blocks, mask)
        key_squares, _ = block_means(key.float().square(), blocks, mask)
        spread = squares @ key_squares.mT - means.square() @ key_means.square().mT  # (B, K, n, n)
        scores = scores + spread.clamp(min=0) * (0.5 / query.shape[-1])
    probability = softmax_known(scores)
    if largest:
        peaks, key_peaks = (_peaks(x, blocks, mask) for x in (query, key))  # (B, K, n, E)
        probability = probability.lerp(softmax_known(score_means(peaks, key_peaks, counts, scale)), largest)
    return probability


def _peaks(x: Tensor, blocks: Layout, mask: Tensor | None) -> Tensor:
    """Return the largest value of each channel in each block, (B, K, n, E); zeros for blocks without a token."""
    tokens, there = padded_blocks(x, blocks, mask)  # (B, K, n, L, E), (B', 1, n, L)
    peaks = tokens.float().masked_fill(~there[..., None], -torch.inf).amax(-2)
    return peaks.masked_fill(~there.any(-1, keepdim=True), 0)


def _tail_scores(
    means: Tensor, key: Tensor, key_means: Tensor, counts: Tensor, blocks: Layout, tails: int, mask: Tensor | None
) -> Tensor:
    """Return log sum exp over the keys farthest from each block's mean and the mean of the others, (B, K, n, m)."""
    tokens, there = padded_blocks(key, blocks, mask)  # (B, K, m, L, E), (B', 1, m, L)
    tokens = functional.pad(tokens.float(), (0, 0, 0, max(tails - tokens.shape[3], 0)))
    there = functional.pad(there, (0, tokens.shape[3] - there.shape[3]))
    away = (tokens - key_means[:, :, :, None]).square().sum(-1).masked_fill(~there, -torch.inf)  # (B, K, m, L)
    far = away.argsort(dim=-1, descending=True, stable=True)[..., :tails]  # (B, K, m, r)
    keys = tokens.gather(3, far[..., None].expand(*far.shape, tokens.shape[-1]))  # (B, K, m, r, E)
    scale = means.shape[-1] ** -0.5
    single = torch.einsum("bkne,bkmre->bknmr", means * scale, keys)  # (B, K, n, m, r)
    single = single.masked_fill(~there.expand_as(away).gather(3, far)[:, :, None], -torch.inf)
    scores = (means * scale) @ key_means.mT  # (B, K, n, m)
    number = counts[..., None, :]  # (B', K', 1, m)
    left = number - tails
    bulk = (number * scores - single.sum(-1)) / left.clamp(min=1)  # mean score of the other keys
    bulk = (bulk + left.clamp(min=1).log()).masked_fill(left <= 0, -torch.inf)
    every = torch.cat([bulk[..., None], single], dim=-1).logsumexp(-1)  # (B, K, n, m)
    return torch.where(number > 1, every, scores).masked_fill(number == 0, -torch.inf)


def _check(form: str, jensen: bool, largest: float, tails: int, anchors: bool, layout: Layout | None) -> None:
    if form not in ("connected", "patches"):
        raise ValueError(f"form is {form!r}; use 'connected' or 'patches'")
    if not 0 <= largest <= 1:
        raise ValueError(f"largest is {largest}; use a weight from 0 to 1")
    if tails not in (0, 1, 2):
        raise ValueError(f"tails is {tails}; use 0, 1 or 2")
    if bool(jensen) + bool(largest) + bool(tails) > 1:
        raise ValueError("jensen, largest and tails are estimates of the same; use one of them")
    if anchors and layout is not None and not layout.is_shared:
        raise ValueError("anchors need blocks that all heads share; leave out layout or anchors")
