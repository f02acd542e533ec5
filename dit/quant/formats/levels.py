"""Grids of a few levels: nearest level, neighbouring levels, and levels by code."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_code(values: Tensor, levels: tuple[float, ...], half_even: bool = False) -> Tensor:
    """Return the index of the nearest level for each value, uint8, of the same shape.

    Comparing with every boundary is faster than `torch.bucketize` for up to 16 levels.

    Args:
        values: any shape, fp32.
        levels: ascending.
        half_even: whether a value halfway between two levels goes to the one with the even index, as rounding to
            nearest even does; otherwise to the lower one.
    """
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for index in range(len(levels) - 1):
        boundary = (levels[index] + levels[index + 1]) / 2
        codes += values >= boundary if half_even and index % 2 else values > boundary
    return codes


def by_code(codes: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Return the level of each code, fp32, of the same shape."""
    table = torch.tensor(levels, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def neighbouring_levels(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest level <= each value and the smallest level above it; at the ends both are the end.

    Args:
        values: any shape, fp32.
        levels: (L,), ascending.
    """
    above = torch.bucketize(values.contiguous(), levels, right=True)
    last = len(levels) - 1
    return levels[(above - 1).clamp(0, last)], levels[above.clamp(max=last)]
