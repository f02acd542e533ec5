"""Sparse-linear attention (SLA, arXiv 2509.24006): the best blocks exactly, all keys by linear attention.

    out = sparse(Q, K, V) + W O_l + b,      O_l = phi(Q) (phi(K)^T V) / (phi(Q) sum_k phi(k))

phi is a softmax over channels; W and b are one linear layer for all heads, `proj_l`, zero at first (thu-ml/SLA,
core.py). Exact tokens see all keys in the first term already; they get no second one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit.attention.corrections.linear import linear_attention
from dit.attention.grid import TokenGrid
from dit.attention.patterns import pattern
from dit.attention.sparse import block_sparse_attention
from dit.attention.trainable.contract import Replacement, register_replacement
from dit.attention.trainable.tokens import visual_tokens, with_visual
from dit.layers.attention import SelfAttention
from dit.layers.linear import Linear
from dit.layers.positions import Rotary


@register_replacement
@dataclass(eq=False)
class SLA(Replacement):
    """Sparse-linear attention, to be trained.

    Args:
        keep: share of the blocks of keys that a block of queries sees, rounded down, at least one.
        block: tokens of a block of queries.
        key_block: tokens of a block of keys.
    """

    keep: float = 0.2
    block: int = 64
    key_block: int = 64
    name: ClassVar[str] = "sla"
    paper: ClassVar[str] = "arXiv 2509.24006"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; use a share above 0 and at most 1")
        if min(self.block, self.key_block) < 1:
            raise ValueError(f"block is {self.block} and key_block {self.key_block}; use at least 1")

    def new_weights(self, attn: SelfAttention) -> dict[str, nn.Module | nn.Parameter]:
        """Return `proj_l`."""
        width = attn.to_v.out_features // attn.heads
        layer = Linear(width, width)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return {"proj_l": layer}

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
        sizes = {"keep": self.keep, "block": self.block, "key_block": self.key_block}
        block_map = pattern("sla", grid, query=query, key=key, key_mask=key_mask, **sizes)
        sparse = block_sparse_attention(query, key, value, block_map, key_mask=key_mask)  # (B, N, K, E)
        linear = linear_attention(visual_tokens(query, grid), key, value, key_mask)  # (B, V, K, E)
        added = attn.proj_l(linear.to(attn.proj_l.weight.dtype)).to(sparse.dtype)
        return sparse + with_visual(torch.zeros_like(sparse), added, grid)
