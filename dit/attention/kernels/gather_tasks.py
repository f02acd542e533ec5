"""What the gather kernel does for a map: tasks, each of some queries of some heads and the keys they visit.

A task holds as many scores as caches do: blocks of queries that visit as many keys are computed together, whichever
heads they are of. Everything here depends on the map and the mask of keys alone, so it is kept with the map; of a map
that was joined of several, the lists are kept with these, which other joined maps share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
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
COPIED_BYTES = 2**25
"""Most bytes of pairs that don't count which are copied, so that heads that share them are computed together."""


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
    tasks = _make_tasks(block_map, batch, heads, dtype, key_mask, tail, (dtype, mask, tail is not None))
    if not _fits(block_map, heads):
        return tasks
    _keep(block_map, kind, list(tasks))
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


def _make_tasks(
    block_map: BlockMap,
    batch: int,
    heads: int,
    dtype: torch.dtype,
    key_mask: Tensor | None,
    tail: Tail | None,
    kind: tuple[Any, ...],
) -> Iterator[Task]:
    """Yield the tasks of a map; `kind` tells apart the calls for which a part's lists differ."""
    parts = block_map.parts or ((block_map, tuple(range(heads))),)
    fixed = [_is_fixed(part, key_mask, tail) for part, _ in parts]
    copies = [COPIED_BYTES]
    for sample in range(1 if all(fixed) else batch):
        mask = None if key_mask is None else key_mask[sample]
        groups: list[_Group] = []
        for (part, members), is_fixed in zip(parts, fixed, strict=True):
            own = 0 if is_fixed else sample
            lists: Iterable[Blocks] | None = part.cache.get(("gather lists", own, *kind))
            if lists is None:
                lists = lists_of(
                    part, own, len(members), dtype, mask, _dead_blocks(block_map, part, members, own, tail)
                )
                if len(parts) > 1 and _fits(part, len(members)):
                    lists = list(lists)
                    _keep(part, ("gather lists", own, *kind), lists)
            found = (_Group.of(one, members) for one in lists)
            groups += found if len(parts) > 1 else ()
            for group in () if len(parts) > 1 else found:
                yield from _of_samples(_tasks_of_group(sample, group, dtype, copies), batch if all(fixed) else 0)
        for group in _joined(groups, dtype):
            yield from _of_samples(_tasks_of_group(sample, group, dtype, copies), batch if all(fixed) else 0)


def _of_samples(tasks: Iterator[Task], batch: int) -> Iterator[Task]:
    """Yield tasks, for each sample of a batch where it is not 0."""
    for task in tasks:
        yield from (replace(task, batch=sample) for sample in range(batch)) if batch else (task,)


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
    """Blocks of queries that visit as many keys, see `Blocks`, with the heads of the call that share each of them."""

    heads: list[tuple[int, ...]]
    rows: Tensor
    columns: Tensor
    pooled: int
    partial: int
    hidden: Tensor | None
    empty: bool

    @classmethod
    def of(cls, blocks: Blocks, members: tuple[int, ...]) -> _Group:
        """Return the blocks of a map that is of some heads of the call."""
        shared = is_shared(blocks.block_map)
        heads = [members if shared else (members[owner],) for owner in blocks.owners]
        lists = (blocks.rows, blocks.columns, blocks.pooled, blocks.partial, blocks.hidden, blocks.empty)
        return cls(heads, *lists)

    @property
    def asks(self) -> bool:
        """Whether the rule is asked in each call."""
        return self.partial > 0 and self.hidden is None

    def is_small(self, dtype: torch.dtype) -> bool:
        """Return whether a task has room for several of the blocks."""
        widest = max(map(len, self.heads))
        return not self.asks and 2 * widest * self.rows.shape[1] <= self.most_rows(dtype)

    def most_rows(self, dtype: torch.dtype) -> int:
        """Return how many rows of so many keys a task should have."""
        keys = self.columns.shape[1]
        if dtype == torch.float32 and keys >= FUSED_KEYS and not self.partial and not has_fast_onednn():
            return self.rows.shape[1]  # the fused kernel of one head
        return max(score_bytes(dtype) // (keys * dtype.itemsize), LEAST_ROWS)


def _joined(groups: list[_Group], dtype: torch.dtype) -> Iterator[_Group]:
    """Yield groups, small blocks of several parts that visit as many keys together."""
    alike: dict[tuple[int, ...], list[_Group]] = {}
    for number, group in enumerate(groups):
        shape = (group.rows.shape[1], group.columns.shape[1], group.pooled, group.partial)
        alike.setdefault(shape if group.is_small(dtype) else (-1, number), []).append(group)
    for some in alike.values():
        if len(some) == 1:
            yield some[0]
            continue
        hidden = [one.hidden for one in some if one.hidden is not None]
        yield some[0]._replace(
            heads=[heads for one in some for heads in one.heads],
            rows=torch.cat([one.rows for one in some]),
            columns=torch.cat([one.columns for one in some]),
            hidden=torch.cat(hidden) if hidden else None,
            empty=any(one.empty for one in some),
        )


def _tasks_of_group(sample: int, group: _Group, dtype: torch.dtype, copies: list[int]) -> Iterator[Task]:
    """Yield the tasks of a group: blocks together, or a large one of heads that share it by itself."""
    most = group.most_rows(dtype)
    pairs = [(number, head) for number, heads in enumerate(group.heads) for head in heads]
    repeated = len(pairs) > len(group.heads)
    size = 0 if group.hidden is None else group.hidden[0].nbytes * len(pairs)
    if group.asks or (repeated and (size > copies[0] or not group.is_small(dtype))):
        for number, heads in enumerate(group.heads):
            own = None if group.hidden is None else group.hidden[number]
            yield from _split(sample, heads, (group.rows[number], group.columns[number]), own, group, most)
        return
    rows, columns, hidden = group.rows, group.columns, group.hidden
    if repeated:
        copies[0] -= size
        index = torch.tensor([number for number, _ in pairs], device=rows.device)
        rows, columns = rows.index_select(0, index), columns.index_select(0, index)
        hidden = None if hidden is None else hidden.index_select(0, index)
    yield from _split(sample, tuple(head for _, head in pairs), (rows, columns), hidden, group, most)


def _split(
    sample: int,
    heads: tuple[int, ...],
    lists: tuple[Tensor, Tensor],
    hidden: Tensor | None,
    group: _Group,
    most: int,
) -> Iterator[Task]:
    """Yield tasks whose scores fit into the cache: some heads, or some of the queries of one.

    Args:
        sample: the sample.
        heads: of each row of the lists, or those that share them.
        lists: rows and columns, see `Task`.
        hidden: likewise.
        group: what else tasks have in common.
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
            yield Task(sample, numbers, *picked, group.pooled, group.partial, part, group.empty)
