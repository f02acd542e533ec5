"""Transformer that generates an image scale by scale (VAR, arXiv 2404.02905; Infinity, arXiv 2412.04431).

An image is a pyramid of token maps. The network sees the image of all coarser scales, shrunk to the size of the next
one, and predicts all tokens of that scale at once. Three entries: `prepare_condition` computes once per image what
does not change from scale to scale, `step` predicts one scale against a cache of the earlier ones, and `forward`
predicts all scales of known images in one masked pass, for training.

VAR and Infinity are configurations: what conditions the image (labels or text), how positions are encoded (learned or
rotary), and what is predicted of a token (its entry in a codebook, or each of its bits).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from dit.cache import CachePlan, KVProfile, Observer, ScaleKVCache, find_table, plan_cache
from dit.layers.linear import Linear
from dit.layers.modulation import AdaLNSingle, modulate
from dit.layers.next_scale_block import AttentivePool, KeyValue, LayerCache, NextScaleBlock
from dit.layers.norms import RMSNorm
from dit.layers.positions import Rotary, rotary_embedding
from dit.layers.resolutions import SCALE_SCHEDULES, reference_grid, scale_positions
from dit.layers.scales import Grid, block_causal_mask, scale_grids, token_counts, token_scales, token_slices
from dit.runtime._typing import Typed

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
"""Sides of VAR's token maps for images of 256 pixels: 680 tokens."""

SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
"""Sides of VAR's token maps for images of 512 pixels: 2240 tokens."""


def _var(depth: int) -> dict[str, Any]:
    """Return the configuration of VAR-d<depth>."""
    return {
        "scales": SCALES_512 if depth == 36 else SCALES_256,
        "num_layers": depth,
        "num_attention_heads": depth,
        "attention_head_dim": 64,
        "shared_modulation": depth == 36,
    }


def _infinity(depth: int, heads: int, head_dim: int, bits: int = 32, patchify: int = 1) -> dict[str, Any]:
    """Return the configuration of an Infinity for images of about a million pixels."""
    width = heads * head_dim
    return {
        "scales": tuple(rows for rows, _ in SCALE_SCHEDULES[1.0]),
        "latent_channels": bits,
        "patchify": patchify,
        "num_layers": depth,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "ff_ratio": round(4 * width / 256) * 256 / width,
        "shared_modulation": True,
        "text_dim": 2048,
        "bitwise": True,
        "positions": "rotary",
        "max_scales": 15,
    }


PRESETS: dict[str, dict[str, Any]] = {
    **{f"VAR-d{depth}": _var(depth) for depth in (16, 20, 24, 30, 36)},
    "Infinity-125M": _infinity(12, 8, 96),
    "Infinity-2B": _infinity(32, 16, 128),
    "Infinity-8B": _infinity(40, 28, 128, bits=14, patchify=2),
}
"""Configurations by their published names, for example "VAR-d16"."""

POSITIONS = ("learned", "rotary")
"""How the network encodes token positions."""


@dataclass(frozen=True, slots=True)
class NextScaleCondition:
    """What the condition contributes to every scale of an image.

    Attributes:
        start: input of the first scale, (B, N0, D).
        modulation: of each block, (B, 6, D): two gates, two scales, two shifts (attention's and the MLP's).
        modulation_out: before the head, (B, 2, D): scale, shift.
        grids: rows and columns of each scale.
        text: of each block, keys and values of the text, (B, M, K, E) each; empty without text.
        text_mask: (B, M), bool, True on real text tokens; None if all are.
        rotary: of each scale, (cos, sin), each (N, E); empty with learned positions.
    """

    start: Tensor
    modulation: tuple[Tensor, ...]
    modulation_out: Tensor
    grids: tuple[Grid, ...]
    text: tuple[KeyValue, ...] = ()
    text_mask: Tensor | None = None
    rotary: tuple[Rotary, ...] = ()

    def select(self, rows: Tensor) -> NextScaleCondition:
        """Keep, drop, repeat or reorder rows of the batch by indices (B',)."""
        return replace(
            self,
            start=self.start.index_select(0, rows),
            modulation=tuple(one.index_select(0, rows) for one in self.modulation),
            modulation_out=self.modulation_out.index_select(0, rows),
            text=tuple((key.index_select(0, rows), value.index_select(0, rows)) for key, value in self.text),
            text_mask=None if self.text_mask is None else self.text_mask.index_select(0, rows),
        )

    def block_kwargs(self, layer: int) -> dict[str, Any]:
        """Return what a block gets at every scale, by the names of `NextScaleBlock.forward`."""
        text = self.text[layer] if self.text else None
        return {"modulation": self.modulation[layer], "text": text, "text_mask": self.text_mask}


class NextScaleTransformer(Typed, ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    """Next-scale transformer, numerically the released VAR or Infinity.

    With `text_dim` the condition is text, which is pooled into one vector (it starts the image and modulates every
    layer) and read by every block through cross-attention; else it is a class label.

    Args:
        scales: sides of the token maps, coarse to fine; pairs are rows and columns.
        latent_channels: channels C of the tokenizer's latents.
        vocab_size: entries V of the tokenizer's codebook; not used with `bitwise`.
        num_layers: number of blocks.
        num_attention_heads: heads K.
        attention_head_dim: head width E; the model width is D = K E.
        ff_ratio: width of the MLP over D.
        num_classes: number of labels; label `num_classes` means 'no class'. Not used with `text_dim`.
        class_dropout_prob: fraction of labels that `forward` replaces by 'no class' in training mode, or of texts that
            it replaces by the null text.
        shared_modulation: one projection of the condition for all blocks (VAR-d36, Infinity), not one a block.
        qk_l2_norm: attend by cosine similarity; all released models do.
        norm_eps: added to the variance by the norms.
        text_dim: width Dt of the text states; None for class labels.
        text_max_length: longest text that can be left empty.
        text_pool_heads: heads that pool the text.
        bitwise: predict each bit of a token, not its entry in a codebook.
        patchify: latent pixels along a side of a token; its inputs are C p p numbers.
        positions: one of `POSITIONS`. "learned": a vector a token, for this schedule only; "rotary": rotated queries
            and keys (arXiv 2104.09864), for any schedule, with rows and columns of all scales counted on one map.
        max_scales: longest schedule; None is the length of `scales`.

    Raises:
        ValueError: scales that shrink, or none; heads that don't divide the width; unknown positions.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["NextScaleBlock"]
    _repeated_blocks: ClassVar = ["NextScaleBlock"]
    _skip_layerwise_casting_patterns: ClassVar = ["embed", "norm", "modulation", "log_sharpness", "proj_out", "text_"]

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
        text_dim: int | None = None,
        text_max_length: int = 512,
        text_pool_heads: int = 16,
        bitwise: bool = False,
        patchify: int = 1,
        positions: str = "learned",
        max_scales: int | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size = num_attention_heads * attention_head_dim
        self.grids = scale_grids(scales)
        self.slices = token_slices(self.grids)
        _check_choices(hidden_size, text_dim, text_pool_heads, positions, attention_head_dim)
        if text_dim is None:
            self.class_embed = nn.Embedding(num_classes + 1, hidden_size)
        else:
            self.null_text = nn.Parameter(torch.empty(text_max_length, text_dim))  # (M, Dt)
            self.text_norm = RMSNorm(text_dim, norm_eps)
            self.text_pool = AttentivePool(text_dim, hidden_size, text_pool_heads)
            self.text_proj = PixArtAlphaTextProjection(text_dim, hidden_size)
        self.start_embed = nn.Parameter(torch.empty(self.slices[0].stop, hidden_size))  # (N0, D)
        learned = positions == "learned"
        self.pos_embed = nn.Parameter(torch.empty(self.slices[-1].stop, hidden_size)) if learned else None  # (L, D)
        self.scale_embed = nn.Embedding(max_scales or len(self.grids), hidden_size)
        self.code_embed = Linear(self.code_size, hidden_size)
        self.adaln_single = AdaLNSingle(hidden_size) if shared_modulation else None
        shape = (hidden_size, num_attention_heads, ff_ratio, norm_eps, qk_l2_norm, shared_modulation)
        self.transformer_blocks: Any = nn.ModuleList(
            [NextScaleBlock(*shape, reads_text=text_dim is not None) for _ in range(num_layers)]
        )
        self.modulation_out = Linear(hidden_size, 2 * hidden_size)
        self.norm_out = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=norm_eps)
        self.proj_out = Linear(hidden_size, 2 * self.code_size if bitwise else vocab_size)
        self.gradient_checkpointing = False
        self._initialize()

    @property
    def code_size(self) -> int:
        """Numbers that the network sees of a token: C p p. With `bitwise` also the bits that it predicts."""
        return self.config.latent_channels * self.config.patchify**2

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
        """Initialize as released: narrow weights, closed gates, and branches that shrink with the depth."""
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
            for last in (block.attn, block.cross_attn, block.ff):
                if last is not None:
                    layer = last.net[2] if last is block.ff else last.to_out[0]
                    layer.weight.div_(math.sqrt(2 * len(self.transformer_blocks)))
        if self.config.text_dim is not None:
            nn.init.trunc_normal_(self.null_text, std=1.2 / math.sqrt(self.config.text_dim))

    # ---------------------------------------------------------------- condition
    # Offloading layer by layer brings weights over for calls of their module. What lies beside the modules, or is read
    # without a call, is brought over by hand: `.to(device)` below does nothing elsewhere.

    @apply_forward_hook
    def null_text_embeds(self, length: int, batch_size: int = 1) -> Tensor:
        """Return the learned null text of guidance's unconditional branch, as long as the text it replaces.

        Args:
            length: text tokens M.
            batch_size: rows B.

        Returns:
            (B, M, Dt); it goes with the mask of the replaced text.

        Raises:
            ValueError: the network reads no text, or none of this length.
        """
        if self.config.text_dim is None:
            raise ValueError("this transformer reads class labels, not text: 'no class' is the label after the last")
        if not 1 <= length <= len(self.null_text):
            raise ValueError(f"a text of {length} tokens can't be left empty: expected 1 to {len(self.null_text)}")
        return self.null_text[:length].expand(batch_size, -1, -1)  # (B, M, Dt)

    @apply_lora_scale("attention_kwargs")
    @apply_forward_hook
    def prepare_condition(
        self,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        grids: Sequence[Grid] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> NextScaleCondition:
        """Compute what does not change from scale to scale.

        Args:
            class_labels: (B,), int; `num_classes` means 'no class'. For networks of labels.
            encoder_hidden_states: text states, (B, M, Dt). For networks of text.
            encoder_attention_mask: (B, M), bool, True on real text tokens, at least one a row; None if all are.
            grids: rows and columns of each scale; None is the schedule of the configuration.
            attention_kwargs: `{"scale": s}` scales LoRA adapters.

        Returns:
            The condition of `step`.

        Raises:
            ValueError: labels for a network of text or the other way round; a schedule that it can't generate.
        """
        grids = self._check_schedule(grids)
        condition, text = self._embed_condition(class_labels, encoder_hidden_states, encoder_attention_mask)
        shared = None if self.adaln_single is None else self.adaln_single(condition)  # (B, 6, D)
        return NextScaleCondition(
            start=condition[:, None] + self.start_embed.to(condition.device),  # (B, N0, D)
            modulation=tuple(block.modulate_by(condition, shared) for block in self.transformer_blocks),
            modulation_out=self.modulation_out(F.silu(condition)).unflatten(-1, (2, -1)),  # (B, 2, D)
            grids=grids,
            text=() if text is None else tuple(block.cross_attn.project_kv(text) for block in self.transformer_blocks),
            text_mask=encoder_attention_mask,
            rotary=self._rotary(grids, condition.device),
        )

    def _embed_condition(
        self, labels: Tensor | None, text: Tensor | None, text_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the condition as one vector (B, D), and the text as the blocks read it, (B, M, D)."""
        wants_text = self.config.text_dim is not None
        if (text is None) == wants_text or (labels is None) != wants_text:
            wanted = "encoder_hidden_states and no class_labels" if wants_text else "class_labels and no text"
            raise ValueError(f"this transformer needs {wanted}")
        if text is None:
            return self.class_embed(labels), None
        text = self.text_norm(text.to(self.dtype))  # (B, M, Dt)
        return self.text_pool(text, text_mask), self.text_proj(text)

    def _check_schedule(self, grids: Sequence[Grid] | None) -> tuple[Grid, ...]:
        """Return the schedule to generate, by default the configuration's."""
        if grids is None:
            return self.grids
        grids = scale_grids(grids)
        if self.pos_embed is not None and grids != self.grids[: len(grids)]:
            raise ValueError(
                f"learned positions fit the schedule {list(self.grids)}, or its first scales, only; got {list(grids)}"
            )
        if len(grids) > self.scale_embed.num_embeddings or grids[0] != self.grids[0]:
            raise ValueError(
                f"the schedule {list(grids)} does not fit this transformer: expected at most "
                f"{self.scale_embed.num_embeddings} scales, the first of size {self.grids[0]}"
            )
        return grids

    def _rotary(self, grids: tuple[Grid, ...], device: torch.device) -> tuple[Rotary, ...]:
        """Return rotary angles of each scale, (cos, sin), each (N, E); none with learned positions."""
        if self.pos_embed is not None:
            return ()
        half, reference = self.config.attention_head_dim // 2, reference_grid(grids)
        positions = [scale_positions(grid, reference, device) for grid in grids]  # (N, 2) each
        return tuple(rotary_embedding(position, (half, half)) for position in positions)

    # --------------------------------------------------------------- generation

    def plan_cache(
        self,
        policy: str = "full",
        budget: float = 0.1,
        grids: Sequence[Grid] | None = None,
        profile: KVProfile | None = None,
        **settings: int,
    ) -> CachePlan:
        """Divide a budget of cached tokens among layers and scales.

        Args:
            policy: what to keep, see `dit.cache.POLICIES`.
            budget: fraction of the full history that a layer keeps on average.
            grids: the schedule; None is the one of the configuration.
            profile: of a calibration, for "scalekv"; without it the authors' table is taken, if the network has one.
            **settings: `observe`, `sinks`, `pool` of `dit.cache.CachePlan`.

        Raises:
            ValueError: see `dit.cache.plan_cache`.
        """
        counts = token_counts(self._check_schedule(grids))
        table = find_table(self.config.num_layers, self.hidden_size, len(counts))
        return plan_cache(policy, counts, self.config.num_layers, budget, table=table, profile=profile, **settings)

    def make_cache(
        self,
        batch_size: int,
        policy: str = "full",
        grids: Sequence[Grid] | None = None,
        *,
        budget: float = 0.1,
        plan: CachePlan | None = None,
        kv_dtype: str = "auto",
        observer: Observer | None = None,
    ) -> ScaleKVCache:
        """Return an empty cache for one run of `step` over all scales.

        Args:
            batch_size: rows B; with guidance both branches count.
            policy: what to keep, see `dit.cache.POLICIES`.
            grids: the schedule of the condition.
            budget: fraction of the full history to keep.
            plan: what to keep, instead of policy and budget; that of a run which ends early holds fewer scales.
            kv_dtype: how to store, see `dit.cache.KV_DTYPES`.
            observer: sees every attention call, for calibration.
        """
        config, grids = self.config, self._check_schedule(grids)
        plan = plan or self.plan_cache(policy, budget, grids)
        return ScaleKVCache(
            token_counts(grids)[: len(plan.token_counts)],
            config.num_layers,
            batch_size,
            config.num_attention_heads,
            config.attention_head_dim,
            dtype=self.dtype,
            device=self.device,
            plan=plan,
            kv_dtype=kv_dtype,
            grids=grids,
            observer=observer,
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
            codes: the image so far at this scale's size, (B, N, C p p); None at scale 0, which starts from the
                condition.
            scale: index of the scale; a run goes through all of them in order.
            condition: of `prepare_condition`, for the same B rows.
            cache: of `make_cache`, for the same schedule; this scale is added.
            attention_kwargs: `{"scale": s}` scales LoRA adapters.

        Returns:
            Logits, (B, N, V), or (B, N, C p p, 2) of bits; float32.

        Raises:
            ValueError: codes of another size than this scale's, or a scale out of order.
        """
        tokens_of_scale = token_slices(condition.grids)[scale]
        expected = tokens_of_scale.stop - tokens_of_scale.start
        if (codes is None) != (scale == 0) or (codes is not None and codes.shape[1] != expected):
            found = None if codes is None else tuple(codes.shape)
            wanted = "None" if scale == 0 else f"(B, {expected}, {self.code_size})"
            raise ValueError(f"codes of scale {scale} are {found}, expected {wanted}")
        # embed: the image so far, its positions, the scale
        tokens = condition.start if codes is None else self.code_embed(codes.to(self.dtype))  # (B, N, D)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed[tokens_of_scale].to(tokens.device)  # (B, N, D)
        hidden_states = tokens + self.scale_embed.weight[scale].to(tokens.device)  # (B, N, D)
        # blocks, with the cache of earlier scales
        rotary = condition.rotary[scale] if condition.rotary else None
        for layer, block in enumerate(self.transformer_blocks):
            hidden_states = block(
                hidden_states,
                cache=LayerCache(cache, layer, scale),
                rotary=rotary,
                **condition.block_kwargs(layer),
            )  # (B, N, D)
        return self._logits(hidden_states, condition)

    def _logits(self, hidden_states: Tensor, condition: NextScaleCondition) -> Tensor:
        """Project tokens (B, N, D) to logits (B, N, V) or (B, N, C p p, 2), float32."""
        scale, shift = condition.modulation_out.unsqueeze(2).unbind(1)  # (B, 1, D) each
        logits = self.proj_out(modulate(self.norm_out(hidden_states), shift, scale)).float()  # (B, N, V)
        return logits.unflatten(-1, (-1, 2)) if self.config.bitwise else logits

    # ----------------------------------------------------------------- training

    def _drop_labels(self, labels: Tensor) -> Tensor:
        """Replace some labels (B,) by 'no class' in training mode, so that guidance has something to push away from."""
        return labels.masked_fill(self._dropped(labels), self.config.num_classes)  # (B,)

    def _drop_texts(self, text: Tensor) -> Tensor:
        """Replace some texts (B, M, Dt) by the empty one in training mode; the mask stays."""
        empty = self.null_text_embeds(text.shape[1]).to(text.dtype)  # (1, M, Dt)
        return torch.where(self._dropped(text)[:, None, None], empty, text)  # (B, M, Dt)

    def _dropped(self, rows: Tensor) -> Tensor:
        """Return which rows (B, ...) lose their condition, (B,), bool; none outside of training."""
        share = self.config.class_dropout_prob if self.training else 0.0
        if share == 0:
            return torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        return torch.rand(len(rows), device=rows.device) < share  # (B,)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        grids: Sequence[Grid] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the tokens of all scales from the true coarser ones (teacher forcing).

        Args:
            hidden_states: the image before each scale from the second on, at that scale's size, all in one row:
                (B, L - N0, C p p); see `teacher_inputs` of the tokenizer.
            class_labels: see `prepare_condition`.
            encoder_hidden_states: see `prepare_condition`.
            encoder_attention_mask: see `prepare_condition`.
            grids: see `prepare_condition`.
            attention_kwargs: `{"scale": s}` scales LoRA adapters.
            return_dict: return an object with `.sample` rather than a tuple.

        Returns:
            Logits, (B, L, V), or (B, L, C p p, 2) of bits; float32.

        Raises:
            ValueError: another number of tokens than the schedule has.
        """
        grids = self._check_schedule(grids)
        expected = sum(token_counts(grids[1:]))
        if hidden_states.shape[1] != expected:
            raise ValueError(
                f"got {hidden_states.shape[1]} tokens, expected {expected}: those of the scales {list(grids[1:])}"
            )
        # drop some conditions for classifier-free guidance (training mode only)
        if class_labels is not None:
            class_labels = self._drop_labels(class_labels)  # (B,)
        if encoder_hidden_states is not None and self.config.text_dim is not None:
            encoder_hidden_states = self._drop_texts(encoder_hidden_states)  # (B, M, Dt)
        condition = self.prepare_condition(class_labels, encoder_hidden_states, encoder_attention_mask, grids)
        # embed all scales in one sequence
        device = hidden_states.device
        tokens = torch.cat([condition.start, self.code_embed(hidden_states.to(self.dtype))], dim=1)  # (B, L, D)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed[: tokens.shape[1]]  # (B, L, D)
        tokens = tokens + self.scale_embed(token_scales(grids, device))  # (B, L, D)
        # blocks: each scale attends to itself and all coarser ones
        shared = {
            "attention_mask": block_causal_mask(grids, device),  # (1, 1, L, L)
            "rotary": _concat_rotary(condition.rotary),
        }
        for layer, block in enumerate(self.transformer_blocks):
            inputs = {**condition.block_kwargs(layer), **shared}
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(partial(block, **inputs), tokens)
            else:
                tokens = block(tokens, **inputs)  # (B, L, D)
        logits = self._logits(tokens, condition)
        return Transformer2DModelOutput(sample=logits) if return_dict else (logits,)


def _concat_rotary(rotary: tuple[Rotary, ...]) -> Rotary | None:
    """Return the angles of all scales in one row, (cos, sin), each (L, E)."""
    if not rotary:
        return None
    cos, sin = zip(*rotary, strict=True)
    return torch.cat(cos), torch.cat(sin)


def _check_choices(hidden_size: int, text_dim: int | None, text_pool_heads: int, positions: str, head_dim: int) -> None:
    """Raise for configurations that can't be built."""
    if positions not in POSITIONS:
        raise ValueError(f"positions {positions!r} are not known; use one of {', '.join(map(repr, POSITIONS))}")
    if positions == "rotary" and head_dim % 4:
        raise ValueError(f"rotary positions over rows and columns need a head width that 4 divides, got {head_dim}")
    if text_dim is not None and (text_pool_heads < 1 or hidden_size % text_pool_heads):
        raise ValueError(f"{text_pool_heads} heads can't pool text into a width of {hidden_size}; use a divisor of it")
