"""Block-sparse attention: the one call that computes a block map, by the kernel that suits it."""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.kernels.backward import differentiable
from dit.attention.kernels.contract import SparseFunction, SparseKernel, Tail, sparse_kernel


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    *,
    kernel: str = "auto",
    return_lse: Literal[False] = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    tail: Tail | None = None,
) -> Tensor: ...


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    *,
    kernel: str = "auto",
    return_lse: Literal[True],
    scale: float | None = None,
    key_mask: Tensor | None = None,
    tail: Tail | None = None,
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    *,
    kernel: str = "auto",
    return_lse: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    tail: Tail | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention between the pairs of tokens that a map says.

    Args:
        query: (B, N, K, E), in the order of the sequence.
        key: (B, M, K, E).
        value: (B, M, K, E).
        block_map: the pairs, see `dit.attention.patterns.pattern`.
        kernel: "auto" takes the first that can compute the call; or one of `kernels.contract.kernel_names()`.
        return_lse: also return the LSE, see `dit.attention.functional.log_sum_exp`.
        scale: factor of the scores; None means 1 / sqrt(E).
        key_mask: bool, (B, M), False for keys that nobody may look at (padded text).
        tail: what stands for blocks that aren't visited, see `dit.attention.corrections`.

    Returns:
        (B, N, K, E); with `return_lse` also the LSE, (B, K, N), float32. A query without a key gets zeros and -inf.

    Raises:
        ValueError: an unknown kernel, one that can't compute this call, or shapes that don't fit.
    """
    _check(query, key, value, block_map, key_mask)
    block_map = block_map.to(query.device)
    chosen = _choose(kernel, query, key, block_map, tail)
    scale = float(float(query.shape[-1]) ** -0.5) if scale is None else scale
    function: SparseFunction = chosen.function
    if not chosen.has_gradient and _needs_gradient(query, key, value, tail):
        function = partial(differentiable, chosen.function)
    out, lse = function(query, key, value, block_map, scale=scale, key_mask=key_mask, tail=tail, return_lse=return_lse)
    if lse is None:
        return out
    return out, lse


AUTOMATIC = {"cpu": ("gather", "reference"), "cuda": ("triton", "gather", "reference")}
"""Kernels that "auto" tries, by device, the fastest first."""


def _needs_gradient(query: Tensor, key: Tensor, value: Tensor, tail: Tail | None) -> bool:
    pooled = () if tail is None else (tail.key, tail.value, tail.log_count)
    return torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, *pooled))


def _choose(name: str, query: Tensor, key: Tensor, block_map: BlockMap, tail: Tail | None) -> SparseKernel:
    names = AUTOMATIC.get(query.device.type, ("reference",)) if name == "auto" else (name,)
    reasons = []
    for one in names:
        kernel = sparse_kernel(one)
        reason = kernel.refusal(query, key, block_map, tail is not None)
        if not reason:
            return kernel
        reasons.append(f"{one}: {reason}")
    raise ValueError(f"kernel {name!r} can't compute this call ({'; '.join(reasons)}); use kernel='auto'")


def _check(query: Tensor, key: Tensor, value: Tensor, block_map: BlockMap, key_mask: Tensor | None) -> None:
    lengths = block_map.queries.grid.length, block_map.keys.grid.length
    if query.ndim != 4 or (query.shape[1], key.shape[1]) != lengths or key.shape != value.shape:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} don't fit a map of "
            f"{lengths[0]} queries and {lengths[1]} keys: expected (B, {lengths[0]}, K, E) and (B, {lengths[1]}, K, E)"
        )
    batch, heads = block_map.visits.shape[:2]
    if batch not in (1, query.shape[0]) or heads not in (1, query.shape[2]):
        raise ValueError(
            f"the map is for {batch} samples and {heads} heads, the query has {query.shape[0]} and {query.shape[2]}"
        )
    if key_mask is not None and tuple(key_mask.shape) != (key.shape[0], key.shape[1]):
        raise ValueError(f"key_mask has the shape {tuple(key_mask.shape)}, expected {(key.shape[0], key.shape[1])}")
