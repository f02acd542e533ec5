"""All scores between visual tokens, tile by tile, for statistics that need them; a few blocks of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dit.attention.grid import TokenGrid
from dit.attention.layout import Layout
from dit.attention.patterns.scores import padded_blocks

SCORES_AT_ONCE = 2**24
"""Most scores between tokens that are held at a time."""


class QueryRows:
    """The queries of visual blocks in rows of equal length, filled up with others.

    Attributes:
        index: (n, L), position of each in the sequence.
        there: bool, (n, L), whether it is one of the block.
    """

    def __init__(self, layout: Layout) -> None:
        """Take the blocks of a layout that all heads share."""
        positions = torch.arange(layout.grid.length, device=layout.order.device)[None, :, None, None]  # (1, N, 1, 1)
        index, there = padded_blocks(positions, layout)  # (1, 1, n, L, 1), (1, 1, n, L)
        self.index, self.there = index[0, 0, ..., 0], there[0, 0]

    def pick(self, x: Tensor, blocks: slice) -> Tensor:
        """Return the tokens of some blocks, (B, N, K, E) to (B, K, r, L, E), float32."""
        return x.transpose(1, 2)[:, :, self.index[blocks]].float()


def tile_scores(
    query: Tensor, key: Tensor, rows: QueryRows, keys: Layout, scale: float, mask: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the scores of some blocks of queries with all visual keys.

    Args:
        query: (B, N, K, E), in the order of the sequence.
        key: likewise.
        rows: of the blocks of queries.
        keys: blocks of keys, which all heads share.
        scale: factor of the scores.
        mask: bool, (B, N), False for keys that nobody may look at.

    Yields:
        Which blocks of queries; and their scores by tiles of keys, (B, K, r, L, m, M), float32, -inf for keys that
        aren't there.
    """
    tokens, there = padded_blocks(key, keys, mask)  # (B, K, m, M, E), (B', 1, m, M)
    flat = tokens.float().flatten(2, 3).mT  # (B, K, E, m M)
    gone = ~there.flatten(2)[:, :, None]  # (B', 1, 1, m M)
    step = max(SCORES_AT_ONCE // (query.shape[0] * query.shape[2] * rows.index.shape[1] * flat.shape[-1]), 1)
    for begin in range(0, len(rows.index), step):
        some = slice(begin, begin + step)
        picked = rows.pick(query, some) * scale  # (B, K, r, L, E)
        scores = (picked.flatten(2, 3) @ flat).masked_fill_(gone, -torch.inf)  # (B, K, r L, m M)
        yield some, scores.unflatten(-1, tokens.shape[2:4]).unflatten(2, picked.shape[2:4])


def exact_scores(picked: Tensor, key: Tensor, grid: TokenGrid, mask: Tensor | None) -> Tensor:
    """Return the scores of some queries with the exact tokens, (B, K, r, L, X), -inf for those nobody may look at.

    Args:
        picked: (B, K, r, L, E), scaled.
        key: (B, N, K, E), in the order of the sequence.
        grid: says which tokens are exact.
        mask: bool, (B, N).
    """
    exact = grid.exact_positions().to(key.device)  # (X,)
    scores = torch.einsum("bkrle,bxke->bkrlx", picked, key[:, exact].float())
    return scores if mask is None else scores.masked_fill(~mask[:, exact][:, None, None, None], -torch.inf)
