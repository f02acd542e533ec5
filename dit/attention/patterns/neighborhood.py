"""Neighborhood attention: every token sees a window around itself on each axis of the grid.

The rule is that of NATTEN (Generalized Neighborhood Attention, arXiv 2504.16922, section 3; neighborhood attention
itself: arXiv 2204.07143, dilated: 2209.15001). It is a product of rules along the axes, so maps of 100,000 tokens are
made from three small tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap, TokenRule, make_rule_map
from dit.attention.grid import TokenGrid
from dit.attention.layout import Layout, parts_layout, tile_layout
from dit.attention.patterns import register_pattern


@dataclass(frozen=True, eq=False)
class NeighborhoodRule(TokenRule):
    """Pairs whose frame, row and column each are neighbors.

    Args:
        grid: the tokens.
        window: (t, h, w), keys that a query sees along each axis, at most the axis.
        stride: (t, h, w), neighboring queries that share a window.
        dilation: (t, h, w), distance of neighboring keys.
        causal: (t, h, w), whether later keys of the axis are hidden.
        tables: bool, (T, T), (H, H), (W, W): which queries of an axis see which keys.
    """

    grid: TokenGrid
    window: tuple[int, int, int]
    stride: tuple[int, int, int]
    dilation: tuple[int, int, int]
    causal: tuple[bool, bool, bool]
    tables: tuple[Tensor, Tensor, Tensor]

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """Return whether the coordinates of query and key are neighbors on all axes."""
        on_axes = zip(self.tables, self.grid.coordinates(query), self.grid.coordinates(key), strict=True)
        t, h, w = (table.to(query.device)[q, k] for table, q, k in on_axes)
        return t & h & w

    def block_counts(self, queries: Layout, keys: Layout) -> Tensor | None:
        """Return the allowed pairs between blocks that are products of parts of the axes, (n, m); otherwise None."""
        if queries.parts is None or keys.parts is None:
            return None
        t, h, w = (
            table_counts(table, rows, columns)
            for table, rows, columns in zip(self.tables, queries.parts, keys.parts, strict=True)
        )
        counts = torch.einsum("ax,by,cz->abcxyz", t, h, w)  # (T', H', W', T'', H'', W'')
        return counts.flatten(3).flatten(0, 2)


def table_counts(table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Count the pairs that a table of an axis allows between parts of its rows and columns.

    Args:
        table: bool, (n, m).
        rows: (n,), the part of each row, from 0.
        columns: (m,), the part of each column.

    Returns:
        int64, (parts of rows, parts of columns).
    """
    by_row = torch.zeros(int(rows.max()) + 1, len(columns), dtype=torch.int64).index_add_(0, rows, table.long())
    return torch.zeros(len(by_row), int(columns.max()) + 1, dtype=torch.int64).index_add_(1, columns, by_row)


@register_pattern("neighborhood", paper="arXiv 2504.16922")
def neighborhood(
    grid: TokenGrid,
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    tile: Sequence[int] | None = None,
    key_tile: Sequence[int] | None = None,
) -> BlockMap:
    """Let every token see a window around itself (NATTEN, GNA): exactly so many keys on each axis, also at its ends.

    Along an axis with window w, stride s and no dilation, the queries s i to s i + s - 1 share the window of the one at
    s i + s // 2: from w // 2 keys before it to the rest behind it, moved inwards at the ends. Causal windows end at the
    query and are counted from the last of those that share one. With dilation d this holds among the tokens whose
    coordinates are equal modulo d. stride = 1 is neighborhood attention, stride = window blocked
    attention. Blocks are tiles of the grid; where stride and window fit them, no visited block is partial (perfectly
    block-sparse, see `BlockMap.asks_nowhere`).

    Args:
        grid: the tokens.
        window: keys of each axis; one number for all, or (t, h, w); larger than an axis means all of it.
        stride: queries that share a window, at most as many as it has keys.
        dilation: distance of the keys.
        causal: hide later frames, rows or columns.
        tile: (t, h, w) of a block of queries; None means (2, 8, 8), of images (1, 8, 16). With dilation tiles are cut
            among the tokens that see each other.
        key_tile: (t, h, w) of a block of keys; None means `tile`.

    Raises:
        ValueError: a number below 1, a stride larger than the window, or not one or three numbers.
    """
    window, stride = sides("window", window), sides("stride", stride)
    dilation, causal = sides("dilation", dilation), _switches(causal)
    if any(one > width for one, width in zip(stride, window, strict=True)):
        raise ValueError(f"stride {stride} is larger than the window {window}: some keys would be seen by nobody")
    t, h, w = (axis_table(*one) for one in zip(grid.shape, window, stride, dilation, causal, strict=True))
    fitting = tuple(min(width, size) for width, size in zip(window, grid.shape, strict=True))
    rule = NeighborhoodRule(grid, (fitting[0], fitting[1], fitting[2]), stride, dilation, causal, (t, h, w))
    tile = default_tile(grid) if tile is None else sides("tile", tile)
    queries = _layout(grid, tile, dilation)
    keys = queries if key_tile is None else _layout(grid, sides("key_tile", key_tile), dilation)
    return make_rule_map(queries, rule, keys=keys)


def axis_table(length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False) -> Tensor:
    """Return which queries of an axis see which keys, bool (length, length).

    Args:
        length: tokens of the axis.
        window: keys that a query sees.
        stride: queries that share a window.
        dilation: distance of the keys.
        causal: hide later keys.
    """
    place = torch.arange(length)
    group, place = place % dilation, place // dilation
    last = (length - 1 - group) // dilation  # (length,), last place within the group
    width = last.clamp(max=window - 1) + 1
    if causal:
        leader = torch.minimum(place // stride * stride + stride - 1, last)
        first, end = leader - width + 1, place
    else:
        leader = torch.minimum(place // stride * stride + stride // 2, last)
        left = width // 2
        first = torch.minimum(torch.maximum(leader, left), last - (width - 1 - left)) - left
        end = first + width - 1
    return (group[:, None] == group) & (place >= first[:, None]) & (place <= end[:, None])


def default_tile(grid: TokenGrid) -> tuple[int, int, int]:
    """Return the tile of 128 tokens that is taken where none is named."""
    return (1, 8, 16) if grid.frames == 1 else (2, 8, 8)


def sides(name: str, value: int | Sequence[int]) -> tuple[int, int, int]:
    """Return a parameter as one number for each axis (t, h, w).

    Args:
        name: of the parameter, for the error.
        value: one number for all axes, or three.

    Raises:
        ValueError: another count of values, or one that isn't a whole number from 1 on.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * 3
    if len(values) != 3 or any(type(one) is not int or one < 1 for one in values):
        raise ValueError(f"{name} is {value}; give one whole number from 1 on, or one for each axis (t, h, w)")
    return values


def _switches(causal: bool | Sequence[bool]) -> tuple[bool, bool, bool]:
    values = tuple(causal) if isinstance(causal, Sequence) else (causal,) * 3
    if len(values) != 3 or any(type(one) is not bool for one in values):
        raise ValueError(f"causal is {causal}; give True or False, or one of them for each axis (t, h, w)")
    return values


def _layout(grid: TokenGrid, tile: tuple[int, int, int], dilation: tuple[int, int, int]) -> Layout:
    """Cut tokens into tiles; with dilation only among those whose coordinates are equal modulo it."""
    if dilation == (1, 1, 1):
        return tile_layout(grid, tile)
    t, h, w = (axis_parts(*one) for one in zip(grid.shape, tile, dilation, strict=True))
    return parts_layout(grid, (t, h, w), exact_block=tile[0] * tile[1] * tile[2])


def axis_parts(length: int, side: int, dilation: int) -> Tensor:
    """Return the tile of each token of an axis, (length,): runs of `side` tokens of a group, group after group.

    Args:
        length: tokens of the axis.
        side: tokens of a tile.
        dilation: tokens with equal coordinates modulo it are a group.
    """
    place = torch.arange(length)
    keys = place % dilation * length + place // dilation // side  # (length,), rises with group and run
    return keys.unique(return_inverse=True)[1]
