"""Which queries and keys the blocks of a map are of: lists of positions, the same for all calls of a static map.

Blocks of queries that visit as many keys stand together, whichever heads they are of, as rows of one tensor. Heads that
share a map share its lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.layout import Layout

RULE_BYTES = 2**28
"""Most bytes of pairs that don't count which are kept with a map; those of larger maps are found anew in each call."""
PAIRS_AT_ONCE = 2**25
"""Most pairs of blocks, or of tokens whose rule is asked, that are looked at together."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of queries that visit as many keys, of one map.

    Args:
        block_map: the map.
        owners: (G,), the head of the map that each block is of; 0 where all heads share it.
        rows: (G, R), positions of the queries in the sequence.
        columns: (G, M), positions of the keys, those first whose pairs the rule must be asked for; behind them those of
            pooled keys, which follow the M keys of the sequence.
        pooled: how many of the last keys are pooled ones.
        partial: how many of the first keys may not count for some queries.
        hidden: (G, R, partial) in the dtype of the scores: -inf where they don't, else 0. None: there are too many of
            them to be kept, ask the rule.
        empty: a query may be left without a key.
    """

    block_map: BlockMap
    owners: list[int]
    rows: Tensor
    columns: Tensor
    pooled: int
    partial: int
    hidden: Tensor | None
    empty: bool


def is_shared(block_map: BlockMap) -> bool:
    """Return whether all heads have the same order, blocks, visits and rule, so that the first stands for all."""
    return block_map.is_shared and block_map.visits.shape[1] == 1


def lists_of(
    block_map: BlockMap, sample: int, heads: int, dtype: torch.dtype, key_mask: Tensor | None, dead: Tensor | None
) -> Iterator[Blocks]:
    """Yield the blocks of queries of a sample with the keys they visit, those that visit as many together.

    Args:
        block_map: the pairs.
        sample: see above.
        heads: of the map.
        dtype: of the scores.
        key_mask: bool, (M,), False for keys that nobody may look at.
        dead: bool, (K', m), blocks of keys for which no pooled key stands; None without pooled keys.
    """
    every = [0] if is_shared(block_map) else list(range(heads))
    step = max(PAIRS_AT_ONCE // max(block_map.queries.count * block_map.keys.count, 1), 1)  # heads at a time
    room = [RULE_BYTES]
    for first in range(0, len(every), step):
        some = torch.tensor(every[first : first + step], device=block_map.visits.device)  # (H,)
        for rows, columns, owners, pooled, partial in _found(block_map, sample, some, key_mask, dead):
            hidden = _hidden(block_map, owners, rows, columns[:, :partial], dtype, room) if partial else None
            if hidden is not None and not bool(hidden.any()):
                yield Blocks(block_map, owners, rows, columns, pooled, 0, None, False)
                continue
            only = partial > 0 and partial == columns.shape[1]
            empty = only and (hidden is None or bool(hidden.isneginf().all(-1).any()))
            yield Blocks(block_map, owners, rows, columns, pooled, partial, hidden, empty)


def hidden_pairs(block_map: BlockMap, head: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Return which pairs of visual tokens don't count for a head, by their positions, bool, (..., R, C).

    Args:
        block_map: whose rule is asked.
        head: see above.
        rows: (..., R), positions of queries in the sequence.
        columns: (..., C), positions of keys.
    """
    rule = None if block_map.rule is None else block_map.rule.of_head(head)
    assert rule is not None, "only maps with a rule have partial blocks"
    query = rows - block_map.queries.grid.visual_start
    key = columns - block_map.keys.grid.visual_start
    return ~rule.allowed(query[..., :, None], key[..., None, :])


def _hidden(
    block_map: BlockMap, owners: list[int], rows: Tensor, columns: Tensor, dtype: torch.dtype, room: list[int]
) -> Tensor | None:
    """Return which pairs don't count, (G, R, C), as `Blocks` has them; None if there are too many."""
    size = rows.numel() * columns.shape[1] * dtype.itemsize
    if size > room[0]:
        return None
    room[0] -= size
    hidden = rows.new_zeros(*rows.shape, columns.shape[1], dtype=dtype)  # (G, R, C)
    step = max(PAIRS_AT_ONCE // (rows.shape[1] * columns.shape[1] * 8), 1)  # rules compare numbers of 8 bytes
    by_rule: dict[int, list[int]] = {}
    for number, head in enumerate(owners):
        by_rule.setdefault(id(None if block_map.rule is None else block_map.rule.of_head(head)), []).append(number)
    for own in by_rule.values():
        for some in torch.tensor(own, device=rows.device).split(step):
            pairs = hidden_pairs(block_map, owners[own[0]], rows[some], columns[some])
            hidden[some] = hidden.new_zeros(()).masked_fill(pairs, -torch.inf)
    return hidden


def _found(
    block_map: BlockMap, sample: int, heads: Tensor, key_mask: Tensor | None, dead: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, list[int], int, int]]:
    """Yield rows, columns, owners, and the numbers of pooled and of partial keys, see `Blocks`, of some heads (H,)."""
    visits = _of_heads(block_map.visits, sample, heads).expand(len(heads), -1, -1)  # (H, n, m)
    queries, keys = _Places.of(block_map.queries, sample, heads), _Places.of(block_map.keys, sample, heads)
    keys = keys if key_mask is None else keys.alive(key_mask)
    asked = _asked(block_map, sample, heads, visits)  # (H, n, m) or None
    left_out = None
    if dead is not None:
        left_out = ~visits & ~(dead if len(dead) == 1 else dead.index_select(0, heads))[:, None]  # (H, n, m)
    sizes = keys.sizes[:, None]  # (H', 1, m)
    none = torch.zeros_like(visits[..., 0], dtype=torch.int64)  # (H, n)
    partial = none if asked is None else (asked * sizes).sum(-1)
    numbers = [queries.sizes.expand(len(heads), -1), (visits * sizes).sum(-1), partial]
    numbers.append(none if left_out is None else left_out.sum(-1))
    found: dict[tuple[int, ...], list[int]] = {}
    for place, kind in enumerate(torch.stack(numbers, -1).flatten(0, 1).tolist()):  # place: of (H, n)
        if kind[0] and kind[1] + kind[3]:
            found.setdefault(tuple(kind), []).append(place)
    for (length, count, first, pooled), places in found.items():
        index = torch.tensor(places, device=visits.device)  # (G,)
        owner, block = index // visits.shape[1], index % visits.shape[1]  # (G,)
        parts = [(visits, count)]
        if first and asked is not None:
            parts = [(asked, first), (visits & ~asked, count - first)]
        lists = [keys.picked(owner, _rows(x, index), number) for x, number in parts]
        if left_out is not None and pooled:
            blocks = _rows(left_out, index).nonzero()[:, 1].view(len(index), pooled)  # (G, U), sorted by row
            lists.append(blocks + block_map.keys.grid.length)
        rows = queries.tokens(owner, torch.arange(len(owner), device=owner.device), block, length)
        yield rows, torch.cat(lists, dim=1) if len(lists) > 1 else lists[0], heads[owner].tolist(), pooled, first


class _Places(NamedTuple):
    """Where the tokens of blocks are.

    Args:
        order: (H', N), the position in the sequence of each token in the order of a unit; H' is 1 where all share it.
        starts: (H', n), where each block begins in that order.
        sizes: (H', n), tokens of each block.
    """

    order: Tensor
    starts: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, layout: Layout, sample: int, heads: Tensor) -> _Places:
        """Return the blocks of a layout for some heads of a sample."""
        order, starts = (_of_heads(x, sample, heads) for x in (layout.order, layout.starts))
        count = max(len(order), len(starts))
        order, starts = order.expand(count, -1), starts.expand(count, -1)
        return cls(order, starts[:, :-1], starts.diff(dim=-1))

    def alive(self, mask: Tensor) -> _Places:
        """Leave out the tokens for which a mask (N,) is False."""
        alive = mask[self.order]  # (H', N)
        before = torch.nn.functional.pad(alive.cumsum(-1), (1, 0))  # (H', N + 1)
        starts = before.gather(1, self.starts)
        sizes = before.gather(1, self.starts + self.sizes) - starts
        return _Places(self.order[alive].view(len(alive), -1), starts, sizes)

    def picked(self, owner: Tensor, picked: Tensor, count: int) -> Tensor:
        """Return the tokens of the blocks that some rows pick, each as many, as positions in the sequence, (G, count).

        Args:
            owner: (G,), the unit of each row.
            picked: bool, (G, n).
            count: tokens of each row.
        """
        row, block = picked.nonzero().unbind(1)
        return self.tokens(owner, row, block, count)

    def tokens(self, owner: Tensor, row: Tensor, block: Tensor, count: int) -> Tensor:
        """Return the tokens of blocks one after another, (G, count).

        Args:
            owner: (G,), the unit of each row.
            row: (T,), the row that a block belongs to, rising.
            block: (T,), its number.
            count: tokens of each row.
        """
        order = self.order.flatten()
        shift = owner[row] if len(self.order) > 1 else torch.zeros_like(row)
        index = shift * self.starts.shape[1] + block  # (T,)
        sizes = self.sizes.flatten()[index]
        first = self.starts.flatten()[index] + shift * self.order.shape[1] - sizes.cumsum(0) + sizes
        place = torch.repeat_interleave(first, sizes, output_size=len(owner) * count)
        place += torch.arange(len(place), device=place.device)
        return order.index_select(0, place).view(len(owner), count)


def _of_heads(x: Tensor, sample: int, heads: Tensor) -> Tensor:
    """Return the parts of a sample and some heads, (H', ...); H' is 1 where all heads share them."""
    own = x[min(sample, x.shape[0] - 1)]
    return own if len(own) == 1 else own.index_select(0, heads)


def _asked(block_map: BlockMap, sample: int, heads: Tensor, visits: Tensor) -> Tensor | None:
    """Return the visited blocks in which the rule must be asked, (H, n, m); None where there is no rule."""
    if block_map.rule is None:
        return None
    if block_map.partial is not None:
        return _of_heads(block_map.partial, sample, heads) & visits
    asked = visits.clone()
    asked[:, block_map.queries.visual_count :] = False
    asked[..., block_map.keys.visual_count :] = False
    return asked


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Return some rows of (H, n, m), (G, m)."""
    return x.flatten(0, 1).index_select(0, index)
