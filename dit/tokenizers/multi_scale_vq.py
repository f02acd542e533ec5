"""MultiScaleVQ: an image as token maps of growing size, each encoding the residual of the coarser ones (VAR).

Section 3.2 and algorithms 1 and 2 of arXiv 2404.02905. All scales share one codebook. A looked-up map is enlarged to
the latent's size, repaired by a small convolution `phi` (enlarging blurs), and added to the sum so far; the next scale
codes the rest. Encoder and decoder are those of latent diffusion's f16 autoencoder, taken from diffusers, or, for small
models, those of `ViTAutoencoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, Decoder, DecoderOutput, Encoder
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from dit.layers.scales import Grid, scale_grids, token_counts
from dit.tokenizers.multi_scale import MultiScaleCodes, MultiScaleTokenizer
from dit.tokenizers.vit_autoencoder import ViTAutoencoder


def phi_of_scale(scale: int, num_scales: int, num_phis: int) -> int:
    """Return which of the few convolutions `phi` serves a scale: the one whose tick is nearest.

    Args:
        scale: index of the scale.
        num_scales: scales S.
        num_phis: convolutions; their ticks are spread evenly over [0, 1], a little wider when there are four.

    Returns:
        Its index. Ties fall as they do in double precision in the released code, which trained with them:
        0, 0, 1, 1, 1, 2, 2, 3, 3, 3 for ten scales and four convolutions.
    """
    margin = 1 / 3 / num_phis if num_phis == 4 else 1 / 2 / num_phis
    step = ((1 - margin) - margin) / max(num_phis - 1, 1)
    ticks = [margin + i * step for i in range(num_phis - 1)] + [1 - margin if num_phis > 1 else margin]
    depth = scale / max(num_scales - 1, 1)
    distances = [abs(tick - depth) for tick in ticks]
    return distances.index(min(distances))


class Phi(nn.Conv2d):
    """A 3x3 convolution beside a short cut: `(1 - ratio) x + ratio conv(x)`.

    Args:
        channels: in and out.
        ratio: fraction of the convolution.
    """

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = ratio

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W), in the dtype of the input."""
        own = {name: weight.to(input.dtype) for name, weight in self.named_parameters()}  # weight, bias
        with torch.autocast(input.device.type, enabled=False):  # a sum of scales must not lose what the fine ones add
            mixed = F.conv2d(input, own["weight"], own["bias"], padding=1)  # (B, C, H, W)
        return input * (1 - self.ratio) + mixed * self.ratio


class MultiScaleQuantizer(nn.Module):
    """Residual quantisation over growing maps; all arithmetic on latents is float32.

    Args:
        grids: rows and columns of each scale; the last is the latent's size H, W.
        vocab_size: codebook entries V.
        channels: width C of an entry.
        num_phis: convolutions shared by the scales, see `phi_of_scale`.
        phi_ratio: see `Phi`.
    """

    def __init__(
        self, grids: tuple[Grid, ...], vocab_size: int, channels: int, num_phis: int, phi_ratio: float
    ) -> None:
        super().__init__()
        self.grids = grids
        self.codebook = nn.Embedding(vocab_size, channels)
        self.phis = nn.ModuleList([Phi(channels, phi_ratio) for _ in range(num_phis)])
        # How often each entry is used at each scale, a running average of training.
        self.register_buffer("hits", torch.zeros(len(grids), vocab_size))  # (S, V)

    def nearest(self, features: Tensor) -> Tensor:
        """Find the nearest entries, by Euclidean distance.

        Args:
            features: (B, C, h, w), float32.

        Returns:
            Indices, (B, h w), int64.
        """
        codebook = self.codebook.weight.float()  # (V, C)
        rows = features.permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, C)
        distances = rows.square().sum(1, keepdim=True) + codebook.square().sum(1)  # (B h w, V)
        distances.addmm_(rows, codebook.T, alpha=-2)  # (B h w, V)
        return distances.argmin(1).unflatten(0, (features.shape[0], -1))  # (B, h w)

    def embed(self, indices: Tensor, scale: int) -> Tensor:
        """Look up a scale's tokens: (B, N) to the map (B, C, h, w), float32."""
        return self.as_map(self.codebook(indices).float(), scale)

    def as_map(self, vectors: Tensor, scale: int) -> Tensor:
        """Reshape a scale's vectors (B, N, C) to its map (B, C, h, w)."""
        return vectors.transpose(1, 2).unflatten(2, self.grids[scale])  # (B, C, h, w)

    def enlarge(self, embedded: Tensor, scale: int) -> Tensor:
        """Return what a scale adds to the latent: its map (B, C, h, w), enlarged and repaired, (B, C, H, W)."""
        if scale < len(self.grids) - 1:
            embedded = F.interpolate(embedded, size=self.grids[-1], mode="bicubic")  # (B, C, H, W)
        return self.phis[phi_of_scale(scale, len(self.grids), len(self.phis))](embedded)  # (B, C, H, W)

    def shrink(self, latent: Tensor, scale: int) -> Tensor:
        """Return the latent (B, C, H, W) at a scale's size, (B, C, h, w)."""
        if scale == len(self.grids) - 1:
            return latent
        return F.interpolate(latent, size=self.grids[scale], mode="area")  # (B, C, h, w)

    def forward(self, features: Tensor) -> MultiScaleCodes:
        """Quantize features (B, C, H, W)."""
        rest = features.float()  # (B, C, H, W)
        latent = torch.zeros_like(rest)
        indices = []
        for scale in range(len(self.grids)):
            indices.append(self.nearest(self.shrink(rest, scale)))  # (B, N_s)
            added = self.enlarge(self.embed(indices[-1], scale), scale)  # (B, C, H, W)
            latent, rest = latent + added, rest - added
        return MultiScaleCodes(indices=indices, latent=latent)


class MultiScaleVQ(MultiScaleTokenizer, ModelMixin, ConfigMixin, AutoencoderMixin):
    """Autoencoder with a multi-scale codebook, numerically the released VQVAE of VAR.

    Its latent is the sum of the looked-up scales, so `decode(encode(x).latent)` is what the tokens can say of `x`.

    Args:
        scales: sides of the token maps, coarse to fine; pairs are rows and columns.
        latent_channels: channels C of the latent, which is the width of a codebook entry.
        vocab_size: codebook entries V.
        block_out_channels: of encoder and (reversed) decoder; each entry but the last halves the size.
        layers_per_block: residual blocks a level of the encoder; the decoder has one more.
        norm_num_groups: groups of the group norms.
        num_phis: convolutions that repair enlarged maps, shared by the scales.
        phi_ratio: fraction of the convolution in their output.
        in_channels: colours.
        vit: arguments of a `ViTAutoencoder` that encodes and decodes instead of the convolutional networks (whose
            sizes, `block_out_channels` to `norm_num_groups`, then mean nothing). Its code has unit variance, so a
            codebook fits whatever the encoder does.

    Raises:
        ValueError: scales that shrink, or none.
    """

    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules = ["quantizer", "latent_norm"]

    @register_to_config
    def __init__(
        self,
        scales: tuple[int | tuple[int, int], ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        latent_channels: int = 32,
        vocab_size: int = 4096,
        block_out_channels: tuple[int, ...] = (160, 160, 320, 320, 640),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        num_phis: int = 4,
        phi_ratio: float = 0.5,
        in_channels: int = 3,
        vit: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.grids = scale_grids(scales)
        self.quantizer = MultiScaleQuantizer(self.grids, vocab_size, latent_channels, num_phis, phi_ratio)
        self.backbone = ViTAutoencoder(in_channels, latent_channels, **vit) if vit is not None else None
        if vit is not None:
            return
        plain = len(block_out_channels) - 1
        shape = {
            "block_out_channels": tuple(block_out_channels),
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
        }
        self.encoder = Encoder(
            in_channels,
            latent_channels,
            down_block_types=("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",),
            double_z=False,
            **shape,
        )
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 3, padding=1)
        self.decoder = Decoder(
            latent_channels,
            in_channels,
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * plain,
            **shape,
        )

    # ------------------------------------------------------------------- pixels

    @apply_forward_hook
    def features(self, x: Tensor) -> Tensor:
        """Encode images without quantising.

        Args:
            x: (B, 3, H f, W f) in [-1, 1], where H, W is the size of the last scale; of any float dtype.

        Returns:
            (B, C, H, W), in the dtype of the encoder's weights.

        Raises:
            ValueError: images of another size.
        """
        size = tuple(side * self.spatial_compression_ratio for side in self.grids[-1])
        if x.ndim != 4 or tuple(x.shape[-2:]) != size:
            raise ValueError(f"got an image tensor of shape {tuple(x.shape)}, expected (B, 3, {size[0]}, {size[1]})")
        if self.backbone is not None:
            return self.backbone.encode(x.to(self.backbone.patch_embed.weight.dtype)).latent  # (B, C, H, W)
        return self.quant_conv(self.encoder(x.to(self.encoder.conv_in.weight.dtype)))  # (B, C, H, W)

    @apply_forward_hook
    def quantize(self, x: Tensor) -> MultiScaleCodes:
        """Turn images into tokens; see `features`.

        Returns:
            The tokens of each scale and their sum.
        """
        return self.quantize_features(self.features(x))

    def quantize_features(self, features: Tensor) -> MultiScaleCodes:
        """Turn features (B, C, H, W) into tokens; see `quantize`."""
        return self.quantizer(features)

    def residuals(self, features: Tensor, sums: Sequence[Tensor]) -> list[Tensor]:
        """Return what each scale had to code: rows (B N_s, C) of what the scales before it left of the features.

        Args:
            features: (B, C, H, W).
            sums: of `partial_sums`.
        """
        before = [torch.zeros_like(features), *sums[:-1]]
        rests = [self.quantizer.shrink(features - done, scale) for scale, done in enumerate(before)]
        return [rest.permute(0, 2, 3, 1).flatten(0, 2) for rest in rests]

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents, also those of the first few scales only.

        Args:
            z: (B, C, H, W); other sizes work too.
            return_dict: whether to wrap the result.
            generator: accepted for the interface; decoding is deterministic.

        Returns:
            Pixels of about [-1, 1], not clamped, (B, 3, H f, W f).
        """
        if self.backbone is not None:
            return self.backbone.decode(z.to(self.backbone.from_latent.weight.dtype), return_dict=return_dict)
        z = z.to(self.post_quant_conv.weight.dtype, memory_format=torch.channels_last)  # a faster order on CPUs
        sample = self.decoder(self.post_quant_conv(z))  # (B, 3, H f, W f)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    # ------------------------------------------------------------------- scales

    def start_latents(self, batch_size: int) -> Tensor:
        """Return the latent before the first scale: zeros, (B, C, H, W), float32."""
        weight = self.quantizer.codebook.weight
        return torch.zeros(batch_size, self.latent_channels, *self.grids[-1], device=weight.device)

    @apply_forward_hook
    def accumulate(self, latents: Tensor, tokens: Tensor, scale: int) -> Tensor:
        """Add a scale to the latent.

        Args:
            latents: sum of the scales before, (B, C, H, W).
            tokens: the scale's codebook entries (B, N), int64; or vectors (B, N, C), such as mixtures of entries.
            scale: index of the scale.

        Returns:
            The new sum, (B, C, H, W); `latents` stays as it is.

        Raises:
            ValueError: another number of tokens than the scale has.
        """
        expected = token_counts(self.grids)[scale]
        if tokens.shape[1] != expected:
            raise ValueError(f"got {tokens.shape[1]} tokens for scale {scale}, which has {expected}")
        if tokens.is_floating_point():
            embedded = self.quantizer.as_map(tokens.float(), scale)  # (B, C, h, w)
        else:
            embedded = self.quantizer.embed(tokens, scale)  # (B, C, h, w)
        return latents + self.quantizer.enlarge(embedded, scale)  # (B, C, H, W)

    def next_input(self, latents: Tensor, scale: int) -> Tensor:
        """Return the generator's input at `scale`: the latent (B, C, H, W) at that size, (B, N, C)."""
        return self.quantizer.shrink(latents, scale).flatten(2).transpose(1, 2)  # (B, N, C)
