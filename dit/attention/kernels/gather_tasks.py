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
    pairs = max(block_map.queries.count * block_map.keys.grid.length, 1)
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
    queries = block_map.queries
    query_order, query_starts = (_of_heads(x, sample, heads) for x in (queries.order, queries.starts))
    order, starts = (_of_heads(x, sample, heads) for x in (block_map.keys.order, block_map.keys.starts))  # (H', M), ..
    block_of = _block_of(starts, order.shape[-1])  # (H', M), of the keys in the layout's order
    seen = _by_key(visits, block_of)  # (H, n, M)
    if key_mask is not None:
        seen = seen & key_mask[order][:, None]
    asked = _asked(block_map, sample, heads, visits)  # (H, n, m) or None
    asked = None if asked is None else _by_key(asked, block_of) & seen  # (H, n, M)
    left_out = None
    if tail is not None:
        counts = _of_heads(tail.log_count, sample, heads)  # (H', m)
        left_out = ~visits & ~counts.isneginf()[:, None]  # (H, n, m)
    sizes = query_starts.diff(dim=-1).expand(len(units), -1)  # (H, n)
    numbers = [sizes, seen.sum(-1), *(torch.zeros_like(sizes) if x is None else x.sum(-1) for x in (asked, left_out))]
    found: dict[tuple[int, ...], list[int]] = {}
    for place, kind in enumerate(torch.stack(numbers, -1).flatten(0, 1).tolist()):  # place: of (H, n)
        if kind[0] and kind[1] + kind[3]:
            found.setdefault(tuple(kind), []).append(place)
    for (length, count, partial, pooled), places in found.items():
        index = torch.tensor(places, device=visits.device)  # (G,)
        owner = index // visits.shape[1]  # (G,)
        columns = _picked(seen, index, count)  # (G, M), in the layout's order
        if partial and asked is not None:
            first, last = (_picked(x, index, n) for x, n in ((asked, partial), (seen & ~asked, count - partial)))
            columns = torch.cat([first, last], dim=1)
        begins = query_starts.expand(len(units), -1)[:, :-1].flatten()[index]  # (G,)
        rows = begins[:, None] + torch.arange(length, device=index.device)  # (G, R)
        yield _Group(
            owner.tolist(),
            _in_sequence(query_order, owner, rows),
            _in_sequence(order, owner, columns),
            partial,
            None if left_out is None or not pooled else _picked(left_out, index, pooled),
        )


def _of_heads(x: Tensor, sample: int, heads: Tensor) -> Tensor:
    """Return the parts of a sample and some heads, (H', ...); H' is 1 where all heads share them."""
    own = x[min(sample, x.shape[0] - 1)]
    return own if len(own) == 1 else own.index_select(0, heads)


def _block_of(starts: Tensor, length: int) -> Tensor:
    """Return the block of each token in a layout's order, (H', n + 1) to (H', N)."""
    index = torch.arange(length, device=starts.device).expand(len(starts), -1).contiguous()
    return torch.searchsorted(starts[:, 1:].contiguous(), index, right=True)


def _by_key(of_blocks: Tensor, block_of: Tensor) -> Tensor:
    """Give each key what belongs to its block: (H, n, m) and (H', M) to (H, n, M)."""
    if len(block_of) == 1:
        return of_blocks.index_select(2, block_of[0])
    return of_blocks.gather(2, block_of[:, None].expand(-1, of_blocks.shape[1], -1))


def _asked(block_map: BlockMap, sample: int, heads: Tensor, visits: Tensor) -> Tensor | None:
    """Return the blocks in which the rule must be asked, (H, n, m); None where there is no rule."""
    if block_map.rule is None:
        return None
    if block_map.partial is not None:
        return _of_heads(block_map.partial, sample, heads).expand_as(visits)
    visual = torch.zeros_like(visits)
    visual[:, : block_map.queries.visual_count, : block_map.keys.visual_count] = True
    return visual


def _picked(picked: Tensor, index: Tensor, count: int) -> Tensor:
    """Return what rows of (H, n, M) pick, each as many, (G, count)."""
    return picked.flatten(0, 1).index_select(0, index).nonzero()[:, 1].view(len(index), count)  # sorted by row


def _in_sequence(order: Tensor, owner: Tensor, places: Tensor) -> Tensor:
    """Turn places in the orders (H', N) of some units into positions in the sequence, (G, I)."""
    if len(order) == 1:
        return order[0][places]
    return order.flatten()[places + owner[:, None] * order.shape[1]]


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
