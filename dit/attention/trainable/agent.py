"""Agent attention (arXiv 2312.08874): few agents ask all keys, and all queries ask the agents.

    O = softmax(Q A^T s + B2) softmax(A K^T s + B1) V + DWC(V)        (Eq. 4 and 7)

Agents A are the queries pooled over parts of the image. B1 and B2 are learned biases between agents and places, DWC is
a depthwise convolution. Cost grows as N agents, not as N^2.

We differ from the released code (LeapLabTHU/Agent-Attention, agent_deit.py) where it can't go: biases of another grid
than the learned one are interpolated, frames share them, and all exact tokens share those of the class token.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.attention.grid import TokenGrid
from dit.attention.trainable.contract import Replacement, register_replacement
from dit.attention.trainable.tokens import convolve_frames, visual_tokens, with_visual
from dit.layers.attention import SelfAttention
from dit.layers.positions import Rotary

COARSE = 7
"""Side of the coarse part of the biases, which is interpolated."""


@register_replacement
@dataclass(eq=False)
class Agent(Replacement):
    """Agent attention with learned biases, to be trained.

    Args:
        agents: how many along frames, rows and columns.
        window: rows and columns of tokens that the fine biases are learned for.
    """

    agents: tuple[int, int, int] = (1, 7, 7)
    window: tuple[int, int] = (14, 14)
    name: ClassVar[str] = "agent"
    paper: ClassVar[str] = "arXiv 2312.08874"

    def __post_init__(self) -> None:
        self.agents, self.window = _sizes("agents", self.agents, 3), _sizes("window", self.window, 2)

    def new_weights(self, attn: SelfAttention) -> dict[str, nn.Module | nn.Parameter]:
        """Return biases and the convolution, by the names of the released code."""
        heads, count, (rows, columns) = attn.heads, prod(self.agents), self.window
        width = attn.to_v.out_features
        shapes = {
            "an_bias": (heads, count, COARSE, COARSE),
            "na_bias": (heads, count, COARSE, COARSE),
            "ah_bias": (1, heads, count, rows, 1),
            "aw_bias": (1, heads, count, 1, columns),
            "ha_bias": (1, heads, rows, 1, count),
            "wa_bias": (1, heads, 1, columns, count),
            "ac_bias": (1, heads, count, 1),
            "ca_bias": (1, heads, 1, count),
        }
        place: dict[str, Any] = {"device": attn.to_v.weight.device, "dtype": attn.to_v.weight.dtype}
        biases = {name: nn.Parameter(torch.randn(shape, **place) * 0.02) for name, shape in shapes.items()}
        return {**biases, "dwc": nn.Conv2d(width, width, 3, padding=1, groups=width)}

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
        agents = pool_agents(query, grid, self.agents)  # (B, A, K, E)
        to_keys = self._bias(attn.an_bias, attn.ah_bias[0] + attn.aw_bias[0], attn.ac_bias[0, ..., 0], grid)
        rows, columns = attn.ha_bias[0].movedim(-1, 1), attn.wa_bias[0].movedim(-1, 1)  # (K, A, h, 1), (K, A, 1, w)
        to_queries = self._bias(attn.na_bias, rows + columns, attn.ca_bias[0, :, 0], grid)  # (K, A, N)
        scale = query.shape[-1] ** -0.5
        out = through_agents(query, key, value, agents, (scale, scale), key_mask, to_keys, to_queries)
        return out + convolve_frames(value, attn.dwc, grid)

    def _bias(self, coarse: Tensor, fine: Tensor, exact: Tensor, grid: TokenGrid) -> Tensor:
        """Return a bias between agents and tokens, (K, A, N).

        Args:
            coarse: (K, A, 7, 7).
            fine: (K, A, h, w), of the window.
            exact: (K, A).
            grid: the tokens.
        """
        size = (grid.height, grid.width)
        bias = F.interpolate(coarse, size=size, mode="bilinear")  # (K, A, H, W)
        bias = bias + (fine if size == self.window else F.interpolate(fine, size=size, mode="bilinear"))
        bias = bias.flatten(2).repeat(1, 1, grid.frames).movedim(-1, 0)  # (T H W, K, A)
        outside = exact.expand(1, grid.length, -1, -1)  # (1, N, K, A)
        return with_visual(outside, bias[None], grid)[0].movedim(0, -1)  # (K, A, N)


@register_replacement
@dataclass(eq=False)
class AgentFree(Replacement):
    """Agent attention for networks that were trained with dense attention (AgentSD): no weights, a shortcut.

    O = softmax(Q A^T s^p) softmax(A K^T s) V + k V, which is softer than trained agents where p < 1. AgentSD makes its
    agents by merging tokens that are alike; ours are means of the parts of the grid, which need no matching.

    Args:
        share: agents along rows and columns, as a share of the tokens there; frames keep theirs.
        power: p, of the scale of the second softmax.
        shortcut: k.
    """

    share: float = 0.5
    power: float = 0.3
    shortcut: float = 0.075
    name: ClassVar[str] = "agent_free"
    paper: ClassVar[str] = "arXiv 2312.08874"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; use a number above 0 and at most 1")

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
        rows, columns = (max(round(self.share * side), 1) for side in (grid.height, grid.width))
        agents = pool_agents(query, grid, (grid.frames, rows, columns))  # (B, A, K, E)
        scale = query.shape[-1] ** -0.5
        out = through_agents(query, key, value, agents, (scale, scale**self.power), key_mask)
        return out + self.shortcut * value


def pool_agents(query: Tensor, grid: TokenGrid, counts: tuple[int, int, int]) -> Tensor:
    """Return the means of the queries in parts of the grid.

    Args:
        query: (B, N, K, E).
        grid: the tokens.
        counts: parts along frames, rows and columns; axes with fewer tokens repeat them.

    Returns:
        (B, A, K, E).
    """
    visual = visual_tokens(query, grid)  # (B, V, K, E)
    volume = visual.flatten(2).unflatten(1, grid.shape).movedim(-1, 1)  # (B, D, T, H, W)
    pooled = F.adaptive_avg_pool3d(volume, counts)  # (B, D, t, h, w)
    return pooled.flatten(2).transpose(1, 2).unflatten(2, query.shape[2:])  # (B, A, K, E)


def through_agents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    scales: tuple[float, float],
    key_mask: Tensor | None = None,
    to_keys: Tensor | None = None,
    to_queries: Tensor | None = None,
) -> Tensor:
    """Let agents attend to keys, and queries to agents.

    Args:
        query: (B, N, K, E).
        key: (B, N, K, E).
        value: (B, N, K, E).
        agents: (B, A, K, E).
        scales: of the scores of agents and keys, and of queries and agents.
        key_mask: bool, (B, N).
        to_keys: bias of agents and keys, (K, A, N).
        to_queries: bias of agents and queries, (K, A, N).

    Returns:
        (B, N, K, E).
    """
    query, key, value, agents = (x.transpose(1, 2) for x in (query, key, value, agents))  # (B, K, N, E), (B, K, A, E)
    asked = (agents * scales[0]) @ key.mT  # (B, K, A, N)
    asked = asked if to_keys is None else asked + to_keys
    if key_mask is not None:
        asked = asked.masked_fill(~key_mask[:, None, None], -torch.inf)
    found = asked.float().softmax(-1).to(value.dtype) @ value  # (B, K, A, E)
    told = (query * scales[1]) @ agents.mT  # (B, K, N, A)
    told = told if to_queries is None else told + to_queries.mT
    return (told.float().softmax(-1).to(value.dtype) @ found).transpose(1, 2)  # (B, N, K, E)


def _sizes(name: str, values: Any, count: int) -> Any:
    """Check a tuple of sizes; configurations read from JSON hold lists."""
    values = tuple(values)
    if len(values) != count or any(not isinstance(value, int) or value < 1 for value in values):
        raise ValueError(f"{name} is {values}; use {count} numbers of at least 1")
    return values
