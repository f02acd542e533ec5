"""The gather kernel: for each block of queries copy the keys it visits side by side, then attend by plain products.

Tokens are copied by their index, so orders, ragged blocks, clusters and masked keys cost nothing more: a list of tokens
is all that is left of them. Blocks of queries that visit as many keys are computed together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.kernels.contract import SparseKernel, Tail, register_kernel
from dit.attention.kernels.rows import attend_rows, levels, score_bytes
from dit.layers.linear import mkl_is_slow

LEAST_ROWS = 16
"""Fewest queries of a task, however many keys there are."""
FUSED_KEYS = 4096
"""From so many keys on torch's fused kernel beats MKL's products in float32: it never writes the scores down."""
RULE_BYTES = 2**28
"""Most bytes of pairs that don't count which are kept with a map; those of larger maps are found anew in each call."""
LIST_BYTES = 2**27
"""Most bytes of lists of keys that are kept with a map."""


@dataclass(frozen=True, slots=True)
class Task:
    """Some queries of some heads of a sample, and the keys they visit.

    Args:
        batch: the sample.
        heads: their indices; a range where they share rows and columns, else a list with the head of each row of
            `rows`, in which heads stand once for each of their blocks.
        rows: positions of the queries in the sequence: (R,) for a range of heads, else (G, R).
        columns: positions of the keys, behind them those of pooled keys, likewise (M,) or (G, M).
        pooled: how many of the last keys are pooled ones.
        partial: how many of the first keys may not count for some queries.
        hidden: bool, (R, partial), where they don't; None: ask the rule.
        empty: a query may be left without a key.
    """

    batch: int
    heads: range | list[int]
    rows: Tensor
    columns: Tensor
    pooled: int
    partial: int
    hidden: Tensor | None
    empty: bool


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Tokens (B, N, K, E) as rows of E numbers, which are copied by their index."""

    flat: Tensor
    step: int
    head_step: int

    @classmethod
    def of(cls, x: Tensor) -> _Tokens:
        """Look at tokens in whichever order they lie in memory: by sequence, or by head."""
        batch, length, heads, width = x.shape
        if not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
            return cls(x.transpose(1, 2).view(batch, -1, width), 1, length)
        return cls(x.contiguous().view(batch, -1, width), heads, 1)

    def index(self, task: Task, positions: Tensor) -> Tensor:
        """Return where the tokens of the task's heads are, (G I,)."""
        heads = task.heads
        if len(heads) == 1:
            return positions.view(-1) * self.step + heads[0] * self.head_step
        offsets = torch.tensor(list(heads), device=positions.device)[:, None] * self.head_step  # (G, 1)
        return (positions * self.step + offsets).flatten()

    def take(self, task: Task, positions: Tensor) -> Tensor:
        """Copy tokens, (G, I, E)."""
        some = self.flat[task.batch].index_select(0, self.index(task, positions))
        return some.view(len(task.heads), positions.shape[-1], -1)

    def put(self, task: Task, positions: Tensor, part: Tensor) -> None:
        """Write tokens (G, I, E)."""
        index = self.index(task, positions)
        self.flat[task.batch].index_copy_(0, index, part.reshape(len(index), -1))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    tail: Tail | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute what `SparseFunction` says."""
    batch, length, heads, _ = query.shape
    tasks = _tasks_of(block_map, batch, heads, query.dtype, key_mask, tail)
    length_of_keys = key.shape[1]
    # 1. tokens as rows; tails are further keys
    if tail is not None:
        key = torch.cat([key, tail.key.transpose(1, 2).to(key.dtype)], dim=1)  # (B, M + m, K, E)
        value = torch.cat([value, tail.value.transpose(1, 2).to(value.dtype)], dim=1)  # (B, M + m, K, E)
    queries, keys, values = _Tokens.of(query), _Tokens.of(key), _Tokens.of(value)
    make = torch.empty if key_mask is None and _visits_everywhere(block_map) else torch.zeros
    out = make(query.shape, dtype=query.dtype, device=query.device)  # (B, N, K, E)
    lse = query.new_full((batch, length, heads, 1), -torch.inf, dtype=torch.float32) if return_lse else None
    outs, lses = _Tokens.of(out), None if lse is None else _Tokens.of(lse)
    level = levels(query.transpose(1, 2), key[:, :length_of_keys].transpose(1, 2), scale)  # (B, K, N, 1)
    near = None if level is None else _Tokens.of(level.transpose(1, 2))
    # 2. each task by itself
    for task in tasks:
        hidden = task.hidden
        if hidden is None and task.partial:
            rows, columns = (x.view(-1, x.shape[-1])[0] for x in (task.rows, task.columns))
            hidden = _hidden_pairs(block_map, rows, columns[: task.partial])  # (R, C)
        bias = None if tail is None or not task.pooled else _bias_of(tail, task, key.shape[1])  # (G', 1, U)
        part, part_lse = attend_rows(
            queries.take(task, task.rows),  # (G, R, E)
            keys.take(task, task.columns),  # (G, M, E)
            values.take(task, task.columns),  # (G, M, E)
            scale,
            level=None if near is None else near.take(task, task.rows),  # (G, R, 1)
            hidden=hidden,
            bias=bias,
            may_be_empty=task.empty,
            return_lse=return_lse,
            fused=task.columns.shape[-1] >= FUSED_KEYS,
        )
        outs.put(task, task.rows, part)
        if lses is not None and part_lse is not None:
            lses.put(task, task.rows, part_lse[..., None])
    return out, None if lse is None else lse[..., 0].transpose(1, 2)  # (B, N, K, E), (B, K, N)


def _visits_everywhere(block_map: BlockMap) -> bool:
    """Return whether every block of queries visits some block of keys that isn't empty."""
    if "everywhere" not in block_map.cache:
        visits = block_map.visits & (block_map.keys.sizes > 0)[..., None, :]
        block_map.cache["everywhere"] = bool(visits.any(-1).all())
    return block_map.cache["everywhere"]


def _bias_of(tail: Tail, task: Task, length: int) -> Tensor:
    """Return what is added to the scores of a task's pooled keys, (G', 1, U)."""
    counts = tail.log_count[min(task.batch, len(tail.log_count) - 1)]  # (K', m)
    blocks = task.columns[..., -task.pooled :] - (length - counts.shape[-1])  # (U,) or (G, U)
    if len(counts) == 1:
        return counts[0][blocks].view(-1, 1, task.pooled)
    heads = torch.tensor(list(task.heads), device=counts.device)
    return counts[heads].gather(1, blocks.expand(len(heads), -1))[:, None]


# ------------------------------------------------------------------------- what is prepared once for a map


def _tasks_of(
    block_map: BlockMap, batch: int, heads: int, dtype: torch.dtype, key_mask: Tensor | None, tail: Tail | None
) -> Iterable[Task]:
    """Return the tasks of a map; those of the last few kinds of calls are kept with it, if they are not too large."""
    mask = None if key_mask is None else (tuple(key_mask.shape), key_mask.cpu().numpy().tobytes())
    kind = ("gather", batch, heads, dtype, mask, tail is not None, score_bytes(dtype))
    known = block_map.cache.get(kind)
    if known is not None:
        return known
    tasks = _make_tasks(block_map, batch, heads, dtype, key_mask, tail)
    lists = block_map.visits.shape[1] if block_map.is_shared else heads
    if block_map.density() * block_map.keys.grid.length * block_map.queries.count * lists * 8 > LIST_BYTES:
        return tasks
    for old in [one for one in block_map.cache if isinstance(one, tuple) and one[0] == "gather"][:-3]:
        block_map.cache.pop(old, None)
    block_map.cache[kind] = known = list(tasks)
    return known


def _make_tasks(
    block_map: BlockMap, batch: int, heads: int, dtype: torch.dtype, key_mask: Tensor | None, tail: Tail | None
) -> Iterator[Task]:
    """Yield the tasks of a map."""
    is_shared = block_map.is_shared and block_map.visits.shape[1] == 1
    room = [RULE_BYTES]
    for sample in range(batch):
        mask = None if key_mask is None else key_mask[sample]
        for group in _groups_of(block_map, sample, [0] if is_shared else range(heads), mask, tail, room, is_shared):
            yield from _split(group, sample, heads if is_shared else 0, dtype, block_map.keys.grid.length)


class _Rows(NamedTuple):
    """One block of queries of a head, and what it visits; see `Task`."""

    head: int
    rows: Tensor
    columns: Tensor
    partial: int
    unvisited: Tensor | None


class _Group(NamedTuple):
    """Blocks of queries, of one or several heads, that visit as many keys; see `Task`."""

    heads: list[int]
    rows: Tensor
    columns: Tensor
    partial: int
    hidden: Tensor | None
    empty: bool
    pooled: Tensor | None


def _groups_of(
    block_map: BlockMap,
    sample: int,
    heads: range | list[int],
    key_mask: Tensor | None,
    tail: Tail | None,
    room: list[int],
    is_shared: bool,
) -> Iterator[_Group]:
    """Yield the blocks of queries of a sample with the keys they visit, those with as many of both together."""
    found: dict[tuple[int, ...], list[_Rows]] = defaultdict(list)
    for head in heads:
        for block, one in enumerate(_head_rows(block_map, sample, head, key_mask, tail)):
            pooled = 0 if one.unvisited is None else len(one.unvisited)
            if len(one.rows) and len(one.columns) + pooled:
                # pairs that don't count differ by block, and a range of heads shares one block's rows
                alone = (head, block) if one.partial or is_shared else (-1, -1)
                found[len(one.rows), len(one.columns), pooled, *alone].append(one)
    for group in found.values():
        first = group[0]
        rows, columns = torch.stack([one.rows for one in group]), torch.stack([one.columns for one in group])
        unvisited = [one.unvisited for one in group if one.unvisited is not None]
        partial, hidden, empty = first.partial, None, False
        if partial:
            hidden = _hidden_pairs(block_map, first.rows, first.columns[:partial])  # (R, C)
            empty = partial == len(first.columns) and not unvisited and bool(hidden.all(-1).any())
            room[0] -= hidden.nbytes
            if not bool(hidden.any()):
                partial, hidden = 0, None
            elif room[0] < 0:
                hidden = None
        pooled = torch.stack(unvisited) if unvisited else None
        yield _Group([one.head for one in group], rows, columns, partial, hidden, empty, pooled)


def _head_rows(
    block_map: BlockMap, sample: int, head: int, key_mask: Tensor | None, tail: Tail | None
) -> Iterator[_Rows]:
    """Yield each block of queries of a head."""
    visits = _of_head(block_map.visits, sample, head)  # (n, m)
    query_order, query_starts = (_of_head(x, sample, head) for x in (block_map.queries.order, block_map.queries.starts))
    order, sizes = (_of_head(x, sample, head) for x in (block_map.keys.order, block_map.keys.sizes))
    block_of = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)  # (M,)
    if key_mask is not None:
        alive = key_mask[order]  # (M,)
        order, block_of = order[alive], block_of[alive]
    partial = _partial_of(block_map, sample, head, visits)
    # keys whose pairs must be asked for come first
    parts = [visits] if partial is None else [visits & partial, visits & ~partial]
    lists = [_token_lists(part[:, block_of], order) for part in parts]
    left_out = None
    if tail is not None:
        counts = _of_head(tail.log_count, sample, head)  # (m,)
        left_out = _token_lists(~visits & ~counts.isneginf(), torch.arange(len(sizes), device=sizes.device))
    queries = query_order.tensor_split(query_starts[1:-1].cpu())
    for block, rows in enumerate(queries):
        columns = torch.cat([one[block] for one in lists]) if len(lists) > 1 else lists[0][block]
        unvisited = None if left_out is None or not len(left_out[block]) else left_out[block]
        yield _Rows(head, rows, columns, 0 if partial is None else len(lists[0][block]), unvisited)


def _partial_of(block_map: BlockMap, sample: int, head: int, visits: Tensor) -> Tensor | None:
    """Return the blocks in which the rule must be asked, (n, m); None where there is no rule."""
    if block_map.rule is None:
        return None
    if block_map.partial is not None:
        return _of_head(block_map.partial, sample, head)
    visual = torch.zeros_like(visits)
    visual[: block_map.queries.visual_count, : block_map.keys.visual_count] = True
    return visual


def _token_lists(picked: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """Return the tokens (M,) that each row of `picked` (n, M) picks."""
    index = picked.nonzero()[:, 1]  # sorted by row
    return tokens[index].tensor_split(picked.sum(1).cumsum(0)[:-1].cpu())


def _hidden_pairs(block_map: BlockMap, rows: Tensor, columns: Tensor) -> Tensor:
    """Return which pairs of visual tokens don't count, by their positions in the sequence, (R, C)."""
    assert block_map.rule is not None, "only maps with a rule have partial blocks"
    query = rows - block_map.queries.grid.visual_start
    key = columns - block_map.keys.grid.visual_start
    return ~block_map.rule.allowed(query[:, None], key[None])


def _split(group: _Group, sample: int, shared_heads: int, dtype: torch.dtype, keys: int) -> Iterator[Task]:
    """Yield tasks whose scores fit into the cache: some heads, or some of the queries of one.

    Args:
        group: what to split.
        sample: its sample.
        shared_heads: how many heads share the group; 0: it is of its own heads.
        dtype: of the scores.
        keys: positions of pooled keys begin here.
    """
    columns, pooled = group.columns, 0
    if group.pooled is not None:
        columns, pooled = torch.cat([columns, group.pooled + keys], dim=1), group.pooled.shape[1]
    length, heads = group.rows.shape[1], range(shared_heads) if shared_heads else group.heads
    # 1. how many queries, and how many heads
    most = max(score_bytes(dtype) // (columns.shape[1] * dtype.itemsize), LEAST_ROWS)
    if dtype == torch.float32 and columns.shape[1] >= FUSED_KEYS and not group.partial and not mkl_is_slow():
        most = length  # of one head
    step = -(-length // -(-length // most))  # pieces of about the same size
    together = -(-len(heads) // -(-len(heads) // max(most // step, 1)))  # as many in each task
    # 2. these
    for first in range(0, len(heads), together):
        pick = 0 if shared_heads else slice(first, first + together)
        for start in range(0, length, step):
            piece = slice(start, start + step)
            hidden = None if group.hidden is None else group.hidden[piece]
            some = heads[first : first + together]
            rows = group.rows[pick, ..., piece]
            yield Task(sample, some, rows, columns[pick], pooled, group.partial, hidden, group.empty)


def _of_head(x: Tensor, sample: int, head: int) -> Tensor:
    """Return the part of a sample and head where they share it or not."""
    return x[min(sample, x.shape[0] - 1), min(head, x.shape[1] - 1)]


register_kernel(SparseKernel("gather", attend, has_tail=True))
