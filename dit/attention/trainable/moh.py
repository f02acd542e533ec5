"""Mixture of heads (MoH, arXiv 2410.11842): each token chooses some of the heads, and weighs them.

Some heads are shared by all tokens. Of the others a token takes the `routed` with the largest gates:

    g_r = routed top(softmax(W x)) / sum(top),   g_s = shared softmax(W_1 x),   (a_s, a_r) = 2 softmax(W_0 x)
    out = to_out(concat(a_s g_s heads_s, a_r g_r heads_r))

The released code (SkyworkAI/MoH, MoH-DiT/models.py) computes all heads and multiplies some by zero. Without gradients
we leave out the queries that don't count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit.attention.grid import TokenGrid
from dit.attention.trainable.contract import Replacement, register_replacement
from dit.layers.attention import AttnProcessor, SelfAttention
from dit.layers.linear import Linear
from dit.layers.positions import Rotary


@register_replacement
@dataclass(eq=False)
class MoH(Replacement, AttnProcessor):
    """Mixture of heads.

    Args:
        shared: heads that all tokens use, the first ones.
        routed: how many of the others a token uses; 0 leaves only the shared ones their weight.
        balance: weight of the loss that keeps the routed heads equally used (Eq. 7), added to the gradients of training
            whatever the task: its gradient isn't scaled as the loss's is.
        skip_from: tokens from which, without gradients, queries of heads that weren't chosen are left out.
    """

    shared: int = 1
    routed: int = 1
    balance: float = 0.01
    skip_from: int = 512
    name: ClassVar[str] = "moh"
    paper: ClassVar[str] = "arXiv 2410.11842"

    def __post_init__(self) -> None:
        if self.shared < 0 or self.routed < 0 or self.shared + self.routed == 0:
            raise ValueError(f"shared is {self.shared} and routed {self.routed}; use at least one head of either kind")

    def new_weights(self, attn: SelfAttention) -> dict[str, nn.Module | nn.Parameter]:
        """Return the routers, by the names of the released code."""
        others, width = attn.heads - self.shared, attn.to_q.in_features
        if self.routed > others or (self.routed == 0 and others):
            raise ValueError(
                f"shared is {self.shared} and routed {self.routed}, of {attn.heads} heads; routed must be 1 to {others}"
                if others
                else f"routed is {self.routed}, but shared already takes all {attn.heads} heads: use 0"
            )
        weights: dict[str, nn.Module | nn.Parameter] = {}
        if self.routed:
            weights["wg"] = Linear(width, others, bias=False)
            if self.shared:
                weights["wg_0"] = Linear(width, 2, bias=False)
        if self.shared > 1:
            weights["wg_1"] = Linear(width, self.shared, bias=False)
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
        query, key, value = self.rotated(qkv, rotary)
        gates, loss = self.gates(attn, hidden_states)  # (B, N, K)
        if torch.is_grad_enabled() or query.shape[1] < self.skip_from:
            heads = self.attend(query, key, value, key_mask)  # (B, N, K, E)
        else:
            heads = self._chosen_heads(query, key, value, gates > 0, key_mask)
        out = heads * gates[..., None].to(heads.dtype)
        if attn.training and loss is not None and self.balance:
            out = _WithLoss.apply(out, self.balance * loss)
        return out

    def gates(self, attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the weight of each head (B, N, K), float32, and the balance loss of the routed ones, if there are any.

        Args:
            attn: the layer.
            hidden_states: (B, N, D).
        """
        parts: list[Tensor] = []
        kinds = attn.wg_0(hidden_states).float().softmax(-1) * 2 if self.shared and self.routed else None  # (B, N, 2)
        if self.shared:
            of_shared = hidden_states.new_ones(*hidden_states.shape[:2], 1, dtype=torch.float32)  # (B, N, 1)
            if self.shared > 1:
                of_shared = attn.wg_1(hidden_states).float().softmax(-1) * self.shared  # (B, N, shared)
            parts.append(of_shared if kinds is None else kinds[..., :1] * of_shared)
        loss = None
        if self.routed:
            probability = attn.wg(hidden_states).float().softmax(-1)  # (B, N, others)
            chosen = torch.zeros_like(probability).scatter(-1, probability.topk(self.routed, -1).indices, 1.0)
            top = probability * chosen
            of_routed = self.routed * top / top.sum(-1, keepdim=True).clamp(min=torch.finfo(top.dtype).eps)
            parts.append(of_routed if kinds is None else kinds[..., 1:] * of_routed)
            loss = balance_loss(probability, chosen)
        return torch.cat(parts, dim=-1), loss

    def _chosen_heads(
        self, query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, key_mask: Tensor | None
    ) -> Tensor:
        """Attend head by head with the queries of tokens that chose it; the others get zeros, (B, N, K, E)."""
        out = torch.zeros_like(query)
        for head in range(query.shape[2]):
            some = chosen[..., head]  # (B, N)
            count = int(some.sum(1).max())
            if count:
                index = some.float().topk(count, dim=1).indices[..., None, None].expand(-1, -1, 1, query.shape[-1])
                asked = query[:, :, head : head + 1].gather(1, index)  # (B, n, 1, E)
                heard = self.attend(asked, key[:, :, head : head + 1], value[:, :, head : head + 1], key_mask)
                out[:, :, head : head + 1].scatter_(1, index, heard)
        return out


def balance_loss(probability: Tensor, chosen: Tensor) -> Tensor:
    """Return H^2 mean_h(mean gate x share of tokens) of H routed heads: as many as tokens take, if all are used alike.

    Args:
        probability: (B, N, H).
        chosen: (B, N, H), 1 where a token takes a head.
    """
    count = probability.shape[-1]
    return (probability.flatten(0, 1).mean(0) * chosen.flatten(0, 1).mean(0)).mean() * count**2


class _WithLoss(torch.autograd.Function):
    """Return a tensor unchanged; backward also sends the gradient of a loss, with weight 1."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.dtype, loss.device
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return gradients[0], torch.ones((), dtype=dtype, device=device)
