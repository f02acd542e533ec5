"""The published schedules of token maps for images of any aspect ratio (Infinity, arXiv 2412.04431).

For each aspect ratio there is one schedule of 13 maps; smaller images use only its first ones. A map says how many
tokens there are, not how many pixels: all released tokenizers have 16 pixels along a side of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from dit.layers.scales import Grid

NUM_SCALES = MappingProxyType({"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13})
"""Number of scales of an image, by its pixels in millions: 256, 512, 768 and 1024 squared."""

_TALL = {
    1.000: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.250: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.500: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.750: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.000: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.500: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.000: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}


def _scale_schedules() -> dict[float, tuple[Grid, ...]]:
    """Return the schedules by height over width; the wide ones are the transposed tall ones."""
    schedules: dict[float, tuple[Grid, ...]] = {}
    for ratio, text in _TALL.items():
        tall = tuple((int(rows), int(columns)) for rows, columns in (one.split("x") for one in text.split()))
        schedules[ratio] = tall
        schedules.setdefault(int(1000 / ratio) / 1000, tuple((columns, rows) for rows, columns in tall))
    return schedules


SCALE_SCHEDULES = MappingProxyType(_scale_schedules())
"""The 13 maps of each aspect ratio, height over width."""


def nearest_ratio(height_over_width: float) -> float:
    """Return the published aspect ratio that is nearest."""
    return min(SCALE_SCHEDULES, key=lambda ratio: abs(ratio - height_over_width))


def published_schedules() -> dict[Grid, tuple[Grid, ...]]:
    """Return every published schedule by its last map."""
    return {
        schedule[count - 1]: schedule[:count] for schedule in SCALE_SCHEDULES.values() for count in NUM_SCALES.values()
    }


def reference_grid(grids: Sequence[Grid]) -> Grid:
    """Return the map in whose rows and columns the positions of all scales are counted.

    Args:
        grids: a schedule.

    Returns:
        The last map of the full published schedule, however many of its scales are used; of any other schedule its own
        last map.
    """
    given = tuple(grids)
    for schedule in SCALE_SCHEDULES.values():
        if len(given) in NUM_SCALES.values() and schedule[: len(given)] == given:
            return schedule[-1]
    return given[-1]


def scale_positions(grid: Grid, reference: Grid, device: torch.device | None = None) -> Tensor:
    """Return where a scale's tokens stand on the reference map: every scale spans all of it.

    Args:
        grid: rows and columns of the scale.
        reference: see `reference_grid`.
        device: where to put them.

    Returns:
        (N, 2), row and column, whole numbers (halves go to the even neighbour, as in the released code), float32.
    """
    axes = [
        (torch.arange(count, device=device) * (whole / count)).round()
        for count, whole in zip(grid, reference, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)  # (N, 2)
