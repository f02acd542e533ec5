"""Sparse-linear attention with a learned router and a learned mixture (SLA2, arXiv 2602.12675).

Blocks of keys are chosen by P = proj_q(mean query) proj_k(mean key - mean of all) / sqrt(E), the best `keep` for each
block of queries (Eq. 15). Then

    out = a O_s + (1 - a) O_l           (Eq. 13)

with O_s the softmax over the chosen blocks, O_l linear attention over the others alone (see `corrections.linear`), and
a in (0, 1) learned. The router is trained first, by SoftTop-k: weights sigmoid(P / tau + c_i) in place of a choice, c_i
such that a row's sum is the number of blocks wanted (Algorithm 1). Later, when blocks are chosen, it has no gradient.

The paper learns a for each block of queries, a third party's code for each head; ours is for each head and part of the
sequence, interpolated to the blocks there are, so that it fits every grid. Exact tokens have a = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.attention.block_map import BlockMap, make_block_map
from dit.attention.corrections.blocks import by_query
from dit.attention.corrections.linear import unvisited_linear
from dit.attention.grid import TokenGrid
from dit.attention.layout import raster_layout
from dit.attention.patterns.scores import block_means
from dit.attention.sparse import block_sparse_attention
from dit.attention.trainable.contract import Replacement, register_replacement
from dit.layers.attention import SelfAttention
from dit.layers.linear import Linear
from dit.layers.positions import Rotary


@register_replacement
@dataclass(eq=False)
class SLA2(Replacement):
    """Sparse-linear attention with a learned router and mixture.

    Args:
        keep: share of the blocks of keys that a block of queries sees, rounded to the nearest number, at least one.
        block: tokens of a block of queries.
        key_block: tokens of a block of keys.
        parts: parts of the sequence that have a mixture of their own.
        soft_router: whether blocks are weighed rather than chosen while training, which trains the router; it computes
            all pairs.
        temperature: tau.
    """

    keep: float = 0.05
    block: int = 128
    key_block: int = 64
    parts: int = 1
    soft_router: bool = False
    temperature: float = 0.1
    name: ClassVar[str] = "sla2"
    paper: ClassVar[str] = "arXiv 2602.12675"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; use a share above 0 and at most 1")
        if min(self.block, self.key_block, self.parts) < 1 or self.temperature <= 0:
            raise ValueError("block, key_block and parts must be at least 1, temperature above 0")

    def new_weights(self, attn: SelfAttention) -> dict[str, nn.Module | nn.Parameter]:
        """Return the router, the identity at first (the choice of SLA), and the logits of the mixture."""
        width = attn.to_v.out_features // attn.heads
        router = {name: Linear(width, width, bias=False) for name in ("proj_q", "proj_k")}
        for layer in router.values():
            nn.init.eye_(layer.weight)
        start = torch.zeros(attn.heads, self.parts, device=attn.to_v.weight.device, dtype=attn.to_v.weight.dtype)
        return {**router, "alpha": nn.Parameter(start)}

    def mix(
        self,
        attn: Any,
        hidden_states: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        rotary: Rotary | None,
        key_mask: Tensor | None,
        grid: TokenGrid,
    ) -> Tensor:
        """Attend, see `Replacement.mix`."""
        query, key, value = self.rotated(qkv, rotary)
        queries = raster_layout(grid, self.block).to(query.device)
        keys = raster_layout(grid, self.key_block).to(query.device)
        scores = self._route(attn, query, key, queries, keys, key_mask)  # (B, K, n, m), of visual blocks
        count = max(round(self.keep * keys.visual_count), 1)
        share = F.interpolate(attn.alpha[None].float(), size=queries.visual_count, mode="linear")[0].sigmoid()  # (K, n)
        share = F.pad(share, (0, queries.exact_blocks), value=1.0)[None]  # (1, K, n')
        if self.soft_router and attn.training:
            weights = soft_top_k(scores, count, self.temperature)
            weights = F.pad(weights, (0, keys.exact_blocks, 0, queries.exact_blocks), value=1.0)  # (B, K, n', m')
            sparse, linear, exists = weighed(query, key, value, weights, queries.block_of(), keys.block_of(), key_mask)
        else:
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(count, -1).indices, True)
            block_map: BlockMap = make_block_map(queries, chosen, keys=keys)
            sparse = block_sparse_attention(query, key, value, block_map, key_mask=key_mask)
            linear, exists = unvisited_linear(query, key, value, block_map, key_mask)
        share = by_query(share, queries.block_of().to(share.device)).expand(*exists.shape)  # (B, K, N)
        share = torch.where(exists, share, torch.ones_like(share)).transpose(1, 2)[..., None]  # (B, N, K, 1)
        return share * sparse.float() + (1 - share) * linear

    def _route(self, attn: Any, query: Tensor, key: Tensor, queries: Any, keys: Any, key_mask: Tensor | None) -> Tensor:
        """Return the router's scores of visual blocks, (B, K, n, m), float32; -inf for blocks without a live key."""
        mean_query, _ = block_means(query.detach(), queries)  # (B, K, n, E)
        mean_key, counts = block_means(key.detach(), keys, key_mask)  # (B, K, m, E), (B', K', m)
        alive = key if key_mask is None else key.masked_fill(~key_mask[..., None, None], 0)  # (B, M, K, E)
        count = key.shape[1] if key_mask is None else key_mask.sum(1).clamp(min=1)[:, None, None, None]
        mean_key = mean_key - alive.detach().float().sum(1)[:, :, None] / count  # exact keys count in the mean of all
        dtype = attn.proj_q.weight.dtype
        scores = attn.proj_q(mean_query.to(dtype)).float() @ attn.proj_k(mean_key.to(dtype)).float().mT
        return (scores * query.shape[-1] ** -0.5).masked_fill(counts[..., None, :] == 0, -torch.inf)


def soft_top_k(scores: Tensor, count: int, temperature: float, rounds: int = 50) -> Tensor:
    """Return sigmoid(scores / temperature + c), c of each row such that the row sums to `count` (SLA2's Algorithm 1).

    Args:
        scores: (..., m), float32.
        count: between 0 and m.
        temperature: tau; the lower, the nearer to a choice of the best.
        rounds: of the bisection for c, through which no gradient flows.
    """
    logits = scores / temperature
    fixed = logits.detach()
    finite = fixed.masked_fill(fixed.isneginf(), torch.inf)
    low = -fixed.amax(-1, keepdim=True) - 40  # here the sum is about 0
    high = -finite.amin(-1, keepdim=True) + 40  # here it is about the number of blocks
    for _ in range(rounds):
        middle = (low + high) / 2
        too_much = (fixed + middle).sigmoid().sum(-1, keepdim=True) > count
        low, high = torch.where(too_much, low, middle), torch.where(too_much, middle, high)
    return (logits + (low + high) / 2).sigmoid()


def weighed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    query_blocks: Tensor,
    key_blocks: Tensor,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute both branches where each pair of blocks counts with a weight w to the sparse, 1 - w to the linear one.

    Args:
        query: (B, N, K, E).
        key: (B, M, K, E).
        value: (B, M, K, E).
        weights: (B, K, n, m), in [0, 1].
        query_blocks: block of each query, (1, 1, N).
        key_blocks: block of each key, (1, 1, M).
        key_mask: bool, (B, M).

    Returns:
        Outputs of the sparse and the linear branch, (B, N, K, E) in float32, and bool (B, K, N), whether the linear one
        has any key.
    """
    query, key, value = (x.float().transpose(1, 2) for x in (query, key, value))  # (B, K, N, E)
    pairs = weights[:, :, query_blocks[0, 0]][..., key_blocks[0, 0]]  # (B, K, N, M)
    alive = torch.ones_like(pairs) if key_mask is None else key_mask[:, None, None].float()
    scores = query @ key.mT * query.shape[-1] ** -0.5
    scores = scores.masked_fill(alive == 0, -torch.inf)
    mass = (scores - scores.amax(-1, keepdim=True)).exp() * pairs  # (B, K, N, M)
    sparse = mass @ value / mass.sum(-1, keepdim=True).clamp(min=1e-30)
    features = (query.softmax(-1) @ key.softmax(-1).mT) * (1 - pairs) * alive  # (B, K, N, M)
    total = features.sum(-1, keepdim=True)  # (B, K, N, 1)
    linear = features @ value / total.clamp(min=1e-30)
    return sparse.transpose(1, 2), linear.transpose(1, 2), total[..., 0] > 0
