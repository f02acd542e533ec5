"""The gather kernel: for each block of queries copy the keys it visits side by side, then attend by plain products.

Tokens are copied by their index, so orders, ragged blocks, clusters and masked keys cost nothing more: a list of tokens
is all that is left of them (`gather_lists`, `gather_tasks`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.kernels import gather_tasks
from dit.attention.kernels.contract import SparseKernel, Tail, register_kernel
from dit.attention.kernels.gather_lists import hidden_pairs
from dit.attention.kernels.gather_tasks import Task, tasks_of
from dit.attention.kernels.rows import attend_rows, levels, reused


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Tokens (B, N, K, E) as rows of E numbers, which are copied by their index."""

    flat: Tensor
    steps: tuple[int, int, int]
    """Rows from one sample, token and head to the next."""

    @classmethod
    def of(cls, x: Tensor) -> _Tokens:
        """Look at tokens in whichever order they lie in memory: by sequence, or by head."""
        _, length, heads, width = x.shape
        if not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
            return cls(x.transpose(1, 2).view(-1, width), (length * heads, 1, length))
        return cls(x.contiguous().view(-1, width), (length * heads, heads, 1))

    def index(self, task: Task, positions: Tensor) -> Tensor:
        """Return where the tokens of the task's heads are, (G I,)."""
        sample, token, head = self.steps
        first = task.samples * sample + task.heads * head  # (G, 1)
        return (positions * token + first).view(-1)

    def take(self, index: Tensor, count: int, name: str) -> Tensor:
        """Copy tokens, (G, I, E), into memory that is used again under that name."""
        out = reused(name, (len(index), self.flat.shape[-1]), self.flat)
        return torch.index_select(self.flat, 0, index, out=out).view(count, -1, self.flat.shape[-1])

    def put(self, index: Tensor, part: Tensor) -> None:
        """Write tokens (G, I, E)."""
        self.flat.index_copy_(0, index, part.reshape(len(index), -1))


class _Indices:
    """Where the tokens of a task are, found once for all tensors that lie in memory alike."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._known: dict[tuple[bool, tuple[int, int, int]], Tensor] = {}

    def rows(self, tokens: _Tokens) -> Tensor:
        """Return where the queries are, (G R,)."""
        return self._index(tokens, True)

    def columns(self, tokens: _Tokens) -> Tensor:
        """Return where the keys are, (G M,)."""
        return self._index(tokens, False)

    def _index(self, tokens: _Tokens, is_query: bool) -> Tensor:
        key = (is_query, tokens.steps)
        if key not in self._known:
            self._known[key] = tokens.index(self.task, self.task.rows if is_query else self.task.columns)
        return self._known[key]


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
    tasks = tasks_of(block_map, batch, heads, query.dtype, key_mask, tail)
    length_of_keys = key.shape[1]
    is_finite = block_map.asks_nowhere or _is_finite(query, key)
    # 1. tokens as rows; tails are further keys, and one that doesn't count
    counts = None
    if tail is not None:
        pads = (0, 0, 0, 1)
        key = torch.cat([key, F.pad(tail.key, pads).transpose(1, 2).to(key.dtype)], dim=1)  # (B, M + m + 1, K, E)
        value = torch.cat([value, F.pad(tail.value, pads).transpose(1, 2).to(value.dtype)], dim=1)
        counts = F.pad(tail.log_count, (0, 1), value=-torch.inf)  # (B', K', m + 1)
    queries, keys, values = _Tokens.of(query), _Tokens.of(key), _Tokens.of(value)
    make = torch.empty if key_mask is None and _visits_everywhere(block_map) else torch.zeros
    out = make(query.shape, dtype=query.dtype, device=query.device)  # (B, N, K, E)
    lse = query.new_full((batch, length, heads, 1), -torch.inf, dtype=torch.float32) if return_lse else None
    outs, lses = _Tokens.of(out), None if lse is None else _Tokens.of(lse)
    level = levels(query.transpose(1, 2), key[:, :length_of_keys].transpose(1, 2), scale)  # (B, K, N, 1)
    near = None if level is None else _Tokens.of(level.transpose(1, 2))
    # 2. each task by itself
    for task in tasks:
        where, count = _Indices(task), len(task.heads)
        part, part_lse = attend_rows(
            queries.take(where.rows(queries), count, "query"),  # (G, R, E)
            keys.take(where.columns(keys), count, "key"),  # (G, M, E)
            values.take(where.columns(values), count, "value"),  # (G, M, E)
            scale,
            level=None if near is None else near.take(where.rows(near), count, "level"),  # (G, R, 1)
            hidden=_hidden_of(block_map, task, query.dtype, is_finite),
            bias=None if counts is None or not task.pooled else _bias_of(counts, task, key.shape[1]),  # (G', 1, U)
            may_be_empty=task.empty,
            return_lse=return_lse,
            fused=task.columns.shape[-1] >= gather_tasks.FUSED_KEYS,
        )
        outs.put(where.rows(outs), part)
        if lses is not None and part_lse is not None:
            lses.put(where.rows(lses), part_lse[..., None])
    return out, None if lse is None else lse[..., 0].transpose(1, 2)  # (B, N, K, E), (B, K, N)


def _is_finite(query: Tensor, key: Tensor) -> bool:
    """Return whether queries and keys hold neither NaN nor infinity."""
    return bool((query.sum(dtype=torch.float32) + key.sum(dtype=torch.float32)).isfinite())


def _hidden_of(block_map: BlockMap, task: Task, dtype: torch.dtype, is_finite: bool) -> Tensor | None:
    """Return the pairs of a task that don't count: added to finite scores, else as bool, so that no NaN spreads."""
    hidden = task.hidden
    if hidden is None:
        if not task.partial:
            return None
        head = int(task.heads[0, 0])
        pairs = hidden_pairs(block_map, head, task.rows, task.columns[: task.partial])  # (R, C)
        return pairs.new_zeros((), dtype=dtype).masked_fill(pairs, -torch.inf) if is_finite else pairs
    return hidden if is_finite else hidden.isneginf()


def _visits_everywhere(block_map: BlockMap) -> bool:
    """Return whether every block of queries that isn't empty visits some block of keys that isn't either."""
    if "everywhere" not in block_map.cache:
        visits = block_map.visits & (block_map.keys.sizes > 0)[..., None, :]
        block_map.cache["everywhere"] = bool((visits.any(-1) | (block_map.queries.sizes == 0)).all())
    return block_map.cache["everywhere"]


def _bias_of(counts: Tensor, task: Task, length: int) -> Tensor:
    """Return what is added to the scores of a task's pooled keys, (G', 1, U).

    Args:
        counts: (B', K', m + 1), of all pooled keys.
        task: which of them.
        length: position behind the last of them.
    """
    blocks = task.columns[..., -task.pooled :] - (length - counts.shape[-1])  # (U,) or (G, U)
    if counts.shape[:2] == (1, 1):
        return counts[0, 0][blocks].view(-1, 1, task.pooled)
    sample, head = (
        x[:, 0].clamp(max=size - 1) for x, size in zip((task.samples, task.heads), counts.shape, strict=False)
    )
    return counts[sample, head].gather(1, blocks.expand(len(task.heads), -1))[:, None]


register_kernel(SparseKernel("gather", attend, has_tail=True))
