"""Layouts: an order of the tokens of a grid, cut into blocks of neighbours in that order.

Block-sparse attention decides block by block, so tokens that attend alike should share a block. A layout permutes the
visual tokens and cuts them into blocks, which may differ in size; exact tokens (text, references) follow in blocks of
their own. Nothing is padded: incomplete tiles are smaller blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations

import torch
from torch import Tensor

from dit.attention.grid import TokenGrid

AXIS_ORDERS = tuple("".join(order) for order in permutations("thw"))
"""The orders of `axes_layout`: the last letter is the axis that runs fastest; "thw" is raster order."""


@dataclass(frozen=True, eq=False)
class Layout:
    """An order of a sequence's tokens, and where its blocks begin.

    Args:
        grid: the tokens.
        order: (B', K', N), the position in the sequence of each token in the new order; B' and K' are 1 where all
            samples or heads share the order.
        starts: (B', K', n + 1), where each of the n blocks begins in the new order; the last entry is N.
        exact_blocks: how many of the last blocks hold exact tokens.
        tile: (t, h, w) of the tiles that the blocks are, where they are tiles of the grid in raster order.
        parts: (T,), (H,), (W,), the part of each frame, row and column, where the visual blocks are the products of
            parts of the axes, in raster order; rules along axes are counted quickly then.
    """

    grid: TokenGrid
    order: Tensor
    starts: Tensor
    exact_blocks: int
    tile: tuple[int, int, int] | None = None
    parts: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def count(self) -> int:
        """Blocks n."""
        return self.starts.shape[-1] - 1

    @property
    def visual_count(self) -> int:
        """Blocks of visual tokens."""
        return self.count - self.exact_blocks

    @property
    def sizes(self) -> Tensor:
        """Tokens of each block, (B', K', n)."""
        return self.starts.diff(dim=-1)

    @property
    def is_shared(self) -> bool:
        """Whether all samples and heads have the same order and blocks."""
        return self.order.shape[:2] == (1, 1) == self.starts.shape[:2]

    def block_of(self) -> Tensor:
        """Return the block of each token, by its position in the sequence, (B', K', N)."""
        batch, heads, length = self.order.shape
        blocks = torch.arange(self.count, device=self.order.device).expand(batch * heads, -1)  # (B' K', n)
        placed = torch.stack(
            [
                one.repeat_interleave(sizes)  # (N,)
                for one, sizes in zip(blocks, self.sizes.expand(batch, heads, -1).flatten(0, 1), strict=True)
            ]
        ).view(batch, heads, length)
        return torch.empty_like(self.order).scatter_(-1, self.order, placed)  # (B', K', N)

    def permute(self, x: Tensor) -> Tensor:
        """Bring tokens into the layout's order: (B, K, N, E) to (B, K, N, E)."""
        order = self.order.to(x.device)
        if self.is_shared:
            return x.index_select(2, order[0, 0])
        return x.gather(2, order[..., None].expand(*x.shape[:2], -1, x.shape[-1]))

    def restore(self, x: Tensor) -> Tensor:
        """Bring tokens back into the order of the sequence: (B, K, N, E) to (B, K, N, E)."""
        inverse = self.order.argsort(dim=-1).to(x.device)  # (B', K', N)
        if self.is_shared:
            return x.index_select(2, inverse[0, 0])
        return x.gather(2, inverse[..., None].expand(*x.shape[:2], -1, x.shape[-1]))

    def to(self, device: torch.device | str) -> Layout:
        """Return the layout with its tensors on a device."""
        if self.order.device == torch.device(device):
            return self
        return replace(self, order=self.order.to(device), starts=self.starts.to(device))


def make_layout(
    grid: TokenGrid,
    visual_order: Tensor,
    visual_sizes: Tensor,
    *,
    exact_block: int = 128,
    tile: tuple[int, int, int] | None = None,
    parts: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Layout:
    """Build a layout from an order of the visual tokens; blocks of exact tokens are added.

    Args:
        grid: the tokens.
        visual_order: (..., T H W), raster indices of the visual tokens in the new order.
        visual_sizes: (..., n), tokens of each block of them; zero is allowed.
        exact_block: most tokens of a block of exact ones.
        tile: see `Layout`.
        parts: see `Layout`.

    Raises:
        ValueError: the order or the sizes don't cover the visual tokens.
    """
    visual_order, visual_sizes = _as_three_dims(visual_order), _as_three_dims(visual_sizes)
    covered = visual_sizes.sum(-1)  # (B', K')
    if visual_order.shape[-1] != grid.visual_length or bool((covered != grid.visual_length).any()):
        raise ValueError(
            f"an order of {visual_order.shape[-1]} tokens in blocks of {covered.flatten().tolist()} in all doesn't "
            f"cover the {grid.visual_length} visual tokens of the grid {grid.shape}"
        )
    device = visual_order.device
    exact = grid.exact_positions().to(device)  # (X,)
    exact_sizes = chunk_sizes(len(exact), exact_block).to(device)
    order = torch.cat([visual_order + grid.visual_start, exact.expand(*visual_order.shape[:2], -1)], dim=-1)
    sizes = torch.cat([visual_sizes, exact_sizes.expand(*visual_sizes.shape[:2], -1)], dim=-1)
    starts = torch.nn.functional.pad(sizes.cumsum(-1), (1, 0))  # (B', K', n + 1)
    return Layout(grid, order, starts, len(exact_sizes), tile, parts)


def chunk_sizes(length: int, block: int) -> Tensor:
    """Return the sizes of the blocks that a run of tokens is cut into; the last may be smaller."""
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    full, rest = divmod(length, block)
    return torch.tensor([block] * full + [rest] * bool(rest), dtype=torch.int64)


@lru_cache(maxsize=64)
def raster_layout(grid: TokenGrid, block: int = 128) -> Layout:
    """Leave the tokens in raster order and cut them into blocks of `block`."""
    return axes_layout(grid, "thw", block)


@lru_cache(maxsize=64)
def axes_layout(grid: TokenGrid, axes: str, block: int = 128) -> Layout:
    """Reorder the axes of the grid (PAROAttention, arXiv 2506.16054), then cut into blocks.

    Args:
        grid: the tokens.
        axes: one of `AXIS_ORDERS`; "hwt" puts all frames of a place side by side.
        block: tokens of a block.

    Raises:
        ValueError: an unknown order.
    """
    if axes not in AXIS_ORDERS:
        raise ValueError(f"axes is {axes!r}; use one of {', '.join(AXIS_ORDERS)}")
    index = torch.arange(grid.visual_length).view(grid.shape)  # (T, H, W)
    order = index.permute(*("thw".index(axis) for axis in axes)).flatten()
    return make_layout(grid, order, chunk_sizes(len(order), block), exact_block=block)


@lru_cache(maxsize=64)
def tile_layout(grid: TokenGrid, tile: tuple[int, int, int]) -> Layout:
    """Make each tile (t, h, w) of the grid a block (Sliding Tile Attention, arXiv 2502.04507).

    Tiles follow each other in raster order, and so do the tokens within one. Those at the far edges may be incomplete.

    Raises:
        ValueError: a side below 1.
    """
    if min(tile) < 1:
        raise ValueError(f"the sides of a tile must be at least 1, got {tile}")
    t, h, w = (torch.arange(size) // side for size, side in zip(grid.shape, tile, strict=True))
    return parts_layout(grid, (t, h, w), exact_block=tile[0] * tile[1] * tile[2], tile=tile)


def parts_layout(
    grid: TokenGrid,
    parts: tuple[Tensor, Tensor, Tensor],
    *,
    exact_block: int = 128,
    tile: tuple[int, int, int] | None = None,
) -> Layout:
    """Cut each axis into parts; every part of the frames with one of the rows and one of the columns is a block.

    Args:
        grid: the tokens.
        parts: (T,), (H,), (W,), the part of each frame, row and column, from 0, none of them empty.
        exact_block: most tokens of a block of exact ones.
        tile: see `Layout`.
    """
    counts = [int(part.max()) + 1 for part in parts]
    coordinates = grid.coordinates(torch.arange(grid.visual_length))
    t, h, w = (part[place] for part, place in zip(parts, coordinates, strict=True))
    block = (t * counts[1] + h) * counts[2] + w  # (T H W,)
    sizes = torch.bincount(block, minlength=counts[0] * counts[1] * counts[2])
    return make_layout(grid, block.argsort(stable=True), sizes, exact_block=exact_block, tile=tile, parts=parts)


def tile_counts(grid: TokenGrid, tile: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return how many tiles lie along each axis."""
    t, h, w = (-(-size // side) for size, side in zip(grid.shape, tile, strict=True))
    return t, h, w


@lru_cache(maxsize=64)
def morton_layout(grid: TokenGrid, block: int = 64) -> Layout:
    """Order the tokens along a Morton curve, as Sol-Attn does (arXiv 2607.24027).

    The bits of frame, row and column follow each other in turn: bit 3 i of a token's code is bit i of its frame,
    3 i + 1 of its row, 3 i + 2 of its column.
    """
    axes = grid.coordinates(torch.arange(grid.visual_length))
    code = torch.zeros(grid.visual_length, dtype=torch.int64)
    for bit in range(max(grid.shape).bit_length()):
        for axis, coordinate in enumerate(axes):
            code |= (coordinate >> bit & 1) << (3 * bit + axis)
    return make_layout(grid, code.argsort(), chunk_sizes(grid.visual_length, block), exact_block=block)


def cluster_layout(grid: TokenGrid, labels: Tensor, count: int, *, exact_block: int = 128) -> Layout:
    """Make each cluster of visual tokens a block, one clustering for each sample and head.

    Args:
        grid: the tokens.
        labels: (B, K, T H W), cluster of each visual token in raster order, from 0.
        count: number of clusters; empty ones become blocks of no token.
        exact_block: most tokens of a block of exact ones.
    """
    sizes = torch.zeros(*labels.shape[:2], count, dtype=torch.int64, device=labels.device)
    sizes.scatter_add_(-1, labels, torch.ones_like(labels))  # (B, K, count)
    return make_layout(grid, labels.argsort(dim=-1, stable=True), sizes, exact_block=exact_block)


def _as_three_dims(x: Tensor) -> Tensor:
    """Put axes of samples and heads before a shared order or sizes."""
    return x[(None,) * (3 - x.ndim)]
