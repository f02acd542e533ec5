"""MVDiT: a text-to-video transformer with a stream for the clip and one for its text (OpenVid-1M, arXiv 2407.02371).

The text gets a copy for each frame, with weights of its own, and changes from block to block as the clip does. A block

    1. lets all tokens of a frame, the clip's and the text's, attend to each other;
    2. lets each place, in the frame or in the text, attend to itself along time;
    3. lets the clip attend to its frame's text once more;
    4. ends with an MLP for each stream.

Modulation is adaLN-single (arXiv 2310.00426), with vectors of their own for both streams and for steps 1 and 2. Frame
positions are added in step 2 of the first block only. Sizes are free here: positions are fixed sinusoids, where the
released code is built for one size.
"""

from functools import partial
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

from dit.layers.attention import CrossAttention, SelfAttention, never_empty
from dit.layers.embeddings import TextProjection, TimestepEmbedding, unpatchify
from dit.layers.feed_forward import FeedForward
from dit.layers.frames import along_time, frame_by_frame, within_frames
from dit.layers.linear import Linear
from dit.layers.modulation import AdaLNSingle, modulate, modulation_table
from dit.layers.positions import sincos_1d, sincos_2d
from dit.runtime._typing import Typed
from dit.runtime.diffusers_compat import registered_block

_VECTORS = (6, 6, 3, 3)
"""Modulation vectors of the clip, of the text, and of both along time."""


@partial(registered_block, text_index=1)
class MVDiTBlock(nn.Module):
    """Joint attention within a frame, attention along time, attention to the text, an MLP for each stream.

    Args:
        hidden_size: model width D.
        num_heads: attention heads K.
        ff_ratio: width of the MLPs over D.
    """

    def __init__(self, hidden_size: int, num_heads: int, ff_ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)  # without weights: one for all
        self.attn = SelfAttention(hidden_size, num_heads, qk_norm=False)
        self.temporal_attn = SelfAttention(hidden_size, num_heads, qk_norm=False)
        self.text_attn = CrossAttention(hidden_size, num_heads)
        self.ff = FeedForward(hidden_size, int(hidden_size * ff_ratio))
        self.ff_context = FeedForward(hidden_size, int(hidden_size * ff_ratio))
        self.scale_shift_table = modulation_table(6, hidden_size)
        self.context_table = modulation_table(6, hidden_size)
        self.temporal_table = modulation_table(3, hidden_size)
        self.temporal_context_table = modulation_table(3, hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        num_frames: int,
        encoder_attention_mask: Tensor | None = None,
        frame_positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            hidden_states: the clip's tokens, frame by frame, (B, T S, D).
            encoder_hidden_states: the text's, a copy for each frame, (B, T L, D).
            temb: modulation shared by all blocks, (B, 18, D): see `_VECTORS`.
            num_frames: frames T.
            encoder_attention_mask: bool, (B, L), True on real text.
            frame_positions: added before the attention along time, (T, D).

        Returns:
            Both streams.
        """
        x, y = hidden_states, encoder_hidden_states
        clip, text, clip_t, text_t = self._modulation(temb)
        shift_x, scale_x, gate_x, shift_fx, scale_fx, gate_fx = clip  # (B, 1, D) each
        shift_y, scale_y, gate_y, shift_fy, scale_fy, gate_fy = text  # (B, 1, D) each

        # 1. clip and text of a frame
        normed_x, normed_y = modulate(self.norm(x), shift_x, scale_x), modulate(self.norm(y), shift_y, scale_y)
        attended_x, attended_y = self._within_frames(normed_x, normed_y, num_frames, encoder_attention_mask)
        x, y = x + gate_x * attended_x, y + gate_y * attended_y  # (B, T S, D), (B, T L, D)

        # 2. each place along time
        (shift_x, scale_x, gate_x), (shift_y, scale_y, gate_y) = clip_t, text_t
        normed_x, normed_y = modulate(self.norm(x), shift_x, scale_x), modulate(self.norm(y), shift_y, scale_y)
        attended_x, attended_y = self._along_time(normed_x, normed_y, num_frames, frame_positions)
        x, y = x + gate_x * attended_x, y + gate_y * attended_y  # (B, T S, D), (B, T L, D)

        # 3. the clip to its frame's text, without norm and gate
        mask = _for_frames(encoder_attention_mask, num_frames)  # (B T, L)
        told = self.text_attn(within_frames(x, num_frames), within_frames(y, num_frames), mask)  # (B T, S, D)
        x = x + told.reshape(x.shape)  # (B, T S, D)

        # 4. MLPs
        x = x + gate_fx * self.ff(modulate(self.norm(x), shift_fx, scale_fx))  # (B, T S, D)
        y = y + gate_fy * self.ff_context(modulate(self.norm(y), shift_fy, scale_fy))  # (B, T L, D)
        return x, y

    def _modulation(self, temb: Tensor) -> list[tuple[Tensor, ...]]:
        """Return the vectors of `_VECTORS`, (B, 1, D) each."""
        own = (self.scale_shift_table, self.context_table, self.temporal_table, self.temporal_context_table)
        table = torch.cat(own).to(temb.dtype) + temb  # (B, 18, D)
        return [part[:, :, None].unbind(1) for part in table.split(_VECTORS, dim=1)]

    def _within_frames(self, x: Tensor, y: Tensor, num_frames: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Let the tokens of a frame, clip (B, T S, D) and text (B, T L, D), attend to each other."""
        frame, words = within_frames(x, num_frames), within_frames(y, num_frames)  # (B T, S, D), (B T, L, D)
        visible = None
        if mask is not None:
            words_visible = _for_frames(mask, num_frames)  # (B T, L)
            assert words_visible is not None, "made of a mask"
            visible = torch.cat([words_visible.new_ones(frame.shape[:2]), words_visible], dim=1)  # (B T, S + L)
        joint = self.attn(torch.cat([frame, words], dim=1), visible)  # (B T, S + L, D)
        frame, words = joint.split([frame.shape[1], words.shape[1]], dim=1)
        return frame.reshape(x.shape), words.reshape(y.shape)  # (B, T S, D), (B, T L, D)

    def _along_time(
        self, x: Tensor, y: Tensor, num_frames: int, frame_positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Let each place of clip (B, T S, D) and text (B, T L, D) attend to itself in all frames."""
        places = x.shape[1] // num_frames * len(x)  # B S
        joint = torch.cat([along_time(x, num_frames), along_time(y, num_frames)])  # (B (S + L), T, D)
        joint = self.temporal_attn(joint if frame_positions is None else joint + frame_positions)
        return frame_by_frame(joint[:places], len(x)), frame_by_frame(joint[places:], len(y))


class MVDiT(Typed, ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, CacheMixin):
    """Text-to-video diffusion transformer with two streams; the defaults are the released MVDiT-XL/2 at 512 pixels.

    Guidance's unconditional branch reads `null_text`, (text_max_length, text_dim), in place of the text.

    Args:
        sample_size: side of the default latent, in latent pixels. Other sizes work too.
        num_frames: latent frames of the default clip. Other numbers work too.
        patch_size: side of a patch, in latent pixels.
        patch_size_t: frames in a patch.
        in_channels: latent channels C.
        out_channels: predicted channels: 2 C where a variance is learned, else C.
        num_layers: number of blocks.
        num_attention_heads: heads K.
        attention_head_dim: head width E; the model width is D = K E.
        ff_ratio: width of the MLPs over D.
        text_dim: width of the text encoder's states.
        text_max_length: text tokens that the network was trained with.
        text_dropout_prob: fraction of texts replaced by `null_text` in training mode.
        space_scale: patches a unit of position in rows and columns.
        time_scale: frames a unit of position in time.

    Raises:
        ValueError: values that don't fit; the message says what does.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["MVDiTBlock"]
    _repeated_blocks: ClassVar = ["MVDiTBlock"]
    _skip_layerwise_casting_patterns: ClassVar = ["patch_embed", "time_embed", "norm", "table", "proj_out"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        num_frames: int = 16,
        patch_size: int = 2,
        patch_size_t: int = 1,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        ff_ratio: float = 4.0,
        text_dim: int = 4096,
        text_max_length: int = 120,
        text_dropout_prob: float = 0.1,
        space_scale: float = 1.0,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        _check_config(dict(self.config))
        self.hidden_size = width = num_attention_heads * attention_head_dim
        self.patch = (patch_size_t, patch_size, patch_size)
        self.patch_embed = nn.Conv3d(in_channels, width, self.patch, stride=self.patch)
        self.time_embed = TimestepEmbedding(width)
        self.adaln_single, self.adaln_context, self.adaln_temporal, self.adaln_temporal_context = (
            AdaLNSingle(width, count) for count in _VECTORS
        )
        self.text_projection = TextProjection(text_dim, width)
        self.register_buffer("null_text", torch.randn(text_max_length, text_dim) / text_dim**0.5)  # (L, Dt)
        self.transformer_blocks = nn.ModuleList(
            [MVDiTBlock(width, num_attention_heads, ff_ratio) for _ in range(num_layers)]
        )
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.scale_shift_table = modulation_table(2, width)
        self.proj_out = Linear(width, patch_size_t * patch_size**2 * out_channels)
        self.gradient_checkpointing = False
        self._initialize()

    def _initialize(self) -> None:
        """Initialize as released: time, text and output are closed at first."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.detach().flatten(1))  # as a linear layer on flat patches
        adaln = (self.adaln_single, self.adaln_context, self.adaln_temporal, self.adaln_temporal_context)
        embeds = (self.time_embed, self.text_projection)
        narrow = [one.linear for one in adaln] + [linear for one in embeds for linear in (one.linear_1, one.linear_2)]
        for linear in narrow:
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.proj_out.weight)
        for block in self.transformer_blocks:
            assert isinstance(block, MVDiTBlock), "the list holds nothing else"
            for attention in (block.temporal_attn, block.text_attn):
                nn.init.zeros_(attention.get_parameter("to_out.0.weight"))

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict noise (and variance).

        Args:
            hidden_states: (B, C, T, H, W) noisy latents; T, H and W multiples of the patch.
            encoder_hidden_states: text states, (B, L, text_dim).
            timestep: (B,) or (), the diffusion step in [0, 999].
            encoder_attention_mask: bool, (B, L), True on real text; None if all is. A sample without any sees all.
            attention_kwargs: `{"scale": s}` scales LoRA adapters.
            return_dict: return an object with `.sample` rather than a tuple.

        Returns:
            (B, out_channels, T, H, W).

        Raises:
            ValueError: latents or text that the network can't take.
        """
        self._check_inputs(hidden_states, encoder_hidden_states)
        batch = len(hidden_states)
        frames, rows, columns = (size // p for size, p in zip(hidden_states.shape[2:], self.patch, strict=True))

        # embed patches, text and condition
        tokens = self.patch_embed(hidden_states).flatten(2).transpose(1, 2)  # (B, T S, D)
        places = sincos_2d(rows, columns, self.hidden_size, self.config.space_scale).to(tokens)  # (S, D)
        tokens = tokens + places.repeat(frames, 1)  # (B, T S, D)
        text = self._embed_text(encoder_hidden_states, tokens.dtype).repeat(1, frames, 1)  # (B, T L, D)
        condition = self.time_embed(timestep.expand(batch), tokens.dtype)  # (B, D)
        adaln = (self.adaln_single, self.adaln_context, self.adaln_temporal, self.adaln_temporal_context)
        temb = torch.cat([one(condition) for one in adaln], dim=1)  # (B, 18, D)
        times = torch.arange(frames) / self.config.time_scale  # (T,)
        frame_positions = sincos_1d(times, self.hidden_size).to(tokens)  # (T, D)
        mask = never_empty(encoder_attention_mask)  # (B, L)

        # blocks
        for i, block in enumerate(self.transformer_blocks):
            positions = frame_positions if i == 0 else None
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens, text = self._gradient_checkpointing_func(block, tokens, text, temb, frames, mask, positions)
            else:
                tokens, text = block(tokens, text, temb, frames, mask, positions)  # (B, T S, D), (B, T L, D)

        # head: modulated norm, projection, patches back to a clip
        shift, scale = (self.scale_shift_table.to(condition.dtype) + condition[:, None]).chunk(2, dim=1)  # (B, 1, D)
        tokens = self.proj_out(modulate(self.norm_out(tokens), shift, scale))  # (B, T S, P)
        sample = unpatchify(tokens, (frames, rows, columns), self.patch)  # (B, C', T, H, W)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embed_text(self, text: Tensor, dtype: torch.dtype) -> Tensor:
        """Project the text states (B, L, Dt) to (B, L, D); in training mode some give way to `null_text`."""
        if self.training and self.config.text_dropout_prob > 0:
            if text.shape[1] != len(self.null_text):
                raise ValueError(
                    f"text states have {text.shape[1]} tokens, but in training mode dropped ones are replaced by "
                    f"text_max_length = {len(self.null_text)}; pad to that, or set text_dropout_prob to 0"
                )
            dropped = torch.rand(len(text), 1, 1, device=text.device) < self.config.text_dropout_prob  # (B, 1, 1)
            text = torch.where(dropped, self.null_text.to(text.dtype), text)  # (B, L, Dt)
        return self.text_projection(text.to(dtype))  # (B, L, D)

    def _check_inputs(self, latents: Tensor, text: Tensor) -> None:
        """Raise a `ValueError` for latents or text of a wrong shape."""
        shape, channels = tuple(latents.shape), self.config.in_channels
        if latents.ndim != 5 or shape[1] != channels:
            raise ValueError(f"latents must be (B, {channels}, T, H, W), got {shape}; an image is a clip of one frame")
        if any(size % p for size, p in zip(shape[2:], self.patch, strict=True)):
            raise ValueError(f"a latent of {shape[2:]} can't be cut into patches of {self.patch}; use multiples")
        if text.ndim != 3 or text.shape[-1] != self.config.text_dim:
            raise ValueError(
                f"text states must be (B, L, {self.config.text_dim}), got {tuple(text.shape)}; is this the text "
                "encoder that the network was trained with?"
            )


def _for_frames(mask: Tensor | None, num_frames: int) -> Tensor | None:
    """Repeat a mask of the text (B, L) for each frame, (B T, L)."""
    return None if mask is None else mask.repeat_interleave(num_frames, dim=0)


def _check_config(config: dict[str, Any]) -> None:
    """Raise a `ValueError` for settings that don't fit each other."""
    channels = config["in_channels"]
    if config["out_channels"] not in (channels, 2 * channels):
        raise ValueError(
            f"out_channels is {config['out_channels']}; use in_channels ({channels}), or {2 * channels} to learn a "
            "variance"
        )
    for size, patch in (("sample_size", "patch_size"), ("num_frames", "patch_size_t")):
        if config[size] % config[patch]:
            raise ValueError(f"{size} {config[size]} is not a multiple of {patch} {config[patch]}; use one")
    if min(config["space_scale"], config["time_scale"]) <= 0:
        raise ValueError(f"space_scale {config['space_scale']} and time_scale {config['time_scale']} must be above 0")
