"""TextDiT: a text-to-image diffusion transformer that learns a flow from noise to latents.

One stream: text tokens and latent patches are concatenated and share every weight, as U-ViT-like text-to-image
models do (arXiv 2412.12391 finds this to scale better than cross-attention). Modulation is adaLN-single
(PixArt-alpha, arXiv 2310.00426), queries and keys are RMS-normalised (arXiv 2302.05442), positions are rotary over
(frame, row, column). An image is a video of one frame, so the same class makes clips: with full attention over all
frames, factorised into attention over time and attention within a frame, as video transformers do (Latte, arXiv
2401.03048; VDT, arXiv 2305.13311), or causal in time: frames see only what came before, at noise levels of their own
(Diffusion Forcing, arXiv 2407.01392), so that clips of any length are made chunk by chunk. All begin at the weights of
an image model.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from dit.attention import TokenGrid
from dit.attention.trainable import replace_attention
from dit.layers.attention import SelfAttention
from dit.layers.embeddings import TimestepEmbedding, patchify, sinusoidal_embedding, unpatchify
from dit.layers.feed_forward import FeedForward
from dit.layers.frame_memory import FrameMemory, LayerMemory, causal_mask, sees_frames
from dit.layers.linear import Linear
from dit.layers.modulation import AdaLNSingle, modulate, modulation_table
from dit.layers.positions import Rotary, fourier_positions, grid_positions, rotary_embedding
from dit.runtime._typing import Typed
from dit.runtime.diffusers_compat import registered_block

TEXT_PERIOD = 100.0  # longest period of the text position embedding, in tokens
CLIP_FREQUENCIES, CLIP_PERIOD = 32, 200.0  # of the embedding of a clip's frame rate and length


@registered_block
class TextDiTBlock(nn.Module):
    """Self-attention over text and latent tokens, then a MLP, both steered by adaLN-single.

    Args:
        hidden_size: model width D.
        num_heads: attention heads K.
        inner_size: width of the MLP.
        activation: see `FeedForward`.
        factorised: attend over time first, then within each frame, instead of over all tokens.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, inner_size: int, activation: str, factorised: bool = False
    ) -> None:
        super().__init__()
        self.norm_time = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False) if factorised else None
        self.attn_time = SelfAttention(hidden_size, num_heads, qk_norm=True) if factorised else None
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(hidden_size, num_heads, qk_norm=True)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.ff = FeedForward(hidden_size, inner_size, activation)
        self.scale_shift_table = modulation_table(6, hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary,
        attention_mask: Tensor | None = None,
        num_frames: int = 1,
        text_tokens: int = 0,
        memory: LayerMemory | None = None,
        grid: TokenGrid | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            hidden_states: text and latent tokens, (B, L + N, D).
            temb: modulation shared by all blocks, (B, 6, D); or of each token, (B, L + N, 6, D).
            image_rotary_emb: (cos, sin), each (L + N, E).
            attention_mask: bool, (B, L + N); or of pairs, (B, 1, L + N, M + L + N).
            num_frames: latent frames T that the N latent tokens belong to, frame by frame.
            text_tokens: L.
            memory: keys and values of frames before these, M tokens.
            grid: the tokens, for attention that looks at it.

        Returns:
            (B, L + N, D).
        """
        table = self.scale_shift_table.to(temb.dtype) + temb  # (B, 6, D) or (B, L + N, 6, D)
        table = table[:, None] if temb.ndim == 3 else table
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = table.unbind(2)  # (B, 1, D) or (B, L + N, D) each
        if self.attn_time is not None and num_frames > 1:
            hidden_states = self._attend_over_time(hidden_states, image_rotary_emb, num_frames, text_tokens)
        normed = modulate(self.norm1(hidden_states), shift_a, scale_a)  # (B, L + N, D)
        if self.attn_time is None or num_frames == 1:
            attended = self.attn(normed, attention_mask, image_rotary_emb, memory, grid)  # (B, L + N, D)
        else:
            attended = self._attend_within_frames(
                normed, image_rotary_emb, attention_mask, num_frames, text_tokens, grid
            )
        hidden_states = hidden_states + gate_a * attended  # (B, L + N, D)
        fed = self.ff(modulate(self.norm2(hidden_states), shift_f, scale_f))
        return hidden_states + gate_f * fed  # (B, L + N, D)

    def _attend_over_time(self, hidden_states: Tensor, rotary: Rotary, num_frames: int, text_tokens: int) -> Tensor:
        """Let each place of the image attend to the same place in all frames, (B, L + N, D)."""
        if self.attn_time is None or self.norm_time is None:
            return hidden_states
        text, image = hidden_states[:, :text_tokens], hidden_states[:, text_tokens:]  # (B, L, D), (B, N, D)
        area = image.shape[1] // num_frames  # S
        tokens = image.unflatten(1, (num_frames, area)).transpose(1, 2).flatten(0, 1)  # (B S, T, D)
        cos, sin = (part[text_tokens::area] for part in rotary)  # (T, E): times; rows and columns are those of a corner
        tokens = tokens + self.attn_time(self.norm_time(tokens), None, (cos, sin))  # (B S, T, D)
        image = tokens.unflatten(0, (-1, area)).transpose(1, 2).flatten(1, 2)  # (B, N, D)
        return torch.cat([text, image], dim=1)  # (B, L + N, D)

    def _attend_within_frames(
        self,
        normed: Tensor,
        rotary: Rotary,
        mask: Tensor | None,
        num_frames: int,
        text_tokens: int,
        grid: TokenGrid | None,
    ) -> Tensor:
        """Let text and each frame attend to each other; the text gets the mean over frames, (B, L + N, D)."""
        batch, length, area = len(normed), text_tokens, (normed.shape[1] - text_tokens) // num_frames
        joint = _beside_each_frame(normed, length, num_frames).flatten(0, 1)  # (B T, L + S, D)
        cos, sin = (_beside_each_frame(part[None], length, num_frames)[0].repeat(batch, 1, 1) for part in rotary)
        shown = None if mask is None else mask[:, : length + area].repeat_interleave(num_frames, dim=0)  # (B T, L + S)
        frame = None if grid is None else replace(grid, frames=1)
        attended = self.attn(joint, shown, (cos, sin), grid=frame).unflatten(0, (batch, num_frames))  # (B, T, L + S, D)
        return torch.cat([attended[:, :, :length].mean(dim=1), attended[:, :, length:].flatten(1, 2)], dim=1)


def _beside_each_frame(tokens: Tensor, length: int, num_frames: int) -> Tensor:
    """Put the text beside each frame's tokens: (B, L + T S, D) to (B, T, L + S, D)."""
    text = tokens[:, None, :length].expand(-1, num_frames, -1, -1)  # (B, T, L, D)
    return torch.cat([text, tokens[:, length:].unflatten(1, (num_frames, -1))], dim=2)


class TextDiT(Typed, ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, CacheMixin):
    """Text-to-image flow transformer; predicts the velocity `noise - data`.

    Args:
        in_channels: latent channels C.
        out_channels: predicted channels; None means `in_channels`.
        patch_size: side of a patch in latent pixels.
        patch_size_t: frames in a patch.
        num_layers: blocks.
        num_attention_heads: heads K.
        attention_head_dim: head width E; D = K * E.
        ff_ratio: width of the MLP as a multiple of D.
        activation: "swiglu" or "gelu-approximate".
        text_dim: width of the text encoder's states.
        rope_axes_dims: fraction of the head for (frame, row, column); even, summing to E. None splits E about evenly.
        rope_theta: base of the rotary frequencies.
        coordinate_frequencies: Fourier features per axis of the token's position as a fraction of the grid; 0: none.
        text_position_frequencies: frequencies of the text token's position embedding, added to its state; 0: none, and
            trusts the text encoder to tell "a left of b" from "b left of a".
        sample_size: latent side of an image of the default size.
        space_time: how the tokens of a clip attend: "full"; "factorised": each place over time, then within frames; or
            "causal": frames to themselves and those before, see `dit.layers.frame_memory`.
        clip_conditioning: whether the network is told a clip's frame rate and length in latent frames.
        chunk_frames: "causal": latent frames, after the first one, that see each other and are made together.
        window_frames: "causal": latent frames before its chunk that a frame sees.
        attention: how tokens attend: "dense", or a name of `dit.attention.trainable`; for "causal" only "dense".
        attention_params: parameters of the latter.
    """

    later_settings: ClassVar[Mapping[str, Any]] = {
        "space_time": "full",
        "clip_conditioning": False,
        "chunk_frames": 1,
        "window_frames": 8,
        "attention": "dense",
        "attention_params": None,
    }
    """Settings that came later and their neutral values, which fingerprints leave out."""
    _supports_gradient_checkpointing = True
    _no_split_modules = ["TextDiTBlock"]
    _repeated_blocks = ["TextDiTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "coordinate_embed", "norm", "scale_shift_table"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int | None = None,
        patch_size: int = 2,
        patch_size_t: int = 1,
        num_layers: int = 6,
        num_attention_heads: int = 4,
        attention_head_dim: int = 64,
        ff_ratio: float = 8 / 3,
        activation: str = "swiglu",
        text_dim: int = 192,
        rope_axes_dims: tuple[int, int, int] | None = None,
        rope_theta: float = 100.0,
        coordinate_frequencies: int = 4,
        text_position_frequencies: int = 32,
        sample_size: int = 8,
        space_time: str = "full",
        clip_conditioning: bool = False,
        chunk_frames: int = 1,
        window_frames: int = 8,
        attention: str = "dense",
        attention_params: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if space_time not in ("full", "factorised", "causal"):
            raise ValueError(f"space_time={space_time!r} is unknown: choose 'full', 'factorised' or 'causal'")
        for name, value in (("chunk_frames", chunk_frames), ("window_frames", window_frames)):
            if value < 1:
                raise ValueError(f"{name}={value} is out of range: expected at least 1 latent frame")
        if space_time == "causal" and patch_size_t != 1:
            raise ValueError(f"patch_size_t={patch_size_t}: causal attention needs patches of one latent frame")
        if space_time == "causal" and attention != "dense":
            raise ValueError(
                f"attention={attention!r} can't be causal in time: use attention='dense' or another space_time"
            )
        hidden_size = num_attention_heads * attention_head_dim
        self.out_channels = out_channels or in_channels
        self.patch = (patch_size_t, patch_size, patch_size)
        values = patch_size_t * patch_size * patch_size
        self.axes_dims = tuple(rope_axes_dims or _split_axes(attention_head_dim))
        if sum(self.axes_dims) != attention_head_dim:
            raise ValueError(f"rope_axes_dims {self.axes_dims} must sum to the head width {attention_head_dim}")

        self.patch_embed = Linear(values * in_channels, hidden_size)
        self.coordinate_embed = (
            Linear(6 * coordinate_frequencies, hidden_size, bias=False) if coordinate_frequencies else None
        )
        self.context_embedder = Linear(text_dim, hidden_size)
        self.text_position_embed = (
            Linear(2 * text_position_frequencies, hidden_size, bias=False) if text_position_frequencies else None
        )
        self.pooled_embedder = nn.Sequential(Linear(text_dim, hidden_size), nn.SiLU(), Linear(hidden_size, hidden_size))
        self.time_embed = TimestepEmbedding(hidden_size)
        self.clip_embed = Linear(2 * CLIP_FREQUENCIES, hidden_size) if clip_conditioning else None
        self.adaln_single = AdaLNSingle(hidden_size)
        inner_size = int(ff_ratio * hidden_size / 16 + 0.5) * 16  # a multiple of 16 keeps the kernels aligned
        self.transformer_blocks: Any = nn.ModuleList(
            [
                TextDiTBlock(hidden_size, num_attention_heads, inner_size, activation, space_time == "factorised")
                for _ in range(num_layers)
            ]
        )
        self.norm_out = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = modulation_table(2, hidden_size)
        self.proj_out = Linear(hidden_size, values * self.out_channels)
        self.gradient_checkpointing = False
        self.initialize_weights()
        if attention != "dense":
            replace_attention(self, attention, **(attention_params or {}))

    def initialize_weights(self) -> None:
        """Start as DiT does (arXiv 2212.09748): xavier matrices, closed gates, an output of zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for weight in (
            self.time_embed.linear_1.weight,
            self.time_embed.linear_2.weight,
            self.pooled_embedder.get_parameter("0.weight"),
        ):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.adaln_single.linear.weight)
        if self.text_position_embed is not None:
            nn.init.zeros_(self.text_position_embed.weight)
        if self.clip_embed is not None:
            nn.init.zeros_(self.clip_embed.weight)
        for block in self.transformer_blocks:
            nn.init.zeros_(block.scale_shift_table)
            if block.attn_time is not None:  # a clip begins as images of their own
                nn.init.zeros_(block.attn_time.to_out[0].weight)
        nn.init.zeros_(self.proj_out.weight)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor | None = None,
        attention_kwargs: dict | None = None,
        return_dict: bool = True,
        frame_rate: Tensor | float | None = None,
        clip_frames: Tensor | float | None = None,
        memory: FrameMemory | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity.

        Args:
            hidden_states: noisy latents, (B, C, H, W) or (B, C, T, H, W).
            encoder_hidden_states: text states, (B, L, text_dim).
            timestep: 1000 * sigma, (B,) or a scalar, in [0, 1000]; for causal networks also of each frame, (B, T).
            encoder_attention_mask: bool, (B, L), True for real tokens; None if all are.
            attention_kwargs: `{"scale": s}` scales attached LoRAs.
            return_dict: whether to wrap the result.
            frame_rate: frames a second, (B,) or one for all; networks with `clip_conditioning` need it for clips and
                take images without.
            clip_frames: latent frames of the whole clip that these are a part of, (B,) or one for all; for networks
                with `clip_conditioning`. None is the number of latent frames given.
            memory: of the frames before these, for causal networks; see `remember`. None begins a clip.

        Returns:
            The velocity, of the shape of `hidden_states` but for the channels.

        Raises:
            ValueError: if the latents or the text have a shape that the model can't take, or a network that isn't
                causal is given a memory.
        """
        self._check(hidden_states, encoder_hidden_states)
        is_causal = self.config.space_time == "causal"
        if memory is not None and not is_causal:
            raise ValueError(f"memory is given, but space_time is {self.config.space_time!r}: only 'causal' takes one")
        is_image = hidden_states.ndim == 4
        latents = hidden_states.unsqueeze(2) if is_image else hidden_states  # (B, C, T, H, W)
        grid = tuple(size // p for size, p in zip(latents.shape[2:], self.patch, strict=True))
        length = encoder_hidden_states.shape[1]

        # embed latents, text and condition
        image = self._embed_latents(latents, grid)  # (B, N, D)
        text = self._embed_text(encoder_hidden_states)  # (B, L, D)
        if is_causal:  # the text, at noise level 0, and each frame have a condition of their own
            timestep = _frame_timesteps(timestep, len(latents), grid[0])  # (B, 1 + T)
        condition = self._embed_condition(timestep, encoder_hidden_states, encoder_attention_mask)  # (B, D)
        condition = condition + self._embed_clip(grid[0], frame_rate, clip_frames, condition)  # (B, D)
        temb = self.adaln_single(condition)  # (B, 6, D)
        first = 0 if memory is None else memory.next_frame
        rotary = self._rotary(grid, length, latents.device, first)
        if is_causal:
            mask = self._causal_mask(encoder_attention_mask, length, grid, memory, latents.device)
            condition, temb = (_of_tokens(part, length, grid) for part in (condition, temb))  # (B, L + N, ...)
        else:
            mask = _joint_mask(encoder_attention_mask, image.shape[1])  # (B, L + N)

        # blocks: joint attention of text and image
        tokens = torch.cat([text, image], dim=1)  # (B, L + N, D)
        positions = TokenGrid(grid[0], grid[1], grid[2], length, "first" if length else "none")
        for index, block in enumerate(self.transformer_blocks):
            kept = None if memory is None else memory.layers[index]
            given = (tokens, temb, rotary, mask, grid[0], length, kept, positions)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, *given)
            else:
                tokens = block(*given)  # (B, L + N, D)

        # head: the image's tokens, modulated norm, projection, patches back to a latent
        image = tokens[:, length:]  # (B, N, D)
        condition = condition[:, length:] if is_causal else condition[:, None]  # (B, N, D) or (B, 1, D)
        shift, scale = (self.scale_shift_table.to(condition.dtype) + condition[:, :, None]).unbind(2)
        image = self.proj_out(modulate(self.norm_out(image), shift, scale))  # (B, N, P)
        sample = unpatchify(image, grid, self.patch)  # (B, C, T, H, W)
        sample = sample.squeeze(2) if is_image else sample
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def new_memory(self) -> FrameMemory:
        """Return the memory of a clip that begins, for causal networks."""
        return FrameMemory(len(self.transformer_blocks), self.config.window_frames)

    @torch.no_grad()
    def remember(
        self, memory: FrameMemory, hidden_states: Tensor, encoder_hidden_states: Tensor, **options: Any
    ) -> None:
        """Add finished frames to a memory, so that the frames that follow see them.

        Args:
            memory: of the frames before these.
            hidden_states: latents without noise, (B, C, T, H, W).
            encoder_hidden_states: text states, (B, L, text_dim).
            **options: see `forward`; not `timestep`.
        """
        memory.record(True, encoder_hidden_states.shape[1])
        try:
            timestep = torch.zeros((), device=hidden_states.device)
            self(hidden_states, encoder_hidden_states, timestep, memory=memory, return_dict=False, **options)
        finally:
            memory.record(False)
        height, width = (side // self.config.patch_size for side in hidden_states.shape[-2:])
        memory.advance(hidden_states.shape[2], height * width)

    def _causal_mask(
        self,
        text_mask: Tensor | None,
        length: int,
        grid: tuple[int, ...],
        memory: FrameMemory | None,
        device: torch.device,
    ) -> Tensor:
        """Return what text and frames see of kept frames, text and frames: (B, 1, L + N, M + L + N)."""
        first, before = (0, 0) if memory is None else (memory.next_frame, memory.frames)
        frames = torch.arange(first, first + grid[0], device=device)
        kept = torch.arange(first - before, first, device=device)
        sees = sees_frames(frames, torch.cat([kept, frames]), self.config.chunk_frames, self.config.window_frames)
        return causal_mask(text_mask, length, frames, kept, grid[1] * grid[2], sees)

    def _check(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> None:
        shape = tuple(hidden_states.shape)
        if hidden_states.ndim not in (4, 5) or shape[1] != self.config.in_channels:
            raise ValueError(
                f"latents must be (B, {self.config.in_channels}, H, W) or (B, {self.config.in_channels}, T, H, W), "
                f"got {shape}"
            )
        if encoder_hidden_states.ndim != 3 or encoder_hidden_states.shape[-1] != self.config.text_dim:
            raise ValueError(
                f"text states must be (B, L, {self.config.text_dim}), got {tuple(encoder_hidden_states.shape)}; "
                "is this the text encoder that the model was trained with?"
            )

    def _embed_latents(self, latents: Tensor, grid: tuple[int, ...]) -> Tensor:
        tokens = self.patch_embed(patchify(latents, self.patch))  # (B, N, D)
        if self.coordinate_embed is None:
            return tokens
        causal = self.config.space_time == "causal"  # then where a frame stands in a part of a clip says nothing
        within = (1, *grid[1:]) if causal else grid
        features = fourier_positions(within, self.config.coordinate_frequencies, latents.device)  # (N, 6 F)
        features = features.repeat(grid[0], 1) if causal else features
        return tokens + self.coordinate_embed(features.to(tokens.dtype))  # (B, N, D)

    def _embed_text(self, states: Tensor) -> Tensor:
        text = self.context_embedder(states)  # (B, L, D)
        if self.text_position_embed is None:
            return text
        indices = torch.arange(states.shape[1], dtype=torch.float32, device=states.device)  # (L,)
        features = sinusoidal_embedding(indices, 2 * self.config.text_position_frequencies, TEXT_PERIOD)  # (L, 2 F)
        return text + self.text_position_embed(features.to(text.dtype))  # (B, L, D)

    def _embed_condition(self, timestep: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        timestep = timestep if timestep.ndim == 2 else timestep.reshape(-1).expand(text.shape[0])  # (B,) or (B, 1 + T)
        if mask is None:
            pooled = text.mean(dim=1)  # (B, text_dim)
        else:
            weight = mask.to(text.dtype)[:, :, None]  # (B, L, 1)
            pooled = (text * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)  # (B, text_dim)
        pooled = self.pooled_embedder(pooled)  # (B, D)
        levels = self.time_embed(timestep.flatten(), text.dtype).unflatten(0, timestep.shape)  # (B, D) or (B, 1 + T, D)
        return levels + (pooled if levels.ndim == 2 else pooled[:, None])

    def _embed_clip(
        self,
        num_frames: int,
        frame_rate: Tensor | float | None,
        clip_frames: Tensor | float | None,
        condition: Tensor,
    ) -> Tensor | float:
        """Embed what a clip's motion depends on: (B, D), or 0 for networks that are not told."""
        if self.clip_embed is None:
            return 0.0
        if frame_rate is None and num_frames > 1:
            raise ValueError("this network is told the frame rate of clips: pass frame_rate, in frames a second")
        rate, length = (0.0 if frame_rate is None else frame_rate), (num_frames if clip_frames is None else clip_frames)
        features = []
        for value in (rate, length):
            values = torch.as_tensor(value, device=condition.device).float().reshape(-1)  # (B,) or (1,)
            features.append(sinusoidal_embedding(values, CLIP_FREQUENCIES, CLIP_PERIOD).expand(len(condition), -1))
        embedded = self.clip_embed(torch.cat(features, dim=-1).to(condition.dtype))  # (B, D)
        return embedded if condition.ndim == 2 else embedded[:, None]

    def _rotary(self, grid: tuple[int, ...], length: int, device: torch.device, first: int = 0) -> Rotary:
        positions = grid_positions(grid, device)  # (N, 3)
        positions[:, 0] += first
        # Text stands at the origin of the image; `_embed_text` says where it stands in the sentence.
        positions = torch.cat([positions.new_zeros(length, 3), positions])  # (L + N, 3)
        return rotary_embedding(positions, self.axes_dims, self.config.rope_theta)


def _split_axes(head_dim: int) -> tuple[int, int, int]:
    """Split a head's width among (frame, row, column): even, rows and columns equal, the rest to the frames."""
    space = head_dim * 3 // 8 // 2 * 2
    return head_dim - 2 * space, space, space


def _joint_mask(text_mask: Tensor | None, num_image_tokens: int) -> Tensor | None:
    """Extend the text's key mask (B, L) by the always visible latent tokens to (B, L + N)."""
    if text_mask is None:
        return None
    text_mask = text_mask.bool()
    return torch.cat([text_mask, text_mask.new_ones(text_mask.shape[0], num_image_tokens)], dim=1)


def _frame_timesteps(timestep: Tensor, batch: int, num_frames: int) -> Tensor:
    """Return the timesteps of the text, 0, and of each frame: (B, 1 + T)."""
    if timestep.ndim == 2 and timestep.shape != (batch, num_frames):
        raise ValueError(f"timestep has shape {tuple(timestep.shape)}: expected (B,) or ({batch}, {num_frames})")
    levels = timestep if timestep.ndim == 2 else timestep.reshape(-1, 1).expand(batch, num_frames)  # (B, T)
    return torch.cat([torch.zeros_like(levels[:, :1]), levels], dim=1)


def _of_tokens(values: Tensor, length: int, grid: tuple[int, ...]) -> Tensor:
    """Give each token the value of its frame, or of the text: (B, 1 + T, ...) to (B, L + N, ...)."""
    counts = torch.tensor([length] + [grid[1] * grid[2]] * grid[0], device=values.device)
    return values.repeat_interleave(counts, dim=1, output_size=length + grid[0] * grid[1] * grid[2])
