"""Dense attention on CPUs by plain products.

torch's fused kernel gains nothing from bfloat16 there, and in float32 it multiplies by MKL, which leaves AVX-512 unused
on processors that aren't Intel's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from dit.attention.kernels.native import attend_native
from dit.attention.kernels.rows import attend_rows, has_fast_onednn, is_zen4, levels, score_bytes

MOST_ROWS, LEAST_ROWS = 512, 16
"""Queries of a task."""
LEAST_TOKENS = {torch.bfloat16: 256, torch.float32: 512}
LEAST_TOKENS_ZEN4 = 512
"""Shortest rows of queries and keys for which it is used unasked; of heads narrower than 64 longer ones."""


def attend_all(query: Tensor, key: Tensor, value: Tensor, scale: float, key_mask: Tensor | None = None) -> Tensor:
    """Attend to all keys.

    Args:
        query: (B, N, K, E), bfloat16 or float32, on a CPU.
        key: (B, M, K, E).
        value: (B, M, K, E).
        scale: factor of the scores.
        key_mask: bool, (B, M), False for keys that nobody may look at; a sample without any key gets zeros.

    Returns:
        (B, N, K, E).
    """
    batch, length, heads, _ = query.shape
    query, key, value = (x.transpose(1, 2).contiguous() for x in (query, key, value))  # (B, K, N, E)
    level = levels(query, key, scale)  # (B, K, N, 1)
    out = torch.empty_like(query)  # (B, K, N, E)
    for sample in range(batch):
        keys, values = key[sample], value[sample]  # (K, M, E)
        if key_mask is not None:
            alive = key_mask[sample].nonzero()[:, 0]  # (M',)
            keys, values = keys.index_select(1, alive), values.index_select(1, alive)
        if keys.shape[1] == 0:
            out[sample] = 0
            continue
        for some, rows in _tasks(heads, length, keys.shape[1], query.dtype):
            near = None if level is None else level[sample, some, rows]  # (G, R, 1)
            part, _ = attend_rows(query[sample, some, rows], keys[some], values[some], scale, level=near)
            out[sample, some, rows] = part  # (G, R, E)
    return out.transpose(1, 2)  # (B, N, K, E)


def _tasks(heads: int, length: int, keys: int, dtype: torch.dtype) -> list[tuple[slice, slice]]:
    """Divide the queries of all heads into tasks whose scores fit into the caches."""
    most = max(score_bytes(dtype) // (keys * dtype.itemsize), LEAST_ROWS)  # rows of all heads
    rows = -(-length // -(-length // min(most, MOST_ROWS)))
    groups = -(-heads // max(most // rows, 1))
    together = -(-heads // groups)  # heads, as many in each task
    return [
        (slice(head, head + together), slice(start, start + rows))
        for head in range(0, heads, together)
        for start in range(0, length, rows)
    ]


@cache
def has_fast_products(dtype: torch.dtype) -> bool:
    """Return whether the processor multiplies so fast that products beat torch's fused kernel.

    In bfloat16 they do with AVX-512 BF16; with AMX the fused kernel itself is fast. In float32 they do where oneDNN
    beats MKL, see `kernels.rows`.

    Args:
        dtype: of query, key and value.
    """
    if dtype == torch.float32:
        return has_fast_onednn()
    known: Any = torch.cpu.get_capabilities()
    return dtype == torch.bfloat16 and bool(known.get("avx512_bf16")) and not known.get("amx_tile")


def refusal(device: torch.device | str, dtype: torch.dtype) -> str:
    """Return why no call would go through products; empty if long ones would.

    Args:
        device: where the tensors are.
        dtype: of query, key and value.
    """
    if torch.device(device).type != "cpu":
        return f"it is for CPUs, not for {torch.device(device).type}"
    if dtype not in LEAST_TOKENS:
        return f"it has no {str(dtype).removeprefix('torch.')}; use bfloat16 or float32"
    if not has_fast_products(dtype):
        return f"its {str(dtype).removeprefix('torch.')} is no faster than torch's own kernel on this processor"
    return ""


def least_tokens(dtype: torch.dtype) -> int:
    """Return from how many tokens on products pay on this processor; one of `LEAST_TOKENS`, or more on Zen 4."""
    return max(LEAST_TOKENS[dtype], LEAST_TOKENS_ZEN4 if is_zen4() else 0)


def suits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether `attend_all` should compute a call that asks for no backend."""
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
        and query.dtype in LEAST_TOKENS
        and query.shape[2] == key.shape[2]
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)))
        and not torch.compiler.is_compiling()
        and has_fast_products(query.dtype)
        and min(query.shape[1], key.shape[1]) * min(query.shape[3], 64) >= least_tokens(query.dtype) * 64
    )


def dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend with the arguments that diffusers' networks give a backend, (B, N, K, E).

    Calls that the products don't cover (other dtypes and devices, short sequences, gradients, masks of pairs) are left
    to torch's own kernel.
    """
    key_mask = as_key_mask(attn_mask, key.shape[0], key.shape[1])
    covered = not dropout_p and not is_causal and (attn_mask is None or key_mask is not None)
    if covered and suits(query, key, value):
        return attend_all(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale, key_mask)
    return attend_native(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def as_key_mask(attn_mask: Tensor | None, batch: int, keys: int) -> Tensor | None:
    """Return a mask that is the same for all heads and queries as one of keys, (B, M); None for any other."""
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return None
    if attn_mask.ndim == 4 and attn_mask.shape[1:3] == (1, 1):
        attn_mask = attn_mask[:, 0, 0]
    if attn_mask.ndim != 2 or attn_mask.shape[1] != keys or attn_mask.shape[0] not in (1, batch):
        return None
    return attn_mask.expand(batch, -1)
