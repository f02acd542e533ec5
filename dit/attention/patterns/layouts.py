"""Layouts by name, as online patterns take them, and pairs of blocks that are visited because of where they lie."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from dit.attention.frame_blocks import frame_layout
from dit.attention.grid import TokenGrid
from dit.attention.hilbert import hilbert_layout
from dit.attention.layout import (
    AXIS_ORDERS,
    Layout,
    axes_layout,
    morton_layout,
    raster_layout,
    tile_counts,
    tile_layout,
)

LAYOUTS = ("raster", "morton", "hilbert", "frames", "tile", *AXIS_ORDERS)
"""Names of layouts; "tile" needs a tile, the others are cut into blocks."""


def choose_layouts(
    grid: TokenGrid,
    layout: str | Layout,
    block: int,
    key_block: int | None,
    tile: tuple[int, int, int] | None,
    device: torch.device,
) -> tuple[Layout, Layout]:
    """Return the layouts of queries and keys that the parameters of a pattern say.

    Args:
        grid: the tokens.
        layout: one of `LAYOUTS`, or a layout of this grid.
        block: tokens of a block of queries.
        key_block: tokens of a block of keys; None means as `block`.
        tile: (t, h, w) of "tile", which decides the blocks alone.
        device: where the tensors are.

    Raises:
        ValueError: an unknown layout, a missing tile, or blocks of keys for a layout that has its own.
    """
    tile = None if tile is None else (tile[0], tile[1], tile[2])  # a list, if it was read from a file
    own = isinstance(layout, Layout) or layout == "tile"
    if key_block is not None and own:
        raise ValueError(f"key_block is {key_block}, but this layout has blocks of its own; leave it out")
    if isinstance(layout, Layout):
        if layout.grid != grid:
            raise ValueError(f"the layout is of the grid {layout.grid.shape}, the pattern is asked for {grid.shape}")
        layout = layout.to(device)
        return layout, layout
    queries = named_layout(grid, layout, block, tile, str(device))
    keys = queries if key_block is None else named_layout(grid, layout, key_block, tile, str(device))
    return queries, keys


@lru_cache(maxsize=64)
def named_layout(grid: TokenGrid, name: str, block: int, tile: tuple[int, int, int] | None, device: str) -> Layout:
    """Return a layout by its name, see `choose_layouts`."""
    if name not in LAYOUTS:
        raise ValueError(f"layout is {name!r}; use one of {', '.join(LAYOUTS)}")
    if (name == "tile") != (tile is not None):
        raise ValueError(f"layout is {name!r} and tile is {tile}; give layout 'tile' a tile (t, h, w), the others none")
    if tile is not None:
        return tile_layout(grid, tile).to(device)
    makers = {"raster": raster_layout, "morton": morton_layout, "hilbert": hilbert_layout, "frames": frame_layout}
    if name in makers:
        return makers[name](grid, block).to(device)
    return axes_layout(grid, name, block).to(device)


def forced_visits(
    queries: Layout, keys: Layout, *, diagonal: int | None, window: tuple[int, int, int] | None, neighbours: bool
) -> Tensor | None:
    """Return the pairs of visual blocks that are always visited, bool, (n, m); None for none.

    Args:
        queries: layout of the queries; all heads share it.
        keys: likewise.
        diagonal: blocks of keys that share a token with the query block, and so many on both sides; None means none.
        window: tiles at most half as many as this away along each axis, for layouts of tiles.
        neighbours: blocks with a token beside one of the query block, diagonally too.

    Raises:
        ValueError: a negative width, or a window for a layout without tiles.
    """
    forced = []
    if diagonal is not None:
        if diagonal < 0:
            raise ValueError(f"diagonal is {diagonal}; use None for nothing, 0 for the block itself, or more")
        forced.append(diagonal_visits(queries, keys, diagonal))
    if window is not None:
        if queries.tile is None:
            raise ValueError(f"window is {window}, which counts tiles; use it with layout 'tile'")
        forced.append(window_visits(queries.grid, queries.tile, window).to(queries.order.device))
    if neighbours:
        forced.append(neighbour_visits(queries, keys))
    if not forced:
        return None
    return torch.stack(forced).any(0)


@lru_cache(maxsize=64)
def diagonal_visits(queries: Layout, keys: Layout, width: int) -> Tensor:
    """Return which blocks of keys share a token with each block of queries, or are so many beside one, (n, m)."""
    grid = queries.grid
    visual = slice(grid.visual_start, grid.visual_start + grid.visual_length)
    shared = torch.zeros(queries.visual_count, keys.visual_count, device=queries.order.device)
    shared[queries.block_of()[0, 0, visual], keys.block_of()[0, 0, visual]] = 1
    return functional.max_pool1d(shared[None], 2 * width + 1, 1, width)[0] > 0


def window_visits(grid: TokenGrid, tile: tuple[int, int, int], window: tuple[int, int, int]) -> Tensor:
    """Return which tiles are at most half a window away along each axis, (n, n); windows don't shift at borders."""
    axes = [torch.arange(count) for count in tile_counts(grid, tile)]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)  # (n, 3)
    away = (place[:, None] - place).abs()  # (n, n, 3)
    return (away <= torch.tensor(window) // 2).all(-1)


@lru_cache(maxsize=64)
def neighbour_visits(queries: Layout, keys: Layout) -> Tensor:
    """Return which blocks of keys have a token among the 26 around one of the query block, or in it, (n, m)."""
    grid = queries.grid
    block, key_block = (
        one.block_of()[0, 0, grid.visual_start : grid.visual_start + grid.visual_length].cpu().view(grid.shape)
        for one in (queries, keys)
    )  # (T, H, W)
    visits = torch.zeros(queries.visual_count, keys.visual_count, dtype=torch.bool)
    steps = torch.cartesian_prod(*[torch.arange(-1, 2)] * 3)  # (27, 3)
    for step in steps.tolist():
        along = list(zip(step, grid.shape, strict=True))
        here = tuple(slice(max(-one, 0), size - max(one, 0)) for one, size in along)
        there = tuple(slice(max(one, 0), size + min(one, 0)) for one, size in along)
        visits[block[here].flatten(), key_block[there].flatten()] = True
    return visits.to(queries.order.device)
