"""Where tokens look. Every attention call of our networks goes through `attention`.

One call, one contract: query, key and value are (B, N, K, E), the result has the query's shape. diffusers' dispatcher
chooses the kernel (native, flex, xformers, flash, sage, ...), so `model.set_attention_backend(name)` works on our
networks as it does on diffusers' own.
"""

import math
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from dit.runtime.bridge import active_attention_backend

SHORT = 192
"""Longest row of keys for which plain products train faster on a CPU than its fused kernel. A next-scale model of 158
tokens: 1.2 s instead of 1.8 s a step."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    backend: str | None = None,
    parallel_config: object | None = None,
) -> Tensor:
    """Scaled dot-product attention through the chosen backend.

    Args:
        query: (B, N, K, E).
        key: (B, M, K, E).
        value: (B, M, K, E).
        attn_mask: bool, True where a query may look; (B, M), or anything that broadcasts to (B, K, N, M).
        backend: name of a diffusers attention backend; None means the active one.
        parallel_config: diffusers' context-parallel configuration.

    Returns:
        (B, N, K, E).
    """
    if attn_mask is not None and attn_mask.ndim == 2:
        attn_mask = attn_mask[:, None, None, :]  # (B, 1, 1, M)
    if _is_short_training_on_cpu(query, key) and backend is None and active_attention_backend() == "native":
        return _attention_by_products(query, key, value, attn_mask)
    options: dict[str, Any] = {"backend": backend, "parallel_config": parallel_config}
    return dispatch_attention_fn(query, key, value, attn_mask=attn_mask, **options)  # (B, N, K, E)


def _is_short_training_on_cpu(query: Tensor, key: Tensor) -> bool:
    return query.device.type == "cpu" and key.shape[1] <= SHORT and torch.is_grad_enabled() and query.requires_grad


def _attention_by_products(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Two matrix products: on CPUs the backward pass of the fused kernel takes four times as long for short rows."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, K, N, E)
    scores = (query @ key.mT).float() * query.shape[-1] ** -0.5  # (B, K, N, M)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)  # finite: an empty row must not be NaN
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)  # (B, N, K, E)


def attention_reference(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """The same as `attention`, written out slowly in float64: the oracle of the tests.

    Args:
        query: (B, N, K, E).
        key: (B, M, K, E).
        value: (B, M, K, E).
        attn_mask: bool, (B, M) or broadcastable to (B, K, N, M).

    Returns:
        (B, N, K, E) in the query's dtype.
    """
    scores = torch.einsum("bnke,bmke->bknm", query.double(), key.double()) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        if attn_mask.ndim == 2:
            attn_mask = attn_mask[:, None, None, :]
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return torch.einsum("bknm,bmke->bnke", scores.softmax(-1), value.double()).to(query.dtype)
