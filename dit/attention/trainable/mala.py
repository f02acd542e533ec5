"""Magnitude-aware linear attention (MALA, arXiv 2507.00698): linear attention whose weights follow the query's length.

With phi = elu + 1, means m over the N keys, s = 1 / sqrt(E) and z = s phi(q) m(phi(k)),

    out = (1 + 1 / z) s / N sum_j (phi(q) phi(k_j)) v_j - z m(v)

so that the weights sum to 1, and grow more unequal as the query grows; without the added term, linear attention forgets
its length. Queries and keys are rotated behind phi, in the first sum only. A depthwise convolution of the values is
added, and a gate multiplies the result (qhfan/MALA, AddLinearAttention). Cost grows as N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.attention.grid import TokenGrid
from dit.attention.trainable.contract import Replacement, register_replacement
from dit.attention.trainable.tokens import convolve_frames
from dit.layers.attention import SelfAttention, split_heads
from dit.layers.linear import Linear
from dit.layers.positions import Rotary, apply_rotary


@register_replacement
@dataclass(eq=False)
class MALA(Replacement):
    """Magnitude-aware linear attention.

    Args:
        kernel: side of the convolution of the values, odd; 0 for none.
        gate: whether a projection of the input multiplies the result.
    """

    kernel: int = 5
    gate: bool = True
    name: ClassVar[str] = "mala"
    paper: ClassVar[str] = "arXiv 2507.00698"

    def __post_init__(self) -> None:
        if self.kernel < 0 or (self.kernel and self.kernel % 2 == 0):
            raise ValueError(f"kernel is {self.kernel}; use an odd number, or 0 for no convolution")

    def new_weights(self, attn: SelfAttention) -> dict[str, nn.Module | nn.Parameter]:
        """Return the convolution `lepe` and the gate `to_o`, the last part of the released `qkvo`."""
        width = attn.to_v.out_features
        weights: dict[str, nn.Module | nn.Parameter] = {}
        if self.kernel:
            weights["lepe"] = nn.Conv2d(width, width, self.kernel, padding=self.kernel // 2, groups=width)
        if self.gate:
            weights["to_o"] = Linear(attn.to_v.in_features, width)
        return weights

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
        out = magnitude_aware(*qkv, rotary, key_mask)  # (B, N, K, E)
        if self.kernel:
            out = out + convolve_frames(qkv[2], attn.lepe, grid)
        return out * split_heads(attn.to_o(hidden_states), attn.heads) if self.gate else out


def magnitude_aware(
    query: Tensor, key: Tensor, value: Tensor, rotary: Rotary | None = None, key_mask: Tensor | None = None
) -> Tensor:
    """Compute the formula of this file.

    Args:
        query: (B, N, K, E).
        key: (B, N, K, E).
        value: (B, N, K, E).
        rotary: (cos, sin), each (N, E).
        key_mask: bool, (B, N), False for keys that nobody may look at.

    Returns:
        (B, N, K, E), float32.
    """
    alive = torch.ones_like(key[..., :1, :1]) if key_mask is None else key_mask[..., None, None]  # (B, N, 1, 1)
    alive = alive.float()
    count = alive.sum(1).clamp(min=1)  # (B, 1, 1)
    query, key = F.elu(query.float()) + 1, (F.elu(key.float()) + 1) * alive  # (B, N, K, E)
    value = value.float() * alive
    scale = query.shape[-1] ** -0.5
    z = (query * (key.sum(1) / count)[:, None]).sum(-1, keepdim=True) * scale  # (B, N, K, 1)
    if rotary is not None:
        query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
    state = torch.einsum("bnke,bnkf->bkef", key, value) * (scale / count[..., None])  # (B, K, E, E)
    out = torch.einsum("bnke,bkef->bnkf", query, state)
    return out * (1 + 1 / (z + 1e-6)) - z * (value.sum(1) / count)[:, None]
