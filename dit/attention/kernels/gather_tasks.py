"""What the gather kernel does for a map: tasks, each of some queries of some heads and the keys they visit.

A task holds as many scores as caches do. Blocks of queries that visit as many keys are computed together, whichever
heads they are of; heads that are alike share lists. Everything here depends on the map and the mask of keys alone, so
it is kept with the map.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.kernels.contract import Tail
from dit.attention.kernels.rows import has_fast_onednn, score_bytes
from dit.attention.layout import Layout

LEAST_ROWS = 16
"""Fewest queries of a task, however many keys there are."""
FUSED_KEYS = 4096
"""From so many keys on torch's fused kernel beats MKL's products in float32: it never writes the scores down."""
RULE_BYTES = 2**28
"""Most bytes of pairs that don't count which are kept with a map; those of larger maps are found anew in each call."""
LIST_BYTES = 2**27
"""Most bytes of lists of keys that are kept with a map."""
PAIRS_AT_ONCE = 2**25
"""Most pairs of blocks of queries and keys that are looked at together."""


@dataclass(frozen=True, slots=True)
class Task:
    """Some queries of some heads of a sample, and the keys they visit.

    Args:
        batch: the sample.
        heads: (G, 1), the head of each row of `rows`, in which heads may stand once for each of their blocks; or the
            heads that share `rows`.
        rows: positions of the queries in the sequence: (R,) for heads that share them, else (G, R).
        columns: positions of the keys, behind them those of pooled keys, likewise (M,) or (G, M).
        pooled: how many of the last keys are pooled ones.
        partial: how many of the first keys may not count for some queries.
        hidden: (R, partial) or (G, R, partial) in the dtype of the scores: -inf where they don't, else 0. None: ask
            the rule of the first head, of whose block all rows are then.
        empty: a query may be left without a key.
    """

    batch: int
    heads: Tensor
    rows: Tensor
    columns: Tensor
    pooled: int
    partial: int
    hidden: Tensor | None
    empty: bool


def tasks_of(
    block_map: BlockMap, batch: int, heads: int, dtype: torch.dtype, key_mask: Tensor | None, tail: Tail | None
) -> Iterable[Task]:
    """Return the tasks of a map; those of the last few kinds of calls are kept with it, if they are not too large.

    Args:
        block_map: the pairs.
        batch: samples B.
        heads: their number K.
        dtype: of the scores.
        key_mask: bool, (B, M).
        tail: what stands for blocks that aren't visited.
    """
    mask = None if key_mask is None else (tuple(key_mask.shape), key_mask.cpu().numpy().tobytes())
    kind = ("gather", batch, heads, dtype, mask, tail is not None, score_bytes(dtype))
    known = block_map.cache.get(kind)
    if known is not None:
        return known
    tasks = _make_tasks(block_map, batch, heads, dtype, key_mask, tail)
    lists = block_map.visits.shape[1] if block_map.is_shared else heads
    if "density" not in block_map.cache:
        block_map.cache["density"] = block_map.density()
    share = block_map.cache["density"]
    if share * block_map.keys.grid.length * block_map.queries.count * lists * 8 > LIST_BYTES:
        return tasks
    for old in [one for one in block_map.cache if isinstance(one, tuple) and one[0] == "gather"][:-3]:
        block_map.cache.pop(old, None)
    block_map.cache[kind] = known = list(tasks)
    return known


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


# ------------------------------------------------------------------------------------ heads that are alike


class _Unit(NamedTuple):
    """Heads that share order, blocks, visits and rule, and the one that stands for them."""

    head: int
    heads: tuple[int, ...]


def _units(block_map: BlockMap, heads: int) -> list[_Unit]:
    """Return the heads of a map, those that are known to be alike together."""
    if block_map.is_shared and block_map.visits.shape[1] == 1:
        return [_Unit(0, tuple(range(heads)))]
    if block_map.alike is None:
        return [_Unit(head, (head,)) for head in range(heads)]
    members: dict[int, list[int]] = {}
    for head, first in enumerate(block_map.alike):
        members.setdefault(first, []).append(head)
    return [_Unit(first, tuple(some)) for first, some in members.items()]


def _make_tasks(
    block_map: BlockMap, batch: int, heads: int, dtype: torch.dtype, key_mask: Tensor | None, tail: Tail | None
) -> Iterator[Task]:
    """Yield the tasks of a map."""
    parts = [block_map.visits, block_map.queries.order, block_map.queries.starts, block_map.keys.order]
    parts += [block_map.keys.starts, *(() if block_map.partial is None else (block_map.partial,))]
    parts += () if tail is None else (tail.log_count,)
    alike = key_mask is None and all(len(one) == 1 for one in parts)
    room = [RULE_BYTES]
    units = _units(block_map, heads)
    pairs = max(block_map.queries.count * block_map.keys.count, 1)
    step = max(PAIRS_AT_ONCE // pairs, 1)  # units at a time
    for sample in range(1 if alike else batch):
        mask = None if key_mask is None else key_mask[sample]
        for first in range(0, len(units), step):
            some = units[first : first + step]
            for group in _groups_of(block_map, sample, some, mask, tail):
                for task in _tasks_of_group(block_map, sample, some, group, dtype, room):
                    yield from (replace(task, batch=one) for one in range(batch)) if alike else (task,)


# --------------------------------------------------------------------------------- blocks that are alike


class _Group(NamedTuple):
    """Blocks of queries, of one or several units, that visit as many keys.

    Args:
        units: (G,), index of the unit of each block.
        rows: (G, R), positions of the queries in the sequence.
        columns: (G, M), positions of the keys, those first whose pairs the rule must be asked for.
        partial: how many of these there are.
        pooled: (G, U), blocks of keys that stand for themselves by their mean; None without a tail.
    """

    units: list[int]
    rows: Tensor
    columns: Tensor
    partial: int
    pooled: Tensor | None


def _groups_of(
    block_map: BlockMap, sample: int, units: list[_Unit], key_mask: Tensor | None, tail: Tail | None
) -> Iterator[_Group]:
    """Yield the blocks of queries of some units of a sample, those that visit as many keys together."""
    heads = torch.tensor([one.head for one in units], device=block_map.visits.device)  # (H,)
    visits = _of_heads(block_map.visits, sample, heads).expand(len(units), -1, -1)  # (H, n, m)
    queries, keys = _Places.of(block_map.queries, sample, heads), _Places.of(block_map.keys, sample, heads)
    keys = keys if key_mask is None else keys.alive(key_mask)
    asked = _asked(block_map, sample, heads, visits)  # (H, n, m) or None
    left_out = None
    if tail is not None:
        counts = _of_heads(tail.log_count, sample, heads)  # (H', m)
        left_out = ~visits & ~counts.isneginf()[:, None]  # (H, n, m)
    sizes = keys.sizes[:, None]  # (H', 1, m)
    none = torch.zeros_like(visits[..., 0], dtype=torch.int64)  # (H, n)
    partial = none if asked is None else (asked * sizes).sum(-1)
    numbers = [queries.sizes.expand(len(units), -1), (visits * sizes).sum(-1), partial]
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
        yield _Group(
            owner.tolist(),
            queries.tokens(owner, torch.arange(len(owner), device=owner.device), block, length),
            _side_by_side([keys.picked(owner, _rows(x, index), number) for x, number in parts]),
            first,
            None if left_out is None or not pooled else _listed(_rows(left_out, index), pooled),
        )


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


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _listed(picked: Tensor, count: int) -> Tensor:
    """Return what rows of (G, m) pick, each as many, (G, count)."""
    return picked.nonzero()[:, 1].view(len(picked), count)  # sorted by row


# ------------------------------------------------------------------------------------------------- tasks


def _tasks_of_group(
    block_map: BlockMap, sample: int, units: list[_Unit], group: _Group, dtype: torch.dtype, room: list[int]
) -> Iterator[Task]:
    """Yield the tasks of a group: blocks together, or a large one of heads that share it by itself."""
    columns, pooled = group.columns, 0
    if group.pooled is not None:
        shift = block_map.keys.grid.length  # positions of pooled keys begin here
        columns, pooled = torch.cat([columns, group.pooled + shift], dim=1), group.pooled.shape[1]
    most = _most_rows(columns.shape[1], group, dtype)
    widest = max(len(units[one].heads) for one in group.units)
    hidden = _hidden(block_map, units, group, dtype, room, widest)  # (G, R, C) or None
    partial = group.partial if hidden is None or bool(hidden.any()) else 0
    asks = bool(partial) and hidden is None
    hidden = hidden if partial else None
    empty = hidden is not None and partial == columns.shape[1] and bool(hidden.isneginf().all(-1).any())
    empty = empty or (asks and partial == columns.shape[1])
    common = (pooled, partial)
    if asks or (widest > 1 and 2 * widest * group.rows.shape[1] > most):
        for number, owner in enumerate(group.units):
            own = None if hidden is None else hidden[number]
            lists = (group.rows[number], columns[number])
            yield from _split(sample, units[owner].heads, lists, own, common, empty, most)
        return
    pairs = [(number, head) for number, owner in enumerate(group.units) for head in units[owner].heads]
    heads = tuple(head for _, head in pairs)
    rows = group.rows
    if widest > 1:
        index = torch.tensor([number for number, _ in pairs], device=rows.device)
        rows, columns = rows[index], columns[index]
        hidden = None if hidden is None else hidden[index]
    yield from _split(sample, heads, (rows, columns), hidden, common, empty, most)


def _most_rows(keys: int, group: _Group, dtype: torch.dtype) -> int:
    """Return how many rows of so many keys a task should have."""
    if dtype == torch.float32 and keys >= FUSED_KEYS and not group.partial and not has_fast_onednn():
        return group.rows.shape[1]  # the fused kernel of one head
    return max(score_bytes(dtype) // (keys * dtype.itemsize), LEAST_ROWS)


def _hidden(
    block_map: BlockMap, units: list[_Unit], group: _Group, dtype: torch.dtype, room: list[int], copies: int
) -> Tensor | None:
    """Return which pairs don't count, (G, R, partial), as `Task` has them; None if there are none, or too many."""
    if not group.partial:
        return None
    size = group.rows.numel() * group.partial * dtype.itemsize
    if size * copies > room[0]:
        return None
    hidden = group.rows.new_zeros(*group.rows.shape, group.partial, dtype=dtype)  # (G, R, C)
    step = max(PAIRS_AT_ONCE // (group.rows.shape[1] * group.partial * 8), 1)  # rules compare numbers of 8 bytes
    heads = [units[one].head for one in group.units]
    for head in dict.fromkeys(heads) if len(set(heads)) > 1 else heads[:1]:
        own = torch.tensor([number for number, one in enumerate(heads) if one == head], device=hidden.device)
        for some in own.split(step):
            pairs = hidden_pairs(block_map, head, group.rows[some], group.columns[some, : group.partial])
            hidden[some] = hidden.new_zeros(()).masked_fill(pairs, -torch.inf)
    room[0] -= size * copies
    return hidden


def _split(
    sample: int,
    heads: tuple[int, ...],
    lists: tuple[Tensor, Tensor],
    hidden: Tensor | None,
    common: tuple[int, int],
    empty: bool,
    most: int,
) -> Iterator[Task]:
    """Yield tasks whose scores fit into the cache: some heads, or some of the queries of one.

    Args:
        sample: the sample.
        heads: of each row of the lists, or those that share them.
        lists: rows and columns, see `Task`.
        hidden: likewise.
        common: pooled and partial keys, likewise.
        empty: likewise.
        most: rows of a task.
    """
    rows, columns = lists
    length, shared = rows.shape[-1], rows.ndim == 1
    step = -(-length // -(-length // most))  # pieces of about the same size
    together = -(-len(heads) // -(-len(heads) // max(most // step, 1)))  # as many in each task
    for first in range(0, len(heads), together):
        some = slice(first, first + together)
        numbers = torch.tensor(heads[some], device=rows.device)[:, None]  # (G, 1)
        for start in range(0, length, step):
            piece = slice(start, start + step)
            if shared:
                picked = rows[piece], columns
                part = None if hidden is None else hidden[piece]
            else:
                picked = rows[some, piece], columns[some]
                part = None if hidden is None else hidden[some, piece]
            yield Task(sample, numbers, *picked, *common, part, empty)
