"""Gradients of kernels that have none: scores of one block of queries at a time are computed again.

With the LSE of the forward call every weight is known, p_ij = exp(s_ij - lse_i), and with d_i = <dO_i, O_i> - dLSE_i
the gradients are those of FlashAttention-2 (arXiv 2307.08691, algorithm 2) over the pairs that the map visits:

    dV_j = sum_i p_ij dO_i,   dS_ij = p_ij (<dO_i, V_j> - d_i),   dQ_i = scale sum_j dS_ij K_j,   dK_j likewise.

A tail is more keys, so its pooled keys and values get gradients too, and pass them on to what they were pooled of.
Within a block of queries each key is added to once, so sums are the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dit.attention.block_map import BlockMap, TokenRule
from dit.attention.kernels.contract import SparseFunction, Tail

SCORES_AT_ONCE = 2**25
"""Most scores of float32 that are held at a time: 128 MiB, four times over."""


def differentiable(
    kernel: SparseFunction,
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
    """Compute what `SparseFunction` says by a kernel without gradients, and give it some.

    Args:
        kernel: the computation; it must return the LSE on request.
        query: (B, N, K, E).
        key: (B, M, K, E).
        value: (B, M, K, E).
        block_map: the pairs.
        scale: factor of the scores.
        key_mask: bool, (B, M).
        tail: what stands for blocks that aren't visited; gradients flow into all three of its tensors.
        return_lse: also return the LSE, which has gradients too.
    """
    pooled = (None, None, None) if tail is None else (tail.key, tail.value, tail.log_count)
    out, lse = _BlockSparse.apply(kernel, block_map, scale, key_mask, query, key, value, *pooled)  # type: ignore[misc]
    return out, lse if return_lse else None


class _BlockSparse(torch.autograd.Function):
    """Block-sparse attention with the backward pass of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: SparseFunction,
        block_map: BlockMap,
        scale: float,
        key_mask: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tail_key: Tensor | None,
        tail_value: Tensor | None,
        log_count: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        tail = _tail(tail_key, tail_value, log_count)
        out, lse = kernel(query, key, value, block_map, scale=scale, key_mask=key_mask, tail=tail, return_lse=True)
        if lse is None:
            raise ValueError("the kernel returned no LSE though it was asked for one, which its gradients need")
        ctx.save_for_backward(query, key, value, out, lse, key_mask, tail_key, tail_value, log_count)
        ctx.block_map, ctx.scale = block_map, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        grad_out, grad_lse = gradients
        query, key, value, out, lse, key_mask, *pooled = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 10
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        sums = _Sums(query, key, value, out, lse, grad_out, grad_lse, key_mask, _tail(*pooled), ctx.scale)
        for group in _groups(ctx.block_map, query.shape[0], query.shape[2]):
            _add_group(sums, group, ctx.block_map)
        grads = [one if wanted else None for one, wanted in zip(sums.results(), ctx.needs_input_grad[4:], strict=True)]
        return (None, None, None, None, *grads)


def _tail(key: Tensor | None, value: Tensor | None, log_count: Tensor | None) -> Tail | None:
    return None if key is None or value is None or log_count is None else Tail(key, value, log_count)


class _Sums:
    """Tensors of one backward pass, heads side by side (G = B K), and the gradients so far."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        key_mask: Tensor | None,
        tail: Tail | None,
        scale: float,
    ) -> None:
        self.shape, self.dtype, self.scale = query.shape, query.dtype, scale
        if key_mask is not None:  # whatever they hold must not count, NaN neither
            key, value = (x.masked_fill(~key_mask[..., None, None], 0) for x in (key, value))
        self.wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.keeps_low = query.is_cuda and query.dtype != self.wide and "dtype" in torch.ops.aten.bmm.overloads()
        self.kind = query.dtype if self.keeps_low else self.wide  # of the factors of products
        self.query, self.key, self.value, self.grad_out = map(self.by_head, (query, key, value, grad_out))  # (G, N, E)
        delta = (grad_out.to(self.wide) * out.to(self.wide)).sum(-1).transpose(1, 2)  # (B, K, N)
        delta = delta if grad_lse is None else delta - grad_lse
        self.delta = delta.flatten(0, 1)[..., None]  # (G, N, 1)
        lse = lse.to(self.wide).masked_fill(lse.isneginf(), torch.inf)  # weights of rows without keys are 0
        self.lse = lse.flatten(0, 1)[..., None]  # (G, N, 1)
        self.key_mask = None if key_mask is None else key_mask.repeat_interleave(query.shape[2], 0)  # (G, M)
        self.tail = tail
        self.sums = [torch.zeros_like(x, dtype=self.wide) for x in (self.query, self.key, self.value)]
        if tail is not None:
            self.tail_key, self.tail_value = (x.flatten(0, 1).to(self.kind) for x in (tail.key, tail.value))
            heads = query.shape[0], query.shape[2]
            self.log_count = tail.log_count.to(self.wide).expand(*heads, -1).flatten(0, 1)  # (G, m)
            self.sums += [torch.zeros_like(x, dtype=self.wide) for x in (self.tail_key, self.tail_value)]
            self.sums.append(torch.zeros_like(self.log_count))

    def by_head(self, x: Tensor) -> Tensor:
        """Bring (B, N, K, E) to (G, N, E) in the type of products."""
        return x.transpose(1, 2).flatten(0, 1).to(self.kind)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply matrices (G, ., .) into the wide type."""
        a, b = a.to(self.kind), b.to(self.kind)
        return torch.bmm(a, b, out_dtype=self.wide) if self.keeps_low else torch.bmm(a, b)  # type: ignore[call-arg]

    def results(self) -> list[Tensor | None]:
        """Return the gradients of query, key, value, and the tail's three tensors."""
        batch, _, heads, _ = self.shape
        grads: list[Tensor | None] = [
            x.unflatten(0, (batch, heads)).transpose(1, 2).to(self.dtype) for x in self.sums[:3]
        ]
        if self.tail is None:
            return [*grads, None, None, None]
        key, value, count = (x.unflatten(0, (batch, heads)) for x in self.sums[3:])
        count = count.sum_to_size(self.tail.log_count.shape).to(self.tail.log_count.dtype)
        return [*grads, key.to(self.tail.key.dtype), value.to(self.tail.value.dtype), count]


@dataclass(frozen=True, slots=True)
class _Group:
    """Heads that share order and blocks.

    Args:
        heads: slice of all B K.
        query_order: (N,).
        query_starts: where each block of queries begins, and N.
        key_order: (M,).
        key_starts: (m + 1,).
        visits: bool, (G', n, m); G' is 1 where the heads do alike.
        asked: bool, as `visits`: blocks whose pairs the rule must be asked for; None without a rule.
        blocks: (G', n, L), the blocks of keys that each block of queries visits; m for none.
        counts: how many each block of queries visits, the most of all heads.
        asks: whether any of those must be asked for.
        rule: who is asked.
    """

    heads: slice
    query_order: Tensor
    query_starts: list[int]
    key_order: Tensor
    key_starts: Tensor
    visits: Tensor
    asked: Tensor | None
    blocks: Tensor
    counts: list[int]
    asks: list[bool]
    rule: TokenRule | None


def _groups(block_map: BlockMap, batch: int, heads: int) -> list[_Group]:
    """Return the groups of heads of a map, which are kept with it."""
    kind = ("backward", batch, heads)
    if kind not in block_map.cache:
        block_map.cache[kind] = list(_make_groups(block_map, batch, heads))
    return block_map.cache[kind]


def _make_groups(block_map: BlockMap, batch: int, heads: int) -> Iterator[_Group]:
    queries, keys = block_map.queries, block_map.keys
    has_rule = not block_map.asks_nowhere
    partial = block_map.visits if block_map.partial is None else block_map.partial & block_map.visits
    if block_map.is_shared:
        parts = [(0, 0, slice(0, batch * heads))]
    else:
        parts = [(b, h, slice(b * heads + h, b * heads + h + 1)) for b in range(batch) for h in range(heads)]
    for b, h, some in parts:
        if len(parts) > 1:
            visits, asked = (_of_head(x, b, h)[None] for x in (block_map.visits, partial))
        elif block_map.visits.shape[:2] == partial.shape[:2] == (1, 1):
            visits, asked = block_map.visits[0], partial[0]
        else:
            visits, asked = (x.expand(batch, heads, -1, -1).flatten(0, 1) for x in (block_map.visits, partial))
        counts = visits.sum(-1).amax(0).tolist()  # (n,)
        index = torch.arange(keys.count, device=visits.device).expand_as(visits)
        blocks = index.masked_fill(~visits, keys.count).sort(-1).values  # (G', n, m)
        yield _Group(
            some,
            _of_head(queries.order, b, h),
            _of_head(queries.starts, b, h).tolist(),
            _of_head(keys.order, b, h),
            _of_head(keys.starts, b, h),
            visits,
            asked if has_rule else None,
            blocks[..., : max(counts)].contiguous(),
            counts,
            asked.any(-1).any(0).tolist() if has_rule else [False] * queries.count,
            None if block_map.rule is None else block_map.rule.of_head(h),
        )


def _of_head(x: Tensor, batch: int, head: int) -> Tensor:
    """Return the part of a sample and head where they share it or not."""
    return x[min(batch, x.shape[0] - 1), min(head, x.shape[1] - 1)]


def _add_group(sums: _Sums, group: _Group, block_map: BlockMap) -> None:
    """Add what the queries of some heads give, block by block."""
    total = group.heads.stop - group.heads.start
    widest = int(group.key_starts.diff().max())
    for block, (start, stop) in enumerate(zip(group.query_starts[:-1], group.query_starts[1:], strict=True)):
        count = group.counts[block]
        if start == stop or (not count and sums.tail is None):
            continue
        rows = group.query_order[start:stop]  # (R,)
        longest = max(count * widest, len(group.visits[0, 0]))
        together = max(SCORES_AT_ONCE // (len(rows) * longest), 1)  # heads
        for first in range(0, total, together):
            heads = slice(first, min(first + together, total))
            _add_block(sums, group, block, rows, heads, block_map)


def _add_block(sums: _Sums, group: _Group, block: int, rows: Tensor, heads: slice, block_map: BlockMap) -> None:
    """Add what one block of queries gives in some heads of the group."""
    own = heads if len(group.visits) > 1 else slice(None)  # of what the group may share
    every = slice(group.heads.start + heads.start, group.heads.start + heads.stop)
    here = _Rows(*(x[every].index_select(1, rows) for x in (sums.query, sums.grad_out, sums.lse, sums.delta)))
    grad = torch.zeros_like(here.query, dtype=sums.wide)  # (G, R, E)
    if group.counts[block]:
        columns, is_key, is_asked = _columns(group, block, own)  # (G', C) each
        hidden = ~is_key[:, None]  # (G', 1, C)
        if group.asks[block]:
            hidden = hidden | (is_asked[:, None] & ~_allowed(group.rule, block_map, rows, columns))  # (G', R, C)
        if sums.key_mask is not None:
            alive = sums.key_mask[every].gather(1, columns.expand(len(here.query), -1))  # (G, C)
            hidden = hidden | ~alive[:, None]
        key, value = (_take(x[every], columns) for x in (sums.key, sums.value))  # (G, C, E)
        of_query, of_key, of_value, _ = _gradients(sums, here, key, value, hidden)
        grad += of_query
        _add(sums.sums[1][every], columns, of_key)
        _add(sums.sums[2][every], columns, of_value)
    if sums.tail is not None:
        hidden = group.visits[own, block][:, None]  # (G', 1, m)
        bias = sums.log_count[every][:, None]  # (G, 1, m)
        pooled = sums.tail_key[every], sums.tail_value[every]
        of_query, of_key, of_value, of_score = _gradients(sums, here, *pooled, hidden, bias)
        grad += of_query
        for total, part in zip(sums.sums[3:], (of_key, of_value, of_score), strict=True):
            total[every] += part
    sums.sums[0][every].index_copy_(1, rows, grad)


def _take(x: Tensor, columns: Tensor) -> Tensor:
    """Copy tokens (G', C) of (G, M, E), to (G, C, E)."""
    if len(columns) == 1:
        return x.index_select(1, columns[0])
    return x.gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))


def _add(total: Tensor, columns: Tensor, part: Tensor) -> None:
    """Add (G, C, E) to the tokens (G', C) of (G, M, E) in place."""
    if len(columns) == 1:
        total.index_add_(1, columns[0], part)
    else:
        total.scatter_add_(1, columns[..., None].expand_as(part), part)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some queries: themselves and the gradient of their output (G, R, E), LSE and d of this file (G, R, 1)."""

    query: Tensor
    grad_out: Tensor
    lse: Tensor
    delta: Tensor


def _gradients(
    sums: _Sums, rows: _Rows, key: Tensor, value: Tensor, hidden: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of queries (G, R, E), keys and values (G, C, E), and of the keys' biases (G, C)."""
    scores = sums.product(rows.query, key.mT) * sums.scale  # (G, R, C)
    scores = scores if bias is None else scores + bias
    weights = (scores - rows.lse).exp().masked_fill(hidden, 0)  # (G, R, C)
    of_value = sums.product(weights.mT, rows.grad_out)
    of_scores = weights * (sums.product(rows.grad_out, value.mT) - rows.delta)  # (G, R, C)
    of_scores = of_scores.masked_fill(hidden, 0)  # 0 times infinity
    of_query = sums.product(of_scores, key) * sums.scale
    return of_query, sums.product(of_scores.mT, rows.query) * sums.scale, of_value, of_scores.sum(1)


def _columns(group: _Group, block: int, heads: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return which keys a block of queries visits, whether there is one, and whether its pairs must be asked for.

    All are (G', C): C is the most that any head visits, in blocks of the size of the largest.
    """
    blocks = group.blocks[heads, block, : group.counts[block]]  # (G', L)
    exists = blocks < len(group.key_starts) - 1
    blocks = blocks.masked_fill(~exists, 0)
    sizes = group.key_starts.diff()  # (m,)
    column = torch.arange(int(sizes.max()), device=blocks.device)
    is_key = exists[..., None] & (column < sizes[blocks][..., None])  # (G', L, S)
    place = (group.key_starts[blocks][..., None] + column).masked_fill(~is_key, 0)
    is_asked = is_key if group.asked is None else group.asked[heads, block].gather(-1, blocks)[..., None] & is_key
    return group.key_order[place].flatten(1), is_key.flatten(1), is_asked.flatten(1)


def _allowed(rule: TokenRule | None, block_map: BlockMap, rows: Tensor, columns: Tensor) -> Tensor:
    """Return which pairs count by the rule, (G', R, C); rows (R,) and columns (G', C) are positions in the sequence."""
    query = (rows - block_map.queries.grid.visual_start)[:, None]  # (R, 1)
    key = (columns - block_map.keys.grid.visual_start)[:, None]  # (G', 1, C)
    is_exact = (query < 0) | (query >= block_map.queries.grid.visual_length)
    is_exact = is_exact | (key < 0) | (key >= block_map.keys.grid.visual_length)  # (G', R, C)
    assert rule is not None, "only maps with a rule have blocks in which it is asked"
    most = block_map.queries.grid.visual_length - 1, block_map.keys.grid.visual_length - 1
    return is_exact | rule.allowed(query.clamp(0, most[0]), key.clamp(0, most[1]))
