"""Conditioning by shifts, scales and gates (forms of adaLN)."""

import torch
from torch import Tensor, nn

from dit.layers.linear import Linear


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale normalised tokens: `x * (1 + scale) + shift`.

    Args:
        x: (B, N, D).
        shift: (B, 1, D) or broadcastable.
        scale: (B, 1, D) or broadcastable.

    Returns:
        (B, N, D).
    """
    return x * (1 + scale) + shift


class AdaLNZero(nn.Module):
    """A block's own projection of the condition to `count` vectors.

    It is zero at first, so that a block starts as the identity.

    Args:
        hidden_size: model width D.
        count: how many vectors of width D.
    """

    def __init__(self, hidden_size: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.act = nn.SiLU()
        self.linear = Linear(hidden_size, count * hidden_size)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Map the condition (B, D) to `count` vectors, each (B, 1, D)."""
        return self.linear(self.act(condition))[:, None].chunk(self.count, dim=-1)  # count x (B, 1, D)


class AdaLNSingle(nn.Module):
    """One projection of the condition for the whole network (PixArt-alpha, arXiv 2310.00426, section 2.3).

    Every block adds its own learned table to the vectors made here, instead of owning a D -> 6D matrix.

    Args:
        hidden_size: model width D.
        count: how many vectors of width D.
    """

    def __init__(self, hidden_size: int, count: int = 6) -> None:
        super().__init__()
        self.count = count
        self.act = nn.SiLU()
        self.linear = Linear(hidden_size, count * hidden_size)

    def forward(self, condition: Tensor) -> Tensor:
        """Map the condition (B, D) to `count` vectors (B, count, D)."""
        return self.linear(self.act(condition)).unflatten(-1, (self.count, -1))  # (B, count, D)


def modulation_table(rows: int, hidden_size: int) -> nn.Parameter:
    """Return a block's own additive table (rows, D), initialised with standard deviation 1/sqrt(D) as in PixArt."""
    return nn.Parameter(torch.randn(rows, hidden_size) / hidden_size**0.5)
