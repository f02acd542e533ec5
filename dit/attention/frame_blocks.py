"""Blocks that never cross frames: each frame is cut into connected pieces of equal size, whatever its sides."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from dit.attention.grid import TokenGrid
from dit.attention.layout import Layout, make_layout


@lru_cache(maxsize=64)
def frame_layout(grid: TokenGrid, block: int = 64) -> Layout:
    """Cut each frame into as few connected blocks as hold at most `block` tokens each, of equal size up to one token.

    Draft attention needs such a partition for frames that its tiles don't divide. There are several; this one has
    the least sum of squared distances from the middles of its blocks, among those that follow bands of rows or columns.

    Args:
        grid: the tokens.
        block: most tokens of a block.
    """
    labels = frame_blocks(grid.height, grid.width, block).flatten()  # (H W,)
    count = int(labels.max()) + 1
    everywhere = (labels + count * torch.arange(grid.frames)[:, None]).flatten()  # (T H W,)
    sizes = torch.bincount(everywhere, minlength=count * grid.frames)
    return make_layout(grid, everywhere.argsort(stable=True), sizes, exact_block=block)


def frame_blocks(height: int, width: int, block: int) -> Tensor:
    """Return the block of each token of a frame, (H, W), see `frame_layout`.

    Raises:
        ValueError: a block below 1.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    count = -(-height * width // block)
    candidates = [*_banded(height, width, count), *(one.T for one in _banded(width, height, count))]
    return min(candidates, key=_spread).contiguous()


def _banded(height: int, width: int, count: int) -> Iterator[Tensor]:
    """Yield partitions along bands of rows: each band goes up and down column by column."""
    least = height * width // count
    for bands in range(1, height + 1):
        heights = [height // bands + (index < height % bands) for index in range(bands)]
        # 1. bands that hold whole blocks each
        fewest = [-(-tall * width // (least + 1)) for tall in heights]
        most = [tall * width // least for tall in heights]
        if all(low <= high for low, high in zip(fewest, most, strict=True)) and sum(fewest) <= count <= sum(most):
            yield _whole_bands(heights, width, fewest, most, count)
        # 2. one path through all bands, cut anywhere
        tall = heights[0] if width % 2 else heights[0] - 1 + heights[0] % 2
        yield _cut(_path(height, width, max(tall, 1)), _equal(height * width, count))


def _whole_bands(heights: list[int], width: int, fewest: list[int], most: list[int], count: int) -> Tensor:
    left = count - sum(fewest)
    bands, first = [], 0
    for tall, low, high in zip(heights, fewest, most, strict=True):
        blocks = low + min(left, high - low)
        left -= blocks - low
        bands.append(_cut(_path(tall, width, tall), _equal(tall * width, blocks)) + first)
        first += blocks
    return torch.cat(bands)


def _path(height: int, width: int, tall: int) -> Tensor:
    """Return how far along a path each token is, (H, W): bands of `tall` rows in turn, each column by column.

    Each step is to a token beside the last one. For that a band has to end in its lowest row, which one of an even
    number of columns only does if its height is odd and its last two columns are passed through row by row.
    """
    steps = []
    for band, top in enumerate(range(0, height, tall)):
        rows = torch.arange(top, min(top + tall, height))  # (t,)
        columns = torch.arange(width)
        by_rows = 2 if width % 2 == 0 and len(rows) % 2 else 0
        body = columns[: width - by_rows]
        place = torch.stack(torch.meshgrid(body, rows, indexing="ij"), dim=-1)  # (c, t, 2)
        place[1::2] = place[1::2].flip(1)
        end = torch.stack(torch.meshgrid(rows, columns[width - by_rows :], indexing="ij")[::-1], dim=-1)  # (t, 2, 2)
        end[1::2] = end[1::2].flip(1)
        both = torch.cat([place.flatten(0, 1), end.flatten(0, 1)])  # (tokens, 2), column and row
        if band % 2:
            both[:, 0] = width - 1 - both[:, 0]
        steps.append(both)
    column, row = torch.cat(steps).unbind(-1)
    path = torch.empty(height, width, dtype=torch.int64)
    path[row, column] = torch.arange(height * width)
    return path


def _equal(tokens: int, blocks: int) -> Tensor:
    """Return sizes of blocks that differ by one at most, the larger ones first."""
    small, larger = divmod(tokens, blocks)
    return torch.tensor([small + 1] * larger + [small] * (blocks - larger))


def _cut(path: Tensor, sizes: Tensor) -> Tensor:
    """Return the block of each token where a path is cut into pieces of these sizes."""
    return torch.arange(len(sizes)).repeat_interleave(sizes)[path]


def _spread(labels: Tensor) -> float:
    """Return the sum of squared distances of tokens from the middle of their block."""
    row, column = (one.flatten().double() for one in torch.meshgrid(*map(torch.arange, labels.shape), indexing="ij"))
    flat = labels.flatten()
    sizes = torch.bincount(flat)
    spread = row.square().sum() + column.square().sum()
    for axis in (row, column):
        spread -= (torch.bincount(flat, weights=axis).square() / sizes).sum()
    return round(float(spread), 6)
