"""Linear attention for the pairs left out (SLA, SLA2).

With phi a softmax over the channels of a head, a query q gets beside its sparse attention O_s

    O_l = phi(q) H / (phi(q) Z)        H = sum_k phi(k)^T v_k,  Z = sum_k phi(k)

- `linear_complement` (SLA2, arXiv 2602.12675, Eq. 13 to 17): the sums run over the blocks that the query's
  block doesn't visit, and O = alpha O_s + (1 - alpha) O_l;
- `linear` (SLA, arXiv 2509.24006; thu-ml/SLA, core.py): they run over all keys, and O = O_s + W O_l.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.corrections.blocks import by_query, gather_blocks, scatter_blocks
from dit.attention.corrections.contract import Correction, CorrectionCall, register_correction
from dit.attention.corrections.pooled import pooled_scores

STATES_AT_ONCE = 2**26
"""Most numbers of the blocks' H that are held at a time: 256 MiB."""

Number = float | Sequence[Any] | Tensor


@register_correction
@dataclass(frozen=True, eq=False)
class LinearComplement(Correction):
    """Mix the sparse result with linear attention to the blocks that aren't visited (SLA2).

    Args:
        alpha: share of the sparse result, in [0, 1]: a number, one for each head (K,), or for each head and block of
            queries (K, n) or (B, K, n). None estimates it for each query without training: the share that visited
            blocks have of the softmax when the others count as pooled terms (`pooled_tail`). Queries whose block visits
            everything have 1.
    """

    alpha: Number | None = None
    name: ClassVar[str] = "linear_complement"
    paper: ClassVar[str] = "arXiv 2602.12675"
    work: ClassVar[float] = 45.0

    def __post_init__(self) -> None:
        if self.alpha is not None:
            alpha = torch.as_tensor(self.alpha).detach()
            if alpha.ndim > 3 or bool(((alpha < 0) | (alpha > 1)).any()):
                raise ValueError("alpha must be in [0, 1] and of shape (), (K,), (K, n) or (B, K, n)")

    @property
    def joins_heads(self) -> bool:
        """Whether alpha is one for all heads."""
        return self.alpha is None or torch.as_tensor(self.alpha).ndim == 0

    def __call__(self, call: CorrectionCall) -> Tensor:
        """Return the corrected output."""
        linear, exists = unvisited_linear(call.query, call.key, call.value, call.block_map, call.key_mask)
        if self.alpha is None:
            sparse, lse = call.sparse(return_lse=True)
            if lse is None:
                raise ValueError("the sparse call returned no LSE though it was asked for one")
            alpha = (lse - pooled_scores(call).logsumexp(-1)).sigmoid()  # (B, K, N)
        else:
            sparse = call.sparse()[0]
            alpha = by_query(_per_block(self.alpha, call), call.block_map.queries.block_of().to(call.query.device))
        alpha = torch.where(exists, alpha, torch.ones_like(alpha)).transpose(1, 2)[..., None]  # (B, N, K, 1)
        return (alpha * sparse.float() + (1 - alpha) * linear).to(call.query.dtype)


@register_correction
@dataclass(frozen=True, eq=False)
class LinearBranch(Correction):
    """Add linear attention to all keys, through a trained matrix (SLA).

    Args:
        weight: W, (E, E), as a linear layer has it; a number stands for that many times the identity.
        bias: (E,), added to W O_l.
    """

    weight: Number
    bias: Number | None = None
    name: ClassVar[str] = "linear"
    paper: ClassVar[str] = "arXiv 2509.24006"
    work: ClassVar[float] = 9.0

    def __post_init__(self) -> None:
        if torch.as_tensor(self.weight).ndim not in (0, 2):
            raise ValueError("weight must be a number or (E, E)")

    def __call__(self, call: CorrectionCall) -> Tensor:
        """Return the corrected output."""
        linear = linear_attention(call.query, call.key, call.value, call.key_mask)  # (B, N, K, E)
        weight = torch.as_tensor(self.weight).to(linear)
        added = linear @ weight.mT if weight.ndim == 2 else linear * weight
        if self.bias is not None:
            added = added + torch.as_tensor(self.bias).to(linear)
        return (call.sparse()[0].float() + added).to(call.query.dtype)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Return O_l over all keys in float32, (B, N, K, E); Z gets 1e-5 added, as in thu-ml/SLA."""
    query, key = query.float().softmax(-1), _alive(key.float().softmax(-1), key_mask)
    state = torch.einsum("bmke,bmkf->bkef", key, value.float())  # (B, K, E, E)
    out = torch.einsum("bnke,bkef->bnkf", query, state)
    return out / (torch.einsum("bnke,bke->bnk", query, key.sum(1)) + 1e-5)[..., None]


def unvisited_linear(
    query: Tensor, key: Tensor, value: Tensor, block_map: BlockMap, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return O_l over the blocks of keys that aren't visited (SLA2, Eq. 14).

    Args:
        query: (B, N, K, E).
        key: (B, M, K, E).
        value: (B, M, K, E).
        block_map: which blocks are visited.
        key_mask: bool, (B, M), False for keys that nobody may look at.

    Returns:
        (B, N, K, E) in float32, zeros for queries whose block leaves out no live key; and bool (B, K, N), whether it
        leaves out any.
    """
    features = _alive(key.float().softmax(-1), key_mask)  # (B, M, K, E)
    values = torch.cat([value.float(), torch.ones_like(value[..., :1], dtype=torch.float32)], dim=-1)  # the 1 gives Z
    keys, _ = gather_blocks(features, block_map.keys)  # (B, K, m, S, E)
    values, _ = gather_blocks(values, block_map.keys)  # (B, K, m, S, E + 1)
    queries, place = gather_blocks(query.float().softmax(-1), block_map.queries)  # (B, K, n, R, E)
    left_out = (~block_map.visits).to(query.device).float().expand(*keys.shape[:2], -1, -1)  # (B, K, n, m)
    numbers = keys.shape[0] * keys.shape[2] * keys.shape[4] * values.shape[4]
    step = max(STATES_AT_ONCE // max(numbers, 1), 1)  # heads at a time
    parts = []
    for start in range(0, keys.shape[1], step):
        some = slice(start, start + step)
        states = keys[:, some].mT @ values[:, some]  # (B, K', m, E, E + 1)
        states = (left_out[:, some] @ states.flatten(3)).unflatten(3, states.shape[3:])  # (B, K', n, E, E + 1)
        parts.append(queries[:, some] @ states)  # (B, K', n, R, E + 1)
    sums = scatter_blocks(torch.cat(parts, dim=1), place)  # (B, N, K, E + 1)
    out, total = sums[..., :-1], sums[..., -1:]
    exists = total > 0  # (B, N, K, 1); phi is positive
    return out / torch.where(exists, total, torch.ones_like(total)), exists[..., 0].transpose(1, 2)


def _alive(features: Tensor, key_mask: Tensor | None) -> Tensor:
    return features if key_mask is None else features.masked_fill(~key_mask[..., None, None], 0)


def _per_block(alpha: Number, call: CorrectionCall) -> Tensor:
    """Return alpha of each block of queries, (B, K, n)."""
    alpha = torch.as_tensor(alpha).to(call.query.device, torch.float32)
    shape = (call.query.shape[0], call.query.shape[2], call.block_map.queries.count)
    alpha = alpha[:, None] if alpha.ndim == 1 else alpha
    try:
        return alpha.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"alpha has the shape {tuple(alpha.shape)}; with {shape[1]} heads and {shape[2]} blocks of queries it must "
            f"be a number, ({shape[1]},), ({shape[1]}, {shape[2]}) or {shape}"
        ) from None
