"""Coarse and fine attention with a gate (VSA, arXiv 2505.13389): tiles attend by their means, tokens to the best tiles.

    out = gate softmax(Q_t K_t^T s) V_t + sparse(Q, K, V)

The first term is computed between means of tiles and given to all tokens of a tile; its scores also choose the tiles
that the second one computes token by token (hao-ai-lab/FastVideo, fastvideo_kernel/ops.py). Exact tokens take no part
in the first term; in the second they see all tokens and are seen by all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from dit.attention.corrections.blocks import by_query
from dit.attention.grid import TokenGrid
from dit.attention.layout import Layout, tile_layout
from dit.attention.patterns import pattern
from dit.attention.patterns.scores import block_means
from dit.attention.sparse import block_sparse_attention
from dit.attention.trainable.contract import Replacement, register_replacement
from dit.layers.attention import SelfAttention, split_heads
from dit.layers.linear import Linear
from dit.layers.positions import Rotary


@register_replacement
@dataclass(eq=False)
class CoarseGate(Replacement):
    """Coarse and fine attention with a gate, to be trained.

    Args:
        keep: share of the tiles that a tile sees token by token, at least one.
        tile: (t, h, w).
    """

    keep: float = 0.1
    tile: tuple[int, int, int] = (4, 4, 4)
    name: ClassVar[str] = "coarse_gate"
    paper: ClassVar[str] = "arXiv 2505.13389"

    def __post_init__(self) -> None:
        self.tile = tuple(self.tile)  # pyright: ignore[reportAttributeAccessIssue]
        if len(self.tile) != 3 or min(self.tile) < 1:
            raise ValueError(f"tile is {self.tile}; use 3 numbers of at least 1")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; use a share above 0 and at most 1")

    def new_weights(self, attn: SelfAttention) -> dict[str, nn.Module | nn.Parameter]:
        """Return the gate `to_gate_compress`, zero at first, as FastVideo loads networks without one."""
        gate = Linear(attn.to_q.in_features, attn.to_v.out_features)
        nn.init.zeros_(gate.weight)
        nn.init.zeros_(gate.bias)
        return {"to_gate_compress": gate}

    def mix(
        self,
        attn: Any,
        hidden_states: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        rotary: Rotary | None,
        key_mask: Tensor | None,
        grid: TokenGrid,
    ) -> Tensor:
        """Attend, see `Replacement.mix`."""
        query, key, value = self.rotated(qkv, rotary)
        layout = tile_layout(grid, self.tile).to(query.device)
        block_map = pattern("coarse_gate", grid, query=query, key=key, keep=self.keep, tile=self.tile)
        fine = block_sparse_attention(query, key, value, block_map, key_mask=key_mask)  # (B, N, K, E)
        gate = split_heads(attn.to_gate_compress(hidden_states), attn.heads)  # (B, N, K, E)
        return fine + gate * coarse_attention(query, key, value, layout).to(fine.dtype)


def coarse_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Let the means of tiles attend to each other; exact tokens get zeros.

    Args:
        query: (B, N, K, E).
        key: (B, N, K, E).
        value: (B, N, K, E).
        layout: tiles, which all heads share.

    Returns:
        (B, N, K, E), float32.
    """
    query, key, value = (block_means(x, layout)[0] for x in (query, key, value))
    out = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value  # (B, K, n, E)
    out = nn.functional.pad(out, (0, 0, 0, layout.exact_blocks))  # (B, K, n', E)
    return by_query(out, layout.block_of().to(out.device)).transpose(1, 2)
