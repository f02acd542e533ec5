"""What the Triton kernel is told of a block map: pieces of blocks, and lists of those that blocks of queries visit.

The kernel computes pieces of `BLOCK_M` queries and `BLOCK_N` keys. A block is cut into as many as it needs, so blocks
may have any size. Keys are packed piece by piece, so a piece begins at a multiple of `BLOCK_N` whatever its block is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.layout import Layout

ASKED = 1 << 30
"""Added to an entry of a list: pairs of this piece count as its bits say."""

PAIRS_AT_ONCE = 2**25
"""Most pairs of tokens that a rule is asked for at a time."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """The blocks of a layout in pieces; those of heads with fewer of them are filled up with empty ones.

    Args:
        block: (B', K', P), the block of each piece.
        start: (B', K', P), its first token in the layout's order.
        size: (B', K', P), its tokens; 0 for empty ones.
    """

    block: Tensor
    start: Tensor
    size: Tensor


@dataclass(frozen=True, slots=True)
class Lists:
    """A block map as the kernel reads it, integers as int32.

    Args:
        query_pieces: (B', K', P, 4), block, first token in the layout's order, tokens, and first token in the block.
        query_order: (B', K', N), see `Layout.order`.
        counts: (B', K', n, 2), how many whole pieces a block of queries visits, and how many others.
        entries: (B', K', n, L), the pieces, whole ones first; `ASKED` is added to those with bits.
        key_sizes: (B', K', Q), tokens of each piece of keys.
        visits: (B', K', n, m), uint8, as in the map.
        bits: (A, rows of a block, BLOCK_N / 32), pairs that count, a bit each; None without a rule.
        bits_of: (n, Q), index into `bits`; None without a rule.
        source: (B', K', Q BLOCK_N), int64, position in the sequence of each packed key, -1 for none; None where the
            keys needn't be packed: they are in this order already, and all pieces are whole.
    """

    query_pieces: Tensor
    query_order: Tensor
    counts: Tensor
    entries: Tensor
    key_sizes: Tensor
    visits: Tensor
    bits: Tensor | None
    bits_of: Tensor | None
    source: Tensor | None


def lists_of(block_map: BlockMap, block_m: int, block_n: int) -> Lists:
    """Return the lists of a map, which are kept with it."""
    kind = ("triton", block_m, block_n)
    if kind not in block_map.cache:
        block_map.cache[kind] = _make_lists(block_map, block_m, block_n)
    return block_map.cache[kind]


def cut(layout: Layout, size: int) -> Pieces:
    """Cut the blocks of a layout into pieces of at most `size` tokens."""
    starts = layout.starts.contiguous()  # (B', K', n + 1)
    sizes = starts.diff(dim=-1)  # (B', K', n)
    pieces = (sizes + size - 1) // size  # (B', K', n)
    ends = pieces.cumsum(-1)  # (B', K', n)
    index = torch.arange(int(ends[..., -1].max()), device=starts.device)  # (P,)
    index = index.expand(*starts.shape[:2], -1).contiguous()  # (B', K', P)
    block = torch.searchsorted(ends, index, right=True).clamp(max=layout.count - 1)
    first = (index - (ends - pieces).gather(-1, block)) * size  # within the block
    left = (sizes.gather(-1, block) - first).clamp(min=0, max=size)
    return Pieces(block, starts.gather(-1, block) + first, left)


def _make_lists(block_map: BlockMap, block_m: int, block_n: int) -> Lists:
    queries, keys = cut(block_map.queries, block_m), cut(block_map.keys, block_n)
    in_block = queries.start - block_map.queries.starts.gather(-1, queries.block)  # (B', K', P)
    visits = _of_pieces(block_map.visits, keys)  # (B', K', n, Q)
    whole = visits & (keys.size == block_n)[..., None, :]
    asked, bits, bits_of = torch.zeros_like(visits), None, None
    if not block_map.asks_nowhere:
        partial = visits if block_map.partial is None else visits & _of_pieces(block_map.partial, keys)
        rows = -(-int(block_map.queries.sizes.max()) // block_m) * block_m
        bits, bits_of, counts = _bits(block_map, keys, partial.flatten(0, 1).any(0), rows, block_n)
        sizes = block_map.queries.sizes[0, 0, :, None] * keys.size[0, 0]  # (n, Q)
        asked = partial & (counts > 0) & (counts < sizes)
        visits, whole = visits & ~(partial & (counts == 0)), whole & ~asked
        whole = whole & visits
    counts, entries = _entries(whole, visits & ~whole, asked)
    return Lists(
        torch.stack([queries.block, queries.start, queries.size, in_block], dim=-1).int(),
        block_map.queries.order.int().contiguous(),
        counts,
        entries,
        keys.size.int().contiguous(),
        block_map.visits.to(torch.uint8).contiguous(),
        bits,
        bits_of,
        _source(block_map.keys, keys, block_n),
    )


def _of_pieces(per_block: Tensor, pieces: Pieces) -> Tensor:
    """Give each piece of keys what belongs to its block: (B', K', n, m) to (B', K', n, Q)."""
    heads = torch.broadcast_shapes(per_block.shape[:2], pieces.block.shape[:2])
    index = pieces.block[..., None, :].expand(*heads, per_block.shape[2], -1)
    picked = per_block.expand(*heads, -1, -1).gather(-1, index)
    return picked & (pieces.size > 0)[..., None, :]


def _entries(whole: Tensor, others: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """List the pieces that each block of queries visits, whole ones first; see `Lists`."""
    counts = torch.stack([whole.sum(-1), others.sum(-1)], dim=-1)  # (B', K', n, 2)
    longest = int(counts.sum(-1).max())
    place = torch.where(whole, whole.cumsum(-1) - 1, counts[..., :1] + others.cumsum(-1) - 1)
    place = place.masked_fill(~(whole | others), longest)  # a column that is cut off
    piece = torch.arange(whole.shape[-1], dtype=torch.int32, device=whole.device) + ASKED * asked.int()
    entries = piece.new_zeros(*whole.shape[:-1], longest + 1).scatter_(-1, place, piece)
    return counts.int(), entries[..., : max(longest, 1)].contiguous()


def _source(layout: Layout, pieces: Pieces, block_n: int) -> Tensor | None:
    """Return the position in the sequence of each packed key; see `Lists`."""
    order = layout.order  # (B', K', M)
    in_order = torch.arange(order.shape[-1], device=order.device)
    if layout.is_shared and bool((pieces.size == block_n).all()) and torch.equal(order[0, 0], in_order):
        return None
    column = torch.arange(block_n, device=order.device)
    index = (pieces.start[..., None] + column).clamp(max=order.shape[-1] - 1)  # (B', K', Q, BLOCK_N)
    heads = torch.broadcast_shapes(index.shape[:2], order.shape[:2])
    source = order.expand(*heads, -1).gather(-1, index.flatten(2).expand(*heads, -1))  # (B', K', Q BLOCK_N)
    return source.masked_fill((column >= pieces.size[..., None]).flatten(2), -1)


def _bits(
    block_map: BlockMap, keys: Pieces, wanted: Tensor, rows: int, block_n: int
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Ask the rule for all pairs of blocks of queries and pieces of keys that are wanted, (n, Q).

    Returns:
        `bits` and `bits_of` of `Lists`, and how many pairs count, (n, Q).
    """
    rule: Any = block_map.rule
    if not block_map.is_shared:
        raise ValueError("a rule of tokens needs an order that all heads share")
    device = wanted.device
    place = "cpu" if any(isinstance(one, Tensor) for one in vars(rule).values()) else device
    query = _visual_positions(block_map.queries, block_map.queries.starts[0, 0, :-1], rows, None).to(place)  # (n, R)
    key = _visual_positions(block_map.keys, keys.start[0, 0], block_n, keys.size[0, 0]).to(place)  # (Q, BLOCK_N)
    pairs = wanted.nonzero()  # (A, 2)
    counts = torch.zeros(wanted.shape, dtype=torch.int64, device=device)
    bits_of = torch.zeros(wanted.shape, dtype=torch.int32, device=device)
    weights = 1 << torch.arange(32, device=place)
    kept, found = [], 0
    for some in pairs.split(max(PAIRS_AT_ONCE // (rows * block_n), 1)):
        i, j = query[some[:, 0].to(place), :, None], key[some[:, 1].to(place), None]  # (A', R, 1), (A', 1, BLOCK_N)
        allowed = (i == -1) | (j == -1) | rule.allowed(i.clamp(min=0), j.clamp(min=0))
        allowed = allowed & (i > -2) & (j > -2)  # (A', R, BLOCK_N)
        count = allowed.sum((1, 2))  # (A',)
        counts[some[:, 0], some[:, 1]] = count.to(device)
        mixed = (count > 0) & (count < (i > -2).sum((1, 2)) * (j > -2).sum((1, 2)))  # (A',)
        words = (allowed[mixed].unflatten(-1, (-1, 32)) * weights).sum(-1)  # (A'', R, BLOCK_N / 32)
        kept.append(words.to(torch.int32).to(device))
        where = some[mixed.to(device)]
        bits_of[where[:, 0], where[:, 1]] = torch.arange(found, found + len(where), device=device, dtype=torch.int32)
        found += len(where)
    return (torch.cat(kept), bits_of, counts) if found else (None, None, counts)


def _visual_positions(layout: Layout, starts: Tensor, width: int, sizes: Tensor | None) -> Tensor:
    """Return raster indices of tokens from each start on: -1 for exact ones, -2 for none, (n, width)."""
    sizes = layout.sizes[0, 0] if sizes is None else sizes
    column = torch.arange(width, device=starts.device)
    index = (starts[:, None] + column).clamp(max=layout.grid.length - 1)
    visual = layout.order[0, 0][index] - layout.grid.visual_start  # (n, width)
    visual = visual.masked_fill((visual < 0) | (visual >= layout.grid.visual_length), -1)
    return visual.masked_fill(column >= sizes[:, None], -2)
