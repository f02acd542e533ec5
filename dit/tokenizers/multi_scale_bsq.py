"""MultiScaleBSQ: an image as bit maps of growing size, each encoding the residual of the coarser ones (Infinity).

Sections 3.2 and 3.3 of arXiv 2412.04431. There is no codebook: a token is the signs of a vector's d channels, and
stands for the unit vector with these signs and equal magnitudes (binary spherical quantisation, arXiv 2406.07548).
With `patchify` 2 a token covers 2 x 2 latent pixels and has 4 d bits. One model serves every schedule of scales, so
methods take the schedule of token maps; None is the one of the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, Decoder, DecoderOutput, Encoder
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from dit.layers.scales import Grid, scale_grids
from dit.tokenizers.multi_scale import MultiScaleCodes, MultiScaleTokenizer
from dit.tokenizers.vit_autoencoder import ViTAutoencoder

VIT_SPREAD = 2.0
"""Standard deviation of a ViT's features in units of a bit's magnitude: several scales are needed to add up to it."""


def bits_to_codes(bits: Tensor) -> Tensor:
    """Return the unit vectors that bits (B, d, h, w) in {0, 1} stand for, (B, d, h, w), float32."""
    corner = bits.shape[1] ** -0.5
    return F.normalize(bits.float() * corner * 2 - corner, dim=1)  # (B, d, h, w)


def resize(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Resize maps (B, d, h, w) as clips of one frame, with the arithmetic that the released weights were trained with.

    Args:
        x: (B, d, h, w).
        size: rows and columns.
        mode: "area" or "trilinear".
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x[:, :, None], size=(1, *size), mode=mode)[:, :, 0]  # (B, d, H, W)


class MultiScaleBSQ(MultiScaleTokenizer, ModelMixin, ConfigMixin, AutoencoderMixin):
    """Autoencoder with multi-scale bits, numerically the released tokenizer of Infinity.

    Its latent is the sum of the coded scales, so `decode(encode(x).latent)` is what the bits can say of `x`.

    Args:
        scales: the default schedule: sides of the token maps, coarse to fine; pairs are rows and columns.
        latent_channels: channels d of the latent, which are the bits of a latent pixel.
        block_out_channels: of encoder and (reversed) decoder; each entry but the last halves the size.
        layers_per_block: residual blocks a level of the encoder; the decoder has one more.
        norm_num_groups: groups of the group norms.
        patchify: latent pixels along a side of a token, 1 or 2.
        in_channels: colours.
        vit: arguments of a `ViTAutoencoder` that encodes and decodes instead of the convolutional networks (whose
            sizes, `block_out_channels` to `norm_num_groups`, then mean nothing).

    Raises:
        ValueError: scales that shrink, or none; tokens of another size.
    """

    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules = ["latent_norm"]

    @register_to_config
    def __init__(
        self,
        scales: tuple[int | tuple[int, int], ...] = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64),
        latent_channels: int = 32,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        patchify: int = 1,
        in_channels: int = 3,
        vit: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if patchify not in (1, 2):
            raise ValueError(f"patchify is {patchify}; a token covers 1 or 2 latent pixels along a side")
        self.grids = scale_grids(scales)
        self.backbone = ViTAutoencoder(in_channels, latent_channels, **vit) if vit is not None else None
        self.feature_scale = VIT_SPREAD * latent_channels**-0.5 if vit is not None else 1.0
        if vit is not None:
            return
        shape = {
            "block_out_channels": tuple(block_out_channels),
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
            "mid_block_add_attention": False,
        }
        levels = len(block_out_channels)
        self.encoder = Encoder(in_channels, latent_channels, ("DownEncoderBlock2D",) * levels, double_z=False, **shape)
        self.decoder = Decoder(latent_channels, in_channels, ("UpDecoderBlock2D",) * levels, **shape)

    # ------------------------------------------------------------------- pixels

    @apply_forward_hook
    def features(self, x: Tensor) -> Tensor:
        """Encode images (B, 3, H f, W f) in [-1, 1] of any float dtype without quantising, (B, d, H, W), float32."""
        if self.backbone is not None:
            latent = self.backbone.encode(x.to(self.backbone.patch_embed.weight.dtype)).latent  # (B, d, H, W)
            return latent.float() * self.feature_scale
        return self.encoder(x.to(self.encoder.conv_in.weight.dtype)).float()

    def quantize(self, x: Tensor, grids: Sequence[Grid] | None = None) -> MultiScaleCodes:
        """Turn images into bits.

        Args:
            x: (B, 3, H f, W f) in [-1, 1], where H, W is the latent size of the last scale.
            grids: the schedule of token maps.

        Returns:
            The bits of each scale, (B, N_s, d p p) int64 each (p is `patchify`), and their sum.

        Raises:
            ValueError: images of another size.
        """
        size = tuple(side * self.spatial_compression_ratio for side in self._latent_size(grids, -1))
        if x.ndim != 4 or tuple(x.shape[-2:]) != size:
            raise ValueError(f"got an image tensor of shape {tuple(x.shape)}, expected (B, 3, {size[0]}, {size[1]})")
        return self.quantize_features(self.features(x), grids)

    def quantize_features(self, features: Tensor, grids: Sequence[Grid] | None = None) -> MultiScaleCodes:
        """Turn features (B, d, H, W) into bits; see `quantize`."""
        latents, indices = torch.zeros_like(features), []
        rest = features  # (B, d, H, W)
        for scale in range(len(grids or self.grids)):
            size = self._latent_size(grids, scale)
            bits = (resize(rest, size, "area") > 0).long()  # (B, d, h, w)
            added = resize(bits_to_codes(bits), features.shape[-2:], "trilinear")  # (B, d, H, W)
            latents, rest = latents + added, rest - added
            indices.append(self._to_tokens(bits))
        return MultiScaleCodes(indices=indices, latent=latents)

    def residuals(self, features: Tensor, sums: Sequence[Tensor], grids: Sequence[Grid] | None = None) -> list[Tensor]:
        """Return what each scale had to code: rows (M, d) of what the scales before it left of the features.

        Args:
            features: (B, d, H, W).
            sums: of `partial_sums`.
            grids: the schedule of token maps.
        """
        before = [torch.zeros_like(features), *sums[:-1]]
        sizes = [self._latent_size(grids, scale) for scale in range(len(before))]
        rests = [resize(features - done, size, "area") for done, size in zip(before, sizes, strict=True)]
        return [rest.permute(0, 2, 3, 1).flatten(0, 2) for rest in rests]

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents, also those of the first few scales only.

        Args:
            z: (B, d, H, W); any size.
            return_dict: whether to wrap the result.
            generator: accepted for the interface; decoding is deterministic.

        Returns:
            Pixels of about [-1, 1], not clamped, (B, 3, H f, W f).
        """
        if self.backbone is not None:
            z = (z / self.feature_scale).to(self.backbone.from_latent.weight.dtype)  # (B, d, H, W)
            return self.backbone.decode(z, return_dict=return_dict)
        sample = self.decoder(z.to(self.decoder.conv_in.weight.dtype))  # (B, 3, H f, W f)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    # ------------------------------------------------------------------- scales

    def _latent_size(self, grids: Sequence[Grid] | None, scale: int) -> Grid:
        """Return rows and columns of a scale in latent pixels."""
        rows, columns = (grids or self.grids)[scale]
        return rows * self.config.patchify, columns * self.config.patchify

    def _to_tokens(self, maps: Tensor) -> Tensor:
        """Cut maps (B, d, h p, w p) into tokens (B, h w, d p p)."""
        return F.pixel_unshuffle(maps, self.config.patchify).flatten(2).transpose(1, 2)  # (B, N, d p p)

    def _to_map(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Reshape tokens (B, h w, d p p) to a map (B, d, h p, w p)."""
        expected = (math.prod(grid), self.latent_channels * self.config.patchify**2)
        if tuple(tokens.shape[1:]) != expected:
            raise ValueError(f"got tokens of shape {tuple(tokens.shape)}, expected (B, {expected[0]}, {expected[1]})")
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), self.config.patchify)  # (B, d, h p, w p)

    def start_latents(self, batch_size: int, grids: Sequence[Grid] | None = None) -> Tensor:
        """Return the latent before the first scale: zeros, (B, d, H, W), float32."""
        size = self._latent_size(grids, -1)
        return torch.zeros(batch_size, self.latent_channels, *size, device=next(self.parameters()).device)

    def accumulate(self, latents: Tensor, tokens: Tensor, scale: int, grids: Sequence[Grid] | None = None) -> Tensor:
        """Add a scale to the latent.

        Args:
            latents: sum of the scales before, (B, d, H, W).
            tokens: the scale's bits, (B, N, d p p).
            scale: index of the scale.
            grids: the schedule of token maps.

        Returns:
            The new sum, (B, d, H, W); `latents` stays as it is.

        Raises:
            ValueError: another number of tokens or bits than the scale has.
        """
        codes = bits_to_codes(self._to_map(tokens, (grids or self.grids)[scale]))  # (B, d, h, w)
        return latents + resize(codes, latents.shape[-2:], "trilinear")  # (B, d, H, W)

    def next_input(self, latents: Tensor, scale: int, grids: Sequence[Grid] | None = None) -> Tensor:
        """Return the generator's input at `scale`: the latent (B, d, H, W) at that size, (B, N, d p p)."""
        return self._to_tokens(resize(latents, self._latent_size(grids, scale), "trilinear"))  # (B, N, d p p)
