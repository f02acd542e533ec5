"""The one attention call of our networks, with its log-sum-exp on request.

Query, key and value are (B, N, K, E), the result has the query's shape. diffusers' dispatcher chooses the kernel
(native, flex, xformers, flash, sage, ...), so `model.set_attention_backend(name)` works on our networks as it does on
diffusers' own.

The log-sum-exp (LSE) of a query's scores, log(sum_j exp(s_j)), is what its softmax divides by. Two attentions of the
same queries to different keys are merged exactly with it: this is how blocks, text segments and processes each compute
a part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from dit.attention.kernels import products
from dit.runtime.diffusers_compat import active_attention_backend

SHORT = 192
"""Longest row of keys for which plain products train faster on a CPU than its fused kernel. A next-scale model of 158
tokens: 1.2 s instead of 1.8 s a step."""

SCORES_AT_ONCE = 2**24
"""Most scores that `log_sum_exp` holds at a time: 64 MiB."""


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
    parallel_config: object | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
    parallel_config: object | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
    parallel_config: object | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute scaled dot-product attention through the chosen backend.

    Args:
        query: (B, N, K, E).
        key: (B, M, K, E).
        value: (B, M, K, E).
        attn_mask: bool, True where a query may look; (B, M), or anything that broadcasts to (B, K, N, M). Of another
            dtype it is added to the scores.
        scale: factor of the scores; None means 1 / sqrt(E).
        backend: name of an attention backend, see `dit.attention.backends`; None means the active one. Where that is
            torch's native one, long sequences on a CPU are computed by "products" where that is faster.
        parallel_config: diffusers' context-parallel configuration.
        return_lse: also return the LSE. Only torch's native kernel on a CPU, without mask and gradient, gives it away;
            elsewhere it costs a second product of queries and keys.

    Returns:
        (B, N, K, E); with `return_lse` also the LSE, see `log_sum_exp`.

    Raises:
        ValueError: an unknown backend; or the LSE is asked for where processes share the keys.
    """
    attn_mask = _as_four_dims(attn_mask)  # broadcasts to (B, K, N, M)
    if return_lse and parallel_config is not None:
        raise ValueError("the LSE under context parallelism would be that of this process's keys; use return_lse=False")
    if return_lse and _native_returns_lse(query, key, value, attn_mask, backend):
        return _native_with_lse(query, key, value, scale)
    is_ours_to_choose = backend is None and parallel_config is None and active_attention_backend() == "native"
    key_mask = products.as_key_mask(attn_mask, key.shape[0], key.shape[1])  # (B, M)
    if is_ours_to_choose and _is_short_training_on_cpu(query, key):
        out = _attention_by_products(query, key, value, attn_mask, scale)  # (B, N, K, E)
    elif is_ours_to_choose and (attn_mask is None or key_mask is not None) and products.suits(query, key, value):
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        out = products.attend_all(query, key, value, factor, key_mask)  # (B, N, K, E)
    else:
        options: dict[str, Any] = {"backend": backend, "parallel_config": parallel_config}
        out = dispatch_attention_fn(query, key, value, attn_mask=attn_mask, scale=scale, **options)  # (B, N, K, E)
    return (out, log_sum_exp(query, key, attn_mask, scale)) if return_lse else out


def log_sum_exp(query: Tensor, key: Tensor, attn_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Compute the logarithm of what a softmax divides by, from the scores themselves.

    Args:
        query: (B, N, K, E).
        key: (B, M, K, E).
        attn_mask: as in `attention`.
        scale: as in `attention`.

    Returns:
        (B, K, N), float32, natural logarithm; -inf for a query that may look nowhere.
    """
    batch, count, heads, _ = query.shape
    attn_mask = _as_four_dims(attn_mask)
    rows = max(SCORES_AT_ONCE // max(batch * heads * key.shape[1], 1), 1)  # queries at a time
    parts = []
    for start in range(0, count, rows):
        some = slice(start, start + rows)
        has_rows = attn_mask is not None and attn_mask.shape[-2] != 1
        mask = attn_mask[..., some, :] if attn_mask is not None and has_rows else attn_mask
        scores = _scores(query[:, some].float(), key.float(), mask, scale)  # (B, K, N', M)
        parts.append(scores.logsumexp(-1))  # (B, K, N')
    return torch.cat(parts, dim=2)  # (B, K, N)


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attentions of the same queries to disjoint sets of keys: exactly what all keys at once would give.

    Args:
        outputs: (B, N, K, E) each.
        lses: of the same attentions, (B, K, N) each.

    Returns:
        The output, (B, N, K, E) in the dtype of the first part, and its LSE, (B, K, N) in float32. A query that may
        look nowhere gets zeros and -inf.

    Raises:
        ValueError: no parts, or not one LSE for each.
    """
    if not outputs or len(outputs) != len(lses):
        raise ValueError(f"{len(outputs)} outputs and {len(lses)} LSEs: expected as many of both, at least 1")
    lse = torch.stack([one.float() for one in lses])  # (P, B, K, N)
    total = lse.logsumexp(0)  # (B, K, N)
    # 1. each part's fraction of the softmax; 0 for one without keys, also where no part has any
    share = (lse - total.masked_fill(total == -torch.inf, 0)).exp()  # (P, B, K, N)
    share = share.transpose(2, 3)[..., None]  # (P, B, N, K, 1)
    # 2. the mean of the outputs by these shares, whatever a part without keys holds
    parts = [out.float().masked_fill(one == 0, 0) * one for out, one in zip(outputs, share, strict=True)]
    return torch.stack(parts).sum(0).to(outputs[0].dtype), total  # (B, N, K, E), (B, K, N)


@overload
def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the same as `attention`, slowly, in float64: what the tests hold all kernels to.

    Args:
        query: (B, N, K, E).
        key: (B, M, K, E).
        value: (B, M, K, E).
        attn_mask: bool, (B, M) or broadcastable to (B, K, N, M); of another dtype it is added to the scores.
        scale: factor of the scores; None means 1 / sqrt(E).
        return_lse: also return the LSE.

    Returns:
        (B, N, K, E) in the query's dtype; with `return_lse` also the LSE, see `log_sum_exp`.
    """
    scores = _scores(query.double(), key.double(), _as_four_dims(attn_mask), scale)  # (B, K, N, M)
    out = torch.einsum("bknm,bmke->bnke", scores.softmax(-1), value.double()).to(query.dtype)  # (B, N, K, E)
    return (out, scores.logsumexp(-1).float()) if return_lse else out


def _scores(query: Tensor, key: Tensor, attn_mask: Tensor | None, scale: float | None) -> Tensor:
    """Return the attention logits, (B, K, N, M)."""
    scores = torch.einsum("bnke,bmke->bknm", query, key)  # (B, K, N, M)
    scores = scores / math.sqrt(query.shape[-1]) if scale is None else scores * scale
    if attn_mask is None:
        return scores
    return scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask


def _as_four_dims(attn_mask: Tensor | None) -> Tensor | None:
    """Return a mask of keys (B, M) as it broadcasts over heads and queries, (B, 1, 1, M); others as they are."""
    return attn_mask[:, None, None, :] if attn_mask is not None and attn_mask.ndim == 2 else attn_mask


def _native_returns_lse(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, backend: str | None
) -> bool:
    """Return whether torch's operator behind the native backend returns a right LSE too.

    The one for CPUs says 0 for rows without keys, and has no gradient of it.
    """
    return (
        (backend or active_attention_backend()) == "native"
        and all(x.device.type == "cpu" for x in (query, key, value))
        and attn_mask is None
        and key.shape[1] > 0  # it divides by their number
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)))
        and not torch.compiler.is_compiling()
    )


def _native_with_lse(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Return the operator that `F.scaled_dot_product_attention` calls on CPUs."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, K, N, E)
    operator: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = operator(query, key, value, scale=scale)  # (B, K, N, E), (B, K, N)
    return out.transpose(1, 2), lse.float().contiguous()  # (B, N, K, E), (B, K, N)


def _is_short_training_on_cpu(query: Tensor, key: Tensor) -> bool:
    return query.device.type == "cpu" and key.shape[1] <= SHORT and torch.is_grad_enabled() and query.requires_grad


def _attention_by_products(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attend by two matrix products: on CPUs the fused kernel's backward takes four times as long for short rows."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, K, N, E)
    scores = (query @ key.mT).float() * (query.shape[-1] ** -0.5 if scale is None else scale)  # (B, K, N, M)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask
    elif attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)  # finite: an empty row must not be NaN
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)  # (B, N, K, E)
