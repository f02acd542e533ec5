"""The xformers kernel: rows of blocks as sequences of a batch of unequal lengths (`BlockDiagonalMask`).

Neighboring blocks of queries that visit the same keys are one sequence. Its keys are copied side by side, so a map
suits where keys are copied few times: windows, frames, tiles with wide blocks of queries.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.kernels.contract import SparseKernel, Tail, register_kernel

MOST_COPIES = 4
"""Copies of all keys that a map may need."""


@dataclass(frozen=True, slots=True)
class _Sequences:
    """The sequences of one sample.

    Args:
        rows: (N',), positions of their queries in the sequence of all tokens; those without keys are left out.
        columns: (M',), positions of their keys.
        row_counts: queries of each.
        column_counts: keys of each.
    """

    rows: Tensor
    columns: Tensor
    row_counts: list[int]
    column_counts: list[int]


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
    """Compute what `SparseFunction` says, without masked keys and tail."""
    if key_mask is not None or tail is not None:
        raise ValueError("the xformers kernel has neither key_mask nor tail; use kernel='gather' or 'triton'")
    batch, length, heads, width = query.shape
    some = _sequences(block_map)
    out = torch.zeros_like(query)  # (B, N, K, E)
    lse = query.new_full((batch, heads, length), -torch.inf, dtype=torch.float32) if return_lse else None
    if not some.row_counts:
        return out, lse
    bias = import_module("xformers.ops.fmha.attn_bias").BlockDiagonalMask.from_seqlens(
        some.row_counts * batch, some.column_counts * batch, device=query.device
    )
    packed = (
        x.index_select(1, index).reshape(1, -1, heads, width)
        for x, index in ((query, some.rows), (key, some.columns), (value, some.columns))
    )
    functions = import_module("xformers.ops.fmha")
    if lse is None:
        found = functions.memory_efficient_attention_forward(*packed, attn_bias=bias, scale=scale)
    else:
        found, found_lse = functions.memory_efficient_attention_forward_requires_grad(
            *packed, attn_bias=bias, scale=scale
        )
        total = batch * len(some.rows)
        if tuple(found_lse.shape) != (1, heads, total):
            raise ValueError(
                f"xformers gives an LSE of the shape {tuple(found_lse.shape)}, expected {(1, heads, total)}; use "
                "another version of it, or kernel='auto'"
            )
        lse.index_copy_(2, some.rows, found_lse.float().view(heads, batch, -1).transpose(0, 1))
    out.index_copy_(1, some.rows, found.view(batch, -1, heads, width))
    return out, lse


def _sequences(block_map: BlockMap) -> _Sequences:
    """Return the sequences of a map, which are kept with it."""
    if "xformers" not in block_map.cache:
        block_map.cache["xformers"] = _make_sequences(block_map)
    return block_map.cache["xformers"]


def _make_sequences(block_map: BlockMap) -> _Sequences:
    visits = block_map.visits[0, 0]  # (n, m)
    queries, keys = block_map.queries, block_map.keys
    starts = queries.starts[0, 0].tolist()
    of_key = torch.arange(keys.count, device=visits.device).repeat_interleave(keys.sizes[0, 0])  # (M,)
    rows, columns = [], []
    block = 0
    while block < queries.count:
        end = block + 1
        while end < queries.count and torch.equal(visits[end], visits[block]):
            end += 1
        seen = keys.order[0, 0][visits[block][of_key]]
        if len(seen) and starts[block] < starts[end]:
            rows.append(queries.order[0, 0][starts[block] : starts[end]])
            columns.append(seen)
        block = end
    nothing = queries.order.new_empty(0)
    return _Sequences(
        torch.cat(rows or [nothing]), torch.cat(columns or [nothing]), [*map(len, rows)], [*map(len, columns)]
    )


def _copies(block_map: BlockMap) -> float:
    """Return how many times the keys are copied."""
    visits, sizes = block_map.visits[0, 0], block_map.keys.sizes[0, 0]
    begins = torch.ones(len(visits), dtype=torch.bool, device=visits.device)
    begins[1:] = (visits[1:] != visits[:-1]).any(-1)
    return float((visits[begins].double() @ sizes.double()).sum() / block_map.keys.grid.length)


def _why_not(query: Tensor, key: Tensor, block_map: BlockMap) -> str:
    """Say why a call can't be computed."""
    shared = block_map.queries.is_shared and block_map.keys.is_shared and block_map.visits.shape[:2] == (1, 1)
    if not shared:
        return "heads or samples visit different blocks"
    if not block_map.asks_nowhere:
        return "only some pairs of its blocks count"
    if (copies := _copies(block_map)) > MOST_COPIES:
        return f"keys would be copied {copies:.0f} times, at most {MOST_COPIES} are made"
    return _trial(query.device, query.dtype, query.shape[-1])


@cache
def _trial(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Attend once among a few tokens; return why that fails."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokens = torch.zeros(1, 16, 1, width, device=device, dtype=dtype)
            bias = import_module("xformers.ops.fmha.attn_bias").BlockDiagonalMask.from_seqlens([8, 8], device=device)
            import_module("xformers.ops.fmha").memory_efficient_attention_forward(
                tokens, tokens, tokens, attn_bias=bias
            )
    except (RuntimeError, ValueError, ImportError, NotImplementedError, AttributeError) as error:
        return f"xformers can't: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    return ""


register_kernel(SparseKernel("xformers", attend, package="xformers", why_not=_why_not))
