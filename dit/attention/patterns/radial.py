"""Radial Attention: the further apart two frames are, the narrower the band that joins them."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap, make_block_map
from dit.attention.grid import TokenGrid
from dit.attention.layout import raster_layout
from dit.attention.patterns import register_pattern


@register_pattern("radial", paper="arXiv 2506.19852")
def radial(
    grid: TokenGrid, decay: float | None = None, density: float | None = None, sink: bool = False, block: int = 128
) -> BlockMap:
    """Let frames see each other within a band that halves whenever their distance doubles (Radial Attention).

    Frames at a distance d of at most 1 see each other wholly. Beyond, with S = H W, g the bits of d, P the first power
    of two above S, and l = P / 2^g, tokens at places i and j attend if |i - j| <= max(block, l decay); where l < block
    only for d that int(block / l) divides. Of that, the authors' rule of blocks keeps those where more than 60 % of the
    columns with any pair have one in more than a third of the rows (`blocks_kept`). Differences: every block sees
    itself, and an incomplete last block of visual tokens sees and is seen by all, like the one in which the text begins
    in the authors' code.

    Args:
        grid: the tokens.
        decay: factor of the bands: 0.95 for HunyuanVideo, 0.2 for Wan, 1 for longer clips; None means 1.
        density: wished share of visual pairs instead, for which `decay` is searched.
        sink: let everybody see the first frame, as for Wan.
        block: tokens of a block; at most those of a frame.

    Raises:
        ValueError: decay and density at once, a negative decay, or a density that no decay has.
    """
    block = min(block, grid.height * grid.width)
    layout = raster_layout(grid, block)
    if density is not None:
        if decay is not None:
            raise ValueError(f"give decay or density, not both: got {decay} and {density}")
        decay = decay_for_density(grid, density, sink, block)
    decay = 1.0 if decay is None else decay
    if decay < 0:
        raise ValueError(f"decay is {decay}; it must be at least 0")
    return make_block_map(layout, _visits(grid, decay, sink, block))


def decay_for_density(grid: TokenGrid, density: float, sink: bool = False, block: int = 128) -> float:
    """Find the decay whose map is closest to a density of visual pairs, by bisection.

    Args:
        grid: the tokens.
        density: visited share of the visual pairs.
        sink: see `radial`.
        block: see `radial`.

    Raises:
        ValueError: no decay has it; the error says what can be had.
    """
    frame, length = grid.height * grid.width, grid.visual_length
    block = min(block, frame)

    def visited(decay: float) -> float:
        visits = _visits(grid, decay, sink, block)
        sizes = torch.full((len(visits),), block)
        sizes[-1] = length - block * (len(visits) - 1)
        rows = visits[:-1].sum(0) * block + visits[-1] * sizes[-1]  # (n,), tokens that see each block
        return int(rows @ sizes) / length**2

    # bands of all distances are a block wide, or a frame
    power, bits = 2 ** frame.bit_length(), max(grid.frames - 1, 2).bit_length()
    low, high = block * 4 / power, max(frame * 2**bits / power, 1.0)
    least, most = visited(low), visited(high)
    if not least <= density <= most:
        raise ValueError(
            f"density is {density}; radial attention visits {least:.4f} to {most:.4f} of the pairs of a grid "
            f"{grid.shape} in blocks of {block}"
        )
    tried = {low: least, high: most}
    while min(abs(one - density) for one in tried.values()) > density / 1000 and len(tried) < 14:
        middle = math.sqrt(low * high)
        tried[middle] = visited(middle)
        low, high = (middle, high) if tried[middle] < density else (low, middle)
    return min(tried, key=lambda one: abs(tried[one] - density))


@lru_cache(maxsize=64)
def _visits(grid: TokenGrid, decay: float, sink: bool, block: int) -> Tensor:
    """Return the visited visual blocks, bool (n, n)."""
    frame, length = grid.height * grid.width, grid.visual_length
    span = -(-frame // block)  # blocks that a frame is written to, from the one on in which it begins
    starts = torch.arange(grid.frames) * frame  # (T,)
    distances = [_band(distance, frame, decay, block) for distance in range(grid.frames)]
    reach = torch.tensor([-1 if one is None else one for one in distances])  # (T,)
    count = -(-length // block)
    visits = torch.zeros(count + span, count + span, dtype=torch.bool)
    columns = (starts // block)[:, None] + torch.arange(span)  # (T, s)
    for index in range(grid.frames):
        reaches = reach[(torch.arange(grid.frames) - index).abs()]  # (T,)
        if sink:
            reaches[0] = frame
        pairs, which = torch.stack([reaches, starts % block]).unique(dim=1, return_inverse=True)  # (2, U), (T,)
        kept = blocks_kept(frame, pairs[0], int(starts[index]) % block, pairs[1], block)[which]  # (T, s, s)
        begin = int(starts[index]) // block
        for some in (slice(0, None, 2), slice(1, None, 2)):  # neighbors may share a block, every other frame doesn't
            visits[begin : begin + span, columns[some].flatten()] |= kept[some].transpose(0, 1).flatten(1)
    visits = visits[:count, :count] | torch.eye(count, dtype=torch.bool)
    visits[length // block :] = True
    visits[:, length // block :] = True
    return visits


def _band(distance: int, frame: int, decay: float, block: int) -> int | None:
    """Return how far tokens of frames at a distance see; None for not at all."""
    length = 2 ** frame.bit_length() / 2 ** distance.bit_length()
    if length < block and distance % int(block / length):
        return None
    return frame if distance <= 1 else int(max(length * decay, block))


def blocks_kept(frame: int, reach: Tensor, row_offset: int, column_offset: Tensor, block: int) -> Tensor:
    """Say which blocks of pairs of frames are kept of the bands |i - j| <= reach.

    Frames may begin within a block: at row `row_offset` of their first one, of which they fill the rest, and then as
    many blocks as ceil(S / block) in all; what lies beyond belongs to the next frame (as in the authors'
    `gen_log_mask_shrinked` and `shrinkMaskStrict`). In a block the pairs of column j are the rows from j - reach to
    j + reach that it has, so the columns with at least so many are one run, and none need be looked at.

    Args:
        frame: S, tokens of a frame.
        reach: (T,), of each pair of frames; -1 for none.
        row_offset: where the frame of the queries begins in its first block.
        column_offset: (T,), where those of the keys do.
        block: tokens of a block.

    Returns:
        bool, (T, s, s), with s = ceil(S / block) blocks of each frame.
    """
    steps = torch.arange(-(-frame // block)) * block  # (s,)
    top, bottom = _inside(steps - row_offset, frame, block)  # (s,), first and last row
    left, right = _inside(steps - column_offset[:, None], frame, block)  # (T, s), first and last column
    top, bottom = top[:, None], bottom[:, None]  # (s, 1)
    left, right = left[:, None], right[:, None]  # (T, 1, s)
    reach = reach[:, None, None]  # (T, 1, 1)

    def columns_with(rows: int) -> Tensor:
        """Count the columns that have pairs with at least so many rows, (T, s, s)."""
        run = torch.minimum(right, bottom + reach + 1 - rows) - torch.maximum(left, top - reach - 1 + rows) + 1
        possible = (bottom - top + 1 >= rows) & (2 * reach + 1 >= rows)  # (T, s, 1)
        return run.clamp(min=0) * possible

    return 5 * columns_with(block // 3 + 1) > 3 * columns_with(1)


def _inside(begin: Tensor, frame: int, block: int) -> tuple[Tensor, Tensor]:
    """Return the first and last token of a frame in the blocks that begin at a token of it, or before the frame."""
    return begin.clamp(min=0), (begin + block - 1).clamp(max=frame - 1)
