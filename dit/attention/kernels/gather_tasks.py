"""What the gather kernel does for a map: tasks, each of some queries of some heads and the keys they visit.

A task holds as many scores as caches do: blocks of queries that visit as many keys are computed together, whichever
heads they are of. Everything here depends on the map and the mask of keys alone, so it is kept with the map; of a map
that was joined of several, the lists are kept with these, which other joined maps share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.kernels.contract import Tail
from dit.attention.kernels.gather_lists import Blocks, is_shared, lists_of
from dit.attention.kernels.rows import has_fast_onednn, score_bytes

LEAST_ROWS = 16
"""Fewest queries of a task, however many keys there are."""
FUSED_KEYS = 4096
"""From so many keys on torch's fused kernel beats MKL's products in float32: it never writes the scores down."""
LIST_BYTES = 2**27
"""Most bytes of lists of keys that are kept with a map."""
SPARED_PAIRS = 2**15
"""Most pairs that are added in vain so that there is one task less: a task takes as long as so many."""
COPIED_BYTES = 2**25
"""Most bytes of pairs that don't count which are copied, so that heads that share them are computed together."""


@dataclass(frozen=True, slots=True)
class Task:
    """Some queries of some heads of a sample, and the keys they visit.

    Args:
        samples: (G, 1), the sample of each row of `rows`; or the samples of the heads that share them.
        heads: likewise the head. Heads may stand here once for each of their blocks.
        rows: positions of the queries in the sequence: (R,) for heads that share them, else (G, R).
        columns: positions of the keys, behind them those of pooled keys, likewise (M,) or (G, M); the position behind
            the last pooled key is that of one that doesn't count.
        pooled: how many of the last keys are pooled ones.
        partial: how many of the first keys may not count for some queries.
        hidden: (R, partial) or (G, R, partial) in the dtype of the scores: -inf where they don't, else 0. None: ask
            the rule of the first head, of whose block all rows are then.
        empty: a query may be left without a key.
    """

    samples: Tensor
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
    groups = _groups_of(block_map, batch, heads, dtype, key_mask, tail, (dtype, mask, tail is not None))
    copies = [COPIED_BYTES]
    if not _fits(block_map, heads):
        return (task for group in groups for task in _tasks_of_group(group, dtype, copies))
    end = block_map.keys.grid.length + block_map.keys.count
    joined = _joined(list(groups), dtype, end)
    _keep(block_map, kind, [task for group in joined for task in _tasks_of_group(group, dtype, copies)])
    return block_map.cache[kind]


def _fits(block_map: BlockMap, heads: int) -> bool:
    """Return whether the lists of a map are small enough to be kept."""
    if "density" not in block_map.cache:
        block_map.cache["density"] = block_map.density()
    lists = block_map.visits.shape[1] if block_map.is_shared else heads
    visited = block_map.cache["density"] * block_map.keys.grid.length
    return visited * block_map.queries.count * lists * 8 <= LIST_BYTES


def _keep(block_map: BlockMap, kind: tuple[Any, ...], value: Any) -> None:
    """Keep what was prepared with a map, of which the last few stay."""
    for old in [one for one in block_map.cache if isinstance(one, tuple) and one[0] == kind[0]][:-3]:
        block_map.cache.pop(old, None)
    block_map.cache[kind] = value


def _groups_of(
    block_map: BlockMap,
    batch: int,
    heads: int,
    dtype: torch.dtype,
    key_mask: Tensor | None,
    tail: Tail | None,
    kind: tuple[Any, ...],
) -> Iterator[_Group]:
    """Yield the blocks of all samples and heads; `kind` tells apart the calls for which a part's lists differ."""
    parts = block_map.parts or ((block_map, tuple(range(heads))),)
    for part, members in parts:
        fixed = _is_fixed(part, key_mask, tail)
        for sample in range(1 if fixed else batch):
            lists: Iterable[Blocks] | None = part.cache.get(("gather lists", sample, *kind))
            if lists is None:
                mask = None if key_mask is None else key_mask[sample]
                dead = _dead_blocks(block_map, part, members, sample, tail)
                lists = lists_of(part, sample, len(members), dtype, mask, dead)
                if len(parts) > 1 and _fits(part, len(members)):
                    lists = list(lists)
                    _keep(part, ("gather lists", sample, *kind), lists)
            samples = range(batch) if fixed else (sample,)
            yield from (_Group.of(one, tuple(samples), members) for one in lists)


def _is_fixed(block_map: BlockMap, key_mask: Tensor | None, tail: Tail | None) -> bool:
    """Return whether the lists of a map are the same for all samples."""
    queries, keys = block_map.queries, block_map.keys
    tensors = [block_map.visits, block_map.partial, queries.order, queries.starts, keys.order, keys.starts]
    tensors.append(None if tail is None else tail.log_count)
    return key_mask is None and all(one is None or len(one) == 1 for one in tensors)


def _dead_blocks(
    block_map: BlockMap, part: BlockMap, members: tuple[int, ...], sample: int, tail: Tail | None
) -> Tensor | None:
    """Return the blocks of keys of a part for which no pooled key stands, bool, (K', m)."""
    if tail is None:
        return None
    dead = tail.log_count[min(sample, len(tail.log_count) - 1)].isneginf()  # (K', m) of the whole map
    if part is block_map:
        return dead
    numbers = members[:1] if is_shared(part) else members
    dead = dead if len(dead) == 1 else dead[list(numbers)]
    visual = dead[:, : part.keys.visual_count]  # exact blocks are always visited
    return torch.nn.functional.pad(visual, (0, part.keys.exact_blocks), value=True)


class _Group(NamedTuple):
    """Blocks of queries that visit as many keys, see `Blocks`, with the samples and heads that share each of them."""

    users: list[tuple[tuple[int, int], ...]]
    rows: Tensor
    columns: Tensor
    pooled: int
    partial: int
    hidden: Tensor | None
    empty: bool

    @classmethod
    def of(cls, blocks: Blocks, samples: tuple[int, ...], members: tuple[int, ...]) -> _Group:
        """Return the blocks of a map that is of some samples and heads of the call."""
        heads = [members if is_shared(blocks.block_map) else (members[owner],) for owner in blocks.owners]
        users = [tuple((sample, head) for sample in samples for head in some) for some in heads]
        lists = (blocks.rows, blocks.columns, blocks.pooled, blocks.partial, blocks.hidden, blocks.empty)
        return cls(users, *lists)

    @property
    def asks(self) -> bool:
        """Whether the rule is asked in each call."""
        return self.partial > 0 and self.hidden is None

    @property
    def size(self) -> int:
        """Rows of all users."""
        return sum(map(len, self.users)) * self.rows.shape[1]

    def is_small(self, dtype: torch.dtype) -> bool:
        """Return whether a task has room for several of the blocks."""
        widest = max(map(len, self.users))
        return not self.asks and 2 * widest * self.rows.shape[1] <= self.most_rows(dtype)

    def most_rows(self, dtype: torch.dtype) -> int:
        """Return how many rows of so many keys a task should have."""
        keys = self.columns.shape[1]
        if dtype == torch.float32 and keys >= FUSED_KEYS and not self.partial and not has_fast_onednn():
            return self.rows.shape[1]  # the fused kernel of one head
        return max(score_bytes(dtype) // (keys * dtype.itemsize), LEAST_ROWS)

    def padded(self, columns: int, pooled: int, partial: int, end: int) -> _Group:
        """Return the blocks with more keys, which don't count.

        Args:
            columns: how many they have then, pooled ones among them.
            pooled: how many of these are pooled ones.
            partial: how many of the first keys may not count.
            end: the position of a pooled key that doesn't count.
        """
        if (columns, pooled, partial) == (self.columns.shape[1], self.pooled, self.partial):
            return self
        before = columns - pooled - (self.columns.shape[1] - self.pooled)
        again = self.columns[:, :1].expand(-1, before)  # of a key that is seen anyway: it may be NaN
        wider = torch.nn.functional.pad(self.columns, (0, pooled - self.pooled), value=end)
        wider = torch.cat([again, wider], dim=1)
        assert self.hidden is not None, "only blocks with pairs that don't count are padded"
        hidden = torch.nn.functional.pad(self.hidden, (before, 0), value=-torch.inf)
        hidden = torch.nn.functional.pad(hidden, (0, partial - before - self.partial))
        return self._replace(columns=wider, pooled=pooled, partial=partial, hidden=hidden)


def _joined(groups: list[_Group], dtype: torch.dtype, end: int) -> Iterator[_Group]:
    """Yield groups, small blocks that visit about as many keys together.

    Args:
        groups: all of a call.
        dtype: of the scores.
        end: the position of a pooled key that doesn't count.
    """
    alike: dict[tuple[int, ...], list[_Group]] = {}
    for number, group in enumerate(groups):
        shape = (group.rows.shape[1], group.columns.shape[1], group.pooled, group.partial)
        alike.setdefault(shape if group.is_small(dtype) else (-1, number), []).append(group)
    same = [_cat(some) for some in alike.values()]
    ragged = [one for one in same if one.partial and one.is_small(dtype)]
    yield from (one for one in same if not (one.partial and one.is_small(dtype)))
    ragged.sort(key=lambda one: (one.rows.shape[1], one.columns.shape[1]))
    while ragged:
        first = ragged.pop()
        while ragged and (both := _pad_together(first, ragged[-1], dtype, end)) is not None:
            first, _ = both, ragged.pop()
        yield first


def _pad_together(one: _Group, other: _Group, dtype: torch.dtype, end: int) -> _Group | None:
    """Return two groups as one if that spares a task and adds few pairs; the first has no fewer keys."""
    if one.rows.shape[1] != other.rows.shape[1]:
        return None
    pooled = max(one.pooled, other.pooled)
    keys = max(each.columns.shape[1] - each.pooled for each in (one, other))
    partial = keys - min(each.columns.shape[1] - each.pooled - each.partial for each in (one, other))
    added = sum(each.size * (keys + pooled - each.columns.shape[1]) for each in (one, other))
    if added > SPARED_PAIRS:
        return None
    wide = [each.padded(keys + pooled, pooled, partial, end) for each in (one, other)]
    joined = _cat(wide)
    before = sum(-(-each.size // each.most_rows(dtype)) for each in (one, other))
    return joined if -(-joined.size // joined.most_rows(dtype)) < before else None


def _cat(groups: list[_Group]) -> _Group:
    """Return groups of blocks of the same sizes as one."""
    if len(groups) == 1:
        return groups[0]
    hidden = [one.hidden for one in groups if one.hidden is not None]
    return groups[0]._replace(
        users=[users for one in groups for users in one.users],
        rows=torch.cat([one.rows for one in groups]),
        columns=torch.cat([one.columns for one in groups]),
        hidden=torch.cat(hidden) if hidden else None,
        empty=any(one.empty for one in groups),
    )


def _tasks_of_group(group: _Group, dtype: torch.dtype, copies: list[int]) -> Iterator[Task]:
    """Yield the tasks of a group: blocks together, or a large one of heads that share it by itself."""
    most = group.most_rows(dtype)
    pairs = [(number, user) for number, users in enumerate(group.users) for user in users]
    repeated = len(pairs) > len(group.users)
    size = 0 if group.hidden is None else group.hidden[0].nbytes * len(pairs)
    if group.asks or (repeated and (size > copies[0] or not group.is_small(dtype))):
        for number, users in enumerate(group.users):
            own = None if group.hidden is None else group.hidden[number]
            yield from _split(users, (group.rows[number], group.columns[number]), own, group, most)
        return
    rows, columns, hidden = group.rows, group.columns, group.hidden
    if repeated:
        copies[0] -= size
        index = torch.tensor([number for number, _ in pairs], device=rows.device)
        rows, columns = rows.index_select(0, index), columns.index_select(0, index)
        hidden = None if hidden is None else hidden.index_select(0, index)
    yield from _split(tuple(user for _, user in pairs), (rows, columns), hidden, group, most)


def _split(
    users: tuple[tuple[int, int], ...],
    lists: tuple[Tensor, Tensor],
    hidden: Tensor | None,
    group: _Group,
    most: int,
) -> Iterator[Task]:
    """Yield tasks whose scores fit into the cache: some users, or some of the queries of one.

    Args:
        users: sample and head of each row of the lists, or those that share them.
        lists: rows and columns, see `Task`.
        hidden: likewise.
        group: what else tasks have in common.
        most: rows of a task.
    """
    rows, columns = lists
    length, shared = rows.shape[-1], rows.ndim == 1
    step = -(-length // -(-length // most))  # pieces of about the same size
    together = -(-len(users) // -(-len(users) // max(most // step, 1)))  # as many in each task
    for first in range(0, len(users), together):
        some = slice(first, first + together)
        samples, heads = torch.tensor(users[some], device=rows.device).T[..., None]  # (G, 1) each
        for start in range(0, length, step):
            piece = slice(start, start + step)
            if shared:
                picked = rows[piece], columns
                part = None if hidden is None else hidden[piece]
            else:
                picked = rows[some, piece], columns[some]
                part = None if hidden is None else hidden[some, piece]
            yield Task(samples, heads, *picked, group.pooled, group.partial, part, group.empty)
