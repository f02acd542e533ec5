"""The reference kernel: every score in float64, the pairs that don't count masked out."""

from __future__ import annotations

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.kernels.contract import SparseKernel, Tail, register_kernel


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
    """Compute what `SparseFunction` says, slowly."""
    allowed = block_map.to_mask().to(query.device)  # (B', K', N, M)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]  # (B, K', N, M)
    # 1. scores of the pairs that count
    scores = torch.einsum("bnke,bmke->bknm", query.double(), key.double()) * scale  # (B, K, N, M)
    scores = scores.masked_fill(~allowed, -torch.inf)
    values = value.double().transpose(1, 2)  # (B, K, M, E)
    # 2. one more key for each block that isn't visited
    if tail is not None:
        pooled = torch.einsum("bnke,bkme->bknm", query.double(), tail.key.double()) * scale  # (B, K, N, m)
        pooled = pooled + tail.log_count.double()[..., None, :]
        blocks = block_map.queries.block_of().to(query.device)  # (B', K', N)
        visits = block_map.visits.expand(*torch.broadcast_shapes(block_map.visits.shape[:2], blocks.shape[:2]), -1, -1)
        blocks = blocks.expand(*visits.shape[:2], -1)
        visited = visits.gather(2, blocks[..., None].expand(*blocks.shape, visits.shape[-1]))  # (B', K', N, m)
        scores = torch.cat([scores, pooled.masked_fill(visited, -torch.inf)], dim=-1)  # (B, K, N, M + m)
        values = torch.cat([values, tail.value.double()], dim=2)  # (B, K, M + m, E)
    # 3. softmax; a query without a key gets zeros
    lse = scores.logsumexp(-1)  # (B, K, N)
    weights = (scores - lse.masked_fill(lse.isneginf(), 0)[..., None]).exp()  # (B, K, N, M + m)
    out = (weights @ values).transpose(1, 2).to(query.dtype)  # (B, N, K, E)
    return out, lse.float() if return_lse else None


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

register_kernel(SparseKernel("reference", attend, dtypes=DTYPES, has_tail=True, has_gradient=True))
