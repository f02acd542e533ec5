"""STAutoencoder: the space-time VAE of LaVin-DiT (arXiv 2411.11505), which is CogVideoX's with other rules for time.

The weights have the names and shapes of diffusers' `AutoencoderKLCogVideoX`. Three rules differ:

- the first latent frame always becomes one frame; CogVideoX doubles it where an even number of latent frames comes in;
- a clip is encoded and decoded at once, while diffusers takes 8 frames (2 latent ones) at a time;
- in tiles, long clips are cut into chunks that overlap by one frame; the overlap is computed twice and kept once.
  The chunks know nothing else of each other, so this is not the same as computing the clip at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch import Tensor, nn

from dit.runtime._typing import Typed

AT_ONCE = 2**30
"""Frames that diffusers' code takes at a time: all."""


class STUpsample3D(CogVideoXUpsample3D):
    """Doubling of sides and, but for the first frame, of frames."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (B, C, T, H, W) to (B, C, T', 2 H, 2 W), T' = 2 T - 1 where time is doubled."""
        x = inputs.repeat_interleave(2, dim=2)[:, :, 1:] if self.compress_time else inputs  # (B, C, T', H, W)
        frames = F.interpolate(x.transpose(1, 2).flatten(0, 1), scale_factor=2.0)  # (B T', C, 2 H, 2 W)
        return self.conv(frames).unflatten(0, (len(x), -1)).transpose(1, 2)


class STAutoencoder(Typed, AutoencoderKLCogVideoX, ModelMixin):
    """Variational autoencoder of clips of 1 + 4 k frames, and of images as clips of one frame.

    `enable_tiling()` lets it work in tiles of `tile_sample_min_height` x `tile_sample_min_width` pixels and
    `tile_sample_min_num_frames` frames where a clip is larger than that along any axis.

    Args:
        block_out_channels: widths from the finest level to the coarsest.
        latent_channels: channels of the code.
        layers_per_block: residual blocks a level of the encoder; the decoder has one more.
        scaling_factor: what LaVin-DiT multiplies latents with: nothing.
        in_channels, out_channels, down_block_types, up_block_types, act_fn, norm_eps, norm_num_groups,
        temporal_compression_ratio, sample_height, sample_width, shift_factor, latents_mean, latents_std, force_upcast,
        use_quant_conv, use_post_quant_conv, invert_scale_latents: as in `AutoencoderKLCogVideoX`.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("CogVideoXDownBlock3D",) * 4,
        up_block_types: tuple[str, ...] = ("CogVideoXUpBlock3D",) * 4,
        block_out_channels: tuple[int, ...] = (128, 256, 256, 512),
        latent_channels: int = 16,
        layers_per_block: int = 3,
        act_fn: str = "silu",
        norm_eps: float = 1e-6,
        norm_num_groups: int = 32,
        temporal_compression_ratio: int = 4,
        sample_height: int = 512,
        sample_width: int = 512,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = False,
        use_post_quant_conv: bool = False,
        invert_scale_latents: bool = False,
    ) -> None:
        sizes: Any = (in_channels, out_channels, down_block_types, up_block_types, block_out_channels, latent_channels)
        norms: Any = (layers_per_block, act_fn, norm_eps, norm_num_groups, temporal_compression_ratio)
        scale: Any = (sample_height, sample_width, scaling_factor, shift_factor, latents_mean, latents_std)
        rest: Any = (force_upcast, use_quant_conv, use_post_quant_conv, invert_scale_latents)
        super().__init__(*sizes, *norms, *scale, *rest)
        blocks: Any = self.decoder.up_blocks
        for block in blocks:
            if block.upsamplers is not None:
                block.upsamplers = nn.ModuleList([_of_ours(old) for old in block.upsamplers])
        self.num_sample_frames_batch_size = self.num_latent_frames_batch_size = AT_ONCE
        self.tile_sample_min_num_frames = 129
        self.tile_overlap_factor_height = self.tile_overlap_factor_width = 0.25
        super().enable_tiling(sample_height, sample_width)  # tiles of the published code
        self.use_tiling = False

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels along a side of a latent pixel."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def _encode(self, x: Tensor) -> Tensor:
        sizes = (self.tile_sample_min_num_frames, self.tile_sample_min_height, self.tile_sample_min_width)
        if self.use_tiling and _exceeds(x, sizes):
            return _in_chunks(x, sizes[0], super().tiled_encode)  # (B, 2 C, T', h, w)
        return super()._encode(x)  # (B, 2 C, T', h, w)

    def _decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        frames = (self.tile_sample_min_num_frames - 1) // self.config.temporal_compression_ratio + 1
        if self.use_tiling and _exceeds(z, (frames, self.tile_latent_min_height, self.tile_latent_min_width)):
            sample = _in_chunks(z, frames, lambda part: super(STAutoencoder, self).tiled_decode(part, False)[0])
        else:
            sample = super()._decode(z, return_dict=False)[0]  # (B, 3, T, H, W)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


def _of_ours(old: CogVideoXUpsample3D) -> STUpsample3D:
    """Return the layer that takes the place of diffusers'."""
    return STUpsample3D(old.conv.in_channels, old.conv.out_channels, compress_time=old.compress_time)


def _exceeds(x: Tensor, sizes: tuple[int, ...]) -> bool:
    """Return whether a clip (B, C, T, H, W) is larger than (T, H, W) anywhere."""
    return any(side > most for side, most in zip(x.shape[2:], sizes, strict=True))


def _in_chunks(x: Tensor, frames: int, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute chunks of `frames` frames (axis 2) that overlap by one, whose second result is dropped."""
    total = x.shape[2]
    starts = range(0, max(total - 1, 1), max(frames - 1, 1))
    parts = [compute(x[:, :, start : min(start + frames, total)]) for start in starts]
    return torch.cat([part if index == 0 else part[:, :, 1:] for index, part in enumerate(parts)], dim=2)
