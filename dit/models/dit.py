"""DiT and SiT: transformers that generate a class label (arXiv 2212.09748 and 2401.08740).

One network, two objectives. DiT predicts the noise of a 1000-step diffusion and, in a second half of its
output channels, where the variance lies. SiT is the same network trained as a stochastic interpolant: it
predicts the velocity `data - noise` at a time in [0, 1] that runs from noise (0) to data (1), and ignores the
second half.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from dit.attention import TokenGrid
from dit.attention.trainable import replace_attention
from dit.layers.attention import SelfAttention
from dit.layers.embeddings import LabelEmbedding, TimestepEmbedding, unpatchify
from dit.layers.feed_forward import FeedForward
from dit.layers.linear import Linear
from dit.layers.modulation import AdaLNZero, modulate
from dit.layers.positions import sincos_2d
from dit.runtime._typing import Typed
from dit.runtime.diffusers_compat import registered_block, with_halved_input

_SIZES = {  # num_layers, num_attention_heads, attention_head_dim: table 1 of the DiT paper
    "S": (12, 6, 64),
    "B": (12, 12, 64),
    "L": (24, 16, 64),
    "XL": (28, 16, 72),
}

PRESETS: dict[str, dict[str, Any]] = {
    f"{family}-{size}/{patch_size}": {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "patch_size": patch_size,
        "objective": objective,
    }
    for family, objective in (("DiT", "epsilon"), ("SiT", "velocity"))
    for size, (layers, heads, head_dim) in _SIZES.items()
    for patch_size in (2, 4, 8)
}
"""Configurations by their published names, for example "DiT-XL/2" and "SiT-B/4"."""


@registered_block
class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-Zero).

    Args:
        hidden_size: model width D.
        num_heads: attention heads K.
        ff_ratio: width of the MLP over D.
    """

    def __init__(self, hidden_size: int, num_heads: int, ff_ratio: float) -> None:
        super().__init__()
        self.modulation = AdaLNZero(hidden_size, 6)
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(hidden_size, num_heads, qk_norm=False)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(hidden_size, int(hidden_size * ff_ratio))

    def forward(self, hidden_states: Tensor, temb: Tensor, grid: TokenGrid | None = None) -> Tensor:
        """Map tokens (B, N, D) of a grid, given the condition `temb` (B, D), to tokens (B, N, D)."""
        # attention's shift, scale and gate, then the MLP's; each (B, 1, D)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(temb)
        attended = self.attn(modulate(self.norm1(hidden_states), shift_a, scale_a), grid=grid)  # (B, N, D)
        hidden_states = hidden_states + gate_a * attended  # (B, N, D)
        fed = self.ff(modulate(self.norm2(hidden_states), shift_f, scale_f))  # (B, N, D)
        return hidden_states + gate_f * fed  # (B, N, D)


class DiT(Typed, ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, CacheMixin):
    """Class-conditional diffusion transformer, numerically the released DiT and SiT.

    Args:
        sample_size: side of the default latent, in latent pixels. Other sizes work too.
        patch_size: side of a patch, in latent pixels.
        in_channels: latent channels C.
        out_channels: channels of the last projection: 2 C where a variance is learned, else C.
        num_layers: number of blocks.
        num_attention_heads: heads K.
        attention_head_dim: head width E; the model width is D = K E.
        ff_ratio: width of the MLP over D.
        num_classes: number of labels; label `num_classes` means 'no class'.
        class_dropout_prob: fraction of labels dropped in training mode; 0 means no row for 'no class'.
        objective: "epsilon" (DiT) or "velocity" (SiT, which drops the channels beyond C).
        time_scale: the sinusoid sees `time_scale * timestep`; 1 in the released DiT and SiT.
        attention: how tokens attend: "dense", or a name of `dit.attention.trainable`.
        attention_params: parameters of the latter.

    Raises:
        ValueError: an objective, a channel count or a patch size that don't fit.
    """

    later_settings: ClassVar[Mapping[str, Any]] = {"attention": "dense", "attention_params": None}
    """Settings that came later and their neutral values, which fingerprints leave out."""
    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["DiTBlock"]
    _repeated_blocks: ClassVar = ["DiTBlock"]
    _skip_layerwise_casting_patterns: ClassVar = [
        "patch_embed",
        "time_embed",
        "label_embed",
        "norm",
        "proj_out",
    ]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        ff_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        objective: str = "epsilon",
        time_scale: float = 1.0,
        attention: str = "dense",
        attention_params: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if objective not in ("epsilon", "velocity"):
            raise ValueError(f"objective {objective!r} is not known; use 'epsilon' (DiT) or 'velocity' (SiT)")
        if out_channels not in (in_channels, 2 * in_channels):
            raise ValueError(
                f"out_channels is {out_channels}; use in_channels ({in_channels}), or {2 * in_channels} "
                "to learn a variance"
            )
        if sample_size % patch_size:
            raise ValueError(f"sample_size {sample_size} is not a multiple of patch_size {patch_size}")
        self.hidden_size = num_attention_heads * attention_head_dim
        side = sample_size // patch_size
        self.patch_embed = nn.Conv2d(in_channels, self.hidden_size, patch_size, stride=patch_size)
        # Recomputed rather than stored, so that a checkpoint fits every size.
        self.register_buffer("pos_embed", sincos_2d(side, side, self.hidden_size), persistent=False)  # (N, D)
        self.time_embed = TimestepEmbedding(self.hidden_size)
        self.label_embed = LabelEmbedding(num_classes, self.hidden_size, class_dropout_prob)
        self.transformer_blocks = nn.ModuleList(
            [DiTBlock(self.hidden_size, num_attention_heads, ff_ratio) for _ in range(num_layers)]
        )
        self.modulation_out = AdaLNZero(self.hidden_size, 2)
        self.norm_out = nn.LayerNorm(self.hidden_size, elementwise_affine=False, eps=1e-6)
        self.proj_out = Linear(self.hidden_size, patch_size**2 * out_channels)
        self.gradient_checkpointing = False
        self._initialize()
        if attention != "dense":
            replace_attention(self, attention, **(attention_params or {}))

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DiT":
        """Build an untrained model by its published name.

        Args:
            name: a key of `PRESETS`, for example "DiT-XL/2" or "SiT-S/4".
            **overrides: arguments of the constructor that differ.

        Raises:
            ValueError: the name is unknown.
        """
        if name not in PRESETS:
            raise ValueError(f"{name!r} is not a preset; use one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    def _initialize(self) -> None:
        """Initialize as the DiT paper does: every block starts as the identity, the output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.detach().flatten(1))  # as a linear layer on flat patches
        nn.init.zeros_(self.patch_embed.get_parameter("bias"))
        for weight in (
            self.label_embed.table.weight,
            self.time_embed.linear_1.weight,
            self.time_embed.linear_2.weight,
        ):
            nn.init.normal_(weight, std=0.02)
        zero = [module.linear for module in self.modules() if isinstance(module, AdaLNZero)] + [self.proj_out]
        for linear in zero:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def _positions(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Return the position table (N, D) of a token grid, in the dtype and on the device of `like`."""
        side = self.config.sample_size // self.config.patch_size
        default = (rows, columns) == (side, side)
        table = self.pos_embed if default else sincos_2d(rows, columns, self.hidden_size)  # (N, D)
        return table.to(device=like.device, dtype=like.dtype)

    def enable_cache(self, config: Any) -> None:
        """Enable a cache of diffusers, see `CacheMixin.enable_cache`."""
        super().enable_cache(with_halved_input(config, "class_labels"))

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict noise (and variance) or velocity.

        Args:
            hidden_states: (B, C, H, W) noisy latents; H and W multiples of the patch size.
            timestep: (B,) or (); the diffusion step in [0, 999] for "epsilon", the time in [0, 1] (1 is data)
                for "velocity".
            class_labels: (B,), int; `num_classes` means 'no class'.
            attention_kwargs: `{"scale": s}` scales LoRA adapters.
            return_dict: return an object with `.sample` rather than a tuple.

        Returns:
            "epsilon": (B, out_channels, H, W); "velocity": (B, C, H, W), the velocity `data - noise`.

        Raises:
            ValueError: the latent can't be cut into patches.
        """
        p = self.config.patch_size
        height, width = hidden_states.shape[-2:]
        if height % p or width % p:
            raise ValueError(f"a latent of {height}x{width} can't be cut into patches of {p}; use multiples of {p}")
        # embed patches and condition
        rows, columns = height // p, width // p
        hidden_states = self.patch_embed(hidden_states).flatten(2).transpose(1, 2)  # (B, N, D)
        hidden_states = hidden_states + self._positions(rows, columns, hidden_states)  # (B, N, D)
        times = self.config.time_scale * timestep.expand(hidden_states.shape[0])  # (B,)
        temb = self.time_embed(times, hidden_states.dtype) + self.label_embed(class_labels)  # (B, D)

        # blocks
        grid = TokenGrid(1, rows, columns)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, temb, grid)
            else:
                hidden_states = block(hidden_states, temb, grid)  # (B, N, D)

        # head: modulated norm, projection, patches back to a latent
        shift, scale = self.modulation_out(temb)  # (B, 1, D) each
        tokens = self.proj_out(modulate(self.norm_out(hidden_states), shift, scale))  # (B, N, p p C')
        sample = unpatchify(tokens, (1, rows, columns), (1, p, p))[:, :, 0]  # (B, C', H, W)
        if self.config.objective == "velocity":
            sample = sample[:, : self.config.in_channels]  # (B, C, H, W)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
