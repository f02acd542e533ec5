"""What online patterns predict attention by: means of blocks and their scores, never all pairs of tokens at once.

Means are of the tokens that are there: blocks may be of any size, masked tokens don't count, and a block without a
token has the score -inf. Everything is float32, whatever the queries are: scores rounded to bfloat16 are equal so often
that the order of the blocks would decide. A NaN or infinity in a query or key makes the scores of its block NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dit.attention.grid import TokenGrid
from dit.attention.layout import Layout


def block_means(
    x: Tensor, layout: Layout, mask: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the mean of each visual block, zeros for those without a token.

    Args:
        x: (B, N, K, E), in the order of the sequence.
        layout: the blocks, which heads and samples may share or not.
        mask: bool, (B, N), False for tokens that don't count.
        starts: (B', K', c + 1), where c other runs of visual tokens begin in the layout's order; None means the blocks.

    Returns:
        Means (B, K, n, E), float32, and how many tokens each is of, (B or 1, K or 1, n), float32.
    """
    batch, length, heads, width = x.shape
    visual = layout.grid.visual_length
    order = layout.order[..., :visual]  # (B', K', V)
    starts = layout.starts[..., : layout.visual_count + 1] if starts is None else starts  # (B', K', n + 1)
    if mask is not None:
        x = x.masked_fill(~mask[:, :, None, None], 0)
    shared = order.shape[:2] == (1, 1) == starts.shape[:2]
    if shared:  # all heads of a token in one row
        rows, groups = x.float().reshape(batch * length, heads * width), batch
    else:
        rows, groups = x.float().transpose(1, 2).reshape(batch * heads * length, width), batch * heads
    order, begin = (one.expand(batch, 1 if shared else heads, -1).flatten(0, 1) for one in (order, starts[..., :-1]))
    group = torch.arange(groups, device=x.device)[:, None]
    sums = functional.embedding_bag(
        (order + group * length).flatten(), rows, (begin + group * visual).flatten(), mode="sum"
    )  # (groups n, ...)
    folded = (batch, -1, heads, width) if shared else (batch, heads, -1, width)
    sums = sums.view(folded).transpose(1, 2) if shared else sums.view(folded)  # (B, K, n, E)
    counts = _counts(layout, starts, mask)  # (B'', K', n)
    return sums / counts.clamp(min=1)[..., None], counts


def block_scores(
    query: Tensor,
    key: Tensor,
    queries: Layout,
    keys: Layout,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the scores between the means of visual blocks, (B, K, n, m), float32.

    Args:
        query: (B, N, K, E), in the order of the sequence.
        key: likewise.
        queries: blocks of the queries.
        keys: blocks of the keys.
        scale: factor of the scores; None means 1 / sqrt(E).
        mask: bool, (B, N), False for tokens that don't count.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    query_means, _ = block_means(query, queries, mask)  # (B, K, n, E)
    key_means, counts = block_means(key, keys, mask)  # (B, K, m, E), (B', K', m)
    return score_means(query_means, key_means, counts, factor)


def score_means(query_means: Tensor, key_means: Tensor, counts: Tensor, scale: float) -> Tensor:
    """Return the scores between means, -inf for keys that are the mean of no token, (B, K, n, m)."""
    scores = (query_means * scale) @ key_means.mT  # (B, K, n, m)
    return scores.masked_fill(counts[..., None, :] == 0, -torch.inf)


def self_similarity(x: Tensor, layout: Layout, mask: Tensor | None = None) -> Tensor:
    """Return the mean cosine between the tokens of each visual block (SpargeAttn, arXiv 2502.18137), (B, K, n).

    The mean of all entries of the Gram matrix of unit vectors is the squared length of their mean.

    Args:
        x: (B, N, K, E), in the order of the sequence.
        layout: the blocks.
        mask: bool, (B, N), False for tokens that don't count.
    """
    means, _ = block_means(functional.normalize(x.float(), dim=-1), layout, mask)  # (B, K, n, E)
    return means.square().sum(-1)


def cell_starts(layout: Layout, cells: int) -> Tensor:
    """Return where the cells of each visual block begin in the layout's order, (B', K', n cells + 1).

    The largest block is cut into as many cells of equal size; smaller blocks have fewer, the others are empty.
    """
    begin = layout.starts[..., : layout.visual_count]  # (B', K', n)
    sizes = layout.sizes[..., : layout.visual_count]  # (B', K', n)
    cell = -(-sizes.amax(-1, keepdim=True) // cells)  # (B', K', 1)
    inside = torch.arange(cells, device=begin.device) * cell  # (B', K', cells)
    starts = begin[..., None] + torch.minimum(inside[..., None, :], sizes[..., None])  # (B', K', n, cells)
    end = layout.starts[..., layout.visual_count : layout.visual_count + 1]
    return torch.cat([starts.flatten(-2), end], dim=-1)


def padded_blocks(x: Tensor, layout: Layout, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the tokens of each visual block in a row, filled up with copies of others.

    Args:
        x: (B, N, K, E), in the order of the sequence.
        layout: the blocks, shared by all heads.
        mask: bool, (B, N), False for tokens that don't count.

    Returns:
        (B, K, n, L, E) with the most tokens L of a block, and which of them count, bool, (B or 1, 1, n, L).
    """
    sizes = layout.sizes[0, 0, : layout.visual_count]  # (n,)
    inside = torch.arange(int(sizes.max()), device=x.device)  # (L,)
    there = inside < sizes[:, None]  # (n, L)
    place = layout.starts[0, 0, : layout.visual_count, None] + inside  # (n, L)
    index = layout.order[0, 0][place.clamp(max=layout.grid.length - 1)]  # (n, L)
    tokens = x.transpose(1, 2)[:, :, index]  # (B, K, n, L, E)
    there = there[None, None]
    if mask is not None:
        there = there & mask[:, index][:, None]
    return tokens, there


def visual_pairs(queries: Layout, keys: Layout) -> Tensor:
    """Return how many pairs of tokens each pair of visual blocks has, float32, (B', K', n, m)."""
    rows = queries.sizes[..., : queries.visual_count].float()
    columns = keys.sizes[..., : keys.visual_count].float()
    return rows[..., None] * columns[..., None, :]


def _counts(layout: Layout, starts: Tensor, mask: Tensor | None) -> Tensor:
    """Return how many tokens count in runs of visual tokens, float32, (B'', K', n)."""
    if mask is None:
        return starts.diff(dim=-1).float()
    order = layout.order[..., : layout.grid.visual_length]  # (B', K', V)
    batch = torch.arange(len(mask), device=mask.device)[:, None, None]
    live = mask.long()[batch, order.expand(len(mask), -1, -1)]  # (B, K', V)
    before = functional.pad(live.cumsum(-1), (1, 0))  # (B, K', V + 1)
    heads = max(before.shape[1], starts.shape[1])
    return before.expand(-1, heads, -1).gather(-1, starts.expand(len(mask), heads, -1)).diff(dim=-1).float()


def sampled_queries(grid: TokenGrid, count: int) -> Tensor:
    """Return positions of visual tokens spread over the grid, the same at every call, (R,).

    They follow the golden ratio, so they fall on all places of a frame and don't repeat a stride of the grid.

    Args:
        grid: the tokens.
        count: how many; all visual tokens if there are no more.
    """
    if count >= grid.visual_length:
        index = torch.arange(grid.visual_length)
    else:
        spread = (torch.arange(count, dtype=torch.float64) + 0.5) * 0.6180339887498949 % 1
        index = (spread * grid.visual_length).long()
    return index + grid.visual_start


def query_scores(query: Tensor, key: Tensor, rows: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return all scores of a few queries, (B, K, R, N), float32, -inf for keys that nobody may look at.

    Args:
        query: (B, N, K, E), in the order of the sequence.
        key: likewise.
        rows: (R,), positions of the queries.
        mask: bool, (B, N).
    """
    some = query[:, rows].float() * query.shape[-1] ** -0.5  # (B, R, K, E)
    scores = some.transpose(1, 2) @ key.float().permute(0, 2, 3, 1)  # (B, K, R, N)
    return scores if mask is None else scores.masked_fill(~mask[:, None, None], -torch.inf)
