"""What corrections compute block by block: tokens gathered by block, and blocks' results given to tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from dit.attention.layout import Layout


def gather_blocks(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Put the tokens of each block side by side, smaller blocks filled with zeros.

    Args:
        x: (B, N, K, E), in the order of the sequence.
        layout: the blocks; S is the largest one's size.

    Returns:
        (B, K, n, S, E), and where each token of the sequence is among the n S places, (B', K', N).
    """
    order, starts = layout.order.to(x.device), layout.starts.to(x.device)  # (B', K', N), (B', K', n + 1)
    size = int(layout.sizes.max())
    heads = torch.broadcast_shapes(order.shape[:2], starts.shape[:2])
    order, starts = order.expand(*heads, -1), starts.expand(*heads, -1)
    blocks = layout.block_of().to(x.device).expand(*heads, -1)  # (B', K', N)
    rank = order.argsort(dim=-1) - starts.gather(2, blocks)  # (B', K', N), place within the block
    place = blocks * size + rank  # (B', K', N)
    index = place.expand(x.shape[0], x.shape[2], -1)[..., None].expand(-1, -1, -1, x.shape[-1])  # (B, K, N, E)
    placed = x.new_zeros(x.shape[0], x.shape[2], layout.count * size, x.shape[-1])
    placed = placed.scatter(2, index, x.transpose(1, 2))  # (B, K, n S, E)
    return placed.unflatten(2, (layout.count, size)), place


def scatter_blocks(x: Tensor, place: Tensor) -> Tensor:
    """Undo `gather_blocks`: (B, K, n, S, E) and (B', K', N) to (B, N, K, E)."""
    index = place.expand(*x.shape[:2], -1)[..., None].expand(-1, -1, -1, x.shape[-1])  # (B, K, N, E)
    return x.flatten(2, 3).gather(2, index).transpose(1, 2)  # (B, N, K, E)


def by_query(per_block: Tensor, blocks: Tensor) -> Tensor:
    """Give each query what belongs to its block: (B', K', n, ...) and blocks (B', K', N) to (B', K', N, ...)."""
    heads = torch.broadcast_shapes(per_block.shape[:2], blocks.shape[:2])
    rest = per_block.shape[3:]
    per_block = per_block.expand(*heads, *per_block.shape[2:])
    index = blocks.expand(*heads, -1).reshape(*heads, -1, *(1,) * len(rest)).expand(*heads, blocks.shape[-1], *rest)
    return per_block.gather(2, index)
