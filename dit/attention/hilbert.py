"""The generalized Hilbert curve: an order in which each token of a grid of any size is beside the next one."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dit.attention.grid import TokenGrid
from dit.attention.layout import Layout, chunk_sizes, make_layout


@lru_cache(maxsize=64)
def hilbert_layout(grid: TokenGrid, block: int = 128) -> Layout:
    """Order the tokens along a generalized Hilbert curve (Jenga, arXiv 2505.16864), and cut them into blocks.

    Args:
        grid: the tokens.
        block: tokens of a block.
    """
    return make_layout(grid, hilbert_order(*grid.shape), chunk_sizes(grid.visual_length, block), exact_block=block)


def hilbert_order(frames: int, height: int, width: int) -> Tensor:
    """Return the raster indices of a grid along the curve, (T H W,).

    The curve is that of J. Cerveny's "gilbert", which Jenga uses: a box is split along its longest sides into two,
    three or five boxes that are passed through one after the other, until a box is a line. All boxes of a level are
    split at once here. Where all sides are even each step is to a token beside the last one; others make some longer.

    Args:
        frames: T.
        height: H.
        width: W.
    """
    sides = sorted(enumerate((width, height, frames)), key=lambda side: (-side[1], side[0]))
    longest = sides[0][0]
    axes = [longest] + [axis for axis in range(3) if axis != longest]
    vectors = torch.zeros(1, 3, 3, dtype=torch.int64)  # (boxes, sides a b c, coordinates x y z)
    for row, axis in enumerate(axes):
        vectors[0, row, axis] = (width, height, frames)[axis]
    start = torch.zeros(1, 3, dtype=torch.int64)  # (boxes, 3)
    offset = torch.zeros(1, dtype=torch.int64)  # (boxes,)
    order = torch.empty(frames * height * width, dtype=torch.int64)
    strides = torch.tensor([1, width, width * height])  # of x, y and z in the raster index
    while len(start):
        lengths = vectors.sum(-1).abs()  # (boxes, 3)
        line = (lengths == 1).sum(-1) >= 2  # (boxes,)
        _fill_lines(order, start[line], vectors[line], offset[line], strides)
        start, vectors, offset = _split(start[~line], vectors[~line], offset[~line])
    return order


def _fill_lines(order: Tensor, start: Tensor, vectors: Tensor, offset: Tensor, strides: Tensor) -> None:
    """Write the tokens of boxes that are lines into the order."""
    lengths = vectors.sum(-1).abs()  # (boxes, 3)
    longest = lengths.argmax(-1)  # (boxes,)
    step = vectors.sign()[torch.arange(len(start)), longest]  # (boxes, 3)
    counts = lengths.amax(-1)  # (boxes,)
    box = torch.arange(len(start)).repeat_interleave(counts)
    position = torch.arange(len(box)) - (counts.cumsum(0) - counts)[box]  # within the line
    order[offset[box] + position] = ((start[box] + step[box] * position[:, None]) * strides).sum(-1)


def _split(start: Tensor, vectors: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split every box; returns the starts, sides and offsets of what comes of them."""
    a, b, c = vectors.unbind(1)  # (boxes, 3)
    w, h, d = vectors.sum(-1).abs().unbind(-1)  # (boxes,)
    ones = vectors.sign()
    da, db, dc = ones.unbind(1)
    halves = vectors.div(2, rounding_mode="floor")
    odd = (halves.sum(-1) % 2 != 0) & (vectors.sum(-1).abs() > 2)  # even halves are preferred
    a2, b2, c2 = (halves + ones * odd[..., None]).unbind(1)
    wide = (2 * w > 3 * h) & (2 * w > 3 * d)
    flat = ~wide & (3 * h > 4 * d)  # not split along c
    narrow = ~wide & ~flat & (3 * d > 4 * h)  # not split along b
    children = [
        (wide, [(0 * a, (a2, b, c)), (a2, (a - a2, b, c))]),
        (
            flat,
            [(0 * a, (b2, c, a2)), (b2, (a, b - b2, c)), (a - da + b2 - db, (-b2, c, a2 - a))],
        ),
        (
            narrow,
            [(0 * a, (c2, a2, b)), (c2, (a, b, c - c2)), (a - da + c2 - dc, (-c2, a2 - a, b))],
        ),
        (
            ~wide & ~flat & ~narrow,
            [
                (0 * a, (b2, c2, a2)),
                (b2, (c, a2, b - b2)),
                (b2 - db + c - dc, (a, -b2, c2 - c)),
                (a - da + b2 + c - dc, (-c, a2 - a, b - b2)),
                (a - da + b2 - db, (-b2, c2, a2 - a)),
            ],
        ),
    ]
    starts, sides, offsets = [], [], []
    for case, boxes in children:
        begin = offset[case]
        for shift, three in boxes:
            some = torch.stack(three, dim=1)[case]  # (boxes, 3, 3)
            volume = some.sum(-1).abs().prod(-1)  # (boxes,)
            filled = volume > 0
            starts.append((start + shift)[case][filled])
            sides.append(some[filled])
            offsets.append(begin[filled])
            begin = begin + volume
    return torch.cat(starts), torch.cat(sides), torch.cat(offsets)
