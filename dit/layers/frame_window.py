"""Transformer block for clips: all tokens of a latent frame attend to that frame and to a few before it.

The window of frames is finite and the rotary angle of a key depends only on how much older than the query it is. So a
clip may be computed in chunks of any size: keys and values of the last `window - 1` frames are all that a block has to
remember, and where a chunk begins makes no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit.layers.attention import AttnProcessor, SelfAttention, apply_rotary_qk, split_heads
from dit.layers.feed_forward import FeedForward
from dit.layers.positions import Rotary, apply_rotary, grid_positions, rotary_embedding

KeyValue = tuple[Tensor, Tensor]
"""Keys (not rotated) and values of the frames before a chunk, (B, M, N, K, E) each."""


def window_rotary(
    grid: tuple[int, int], head_dim: int, theta: float, window: int, device: torch.device | None = None
) -> list[Rotary]:
    """Compute rotary embeddings of a frame's tokens by age, in latent frames before the query's.

    Rows and columns have half of the head each, as in images. The slowest quarter of the pairs of either half, which
    hardly turns within a frame, also turns with time: by 1 radian a frame, the next pair by 1/2, and so on. At age 0
    the result is that of an image, so weights of an image model keep their meaning.

    Args:
        grid: tokens along (H, W).
        head_dim: width E of a head, a multiple of 4.
        theta: base of the spatial frequencies.
        window: ages to compute, at least 1.
        device: where to put them.

    Returns:
        `window` pairs (cos, sin), each (N, E), float32; the first is of queries and of keys of their own frame.
    """
    half = head_dim // 2
    cos, sin = rotary_embedding(grid_positions(grid, device), (half, half), theta)  # (N, E)
    pairs = half // 2
    turning = max(pairs // 4, 1)
    rates = torch.zeros(pairs, device=device)
    rates[-turning:] = 2.0 ** -torch.arange(turning - 1, -1, -1, dtype=torch.float32, device=device)
    rates = rates.repeat_interleave(2).repeat(2)  # (E,)
    embeddings = [(cos, sin)]
    for age in range(1, window):
        turned_cos, turned_sin = (age * rates).cos(), (age * rates).sin()  # (E,)
        embeddings.append((cos * turned_cos + sin * turned_sin, sin * turned_cos - cos * turned_sin))
    return embeddings


class FrameWindowAttnProcessor(AttnProcessor):
    """Project, normalise, rotate, attend to the frames of the window, project back."""

    def __call__(
        self,
        attn: FrameWindowAttention,
        hidden_states: Tensor,
        rotary: Sequence[Rotary],
        memory: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue | None]:
        """Attend within each frame and to those before it.

        Args:
            attn: the layer that owns the projections.
            hidden_states: consecutive frames, (B, T, N, D).
            rotary: of `window_rotary`; its length is the window.
            memory: keys and values of at most `window - 1` frames right before these; None at the start of a clip.

        Returns:
            (B, T, N, D), and the memory for the frames that follow (None if the window is 1).
        """
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)  # (B, T, N, D) each
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (split_heads(x, attn.heads) for x in (query, key, value))  # (B, T, N, K, E)
        query, key = apply_rotary_qk(attn.norm_q(query), attn.norm_k(key), None, value.dtype)
        query = apply_rotary(query, rotary[0])  # (B, T, N, K, E)
        if memory is not None:
            key, value = torch.cat([memory[0], key], dim=1), torch.cat([memory[1], value], dim=1)  # (B, M + T, ...)
        frames, reach = query.shape[1], len(rotary) - 1
        before = key.shape[1] - frames
        parts, frame = [], 0
        while frame < frames:  # frames with a whole window before them at once; those at a clip's start one by one
            ages = min(before + frame, reach)
            end = frames if ages == reach else frame + 1
            parts.append(self._attend_to_window(query[:, frame:end], key, value, before + frame, rotary[: ages + 1]))
            frame = end
        out = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]  # (B, T, N, K, E)
        out = self.project_back(attn, out.flatten(0, 1)).unflatten(0, (-1, frames))  # (B, T, N, D)
        return out, (key[:, -reach:], value[:, -reach:]) if reach else None

    def _attend_to_window(
        self, query: Tensor, key: Tensor, value: Tensor, first: int, rotary: Sequence[Rotary]
    ) -> Tensor:
        """Attend from F frames (B, F, N, K, E), the first of them number `first` of the keys, to a window each."""
        count, ages = query.shape[1], range(len(rotary) - 1, -1, -1)
        spans = [slice(first - age, first - age + count) for age in ages]
        keys = [apply_rotary(key[:, span], rotary[age]) for span, age in zip(spans, ages, strict=True)]
        window_keys = torch.cat(keys, dim=2).flatten(0, 1)  # (B F, w N, K, E)
        window_values = torch.cat([value[:, span] for span in spans], dim=2).flatten(0, 1)  # (B F, w N, K, E)
        out = self.attend(query.flatten(0, 1), window_keys, window_values)  # (B F, N, K, E)
        return out.unflatten(0, (-1, count))  # (B, F, N, K, E)


class FrameWindowAttention(SelfAttention):
    """Self-attention of latent frames over a finite window, with the weights of `SelfAttention`.

    Args:
        hidden_size: model width D.
        num_heads: heads K; D must be a multiple.
    """

    _default_processor_cls: Any = FrameWindowAttnProcessor
    _available_processors = [FrameWindowAttnProcessor]

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, rotary: Sequence[Rotary], memory: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue | None]:
        """Attend; `FrameWindowAttnProcessor` lists the shapes."""
        return self.processor(self, hidden_states, rotary, memory)


class FrameWindowBlock(nn.Module):
    """Pre-norm attention over a window of frames and MLP; the weights are those of `ViTBlock`.

    Args:
        hidden_size: model width D.
        num_heads: attention heads.
        ff_ratio: width of the MLP as a multiple of D.
    """

    def __init__(self, hidden_size: int, num_heads: int, ff_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = FrameWindowAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.ff = FeedForward(hidden_size, int(ff_ratio * hidden_size / 16 + 0.5) * 16, "swiglu")

    def forward(
        self, hidden_states: Tensor, rotary: Sequence[Rotary], memory: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue | None]:
        """Map frames (B, T, N, D) to (B, T, N, D), and return what the next frames need of these."""
        out, memory = self.attn(self.norm1(hidden_states), rotary, memory)  # (B, T, N, D)
        hidden_states = hidden_states + out
        return hidden_states + self.ff(self.norm2(hidden_states)), memory  # (B, T, N, D)
