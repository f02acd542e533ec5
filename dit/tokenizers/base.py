"""The interface between pixels and latents."""

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class TokenizerOutput(BaseOutput):
    """What encoding gives.

    Attributes:
        latent: (B, C, H, W) or (B, C, T, H, W).
        latent_dist: the posterior, for tokenizers that have one.
    """

    latent: Tensor
    latent_dist: DiagonalGaussianDistribution | None = None


class VisualTokenizer:
    """Pixels in [-1, 1] to latents and back; images are (B, 3, H, W), clips (B, 3, T, H, W).

    Latents have the rank of the pixels that they come from. Pipelines and training only use what is declared here,
    and always exchange *normalised* latents (about zero mean and unit variance a channel) with the generator.
    """

    spatial_compression_ratio: int
    temporal_compression_ratio: int = 1
    latent_channels: int

    def encode(
        self, x: Tensor, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> TokenizerOutput | tuple[Tensor]:
        """Encode pixels.

        Args:
            x: (B, 3, H, W) or (B, 3, T, H, W) in [-1, 1].
            generator: for tokenizers that sample a posterior; None takes its mode.
            return_dict: whether to wrap the result.
        """
        raise NotImplementedError

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode (not normalised) latents to pixels, not clamped."""
        raise NotImplementedError

    def normalize_latents(self, z: Tensor) -> Tensor:
        """Convert from the tokenizer's own scale to the generator's."""
        raise NotImplementedError

    def denormalize_latents(self, z: Tensor) -> Tensor:
        """Convert from the generator's scale to the tokenizer's own."""
        raise NotImplementedError

    def preview(self, z: Tensor) -> Tensor:
        """Show normalised latents cheaply, in a small part of the time of a denoising step.

        Args:
            z: (B, C, H, W).

        Returns:
            (B, 3, h, w) in [-1, 1], no larger than the decoded image.
        """
        raise NotImplementedError


def fit_linear_preview(latents: Tensor, pixels: Tensor, cell: int) -> Tensor:
    """Fit least squares from a latent pixel (and a constant) to a small block of colours.

    Args:
        latents: normalised, (B, C, H, W).
        pixels: the images they came from, (B, 3, H * f, W * f).
        cell: side of the block of pixels that each latent pixel stands for.

    Returns:
        (3 * cell * cell, C + 1); the last column is the constant.
    """
    h, w = latents.shape[-2:]
    small = torch.nn.functional.interpolate(pixels, size=(h * cell, w * cell), mode="area")  # (B, 3, Hc, Wc)
    target = torch.nn.functional.pixel_unshuffle(small, cell).permute(0, 2, 3, 1).flatten(0, 2)  # (B H W, 3cc)
    inputs = latents.permute(0, 2, 3, 1).flatten(0, 2)  # (B H W, C)
    inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)  # (B H W, C + 1)
    return torch.linalg.lstsq(inputs.double(), target.double()).solution.T.float()  # (3cc, C + 1)


def linear_preview(latents: Tensor, factors: Tensor) -> Tensor:
    """Apply what `fit_linear_preview` found.

    Args:
        latents: normalised, (B, C, H, W).
        factors: (3 * cell * cell, C + 1).

    Returns:
        (B, 3, H * cell, W * cell), clamped to [-1, 1].
    """
    cell = round((factors.shape[0] / 3) ** 0.5)
    weight, bias = factors[:, :-1, None, None], factors[:, -1]
    pixels = torch.nn.functional.conv2d(latents.float(), weight.float(), bias.float())  # (B, 3cc, H, W)
    return torch.nn.functional.pixel_shuffle(pixels, cell).clamp(-1, 1)  # (B, 3, H cell, W cell)
