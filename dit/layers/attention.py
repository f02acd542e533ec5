"""The attention layer of our networks: projections in diffusers' names around `dit.attention.attention`.

Helpers of our other attention layers are here too: split into heads, rotate, attend, project back.
"""

from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn

from dit.attention import TokenGrid, attention
from dit.layers.frame_memory import LayerMemory
from dit.layers.linear import Linear
from dit.layers.norms import RMSNorm
from dit.layers.positions import Rotary, apply_rotary


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Cut channels into heads: (B, N, D) to (B, N, K, E)."""
    return x.unflatten(-1, (heads, -1))


def apply_rotary_qk(query: Tensor, key: Tensor, rotary: Rotary | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Apply rotary embeddings, if any, to queries and keys (B, N, K, E), and cast them to the values' dtype.

    Under autocast norms compute in float32, and kernels want one dtype.
    """
    if rotary is not None:
        query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
    return query.to(dtype), key.to(dtype)


class Projections:
    """How a processor uses the projections of its layer."""

    @staticmethod
    def project(attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project tokens (B, N, D) to normalised queries, keys, and values, (B, N, K, E) each."""
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)  # (B, N, D) each
        else:
            query = attn.to_q(hidden_states)  # (B, N, D)
            key = attn.to_k(hidden_states)  # (B, N, D)
            value = attn.to_v(hidden_states)  # (B, N, D)
        query, key, value = (split_heads(x, attn.heads) for x in (query, key, value))  # (B, N, K, E)
        return attn.norm_q(query), attn.norm_k(key), value

    @staticmethod
    def project_back(attn: Any, out: Tensor) -> Tensor:
        """Join the heads (B, N, K, E) and project them back, (B, N, D)."""
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


class AttnProcessor(Projections):
    """Attention of a layer, with the backend and the parallelism that diffusers set on it."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Call `dit.attention.attention` with the chosen backend, (B, N, K, E)."""
        return attention(
            query,
            key,
            value,
            attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )


class SelfAttnProcessor(AttnProcessor):
    """Project, normalise, rotate, attend, project back. Replaceable through `set_attn_processor`."""

    def __call__(
        self,
        attn: "SelfAttention",
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        memory: LayerMemory | None = None,
    ) -> Tensor:
        """Attend among all tokens.

        Args:
            attn: the layer that owns the projections.
            hidden_states: (B, N, D).
            attention_mask: bool, (B, N), True for tokens that may be attended to; or of pairs, (B, 1, N, M + N).
            image_rotary_emb: (cos, sin), each (N, E).
            memory: keys and values of M tokens that are attended to as well.

        Returns:
            (B, N, D).
        """
        query, key, value = self.project(attn, hidden_states)  # (B, N, K, E)
        query, key = apply_rotary_qk(query, key, image_rotary_emb, value.dtype)
        if memory is not None:
            key, value = memory.extend(key, value)  # (B, M + N, K, E)
        return self.project_back(attn, self.attend(query, key, value, attention_mask))  # (B, N, D)


class SelfAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention.

    Args:
        hidden_size: model width D.
        num_heads: heads K; D must be a multiple.
        bias: whether the projections of query, key and value have a bias.
        qk_norm: normalise queries and keys per head by an RMS norm (arXiv 2302.05442).
    """

    processor: Any  # diffusers lists only its own
    _default_processor_cls: Any = SelfAttnProcessor
    _available_processors = [SelfAttnProcessor]

    def __init__(self, hidden_size: int, num_heads: int, *, bias: bool = True, qk_norm: bool = True) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"a width of {hidden_size} can't be split into {num_heads} heads; use a divisor of it")
        self.heads = num_heads
        self.use_bias = bias  # read by diffusers' fuse_projections
        self.is_cross_attention = False
        self.to_q = Linear(hidden_size, hidden_size, bias=bias)
        self.to_k = Linear(hidden_size, hidden_size, bias=bias)
        self.to_v = Linear(hidden_size, hidden_size, bias=bias)
        self.to_out = nn.ModuleList([Linear(hidden_size, hidden_size), nn.Identity()])
        head_dim = hidden_size // num_heads
        self.norm_q = RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.set_processor(self._default_processor_cls())

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        memory: LayerMemory | None = None,
        grid: TokenGrid | None = None,
    ) -> Tensor:
        """Attend; `SelfAttnProcessor` lists the shapes, `dit.attention.trainable` has processors that use the grid."""
        known: dict[str, Any] = {} if memory is None else {"memory": memory}  # other processors may know none
        if getattr(self.processor, "takes_grid", False):
            known["grid"] = grid
        return self.processor(self, hidden_states, attention_mask, image_rotary_emb, **known)


class CrossAttnProcessor(AttnProcessor):
    """Project, attend to another sequence, project back. Replaceable through `set_attn_processor`."""

    def __call__(
        self,
        attn: "CrossAttention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend to another sequence.

        Args:
            attn: the layer that owns the projections.
            hidden_states: (B, N, D).
            encoder_hidden_states: (B, M, D).
            attention_mask: bool, (B, M), True for tokens that may be attended to; `never_empty` keeps it well defined.

        Returns:
            (B, N, D).
        """
        query = split_heads(attn.to_q(hidden_states), attn.heads)  # (B, N, K, E)
        key = split_heads(attn.to_k(encoder_hidden_states), attn.heads)  # (B, M, K, E)
        value = split_heads(attn.to_v(encoder_hidden_states), attn.heads)  # (B, M, K, E)
        return self.project_back(attn, self.attend(query, key, value, attention_mask))  # (B, N, D)


class CrossAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention to another sequence of the same width.

    Args:
        hidden_size: model width D.
        num_heads: heads K; D must be a multiple.
        bias: whether the projections of query, key and value have a bias.
    """

    processor: Any  # diffusers lists only its own
    _default_processor_cls: Any = CrossAttnProcessor
    _available_processors = [CrossAttnProcessor]
    _supports_qkv_fusion = False
    is_cross_attention = True

    def __init__(self, hidden_size: int, num_heads: int, *, bias: bool = True) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"a width of {hidden_size} can't be split into {num_heads} heads; use a divisor of it")
        self.heads = num_heads
        self.to_q = Linear(hidden_size, hidden_size, bias=bias)
        self.to_k = Linear(hidden_size, hidden_size, bias=bias)
        self.to_v = Linear(hidden_size, hidden_size, bias=bias)
        self.to_out = nn.ModuleList([Linear(hidden_size, hidden_size), nn.Identity()])
        self.set_processor(self._default_processor_cls())

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Attend; `CrossAttnProcessor` lists the shapes."""
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask)


def never_empty(mask: Tensor | None) -> Tensor | None:
    """Make a mask of keys (B, M) bool; a sample without a key sees all of them: a softmax over none is undefined."""
    if mask is None:
        return None
    mask = mask.bool()
    return mask | ~mask.any(dim=1, keepdim=True)  # (B, M)
