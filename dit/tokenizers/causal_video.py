"""CausalVideoAutoencoder: a small continuous autoencoder of clips, causal in time, exact in chunks.

`ViTAutoencoder` (after ViTok, arXiv 2501.09755) with space-time patches and a memory. The first frame is a latent frame
of its own, as in MAGVIT-v2 (arXiv 2310.05737), so an image is a clip of one frame; every further latent frame holds
four. Blocks attend within a latent frame and to a finite window of frames before it, and nothing else mixes frames: no
statistics over time, no padding in the middle of a clip. So encoding and decoding in chunks gives what they give at
once, with memory that doesn't grow with the clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from dit.layers.embeddings import patchify, unpatchify
from dit.layers.frame_window import FrameWindowBlock, KeyValue, window_rotary
from dit.layers.linear import Linear
from dit.runtime._typing import Typed
from dit.tokenizers.base import TokenizerOutput, VisualTokenizer, linear_preview
from dit.tokenizers.clip_state import DecoderState, EncoderState, as_clip, check_same_clip
from dit.tokenizers.vit_autoencoder import PREVIEW_CELL, PREVIEW_TOKENS, ConvBlock, limit_spread


class CausalVideoAutoencoder(Typed, ModelMixin, AutoencoderMixin, ConfigMixin, VisualTokenizer):
    """Autoencoder of clips and images with a continuous, unit-variance code.

    T frames become 1 + ceil((T - 1) / `temporal_patch_size`) latent frames; a last group that isn't complete is filled
    with its last frame. Decoding gives whole groups, and crops them on request (`num_frames`).

    Clips of more than `tile_sample_min_num_frames` frames are computed in chunks of as many where no gradient is asked
    for, with the same result; set `use_temporal_tiling` to False to compute them at once.

    With `frame_codes` each frame is coded by itself, as by an autoencoder of images, and the codes of a group of frames
    are stacked as channels. The generator then has as few tokens, and what moves is drawn as sharply as what doesn't;
    its latents have `temporal_patch_size` times the channels of an image's code.

    Args:
        in_channels: colour channels.
        latent_channels: code channels C; a frame of side S becomes (C, S / patch_size, S / patch_size).
        patch_size: pixels along a patch; a multiple of `refiner_patch`.
        temporal_patch_size: frames of a latent frame after the first.
        encoder_dim: width of the encoder.
        encoder_layers: blocks of the encoder.
        encoder_window: latent frames that each block of the encoder sees, its own and those before it. At 1 a latent
            frame depends on its own group of frames only.
        decoder_dim: width of the decoder.
        decoder_layers: blocks of the decoder.
        decoder_window: latent frames that each block of the decoder sees.
        attention_head_dim: head width of both, a multiple of 4.
        ff_ratio: width of the MLPs as a multiple of the model's.
        refiner_channels: width of the convolutions on each frame behind the decoder; 0 leaves them out.
        refiner_layers: residual pairs of convolutions.
        refiner_patch: pixels that one position of the convolutions generates along a side.
        rope_theta: base of the spatial rotary frequencies.
        sample_size: side of the frames it was trained on.
        frame_codes: whether each frame is coded by itself. Blocks then see `encoder_window` and `decoder_window` frames
            instead of latent frames.

    Raises:
        ValueError: sizes that don't divide each other, or a window without a frame.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["FrameWindowBlock", "ConvBlock"]
    _repeated_blocks = ["FrameWindowBlock", "ConvBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "latent_norm", "norm"]
    _keep_in_fp32_modules = ["latent_norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 16,
        patch_size: int = 16,
        temporal_patch_size: int = 4,
        encoder_dim: int = 128,
        encoder_layers: int = 2,
        encoder_window: int = 1,
        decoder_dim: int = 192,
        decoder_layers: int = 4,
        decoder_window: int = 2,
        attention_head_dim: int = 32,
        ff_ratio: float = 8 / 3,
        refiner_channels: int = 32,
        refiner_layers: int = 1,
        refiner_patch: int = 4,
        rope_theta: float = 100.0,
        sample_size: int = 96,
        frame_codes: bool = False,
    ) -> None:
        super().__init__()
        if refiner_patch < 1 or patch_size % refiner_patch:
            raise ValueError(f"patch_size {patch_size} must be a multiple of refiner_patch {refiner_patch}")
        if attention_head_dim % 4:
            raise ValueError(f"attention_head_dim is {attention_head_dim}, expected a multiple of 4; use 16, 32 or 64")
        counts = {
            "encoder_window": encoder_window,
            "decoder_window": decoder_window,
            "temporal_patch_size": temporal_patch_size,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1, the frame itself")
        if frame_codes and latent_channels % temporal_patch_size:
            raise ValueError(
                f"latent_channels is {latent_channels}, expected a multiple of temporal_patch_size "
                f"{temporal_patch_size}: with frame_codes the frames of a group share the channels"
            )
        self.stacked = temporal_patch_size if frame_codes else 1  # codes in the channels of a latent frame
        frames = temporal_patch_size // self.stacked  # of a code
        code_channels = latent_channels // self.stacked
        self.patch = (frames, patch_size, patch_size)
        self.patch_embed = Linear(in_channels * frames * patch_size**2, encoder_dim)
        self.encoder_blocks = nn.ModuleList(
            [FrameWindowBlock(encoder_dim, encoder_dim // attention_head_dim, ff_ratio) for _ in range(encoder_layers)]
        )
        self.encoder_norm = nn.LayerNorm(encoder_dim, eps=1e-6)
        self.to_latent = Linear(encoder_dim, code_channels)
        self.latent_norm = nn.BatchNorm1d(code_channels, affine=False, momentum=0.01)

        self.from_latent = Linear(code_channels, decoder_dim)
        self.decoder_blocks = nn.ModuleList(
            [FrameWindowBlock(decoder_dim, decoder_dim // attention_head_dim, ff_ratio) for _ in range(decoder_layers)]
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        if refiner_channels:
            scale = patch_size // refiner_patch
            self.to_pixels = Linear(decoder_dim, frames * refiner_channels * scale**2)
            self.refiner = nn.Sequential(
                *[ConvBlock(refiner_channels) for _ in range(refiner_layers)],
                nn.Conv2d(refiner_channels, in_channels * refiner_patch**2, 3, padding=1),
                nn.PixelShuffle(refiner_patch),
            )
        else:
            self.to_pixels = Linear(decoder_dim, frames * in_channels * patch_size**2)
            self.refiner = None
        self.register_buffer("preview_factors", torch.zeros(3 * PREVIEW_CELL**2, latent_channels + 1))
        self.gradient_checkpointing = False
        self.use_slicing = False
        self.use_temporal_tiling = True
        self.tile_sample_min_num_frames = 64

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels along a side of a latent pixel."""
        return self.config.patch_size

    @property
    def temporal_compression_ratio(self) -> int:
        """Frames of a latent frame after the first."""
        return self.config.temporal_patch_size

    @property
    def latent_channels(self) -> int:
        """Channels of the code."""
        return self.config.latent_channels

    @apply_forward_hook
    def encode(
        self, x: Tensor, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> TokenizerOutput | tuple[Tensor]:
        """Encode pixels; deterministic, so `generator` is not used.

        Args:
            x: (B, 3, H, W) or (B, 3, T, H, W) in [-1, 1]; H and W multiples of `patch_size`.
            generator: accepted for the interface.
            return_dict: whether to wrap the result.

        Returns:
            Latents of unit variance, (B, C, H/p, W/p) or (B, C, 1 + ceil((T - 1) / 4), H/p, W/p).
        """
        clip = as_clip(x)  # (B, 3, T, H, W)
        parts = clip.split(1) if self.use_slicing else (clip,)
        latent = torch.cat([self._encode(part) for part in parts])  # (B, C, T', H', W')
        latent = latent.squeeze(2) if x.ndim == 4 else latent
        return TokenizerOutput(latent=latent) if return_dict else (latent,)

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        *,
        num_frames: int | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents.

        Args:
            z: (B, C, H, W) or (B, C, T', H, W).
            return_dict: whether to wrap the result.
            generator: accepted for the interface; decoding is deterministic.
            num_frames: frames of the clip that was encoded, to crop to; None gives all, 1 + 4 (T' - 1).

        Returns:
            Pixels of about [-1, 1], not clamped.

        Raises:
            ValueError: a clip of `num_frames` has another number of latent frames.
        """
        latent = as_clip(z)  # (B, C, T', H, W)
        if num_frames is not None and self.num_latent_frames(num_frames) != latent.shape[2]:
            most = 1 + self.temporal_compression_ratio * (latent.shape[2] - 1)
            least = max(most - self.temporal_compression_ratio + 1, 1)
            raise ValueError(
                f"num_frames is {num_frames}, but {latent.shape[2]} latent frames hold {least} to {most} frames; "
                "pass the number of frames that were encoded, or None for all"
            )
        parts = latent.split(1) if self.use_slicing else (latent,)
        sample = torch.cat([self._decode(part) for part in parts])[:, :, :num_frames]  # (B, 3, T, H, W)
        sample = sample.squeeze(2) if z.ndim == 4 else sample
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode `sample`, an image or a clip; the result has its shape."""
        latent = self.encode(sample, return_dict=False)[0]
        return self.decode(latent, return_dict, num_frames=sample.shape[2] if sample.ndim == 5 else None)

    def num_latent_frames(self, num_frames: int) -> int:
        """Return the latent frames of a clip of `num_frames` frames, at least 1."""
        if num_frames < 1:
            raise ValueError(f"num_frames is {num_frames}, expected at least 1; an image is a clip of one frame")
        return 1 + -(-(num_frames - 1) // self.temporal_compression_ratio)

    def encode_chunk(
        self, x: Tensor, state: EncoderState | None = None, *, last: bool = False
    ) -> tuple[Tensor, EncoderState]:
        """Encode the next frames of a clip.

        In training mode the statistics of the code are those of the chunk; for equal results use `eval()`.

        Args:
            x: (B, 3, T, H, W), any T; after the first chunk also 0.
            state: what the chunk before returned; None at the start of a clip.
            last: whether the clip ends here, so that an incomplete group is filled with its last frame.

        Returns:
            Latents of the groups that are complete, (B, C, T', H/p, W/p) with T' from 0, and the state to go on with.

        Raises:
            ValueError: frames of another shape than the chunk before, or sides that aren't multiples of `patch_size`.
        """
        group = self.config.temporal_patch_size
        self._check_frames(x, least=1 if state is None else 0)
        if state is None:
            x = torch.cat([x[:, :, :1].expand(-1, -1, group - 1, -1, -1), x], dim=2)  # (B, 3, T + 3, H, W)
        else:
            check_same_clip(x, state.waiting)
            x = torch.cat([state.waiting, x], dim=2)  # (B, 3, R + T, H, W)
        if last and x.shape[2] % group:
            missing = group - x.shape[2] % group
            x = torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        whole = x.shape[2] // group * group
        waiting = x[:, :, whole:].clone()  # a view would keep the whole chunk in memory
        memory = () if state is None else state.memory
        if whole == 0:
            shape = (x.shape[0], self.latent_channels, 0, *(side // self.config.patch_size for side in x.shape[-2:]))
            return x.new_zeros(shape), EncoderState(memory, waiting)
        grid = (whole // self.patch[0], x.shape[3] // self.patch[1], x.shape[4] // self.patch[2])
        tokens = self.patch_embed(patchify(x[:, :, :whole], self.patch)).unflatten(1, (grid[0], -1))  # (B, T', N, De)
        tokens, memory = self._run(self.encoder_blocks, tokens, grid[1:], self.config.encoder_window, memory)
        tokens = self.to_latent(self.encoder_norm(tokens)).flatten(1, 2)  # (B, T' N, C)
        latent = self._normalize(tokens.float().transpose(1, 2)).to(tokens.dtype)  # (B, C, T' N)
        return self._stack(latent.unflatten(-1, grid)), EncoderState(memory, waiting)

    def decode_chunk(self, z: Tensor, state: DecoderState | None = None) -> tuple[Tensor, DecoderState]:
        """Decode the next latent frames of a clip.

        Args:
            z: (B, C, T', H, W), at least one latent frame.
            state: what the chunk before returned; None at the start of a clip.

        Returns:
            Pixels, (B, 3, 4 T', H p, W p), at the start of a clip 3 frames less, and the state to go on with.

        Raises:
            ValueError: no latent frame, or of another shape than the chunk before.
        """
        if z.ndim != 5 or z.shape[1] != self.latent_channels or z.shape[2] < 1:
            expected = f"(B, {self.latent_channels}, T, H, W) with T from 1"
            raise ValueError(f"latents have the shape {tuple(z.shape)}, expected {expected}; pass what encode gave")
        if state is not None:
            check_same_clip(z, state.latent)
        codes = self._unstack(z)  # (B, C, T', H, W)
        grid = tuple(codes.shape[2:])
        tokens = self.from_latent(codes.flatten(2).transpose(1, 2)).unflatten(1, (grid[0], -1))  # (B, T', N, Dd)
        memory = () if state is None else state.memory
        tokens, memory = self._run(self.decoder_blocks, tokens, grid[1:], self.config.decoder_window, memory)
        tokens = self.to_pixels(self.decoder_norm(tokens)).flatten(1, 2)  # (B, T' N, P)
        scale = self.config.patch_size if self.refiner is None else self.config.patch_size // self.config.refiner_patch
        frames = unpatchify(tokens, grid, (self.patch[0], scale, scale))  # (B, R, 4 T', H/r, W/r)
        if state is None:
            frames = frames[:, :, self.config.temporal_patch_size - 1 :]  # of the first group the last frame counts
        if self.refiner is not None:
            pixels = self.refiner(frames.transpose(1, 2).flatten(0, 1))  # (B T, 3, H p, W p)
            frames = pixels.unflatten(0, (len(z), -1)).transpose(1, 2)
        return frames, DecoderState(memory, z[:, :, :0].clone())  # (B, 3, T, H p, W p)

    @torch.no_grad()
    def encode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode a clip that comes in chunks; together the same as `encode` of all frames.

        Args:
            chunks: (B, 3, T, H, W) each, of any numbers of frames T.

        Yields:
            Latents, (B, C, T', H/p, W/p), as soon as their frames are there.
        """
        state = None
        for chunk in chunks:
            latent, state = self.encode_chunk(chunk, state)
            if latent.shape[2]:
                yield latent
        if state is not None and state.waiting.shape[2]:
            yield self.encode_chunk(state.waiting[:, :, :0], state, last=True)[0]

    @torch.no_grad()
    def decode_chunks(self, chunks: Iterable[Tensor], *, num_frames: int | None = None) -> Iterator[Tensor]:
        """Decode a clip that comes in chunks; together the same as `decode` of all latent frames.

        Args:
            chunks: (B, C, T', H, W) each, of any numbers of latent frames.
            num_frames: frames to give at most; the rest of the last group is dropped.

        Yields:
            Pixels, (B, 3, T, H p, W p).

        Raises:
            ValueError: there are fewer frames than `num_frames`.
        """
        state, given = None, 0
        for chunk in chunks:
            pixels, state = self.decode_chunk(chunk, state)
            rest = None if num_frames is None else num_frames - given
            given += pixels.shape[2]
            if rest is None or rest > 0:
                yield pixels[:, :, :rest]
        if num_frames is not None and given < num_frames:
            raise ValueError(f"num_frames is {num_frames}, but the chunks hold {given} frames; pass at most {given}")

    def stills(self, latent: Tensor, num_frames: int) -> Tensor:
        """Return what each frame of a clip is encoded as where the clip stands still there, without encoding it.

        Args:
            latent: of a clip, (B, C, T', h, w), of a model with `frame_codes`.
            num_frames: frames T of the clip.

        Returns:
            (B, C, T, h, w).

        Raises:
            ValueError: the model has no codes of single frames.
        """
        if self.stacked == 1:
            raise ValueError("frame_codes is off, so frames have no codes of their own; encode each frame by itself")
        first = self.stacked - 1  # the first frame fills its group
        return self._unstack(latent)[:, :, first : first + num_frames].repeat(1, self.stacked, 1, 1, 1)

    def _encode(self, clip: Tensor) -> Tensor:
        """Encode a clip (B, 3, T, H, W) at once, or in chunks if it is long."""
        frames = self.tile_sample_min_num_frames
        if self._in_chunks(clip.shape[2]):
            return torch.cat(list(self.encode_chunks(clip.split(frames, dim=2))), dim=2)  # (B, C, T', H', W')
        return self.encode_chunk(clip, last=True)[0]  # (B, C, T', H', W')

    def _decode(self, latent: Tensor) -> Tensor:
        """Decode a clip (B, C, T', H, W) at once, or in chunks if it is long."""
        frames = max(self.tile_sample_min_num_frames // self.temporal_compression_ratio, 1)
        if self._in_chunks(latent.shape[2] * self.temporal_compression_ratio):
            return torch.cat(list(self.decode_chunks(latent.split(frames, dim=2))), dim=2)  # (B, 3, T, H p, W p)
        return self.decode_chunk(latent)[0]  # (B, 3, T, H p, W p)

    def _in_chunks(self, frames: int) -> bool:
        """Return whether a clip is long, and chunks can't change anything: neither gradients nor batch statistics."""
        long = self.use_temporal_tiling and frames > self.tile_sample_min_num_frames
        return long and not torch.is_grad_enabled() and not self.latent_norm.training

    def _stack(self, codes: Tensor) -> Tensor:
        """Stack the codes of each group as channels, frame by frame: (B, C, T, H, W) to (B, R C, T / R, H, W)."""
        return codes.unflatten(2, (-1, self.stacked)).permute(0, 3, 1, 2, 4, 5).flatten(1, 2)

    def _unstack(self, latent: Tensor) -> Tensor:
        """Undo `_stack`: (B, R C, T, H, W) to (B, C, R T, H, W)."""
        return latent.unflatten(1, (self.stacked, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)

    def _check_frames(self, x: Tensor, least: int) -> None:
        colours, side = self.config.in_channels, self.config.patch_size
        fits = x.ndim == 5 and x.shape[1] == colours and x.shape[2] >= least
        if not fits or any(size % side or size == 0 for size in x.shape[3:]):
            raise ValueError(
                f"frames have the shape {tuple(x.shape)}, expected (B, {colours}, T, H, W) with T from {least} and H "
                f"and W multiples of {side}; crop or resize them"
            )

    def _normalize(self, latent: Tensor) -> Tensor:
        """Apply batch norm to (B, C, N) in float32 whatever the model's dtype: this defines the scale of the code."""
        norm = self.latent_norm
        if norm.training:
            return norm(latent)
        mean, var = (norm.get_buffer(name).float() for name in ("running_mean", "running_var"))  # (C,)
        return F.batch_norm(latent, mean, var, eps=norm.eps)  # (B, C, N)

    def _run(
        self, blocks: nn.ModuleList, tokens: Tensor, grid: tuple[int, ...], window: int, memory: tuple[KeyValue, ...]
    ) -> tuple[Tensor, tuple[KeyValue, ...]]:
        """Run frames (B, T, N, D) through blocks; returns them and the memory of the blocks."""
        height, width = grid
        config = self.config
        rotary = window_rotary((height, width), config.attention_head_dim, config.rope_theta, window, tokens.device)
        kept: list[KeyValue] = []
        for index, block in enumerate(blocks):
            before = memory[index] if memory else None
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens, after = self._gradient_checkpointing_func(block, tokens, rotary, before)
            else:
                tokens, after = block(tokens, rotary, before)  # (B, T, N, D)
            if after is not None and not torch.is_grad_enabled():
                after = (after[0].clone(), after[1].clone())  # views would keep the whole chunk in memory
            kept += [] if after is None else [after]
        return tokens, tuple(kept)

    def normalize_latents(self, z: Tensor) -> Tensor:
        """Return the latents: they already have unit variance."""
        return z

    def denormalize_latents(self, z: Tensor) -> Tensor:
        """Return the latents, as `normalize_latents` does."""
        return z

    @torch.no_grad()
    def preview(self, z: Tensor, every_frame: bool = False) -> Tensor:
        """Show latents by the decoder, or large ones (and those of an offloaded decoder) by a linear map.

        Args:
            z: normalised, (B, C, H, W) or (B, C, T', H, W); scaled down where they spread further than encoded ones.
            every_frame: of a clip, show each latent frame by its last frame instead of the first one only.

        Returns:
            (B, 3, h, w) in [-1, 1], or with `every_frame` (B, 3, T', h, w).
        """
        clip = as_clip(z)  # (B, C, T', H, W)
        clip = clip if every_frame else clip[:, :, :1]
        count = clip.shape[2]
        spread = limit_spread(clip.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, count))  # (B, T', C, H, W)
        weight = self.from_latent.weight
        if spread[0, :, 0].numel() > PREVIEW_TOKENS or weight.is_meta:
            shown = linear_preview(spread.flatten(0, 1), self.preview_factors).unflatten(0, (-1, count))
            shown = shown.transpose(1, 2)  # (B, 3, T', 4 H, 4 W)
        else:
            pixels = self._decode(spread.transpose(1, 2).to(weight.dtype)).float().clamp(-1, 1)
            shown = pixels[:, :, :: self.temporal_compression_ratio]  # (B, 3, T', H p, W p)
        return shown if every_frame else shown[:, :, 0]
