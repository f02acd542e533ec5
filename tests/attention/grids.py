"""Small grids drawn at random, and masks from slow definitions to compare patterns with."""

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from dit.attention import TokenGrid
from dit.attention.grid import TextPosition

Place = tuple[int, int, int]


@st.composite
def grids(draw: st.DrawFn, most: int = 6) -> TokenGrid:
    """Draw a grid of up to `most` tokens an axis, images among them, with text first, last or not, and extra tokens."""
    position: TextPosition = draw(st.sampled_from(["none", "first", "last"]))
    text = 0 if position == "none" else draw(st.integers(1, 5))
    side = st.integers(1, most)
    return TokenGrid(draw(side), draw(side), draw(side), text, position, draw(st.integers(0, 2)))


def slow_mask(grid: TokenGrid, allowed: Callable[[Place, Place], bool]) -> Tensor:
    """Ask a definition for each pair of visual tokens; exact tokens see everything and are seen, bool (1, 1, N, N).

    Args:
        grid: the tokens.
        allowed: whether the query at (t, h, w) sees the key at (t, h, w).
    """
    places = [(t, h, w) for t in range(grid.frames) for h in range(grid.height) for w in range(grid.width)]
    mask = torch.ones(grid.length, grid.length, dtype=torch.bool)
    visual = slice(grid.visual_start, grid.visual_start + grid.visual_length)
    mask[visual, visual] = torch.tensor([[allowed(query, key) for key in places] for query in places])
    return mask[None, None]


def slow_density(grid: TokenGrid, allowed: Callable[[Place, Place], bool]) -> float:
    """Return the share of pairs in the mask of a definition."""
    return float(slow_mask(grid, allowed).float().mean())
