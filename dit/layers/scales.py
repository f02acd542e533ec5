"""The pyramid of token maps that next-scale models generate, coarse to fine (VAR, arXiv 2404.02905)."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

Grid = tuple[int, int]
"""Rows and columns of one token map."""


def scale_grids(scales: Sequence[int | Sequence[int]]) -> tuple[Grid, ...]:
    """Read a schedule of scales.

    Args:
        scales: coarse to fine; a number is the side of a square map, a pair its rows and columns.

    Returns:
        (rows, columns) of each scale.

    Raises:
        ValueError: no scales, a map without tokens, or a map that is smaller than the one before it.
    """
    grids = tuple((one, one) if isinstance(one, int) else (int(one[0]), int(one[1])) for one in scales)
    if not grids:
        raise ValueError("the schedule of scales is empty; give at least one side, for example (1, 2, 3, 4)")
    before = (1, 1)
    for grid in grids:
        if grid[0] < before[0] or grid[1] < before[1]:
            raise ValueError(
                f"the schedule {list(scales)} holds the map {grid} after {before}: sides must be at least 1 and never "
                "shrink from one scale to the next"
            )
        before = grid
    return grids


def token_counts(grids: Sequence[Grid]) -> tuple[int, ...]:
    """Return tokens of each scale."""
    return tuple(rows * columns for rows, columns in grids)


def token_slices(grids: Sequence[Grid]) -> tuple[slice, ...]:
    """Return the slice of each scale's tokens in the sequence of all L tokens."""
    ends = list(accumulate(token_counts(grids)))
    return tuple(slice(start, end) for start, end in zip([0, *ends], ends, strict=False))


def token_scales(grids: Sequence[Grid], device: torch.device | None = None) -> Tensor:
    """Return the scale that each of the L tokens belongs to, (L,), int64."""
    counts = torch.tensor(token_counts(grids), device=device)  # (S,)
    return torch.repeat_interleave(torch.arange(len(counts), device=device), counts)  # (L,)


def block_causal_mask(grids: Sequence[Grid], device: torch.device | None = None) -> Tensor:
    """Build the block-causal attention mask of all scales: a token attends to its own scale and all coarser ones.

    Args:
        grids: rows and columns of each scale.
        device: of the mask.

    Returns:
        (1, 1, L, L), bool, True where the query (row) may attend to the key (column).
    """
    scale = token_scales(grids, device)  # (L,)
    return (scale[:, None] >= scale[None, :])[None, None]  # (1, 1, L, L)
