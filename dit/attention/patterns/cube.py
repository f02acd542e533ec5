"""Cubes of the grid, each of which sees itself and the cubes that score highest."""

from __future__ import annotations

from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.grid import TokenGrid
from dit.attention.patterns import register_pattern
from dit.attention.patterns.pooled import pooled_topk


@register_pattern("cube", online=True)
def cube(
    grid: TokenGrid,
    query: Tensor,
    key: Tensor,
    keep: float = 0.25,
    *,
    tile: tuple[int, int, int] = (4, 4, 4),
    key_mask: Tensor | None = None,
) -> BlockMap:
    """Let each cube of tokens see itself and the best cubes, by the scores between their means.

    The rule of sglang's cube sparse attention (multimodal_gen, cube_sparse_attn), which has no paper: the number of
    cubes is rounded down, at least one, and the cube itself competes. Incomplete cubes at the edges are smaller blocks
    here; there they are padded. It changes `keep` from step to step, which is a matter of the plan.

    Args:
        grid: the tokens.
        query: (B, N, K, E), in the order of the sequence.
        key: likewise.
        keep: share of the cubes that are visited.
        tile: (t, h, w) of a cube.
        key_mask: bool, (B, N), False for tokens that don't count.
    """
    return pooled_topk(
        grid, query, key, keep, rounding="floor", layout="tile", tile=tile, diagonal=0, key_mask=key_mask
    )
