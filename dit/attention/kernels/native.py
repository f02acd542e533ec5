"""torch's own kernel of dense attention, on the layout of diffusers' networks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend_native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Call `F.scaled_dot_product_attention` on (B, N, K, E), (B, M, K, E) and (B, M, K, E).

    Args:
        query: (B, N, K, E).
        key: (B, M, K, E).
        value: (B, M, K, E).
        attn_mask: as torch takes it, broadcastable to (B, K, N, M).
        dropout_p: see torch.
        is_causal: see torch.
        scale: factor of the scores; None means 1 / sqrt(E).
        enable_gqa: keys and values have fewer heads.

    Returns:
        (B, N, K, E).
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, K, N, E)
    gqa = {"enable_gqa": True} if enable_gqa else {}  # kernels that don't know it are not asked
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, **gqa
    )
    return out.transpose(1, 2)
