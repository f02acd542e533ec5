"""Storage of tokens: as they are, or int8 with one scale per token and head."""

from __future__ import annotations

import torch
from torch import Tensor

KV_DTYPES = ("auto", "int8")
"""How keys and values can be stored; "auto" is the dtype of the model."""

Stored = tuple[Tensor, ...]
"""What `quantize` makes: numbers (B, K, T, E), for int8 also factors (B, K, T, 1)."""


def check_kv_dtype(kv_dtype: str) -> None:
    """Raise ValueError unless a storage format is known."""
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype {kv_dtype!r} is not known; use one of {', '.join(map(repr, KV_DTYPES))}")


def quantize(x: Tensor, kv_dtype: str) -> Stored:
    """Quantize tokens.

    Args:
        x: (B, K, T, E).
        kv_dtype: one of `KV_DTYPES`.
    """
    if kv_dtype == "auto":
        return (x,)
    factor = (x.float().abs().amax(-1, keepdim=True) / 127).to(torch.float16)  # (B, K, T, 1)
    steps = x.float() / factor.float().clamp_min(torch.finfo(torch.float16).tiny)  # (B, K, T, E)
    return steps.round().clamp(-127, 127).to(torch.int8), factor


def dequantize_into(stored: Stored, out: Tensor) -> None:
    """Dequantize tokens into `out` (B, K, T, E)."""
    if len(stored) == 1:
        out.copy_(stored[0])
    else:
        out.copy_(stored[0].float() * stored[1].float())


def token_nbytes(head_dim: int, dtype: torch.dtype, kv_dtype: str) -> int:
    """Return bytes of one stored token of one head, key or value."""
    return head_dim * dtype.itemsize if kv_dtype == "auto" else head_dim + torch.float16.itemsize
