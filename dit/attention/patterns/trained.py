"""Maps of attention that networks are trained with; `dit.attention.trainable` has their other branches.

Used alone they are what such a method's sparse branch computes; with the correction `pooled_tail` they serve networks
that were trained with dense attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap, make_block_map
from dit.attention.grid import TokenGrid
from dit.attention.layout import raster_layout, tile_layout
from dit.attention.patterns import pattern, register_pattern


@register_pattern("coarse_gate", paper="arXiv 2505.13389", online=True)
def coarse_gate(
    grid: TokenGrid, query: Tensor, key: Tensor, keep: float = 0.1, tile: tuple[int, int, int] = (4, 4, 4)
) -> BlockMap:
    """Let each tile see the tiles whose mean key its mean query scores highest (VSA's fine branch).

    Args:
        grid: the tokens.
        query: (B, N, K, E), in the order of the sequence.
        key: likewise.
        keep: share of the tiles, rounded up.
        tile: (t, h, w).
    """
    return pattern("pooled_topk", grid, query=query, key=key, keep=keep, layout="tile", tile=tuple(tile))


@register_pattern("sla", paper="arXiv 2509.24006", online=True)
def sla(
    grid: TokenGrid,
    query: Tensor,
    key: Tensor,
    keep: float = 0.1,
    block: int = 128,
    key_block: int = 64,
    key_mask: Tensor | None = None,
) -> BlockMap:
    """Let each block see the blocks whose mean key its mean query scores highest (SLA's sparse branch).

    SLA takes the mean of all keys off them first, which changes no order.

    Args:
        grid: the tokens.
        query: (B, N, K, E), in the order of the sequence.
        key: likewise.
        keep: share of the blocks, rounded down, at least one (SLA's code may take none).
        block: tokens of a block of queries.
        key_block: tokens of a block of keys.
        key_mask: bool, (B, N), False for tokens that don't count.
    """
    sizes = {"keep": keep, "rounding": "floor", "block": block, "key_block": key_block}
    return pattern("pooled_topk", grid, query=query, key=key, key_mask=key_mask, **sizes)


@register_pattern("dma", paper="arXiv 2508.02124", online=True)
def dma(
    grid: TokenGrid,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None = None,
    keep: float = 0.25,
    block: int = 128,
) -> BlockMap:
    """Let all queries of a head see the same blocks of keys: those with the largest bias of a key (DMA, by blocks).

    Args:
        grid: the tokens.
        query: (B, N, K, E), in the order of the sequence; not looked at.
        key: likewise; not looked at.
        bias: (B, K, N), of each key, see `dit.attention.trainable.dma.key_bias`; None takes the length of the keys.
        keep: share of the visual blocks, at least one.
        block: tokens of a block.
    """
    layout = raster_layout(grid, block)
    rank = (key.float().norm(dim=-1).transpose(1, 2) if bias is None else bias).detach()  # (B, K, N)
    rank = rank[..., grid.visual_start : grid.visual_start + grid.visual_length]  # (B, K, V)
    rank = torch.nn.functional.pad(rank, (0, -rank.shape[-1] % block), value=-torch.inf)
    best = rank.unflatten(-1, (-1, block)).amax(-1)  # (B, K, n)
    chosen = best.topk(max(round(keep * layout.visual_count), 1), -1).indices  # (B, K, k)
    stripes = torch.zeros_like(best, dtype=torch.bool).scatter(-1, chosen, True)  # (B, K, n)
    return make_block_map(layout.to(key.device), stripes[..., None, :].expand(-1, -1, layout.visual_count, -1))


@register_pattern("proxy", paper="arXiv 2409.04005")
def proxy(grid: TokenGrid, window: tuple[int, int, int] = (1, 4, 4)) -> BlockMap:
    """Let each window see itself (PT-DiT); with the correction `pooled_tail` it sees the means of all others, proxies.

    Networks that are trained this way are `dit.models.pt_dit`.

    Args:
        grid: the tokens.
        window: (t, h, w).
    """
    layout = tile_layout(grid, tuple(window))
    return make_block_map(layout, torch.eye(layout.visual_count, dtype=torch.bool))
