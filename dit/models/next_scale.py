"""Transformer that paints a picture scale by scale (VAR, arXiv 2404.02905).

A picture is a pyramid of token maps. The network sees the picture of all coarser scales, shrunk to the size of the next
one, and predicts all tokens of that scale at once. Three entries: `prepare_condition` computes once per picture what
does not change from scale to scale, `step` predicts one scale against a cache of the earlier ones, and `forward`
predicts all scales of known pictures in one masked pass, for training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from dit.attention import attention
from dit.cache import ScaleKVCache
from dit.layers.feed_forward import FeedForward
from dit.layers.modulation import AdaLNSingle, modulate, modulation_table
from dit.layers.scales import block_causal_mask, scale_grids, token_counts, token_scales, token_slices

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
"""Sides of the token maps for pictures of 256 pixels: 680 tokens."""

SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
"""Sides of the token maps for pictures of 512 pixels: 2240 tokens."""

PRESETS: dict[str, dict[str, Any]] = {
    f"VAR-d{depth}": {
        "scales": SCALES_512 if depth == 36 else SCALES_256,
        "num_layers": depth,
        "num_attention_heads": depth,
        "attention_head_dim": 64,
        "shared_modulation": depth == 36,
    }
    for depth in (16, 20, 24, 30, 36)
}
"""Configurations by their published names, for example "VAR-d16"."""

MAX_SHARPNESS = 100.0
"""Upper limit of what a head multiplies its cosine similarities with."""


@dataclass(frozen=True, slots=True)
class NextScaleCondition:
    """What the condition contributes to every scale of a picture.

    Attributes:
        start: input of the first scale, (B, N0, D).
        modulation: of each block, (B, 6, D): two gates, two scales, two shifts (attention's and the perceptron's).
        modulation_out: before the head, (B, 2, D): scale, shift.
    """

    start: Tensor
    modulation: tuple[Tensor, ...]
    modulation_out: Tensor

    def select(self, rows: Tensor) -> NextScaleCondition:
        """Keep, drop, repeat or reorder rows of the batch by indices (B',)."""
        chosen = tuple(one.index_select(0, rows) for one in self.modulation)
        return NextScaleCondition(self.start.index_select(0, rows), chosen, self.modulation_out.index_select(0, rows))


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's way into the cache at one scale."""

    cache: ScaleKVCache
    layer: int
    scale: int

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, N, K, E); returns those of all scales so far, (B, M, K, E)."""
        return self.cache.append(self.layer, self.scale, key, value)


class NextScaleAttnProcessor:
    """Project, normalise, remember, attend, project back. Replaceable through `set_attn_processor`."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: NextScaleAttention,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend to all scales so far.

        Args:
            attn: the layer that owns the projections.
            hidden_states: (B, N, D), one scale with a cache, else all of them.
            attention_mask: bool, broadcastable to (B, K, N, M).
            cache: earlier scales of this layer; the current one is added.

        Returns:
            (B, N, D).
        """
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))  # (B, N, K, E)
        key = attn.to_k(hidden_states).unflatten(-1, (attn.heads, -1))  # (B, N, K, E)
        value = attn.to_v(hidden_states).unflatten(-1, (attn.heads, -1))  # (B, N, K, E)
        query, key = attn.normalize(query, key)
        if cache is not None:
            key, value = cache.append(key, value)  # (B, M, K, E)
        out = attention(
            query,
            key,
            value,
            attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )  # (B, N, K, E)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))  # (B, N, D)


class NextScaleAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention over cosine similarities, each head with a learned sharpness (arXiv 2111.09883, 3.3).

    Args:
        hidden_size: model width D.
        num_heads: heads K; D must be a multiple.
        qk_l2_norm: compare directions; False compares vectors, at a quarter of the usual softmax scale, as the
            reference does.
    """

    _default_processor_cls = NextScaleAttnProcessor
    _available_processors = [NextScaleAttnProcessor]
    _supports_qkv_fusion = False  # keys have no bias, and diffusers fuses layers with biases or without

    def __init__(self, hidden_size: int, num_heads: int, qk_l2_norm: bool) -> None:
        super().__init__()
        self.heads = num_heads
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size, bias=False)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size), nn.Identity()])
        self.log_sharpness = nn.Parameter(torch.full((num_heads,), math.log(4.0))) if qk_l2_norm else None
        self.set_processor(self._default_processor_cls())

    def normalize(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Make queries and keys (B, N, K, E) such that the usual softmax scale 1 / sqrt(E) gives the wanted scores."""
        if self.log_sharpness is None:
            return 0.25 * query, key
        sharpness = self.log_sharpness.clamp(max=math.log(MAX_SHARPNESS)).exp() * math.sqrt(query.shape[-1])  # (K,)
        return F.normalize(query, dim=-1) * sharpness[:, None].to(query.dtype), F.normalize(key, dim=-1)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Attend; see `NextScaleAttnProcessor` for the shapes."""
        return self.processor(self, hidden_states, attention_mask, cache)


class NextScaleBlock(nn.Module):
    """Attention and perceptron, each scaled, shifted and gated by the condition.

    Args:
        hidden_size: model width D.
        num_heads: attention heads K.
        ff_ratio: width of the perceptron over D.
        norm_eps: added to the variance by the norms.
        qk_l2_norm: see `NextScaleAttention`.
        shared_modulation: own a table to be added to the network's six vectors, not a projection of the condition.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        ff_ratio: float,
        norm_eps: float,
        qk_l2_norm: bool,
        shared_modulation: bool,
    ) -> None:
        super().__init__()
        self.modulation = None if shared_modulation else AdaLNSingle(hidden_size)
        self.modulation_table = modulation_table(6, hidden_size) if shared_modulation else None  # (6, D)
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=norm_eps)
        self.attn = NextScaleAttention(hidden_size, num_heads, qk_l2_norm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=norm_eps)
        self.ff = FeedForward(hidden_size, int(hidden_size * ff_ratio))

    def modulate_by(self, condition: Tensor, shared: Tensor | None) -> Tensor:
        """This block's six vectors (B, 6, D) from the condition (B, D) or the network's shared vectors (B, 6, D)."""
        return self.modulation(condition) if self.modulation is not None else self.modulation_table + shared

    def forward(
        self,
        hidden_states: Tensor,
        modulation: Tensor,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Map tokens (B, N, D), given the six vectors (B, 6, D), to tokens (B, N, D)."""
        gate_a, gate_f, scale_a, scale_f, shift_a, shift_f = modulation.unsqueeze(2).unbind(1)  # (B, 1, D) each
        attended = self.attn(modulate(self.norm1(hidden_states), shift_a, scale_a), attention_mask, cache)  # (B, N, D)
        hidden_states = hidden_states + gate_a * attended  # (B, N, D)
        fed = self.ff(modulate(self.norm2(hidden_states), shift_f, scale_f))  # (B, N, D)
        return hidden_states + gate_f * fed  # (B, N, D)


class NextScaleTransformer(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    """Class-conditional next-scale transformer, numerically the released VAR.

    Args:
        scales: sides of the token maps, coarse to fine; pairs are rows and columns.
        latent_channels: channels C of the tokenizer's latents.
        vocab_size: entries V of the tokenizer's codebook.
        num_layers: number of blocks.
        num_attention_heads: heads K.
        attention_head_dim: head width E; the model width is D = K E.
        ff_ratio: width of the perceptron over D.
        num_classes: number of labels; label `num_classes` means 'no class'.
        class_dropout_prob: share of labels that `forward` replaces by 'no class' in training mode.
        shared_modulation: one projection of the condition for all blocks (VAR-d36), not one a block.
        qk_l2_norm: attend by cosine similarity; all released models do.
        norm_eps: added to the variance by the norms.

    Raises:
        ValueError: scales that shrink, or none.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["NextScaleBlock"]
    _repeated_blocks: ClassVar = ["NextScaleBlock"]
    _skip_layerwise_casting_patterns: ClassVar = ["embed", "norm", "modulation", "log_sharpness", "proj_out"]

    @register_to_config
    def __init__(
        self,
        scales: tuple[int | tuple[int, int], ...] = SCALES_256,
        latent_channels: int = 32,
        vocab_size: int = 4096,
        num_layers: int = 16,
        num_attention_heads: int = 16,
        attention_head_dim: int = 64,
        ff_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        shared_modulation: bool = False,
        qk_l2_norm: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.grids = scale_grids(scales)
        self.slices = token_slices(self.grids)
        self.hidden_size = hidden_size = num_attention_heads * attention_head_dim
        self.class_embed = nn.Embedding(num_classes + 1, hidden_size)
        self.start_embed = nn.Parameter(torch.empty(self.slices[0].stop, hidden_size))  # (N0, D)
        self.pos_embed = nn.Parameter(torch.empty(self.slices[-1].stop, hidden_size))  # (L, D)
        self.scale_embed = nn.Embedding(len(self.grids), hidden_size)
        self.code_embed = nn.Linear(latent_channels, hidden_size)
        self.adaln_single = AdaLNSingle(hidden_size) if shared_modulation else None
        self.transformer_blocks = nn.ModuleList(
            [
                NextScaleBlock(hidden_size, num_attention_heads, ff_ratio, norm_eps, qk_l2_norm, shared_modulation)
                for _ in range(num_layers)
            ]
        )
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.norm_out = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=norm_eps)
        self.proj_out = nn.Linear(hidden_size, vocab_size)
        self.gradient_checkpointing = False
        self._initialize()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> NextScaleTransformer:
        """Build an untrained model by its published name.

        Args:
            name: a key of `PRESETS`, for example "VAR-d16".
            **overrides: arguments of the constructor that differ.

        Raises:
            ValueError: the name is unknown.
        """
        if name not in PRESETS:
            raise ValueError(f"{name!r} is not a preset; use one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @torch.no_grad()
    def _initialize(self) -> None:
        """The released recipe: narrow weights, closed gates, and branches that shrink with the depth."""
        std = (3 * self.hidden_size) ** -0.5
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.trunc_normal_(parameter, std=std)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.proj_out.weight.mul_(0.02)
        self.modulation_out.weight.mul_(0.5)
        for block in self.transformer_blocks:
            own = block.modulation_table if block.modulation is None else block.modulation.linear.weight
            if block.modulation is None:
                nn.init.normal_(own, std=self.hidden_size**-0.5)
            gates, rest = own.unflatten(0, (6, -1)).split((2, 4))  # the gates are the first two of six
            gates.mul_(1e-5)
            rest.mul_(0.5)
            for last in (block.attn.to_out[0], block.ff.net[2]):
                last.weight.div_(math.sqrt(2 * len(self.transformer_blocks)))

    # --------------------------------------------------------------- generation

    @apply_forward_hook
    def prepare_condition(self, class_labels: Tensor) -> NextScaleCondition:
        """Compute what does not change from scale to scale.

        Args:
            class_labels: (B,), int; `num_classes` means 'no class'.

        Returns:
            The condition of `step`.
        """
        condition = self.class_embed(class_labels)  # (B, D)
        shared = None if self.adaln_single is None else self.adaln_single(condition)  # (B, 6, D)
        return NextScaleCondition(
            start=condition[:, None] + self.start_embed,  # (B, N0, D)
            modulation=tuple(block.modulate_by(condition, shared) for block in self.transformer_blocks),
            modulation_out=self.modulation_out(F.silu(condition)).unflatten(-1, (2, -1)),  # (B, 2, D)
        )

    def make_cache(self, batch_size: int, policy: str = "full") -> ScaleKVCache:
        """An empty cache for one run of `step` over all scales.

        Args:
            batch_size: rows B; with guidance both branches count.
            policy: what to keep, see `dit.cache.POLICIES`.
        """
        config = self.config
        return ScaleKVCache(
            token_counts(self.grids),
            config.num_layers,
            batch_size,
            config.num_attention_heads,
            config.attention_head_dim,
            dtype=self.dtype,
            device=self.start_embed.device,
            policy=policy,
        )

    @apply_lora_scale("attention_kwargs")
    @apply_forward_hook
    def step(
        self,
        codes: Tensor | None,
        scale: int,
        condition: NextScaleCondition,
        cache: ScaleKVCache,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """Predict the tokens of one scale.

        Args:
            codes: the picture so far at this scale's size, (B, N, C); None at scale 0, which starts from the condition.
            scale: index of the scale; a run goes through all of them in order.
            condition: of `prepare_condition`, for the same B rows.
            cache: of `make_cache`; this scale is added.
            attention_kwargs: `{"scale": s}` scales LoRA adapters.

        Returns:
            Logits, (B, N, V), float32.

        Raises:
            ValueError: codes of another size than this scale's, or a scale out of order.
        """
        expected = self.slices[scale].stop - self.slices[scale].start
        if (codes is None) != (scale == 0) or (codes is not None and codes.shape[1] != expected):
            found = None if codes is None else tuple(codes.shape)
            wanted = "None" if scale == 0 else f"(B, {expected}, {self.config.latent_channels})"
            raise ValueError(f"codes of scale {scale} are {found}, expected {wanted}")
        tokens = condition.start if codes is None else self.code_embed(codes.to(self.dtype))  # (B, N, D)
        hidden_states = tokens + self.pos_embed[self.slices[scale]] + self.scale_embed.weight[scale]  # (B, N, D)
        for layer, block in enumerate(self.transformer_blocks):
            hidden_states = block(
                hidden_states, condition.modulation[layer], None, LayerCache(cache, layer, scale)
            )  # (B, N, D)
        return self._logits(hidden_states, condition)  # (B, N, V)

    def _logits(self, hidden_states: Tensor, condition: NextScaleCondition) -> Tensor:
        """From tokens (B, N, D) to logits (B, N, V), float32."""
        scale, shift = condition.modulation_out.unsqueeze(2).unbind(1)  # (B, 1, D) each
        return self.proj_out(modulate(self.norm_out(hidden_states), shift, scale)).float()  # (B, N, V)

    # ----------------------------------------------------------------- training

    def _drop_labels(self, labels: Tensor) -> Tensor:
        """Replace some labels (B,) by 'no class' in training mode, so that guidance has something to push away from."""
        if not self.training or self.config.class_dropout_prob == 0:
            return labels
        dropped = torch.rand(labels.shape, device=labels.device) < self.config.class_dropout_prob  # (B,)
        return labels.masked_fill(dropped, self.config.num_classes)  # (B,)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        class_labels: Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the tokens of all scales from the true coarser ones (teacher forcing).

        Args:
            hidden_states: the picture before each scale from the second on, at that scale's size, all in one row:
                (B, L - N0, C); see `teacher_inputs` of the tokenizer.
            class_labels: (B,), int; `num_classes` means 'no class'.
            attention_kwargs: `{"scale": s}` scales LoRA adapters.
            return_dict: return an object with `.sample` rather than a tuple.

        Returns:
            Logits, (B, L, V), float32.

        Raises:
            ValueError: another number of tokens than the schedule has.
        """
        expected = self.slices[-1].stop - self.slices[0].stop
        if hidden_states.shape[1] != expected:
            raise ValueError(
                f"got {hidden_states.shape[1]} tokens, expected {expected}: those of the scales {list(self.grids[1:])}"
            )
        class_labels = self._drop_labels(class_labels)  # (B,)
        condition = self.prepare_condition(class_labels)
        device = hidden_states.device
        tokens = torch.cat([condition.start, self.code_embed(hidden_states.to(self.dtype))], dim=1)  # (B, L, D)
        tokens = tokens + self.pos_embed + self.scale_embed(token_scales(self.grids, device))  # (B, L, D)
        mask = block_causal_mask(self.grids, device)  # (1, 1, L, L)
        for block, modulation in zip(self.transformer_blocks, condition.modulation, strict=True):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, modulation, mask)
            else:
                tokens = block(tokens, modulation, mask)  # (B, L, D)
        logits = self._logits(tokens, condition)  # (B, L, V)
        return Transformer2DModelOutput(sample=logits) if return_dict else (logits,)
