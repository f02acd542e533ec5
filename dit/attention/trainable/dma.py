"""Dynamic mask attention (DMA, arXiv 2508.02124): each head keeps the keys that their values ask for.

    bias_j = A softplus(W v_j + b)        of each head; v_j are the values of all heads of token j

A head attends to the `keep` keys with the largest bias, which is added to their scores; the others are left out. The
choice is the same for all queries, so keys and values are gathered once and what follows is dense. Published for
language models (SmallDoges/flash-dmattn, modeling_doge.py), where it is causal; here all tokens see each other. Exact
tokens of a grid are always kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.attention.grid import TokenGrid
from dit.attention.trainable.contract import Replacement, register_replacement
from dit.layers.attention import AttnProcessor, SelfAttention
from dit.layers.linear import Linear
from dit.layers.positions import Rotary


@register_replacement
@dataclass(eq=False)
class DMA(Replacement, AttnProcessor):
    """Dynamic mask attention.

    Args:
        keep: keys that a head keeps beside the exact ones: a whole number, or a share of the visual tokens below 1.
    """

    keep: float = 0.25
    name: ClassVar[str] = "dma"
    paper: ClassVar[str] = "arXiv 2508.02124"

    def __post_init__(self) -> None:
        if self.keep <= 0 or (self.keep >= 1 and self.keep != int(self.keep)):
            raise ValueError(f"keep is {self.keep}; use a whole number of keys, or a share above 0 and below 1")

    def new_weights(self, attn: SelfAttention) -> dict[str, nn.Module | nn.Parameter]:
        """Return `A`, zero at first, so that the network begins with scores as they were, and `dt_proj`."""
        start = torch.zeros(attn.heads, device=attn.to_v.weight.device, dtype=attn.to_v.weight.dtype)
        return {"A": nn.Parameter(start), "dt_proj": Linear(attn.to_v.out_features, attn.heads, bias=attn.use_bias)}

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
        bias = key_bias(value, attn.A, attn.dt_proj)  # (B, K, N)
        kept = kept_keys(bias, self.keep, grid, key_mask)  # (B, K, k)
        bias = bias.gather(2, kept)  # (B, K, k)
        if key_mask is not None:
            alive = key_mask[:, None].expand(-1, attn.heads, -1).gather(2, kept)  # (B, K, k)
            bias = bias.masked_fill(~alive, -torch.inf)
        index = kept.transpose(1, 2)[..., None].expand(-1, -1, -1, key.shape[-1])  # (B, k, K, E)
        key, value = key.gather(1, index), value.gather(1, index)  # (B, k, K, E)
        return self.attend(query, key, value, bias[:, :, None].to(query.dtype).expand(-1, -1, query.shape[1], -1))


def key_bias(value: Tensor, rate: Tensor, projection: nn.Module) -> Tensor:
    """Return the bias of each head and key, (B, K, N), float32.

    Args:
        value: (B, N, K, E).
        rate: A, (K,).
        projection: W and b, from all heads' values to a number for each head.
    """
    return (rate.float() * F.softplus(projection(value.flatten(2)).float())).transpose(1, 2)


def kept_keys(bias: Tensor, keep: float, grid: TokenGrid, key_mask: Tensor | None = None) -> Tensor:
    """Return the positions of the keys with the largest bias, and of all exact ones, (B, K, k).

    Args:
        bias: (B, K, N).
        keep: how many visual ones, or which share below 1.
        grid: the tokens.
        key_mask: bool, (B, N); others come last.
    """
    wanted = max(round(keep * grid.visual_length), 1) if keep < 1 else min(int(keep), grid.visual_length)
    rank = bias.detach()
    if key_mask is not None:
        rank = rank.masked_fill(~key_mask[:, None], -torch.inf)
    exact = grid.exact_positions().to(bias.device)
    rank = rank.index_fill(2, exact, torch.inf)
    return rank.topk(wanted + len(exact), dim=-1).indices
