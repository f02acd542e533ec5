"""SpaceTimeDiT: DiT over clips, with attention within a frame and attention along time (VDT and Latte).

Two arrangements of the same parts, chosen by the configuration:

    "alternating"      Latte (arXiv 2401.03048, variant 1): blocks attend in turn within each frame and along time
    "temporal_first"   VDT (arXiv 2305.13311): every block attends along time, un-modulated, then within each frame

Both add a fixed table of frame positions, VDT to the first block's input, Latte to that of the first block along time.

VDT's released weights complete clips (its unified mask modelling): their input is `noisy * mask + clean * (1 - mask)`,
where the mask is 1 on what is to be generated, and only the prediction there counts. That is a matter of the caller;
the network sees one clip of C channels either way. The text-to-video model Latte-1 is another network, diffusers'
`LatteTransformer3DModel`.
"""

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

from dit.layers.attention import SelfAttention
from dit.layers.embeddings import LabelEmbedding, TimestepEmbedding, unpatchify
from dit.layers.feed_forward import FeedForward
from dit.layers.frames import along_time, frame_by_frame, within_frames
from dit.layers.linear import Linear
from dit.layers.modulation import AdaLNZero, modulate
from dit.layers.positions import sincos_1d, sincos_2d
from dit.runtime._typing import Typed
from dit.runtime.diffusers_compat import registered_block, with_halved_input

ARRANGEMENTS = ("alternating", "temporal_first")
"""What the blocks attend over, see the module's docstring."""

_SIZES = {  # num_layers, num_attention_heads, attention_head_dim
    "S": (12, 6, 64),
    "B": (12, 12, 64),
    "L": (24, 16, 64),
    "XL": (28, 16, 72),
}

_VDT: dict[str, Any] = {"arrangement": "temporal_first", "patch_size": 2, "default_label": 0}


def _sized(size: str) -> dict[str, Any]:
    """Return the arguments that a published size stands for."""
    return dict(zip(("num_layers", "num_attention_heads", "attention_head_dim"), _SIZES[size], strict=True))


PRESETS: dict[str, dict[str, Any]] = {
    "VDT-S/2": {**_sized("S"), **_VDT},
    "VDT-L/2": {**_sized("XL"), **_VDT},  # as large as the XL of the others
    **{f"Latte-{size}/{patch}": {**_sized(size), "patch_size": patch} for size in _SIZES for patch in (2, 4, 8)},
}
"""Configurations by their published names, for example "VDT-L/2" and "Latte-XL/2"."""


@registered_block
class SpaceTimeBlock(nn.Module):
    """Attention over one axis or both, then an MLP, shifted, scaled and gated by the condition (adaLN-Zero).

    Args:
        hidden_size: model width D.
        num_heads: attention heads K.
        ff_ratio: width of the MLP over D.
        axes: "space" or "time": what the modulated attention runs over; "time_space": over space, after an attention
            along time that has a norm of its own and no gate (VDT).
    """

    def __init__(self, hidden_size: int, num_heads: int, ff_ratio: float, axes: str) -> None:
        super().__init__()
        both = axes == "time_space"
        self.temporal_norm = nn.LayerNorm(hidden_size) if both else None
        self.temporal_attn = None if axes == "space" else SelfAttention(hidden_size, num_heads, qk_norm=False)
        self.temporal_proj = Linear(hidden_size, hidden_size) if both else None
        self.modulation = AdaLNZero(hidden_size, 6)
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = None if axes == "time" else SelfAttention(hidden_size, num_heads, qk_norm=False)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(hidden_size, int(hidden_size * ff_ratio))

    def forward(
        self, hidden_states: Tensor, temb: Tensor, num_frames: int, frame_positions: Tensor | None = None
    ) -> Tensor:
        """Run the block.

        Args:
            hidden_states: tokens, frame by frame, (B, T S, D).
            temb: condition, (B, D).
            num_frames: frames T.
            frame_positions: added to the tokens first, (T, D). It comes in here, not between blocks, so that a cache
                that skips blocks skips it with them.

        Returns:
            (B, T S, D).
        """
        if frame_positions is not None:
            places = hidden_states.shape[1] // num_frames
            hidden_states = hidden_states + frame_positions.repeat_interleave(places, 0)  # (B, T S, D)
        if self.temporal_norm is not None and self.temporal_proj is not None:  # VDT's branch along time
            normed = self.temporal_norm(hidden_states)  # (B, T S, D)
            hidden_states = hidden_states + self.temporal_proj(self._attend_along_time(normed, num_frames))
        # attention's shift, scale and gate, then the MLP's; each (B, 1, D)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(temb)
        normed = modulate(self.norm1(hidden_states), shift_a, scale_a)  # (B, T S, D)
        if self.attn is not None:
            attended = self.attn(within_frames(normed, num_frames))  # (B T, S, D)
            attended = attended.reshape(normed.shape)  # (B, T S, D)
        else:
            attended = self._attend_along_time(normed, num_frames)  # (B, T S, D)
        hidden_states = hidden_states + gate_a * attended  # (B, T S, D)
        fed = self.ff(modulate(self.norm2(hidden_states), shift_f, scale_f))  # (B, T S, D)
        return hidden_states + gate_f * fed  # (B, T S, D)

    def _attend_along_time(self, normed: Tensor, num_frames: int) -> Tensor:
        """Let each place of the frame attend to itself in all frames, (B, T S, D)."""
        assert self.temporal_attn is not None, "only blocks over time come here"
        attended = self.temporal_attn(along_time(normed, num_frames))  # (B S, T, D)
        return frame_by_frame(attended, len(normed))  # (B, T S, D)


class SpaceTimeDiT(Typed, ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, CacheMixin):
    """Diffusion transformer for clips, numerically the released VDT and (class-conditional) Latte.

    Args:
        arrangement: "alternating" (Latte) or "temporal_first" (VDT).
        sample_size: side of the default latent, in latent pixels. Other sizes work too.
        num_frames: frames T of the default clip. Other numbers work too: positions are fixed sinusoids.
        patch_size: side of a patch, in latent pixels; a patch lies in one frame.
        in_channels: latent channels C.
        out_channels: channels of the last projection: 2 C where a variance is learned, else C.
        num_layers: number of blocks; even for "alternating".
        num_attention_heads: heads K.
        attention_head_dim: head width E; the model width is D = K E.
        ff_ratio: width of the MLP over D.
        num_classes: number of labels; label `num_classes` means 'no class'. None: the network takes no labels.
        class_dropout_prob: fraction of labels dropped in training mode; 0 means no row for 'no class'.
        default_label: label of calls that name none (VDT's, whose table is never asked for another than 0); None
            makes labels mandatory.
        text_dim: width of a flattened text (Latte's 77 states of 768 numbers each); None: the network reads no text.

    Raises:
        ValueError: values that don't fit; the message says what does.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["SpaceTimeBlock"]
    _repeated_blocks: ClassVar = ["SpaceTimeBlock"]
    _skip_layerwise_casting_patterns: ClassVar = [
        "patch_embed",
        "time_embed",
        "label_embed",
        "text_embed",
        "norm",
        "proj_out",
    ]

    @register_to_config
    def __init__(
        self,
        arrangement: str = "alternating",
        sample_size: int = 32,
        num_frames: int = 16,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        ff_ratio: float = 4.0,
        num_classes: int | None = 1000,
        class_dropout_prob: float = 0.1,
        default_label: int | None = None,
        text_dim: int | None = None,
    ) -> None:
        super().__init__()
        _check_config(dict(self.config))
        self.hidden_size = width = num_attention_heads * attention_head_dim
        self.patch_embed = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.time_embed = TimestepEmbedding(width)
        self.label_embed = None if num_classes is None else LabelEmbedding(num_classes, width, class_dropout_prob)
        self.text_embed = None if text_dim is None else nn.Sequential(nn.SiLU(), Linear(text_dim, width))
        axes = ("space", "time") if arrangement == "alternating" else ("time_space",)
        self.transformer_blocks = nn.ModuleList(
            [SpaceTimeBlock(width, num_attention_heads, ff_ratio, axes[i % len(axes)]) for i in range(num_layers)]
        )
        self.modulation_out = AdaLNZero(width, 2)
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.proj_out = Linear(width, patch_size**2 * out_channels)
        self.gradient_checkpointing = False
        self._initialize()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "SpaceTimeDiT":
        """Build an untrained model by its published name.

        Args:
            name: a key of `PRESETS`, for example "VDT-L/2" or "Latte-XL/2".
            **overrides: arguments of the constructor that differ.

        Raises:
            ValueError: the name is unknown.
        """
        if name not in PRESETS:
            raise ValueError(f"{name!r} is not a preset; use one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    def _initialize(self) -> None:
        """Initialize as both papers do: modulated sublayers start as the identity, the output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.detach().flatten(1))  # as a linear layer on flat patches
        nn.init.zeros_(self.patch_embed.get_parameter("bias"))
        narrow = [self.time_embed.linear_1.weight, self.time_embed.linear_2.weight]
        for weight in [*narrow, *([] if self.label_embed is None else [self.label_embed.table.weight])]:
            nn.init.normal_(weight, std=0.02)
        zero = [module.linear for module in self.modules() if isinstance(module, AdaLNZero)] + [self.proj_out]
        for linear in zero:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def enable_cache(self, config: Any) -> None:
        """Enable a cache of diffusers, see `CacheMixin.enable_cache`."""
        super().enable_cache(with_halved_input(config, "class_labels"))

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict noise (and variance).

        Args:
            hidden_states: (B, C, T, H, W) noisy latents; H and W multiples of the patch size.
            timestep: (B,) or (), the diffusion step in [0, 999].
            class_labels: (B,), int; `num_classes` means 'no class'. None takes `default_label`.
            encoder_hidden_states: text states, (B, L, Dt) or flattened already, (B, L Dt), with L Dt = `text_dim`.
            attention_kwargs: `{"scale": s}` scales LoRA adapters.
            return_dict: return an object with `.sample` rather than a tuple.

        Returns:
            (B, out_channels, T, H, W).

        Raises:
            ValueError: latents, labels or text that the network can't take, or lacks.
        """
        p = self.config.patch_size
        _check_latents(hidden_states, self.config.in_channels, p)
        batch, _, frames, height, width = hidden_states.shape
        rows, columns = height // p, width // p

        # embed patches and condition
        images = hidden_states.transpose(1, 2).flatten(0, 1)  # (B T, C, H, W)
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B T, S, D)
        tokens = tokens + sincos_2d(rows, columns, self.hidden_size).to(tokens)  # (B T, S, D)
        tokens = tokens.unflatten(0, (batch, frames)).flatten(1, 2)  # (B, T S, D)
        temb, temb_out = self._condition(timestep.expand(batch), class_labels, encoder_hidden_states, tokens)
        frame_positions = sincos_1d(torch.arange(frames), self.hidden_size).to(tokens)  # (T, D)

        # blocks
        first_in_time = 1 if self.config.arrangement == "alternating" else 0
        for i, block in enumerate(self.transformer_blocks):
            positions = frame_positions if i == first_in_time else None
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, temb, frames, positions)
            else:
                tokens = block(tokens, temb, frames, positions)  # (B, T S, D)

        # head: modulated norm, projection, patches back to a clip
        shift, scale = self.modulation_out(temb_out)  # (B, 1, D) each
        tokens = self.proj_out(modulate(self.norm_out(tokens), shift, scale))  # (B, T S, p p C')
        sample = unpatchify(tokens, (frames, rows, columns), (1, p, p))  # (B, C', T, H, W)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _condition(
        self, times: Tensor, labels: Tensor | None, text: Tensor | None, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the condition of the blocks and that of the head, (B, D) each.

        The head knows nothing of the text: so the released text-conditional Latte was trained.
        """
        temb = self.time_embed(times, like.dtype)  # (B, D)
        if self.label_embed is not None:
            if labels is None and self.config.default_label is None:
                raise ValueError("class_labels is None; pass one label a clip, or set default_label in the config")
            if labels is None:
                labels = torch.full((len(times),), self.config.default_label, device=like.device)  # (B,)
            temb = temb + self.label_embed(labels)  # (B, D)
        elif labels is not None:
            raise ValueError("class_labels was given to a network without labels (num_classes=None); leave it out")
        if (self.text_embed is None) != (text is None):
            wanted = "this network reads no text; leave it out" if self.text_embed is None else "pass text states"
            raise ValueError(f"encoder_hidden_states is {'None' if text is None else 'given'}: {wanted}")
        if self.text_embed is None or text is None:
            return temb, temb
        flat = text.flatten(1)  # (B, L Dt)
        if flat.shape[1] != self.config.text_dim:
            raise ValueError(
                f"encoder_hidden_states has {flat.shape[1]} numbers a clip, expected text_dim = {self.config.text_dim} "
                "(for Latte 77 states of CLIP-L's 768)"
            )
        return temb + self.text_embed(flat.to(like.dtype)), temb


def _check_config(config: dict[str, Any]) -> None:
    """Raise a `ValueError` for settings that don't fit each other."""
    if config["arrangement"] not in ARRANGEMENTS:
        raise ValueError(f"arrangement {config['arrangement']!r} is not known; use one of {', '.join(ARRANGEMENTS)}")
    if config["arrangement"] == "alternating" and config["num_layers"] % 2:
        raise ValueError(f"num_layers is {config['num_layers']}; alternating blocks come in pairs, use an even number")
    channels = config["in_channels"]
    if config["out_channels"] not in (channels, 2 * channels):
        raise ValueError(
            f"out_channels is {config['out_channels']}; use in_channels ({channels}), or {2 * channels} to learn a "
            "variance"
        )
    if config["sample_size"] % config["patch_size"]:
        raise ValueError(
            f"sample_size {config['sample_size']} is not a multiple of patch_size {config['patch_size']}; use one"
        )
    label, classes = config["default_label"], config["num_classes"]
    if label is not None and not (classes is not None and 0 <= label <= classes):
        raise ValueError(f"default_label is {label}, expected None or a label of num_classes = {classes}")


def _check_latents(latents: Tensor, channels: int, patch: int) -> None:
    """Raise a `ValueError` for latents that can't be cut into patches."""
    shape = tuple(latents.shape)
    if latents.ndim != 5 or shape[1] != channels:
        raise ValueError(f"latents must be (B, {channels}, T, H, W), got {shape}; an image is a clip of one frame")
    if shape[3] % patch or shape[4] % patch:
        raise ValueError(
            f"a latent of {shape[3]}x{shape[4]} can't be cut into patches of {patch}; use multiples of {patch}"
        )
