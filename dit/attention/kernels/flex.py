"""The flex kernel: torch's FlexAttention (arXiv 2412.05496), for maps whose blocks are all of one size.

Uncompiled it computes every score, which is good for comparisons only; "flex_compiled" compiles it at its first call,
which takes seconds to minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from dit.attention.block_map import BlockMap, RulesByHead
from dit.attention.kernels.contract import SparseKernel, Tail, register_kernel
from dit.attention.layout import Layout


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
    compiled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute what `SparseFunction` says; `compiled` by a kernel that is compiled for it."""
    if tail is not None:
        raise ValueError("the flex kernel has no tail; use kernel='gather' or 'triton'")
    block_mask = to_block_mask(block_map, key_mask)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, K, N, E)
    query, key, value = block_map.queries.permute(query), block_map.keys.permute(key), block_map.keys.permute(value)
    function: Any = _compiled() if compiled else flex_attention
    out, found = function(
        query, key, value, block_mask=block_mask, scale=scale, return_aux=AuxRequest(lse=return_lse)
    )  # (B, K, N, E)
    out = block_map.queries.restore(out).transpose(1, 2)  # (B, N, K, E)
    if not return_lse:
        return out, None
    return out, block_map.queries.restore(found.lse[..., None])[..., 0].float()


def to_block_mask(block_map: BlockMap, key_mask: Tensor | None = None) -> BlockMask:
    """Turn a map into a `BlockMask` of the sequence in the layout's order.

    Args:
        block_map: the pairs.
        key_mask: bool, (B, M), False for keys that nobody may look at, in the order of the sequence.

    Raises:
        ValueError: blocks of several sizes.
    """
    reason = _why_not_uniform(block_map)
    if reason:
        raise ValueError(f"this map has no BlockMask: {reason}; use kernel='gather' or 'triton'")
    sizes = _size(block_map.queries), _size(block_map.keys)
    visits = block_map.visits
    asked = torch.zeros_like(visits)
    if block_map.rule is not None:
        asked = visits if block_map.partial is None else visits & block_map.partial
    alive = None
    if key_mask is not None:
        order = block_map.keys.order  # (B', K', M)
        alive = key_mask[:, None].expand(-1, order.shape[1], -1).gather(2, order.expand(len(key_mask), -1, -1))
        padded = torch.nn.functional.pad(~alive, (0, block_map.keys.count * sizes[1] - alive.shape[-1]))
        some_dead = padded.unflatten(-1, (-1, sizes[1])).any(-1)  # (B, K', m)
        heads = torch.broadcast_shapes(visits.shape[:2], some_dead.shape[:2])
        visits, asked = visits.expand(*heads, -1, -1), asked.expand(*heads, -1, -1)
        asked = visits & (asked | some_dead[..., None, :])
    lengths = block_map.queries.grid.length, block_map.keys.grid.length
    return BlockMask.from_kv_blocks(
        *_listed(asked),
        *_listed(visits & ~asked),
        BLOCK_SIZE=sizes,
        mask_mod=_mask_of(block_map, sizes, alive),
        seq_lengths=lengths,
        compute_q_blocks=False,
    )


def _listed(picked: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks each row picks, (B', K', n), and all of them, those first, (B', K', n, m)."""
    index = picked.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return picked.sum(-1).int(), index.int()


def _mask_of(block_map: BlockMap, sizes: tuple[int, int], alive: Tensor | None) -> Callable[..., Tensor]:
    """Return the function that says which pairs count; the uncompiled kernel asks nothing else.

    Pairs within blocks that aren't partial are never asked for by the compiled one.
    """
    visits, rule, partial_blocks = block_map.visits, block_map.rule, block_map.partial
    queries, keys = (_visual_index(one) for one in (block_map.queries, block_map.keys))  # (B', K', N)

    def at(x: Tensor, batch: Tensor, head: Tensor, *index: Tensor) -> Tensor:
        return x[batch * (x.shape[0] > 1), head * (x.shape[1] > 1), *index]

    def counts(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        blocks = query // sizes[0], key // sizes[1]
        allowed = at(visits, batch, head, *blocks)
        if rule is not None:
            i, j = at(queries, batch, head, query), at(keys, batch, head, key)
            known: Any = (i < 0) | (j < 0) | rule.allowed(i.clamp(min=0), j.clamp(min=0))
            if partial_blocks is not None:
                known = known | ~at(partial_blocks, batch, head, *blocks)
            allowed = allowed & known
        return allowed if alive is None else allowed & at(alive, batch, head, key)

    return counts


def _visual_index(layout: Layout) -> Tensor:
    """Return the raster index of each token in the layout's order, -1 for exact ones, (B', K', N)."""
    visual = layout.order - layout.grid.visual_start
    return visual.masked_fill((visual < 0) | (visual >= layout.grid.visual_length), -1)


def _size(layout: Layout) -> int:
    return int(layout.starts[0, 0, 1])


def _why_not_uniform(block_map: BlockMap) -> str:
    """Say why the blocks aren't of one size; the last may be smaller."""
    for name, layout in (("queries", block_map.queries), ("keys", block_map.keys)):
        starts = layout.starts  # (B', K', n + 1)
        expected = torch.arange(starts.shape[-1], device=starts.device) * _size(layout)
        if not torch.equal(starts, expected.clamp(max=layout.grid.length).expand_as(starts)) or not _size(layout):
            sizes = layout.sizes
            return f"its blocks of {name} have {int(sizes.min())} to {int(sizes.max())} tokens, not all the same number"
    return ""


def _why_not(query: Tensor, key: Tensor, block_map: BlockMap) -> str:
    if isinstance(block_map.rule, RulesByHead):
        return "heads have different rules of tokens"
    return _why_not_uniform(block_map)


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


register_kernel(SparseKernel("flex", attend, why_not=_why_not))
register_kernel(SparseKernel("flex_compiled", partial(attend, compiled=True), why_not=_why_not))
