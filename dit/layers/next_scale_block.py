"""Block of next-scale transformers: attention over all scales so far, optional cross-attention to text, an MLP.

VAR (arXiv 2404.02905) has the first and the last, Infinity (arXiv 2412.04431) all three. Keys and values of the text
don't change from scale to scale, so they come ready into the block.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn

from dit.cache import Attend, ScaleKVCache
from dit.layers.attention import AttnProcessor, apply_rotary_qk, split_heads
from dit.layers.feed_forward import FeedForward
from dit.layers.linear import Linear
from dit.layers.modulation import AdaLNSingle, modulate, modulation_table
from dit.layers.positions import Rotary

MAX_ATTN_SCALE = 100.0
"""Upper limit of what a head multiplies its cosine similarities with."""

KeyValue = tuple[Tensor, Tensor]
"""Keys and values, (B, M, K, E) each."""


def _attend(one: LayerCache, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
    return one.cache.attend(one.layer, one.scale, query, key, value, attend)


@cache
def _attend_outside_graphs() -> Callable[..., Tensor]:
    return torch.compiler.disable(_attend)


def _attend_of_caches() -> Callable[..., Tensor]:
    """Return what attends with a cache, which compiled blocks call as it is.

    A graph would hold the numbers of its layer and scale: one for each pair of them, and torch compiles eight at most.
    """
    return _attend_outside_graphs() if "torch._dynamo" in sys.modules else _attend  # importing it takes seconds


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Access of one layer to the cache at one scale."""

    cache: ScaleKVCache
    layer: int
    scale: int
    _attend: Callable[..., Tensor] = field(default_factory=_attend_of_caches, repr=False)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        """Store keys and values (B, N, K, E) and attend to those of all scales so far, (B, N, K, E)."""
        return self._attend(self, query, key, value, attend)


class NextScaleAttnProcessor(AttnProcessor):
    """Project, normalise, rotate, cache, attend, project back. Replaceable through `set_attn_processor`."""

    def __call__(
        self,
        attn: NextScaleAttention,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Attend to all scales so far.

        Args:
            attn: the layer that owns the projections.
            hidden_states: (B, N, D), one scale with a cache, else all of them.
            attention_mask: bool, broadcastable to (B, K, N, M).
            cache: earlier scales of this layer; the current one is added.
            rotary: (cos, sin) of these tokens' positions, each (N, E).

        Returns:
            (B, N, D).
        """
        query = split_heads(attn.to_q(hidden_states), attn.heads)  # (B, N, K, E)
        key = split_heads(attn.to_k(hidden_states), attn.heads)  # (B, N, K, E)
        value = split_heads(attn.to_v(hidden_states), attn.heads)  # (B, N, K, E)
        query, key = apply_rotary_qk(*attn.normalize(query, key), rotary, value.dtype)
        attend = partial(self.attend, attention_mask=attention_mask)
        out = attend(query, key, value) if cache is None else cache.attend(query, key, value, attend)  # (B, N, K, E)
        return self.project_back(attn, out)  # (B, N, D)


class NextScaleAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention over cosine similarities, each head with a learned scale (arXiv 2111.09883, 3.3).

    Args:
        hidden_size: model width D.
        num_heads: heads K; D must be a multiple.
        qk_l2_norm: compare directions; False compares vectors, at a quarter of the usual softmax scale, as the
            reference does.
    """

    processor: Any  # diffusers lists only its own
    _default_processor_cls: Any = NextScaleAttnProcessor
    _available_processors = [NextScaleAttnProcessor]
    _supports_qkv_fusion = False  # keys have no bias, and diffusers fuses layers with biases or without

    def __init__(self, hidden_size: int, num_heads: int, qk_l2_norm: bool) -> None:
        super().__init__()
        self.heads = num_heads
        self.to_q = Linear(hidden_size, hidden_size)
        self.to_k = Linear(hidden_size, hidden_size, bias=False)
        self.to_v = Linear(hidden_size, hidden_size)
        self.to_out = nn.ModuleList([Linear(hidden_size, hidden_size), nn.Identity()])
        self.log_sharpness = nn.Parameter(torch.full((num_heads,), math.log(4.0))) if qk_l2_norm else None
        self.set_processor(self._default_processor_cls())

    def normalize(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Make queries and keys (B, N, K, E) such that the usual softmax scale 1 / sqrt(E) gives the wanted scores."""
        if self.log_sharpness is None:
            return 0.25 * query, key
        sharpness = self.log_sharpness.clamp(max=math.log(MAX_ATTN_SCALE)).exp() * math.sqrt(query.shape[-1])  # (K,)
        return F.normalize(query, dim=-1) * sharpness[:, None].to(query.dtype), F.normalize(key, dim=-1)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Attend; `NextScaleAttnProcessor` lists the shapes."""
        return self.processor(self, hidden_states, attention_mask, cache, rotary)


class TextAttnProcessor(AttnProcessor):
    """Project queries, attend to ready keys and values, project back. Replaceable through `set_attn_processor`."""

    def __call__(
        self, attn: TextAttention, hidden_states: Tensor, text: KeyValue, text_mask: Tensor | None = None
    ) -> Tensor:
        """Attend to the text.

        Args:
            attn: the layer that owns the projections.
            hidden_states: (B, N, D).
            text: of `TextAttention.project_kv`.
            text_mask: bool, (B, M), True on real text tokens; None if all are.

        Returns:
            (B, N, D).
        """
        query = split_heads(attn.to_q(hidden_states), attn.heads)  # (B, N, K, E)
        return self.project_back(attn, self.attend(query, *text, text_mask))  # (B, N, D)


class TextAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention of the image to the text; no positions, no norm of queries and keys.

    Args:
        hidden_size: model width D.
        num_heads: heads K; D must be a multiple.
    """

    processor: Any  # diffusers lists only its own
    _default_processor_cls: Any = TextAttnProcessor
    _available_processors = [TextAttnProcessor]
    _supports_qkv_fusion = False
    is_cross_attention = True

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.heads = num_heads
        self.to_q = Linear(hidden_size, hidden_size)
        self.to_k = Linear(hidden_size, hidden_size, bias=False)
        self.to_v = Linear(hidden_size, hidden_size)
        self.to_out = nn.ModuleList([Linear(hidden_size, hidden_size), nn.Identity()])
        self.set_processor(self._default_processor_cls())

    def project_kv(self, text: Tensor) -> KeyValue:
        """Return keys and values of text (B, M, D), once an image."""
        key, value = self.to_k(text), self.to_v(text)  # (B, M, D) each
        return split_heads(key, self.heads), split_heads(value, self.heads)  # (B, M, K, E) each

    def forward(self, hidden_states: Tensor, text: KeyValue, text_mask: Tensor | None = None) -> Tensor:
        """Attend to the text; `TextAttnProcessor` lists the shapes."""
        return self.processor(self, hidden_states, text, text_mask)


class AttentivePoolProcessor(AttnProcessor):
    """Project keys and values, attend, project back. Replaceable through `set_attn_processor`."""

    def __call__(self, pool: AttentivePool, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Pool a text.

        Args:
            pool: the layer that owns query and projections.
            text: (B, M, Dt).
            text_mask: bool, (B, M), True on real text tokens; None if all are.

        Returns:
            (B, D).
        """
        key, value = split_heads(pool.to_k(text), pool.heads), split_heads(pool.to_v(text), pool.heads)  # (B, M, K, E)
        query = pool.query.to(key.dtype).expand(len(text), 1, -1, -1)  # (B, 1, K, E)
        return pool.proj_out(self.attend(query, key, value, text_mask).flatten(1))  # (B, D)


class AttentivePool(nn.Module, AttentionModuleMixin):
    """Pool text into one vector: a learned query attends to its tokens (the reference's attentive pool).

    Args:
        text_dim: width Dt of the text states.
        hidden_size: width D of the result.
        num_heads: heads K; D must be a multiple.
    """

    processor: Any  # diffusers lists only its own
    _default_processor_cls: Any = AttentivePoolProcessor
    _available_processors = [AttentivePoolProcessor]
    _supports_qkv_fusion = False
    is_cross_attention = True

    def __init__(self, text_dim: int, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.heads = num_heads
        self.query = nn.Parameter(torch.empty(num_heads, hidden_size // num_heads))  # (K, E)
        self.to_k = Linear(text_dim, hidden_size, bias=False)
        self.to_v = Linear(text_dim, hidden_size)
        self.proj_out = Linear(hidden_size, hidden_size)
        self.set_processor(self._default_processor_cls())

    def forward(self, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Pool; `AttentivePoolProcessor` lists the shapes."""
        return self.processor(self, text, text_mask)


class NextScaleBlock(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the condition; between them cross-attention.

    Args:
        hidden_size: model width D.
        num_heads: attention heads K.
        ff_ratio: width of the MLP over D.
        norm_eps: added to the variance by the norms.
        qk_l2_norm: see `NextScaleAttention`.
        shared_modulation: own a table to be added to the network's six vectors, not a projection of the condition.
        reads_text: whether it has cross-attention.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        ff_ratio: float,
        norm_eps: float,
        qk_l2_norm: bool,
        shared_modulation: bool,
        reads_text: bool = False,
    ) -> None:
        super().__init__()
        self.modulation = None if shared_modulation else AdaLNSingle(hidden_size)
        self.modulation_table = modulation_table(6, hidden_size) if shared_modulation else None  # (6, D)
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=norm_eps)
        self.attn = NextScaleAttention(hidden_size, num_heads, qk_l2_norm)
        self.norm_cross = nn.LayerNorm(hidden_size, eps=norm_eps) if reads_text else None
        self.cross_attn = TextAttention(hidden_size, num_heads) if reads_text else None
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=norm_eps)
        self.ff = FeedForward(hidden_size, round(hidden_size * ff_ratio))

    def modulate_by(self, condition: Tensor, shared: Tensor | None) -> Tensor:
        """Return the block's six vectors (B, 6, D), of the condition (B, D) or the shared vectors (B, 6, D)."""
        if self.modulation is not None:
            return self.modulation(condition)
        assert self.modulation_table is not None, "a block has vectors of its own or shares the network's"
        assert shared is not None, "the network shares its vectors"
        return self.modulation_table.to(shared.device) + shared  # offloading moves it in `forward` only

    def forward(
        self,
        hidden_states: Tensor,
        modulation: Tensor,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        rotary: Rotary | None = None,
        text: KeyValue | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Map tokens to tokens.

        Args:
            hidden_states: (B, N, D).
            modulation: the six vectors, (B, 6, D).
            attention_mask: see `NextScaleAttnProcessor`.
            cache: see `NextScaleAttnProcessor`.
            rotary: see `NextScaleAttnProcessor`.
            text: keys and values of `TextAttention.project_kv`, for blocks that read text.
            text_mask: see `TextAttnProcessor`.

        Returns:
            (B, N, D).
        """
        gate_a, gate_f, scale_a, scale_f, shift_a, shift_f = modulation.unsqueeze(2).unbind(1)  # (B, 1, D) each
        # self-attention over all scales so far
        normed = modulate(self.norm1(hidden_states), shift_a, scale_a)  # (B, N, D)
        hidden_states = hidden_states + gate_a * self.attn(normed, attention_mask, cache, rotary)  # (B, N, D)
        # cross-attention to the text
        if self.cross_attn is not None and self.norm_cross is not None:
            hidden_states = hidden_states + self.cross_attn(self.norm_cross(hidden_states), text, text_mask)
        # MLP
        fed = self.ff(modulate(self.norm2(hidden_states), shift_f, scale_f))  # (B, N, D)
        return hidden_states + gate_f * fed  # (B, N, D)
