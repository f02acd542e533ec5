"""ViTAutoencoder: a small continuous autoencoder of transformer blocks.

After ViTok (arXiv 2501.09755): patches in, a shallow encoder, a narrow code, a deeper decoder that carries the
detail. Two additions keep it small and its images clean: the code is batch-normalised without parameters, so it
has unit variance whatever the encoder does (the generator needs no scaling factor, and noise on the code means the
same everywhere), and a few convolutions after the decoder's tokens hide the seams between patches.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from dit.layers.attention import SelfAttention
from dit.layers.embeddings import patchify, unpatchify
from dit.layers.feed_forward import FeedForward
from dit.layers.linear import Linear
from dit.layers.positions import Rotary, grid_positions, rotary_embedding
from dit.runtime._typing import Typed
from dit.tokenizers.base import TokenizerOutput, VisualTokenizer, linear_preview

PREVIEW_CELL = 4
PREVIEW_TOKENS = 1024
"""Latent pixels up to which a preview runs the decoder, which takes about a third of a step's time.

Who shows previews decides how often they may cost that. The linear map is far from the image: 13.6 dB for latents of
the built-in model, which is also what a new fit by least squares comes to."""
PREVIEW_SPREAD = 1.3
"""Largest standard deviation of an image's latents that a preview shows as it is; few encoded images exceed it."""


class ViTBlock(nn.Module):
    """Pre-norm attention and MLP.

    Args:
        hidden_size: model width D.
        num_heads: attention heads.
        ff_ratio: width of the MLP as a multiple of D.
    """

    def __init__(self, hidden_size: int, num_heads: int, ff_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = SelfAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.ff = FeedForward(hidden_size, int(ff_ratio * hidden_size / 16 + 0.5) * 16, "swiglu")

    def forward(self, hidden_states: Tensor, image_rotary_emb: Rotary) -> Tensor:
        """Map tokens (B, N, D) to (B, N, D)."""
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), image_rotary_emb=image_rotary_emb)
        return hidden_states + self.ff(self.norm2(hidden_states))  # (B, N, D)


class ConvBlock(nn.Module):
    """Residual pair of 3x3 convolutions.

    Args:
        channels: width.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class ViTAutoencoder(Typed, ModelMixin, AutoencoderMixin, ConfigMixin, VisualTokenizer):
    """Image autoencoder with a continuous, unit-variance code.

    Args:
        in_channels: colour channels.
        latent_channels: code channels C; an image of side S becomes (C, S / patch_size, S / patch_size).
        patch_size: pixels along a patch; a multiple of `refiner_patch`.
        encoder_dim: width of the encoder.
        encoder_layers: blocks of the encoder.
        decoder_dim: width of the decoder.
        decoder_layers: blocks of the decoder.
        attention_head_dim: head width of both.
        ff_ratio: width of the MLPs as a multiple of the model's.
        refiner_channels: width of the convolutions behind the decoder; 0 leaves them out.
        refiner_layers: residual pairs of convolutions.
        refiner_patch: pixels that one position of the convolutions generates along a side.
        rope_theta: base of the rotary frequencies.
        sample_size: side of the images it was trained on.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ViTBlock", "ConvBlock"]
    _repeated_blocks = ["ViTBlock", "ConvBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "latent_norm", "norm"]
    _keep_in_fp32_modules = ["latent_norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 8,
        patch_size: int = 16,
        encoder_dim: int = 128,
        encoder_layers: int = 2,
        decoder_dim: int = 192,
        decoder_layers: int = 4,
        attention_head_dim: int = 32,
        ff_ratio: float = 8 / 3,
        refiner_channels: int = 32,
        refiner_layers: int = 1,
        refiner_patch: int = 4,
        rope_theta: float = 100.0,
        sample_size: int = 128,
    ) -> None:
        super().__init__()
        if patch_size % refiner_patch:
            raise ValueError(f"patch_size {patch_size} must be a multiple of refiner_patch {refiner_patch}")
        self.patch = (1, patch_size, patch_size)
        self.patch_embed = Linear(in_channels * patch_size**2, encoder_dim)
        self.encoder_blocks = nn.ModuleList(
            [ViTBlock(encoder_dim, encoder_dim // attention_head_dim, ff_ratio) for _ in range(encoder_layers)]
        )
        self.encoder_norm = nn.LayerNorm(encoder_dim, eps=1e-6)
        self.to_latent = Linear(encoder_dim, latent_channels)
        self.latent_norm = nn.BatchNorm1d(latent_channels, affine=False, momentum=0.01)

        self.from_latent = Linear(latent_channels, decoder_dim)
        self.decoder_blocks = nn.ModuleList(
            [ViTBlock(decoder_dim, decoder_dim // attention_head_dim, ff_ratio) for _ in range(decoder_layers)]
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        if refiner_channels:
            self.to_pixels = Linear(decoder_dim, refiner_channels * (patch_size // refiner_patch) ** 2)
            self.refiner = nn.Sequential(
                *[ConvBlock(refiner_channels) for _ in range(refiner_layers)],
                nn.Conv2d(refiner_channels, in_channels * refiner_patch**2, 3, padding=1),
                nn.PixelShuffle(refiner_patch),
            )
        else:
            self.to_pixels = Linear(decoder_dim, in_channels * patch_size**2)
            self.refiner = None
        self.register_buffer("preview_factors", torch.zeros(3 * PREVIEW_CELL**2, latent_channels + 1))
        self.gradient_checkpointing = False
        self.use_slicing = False

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels along a side of a latent pixel."""
        return self.config.patch_size

    @property
    def temporal_compression_ratio(self) -> int:
        """Frames of a latent frame: 1, each frame is coded by itself."""
        return 1

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
            Latents of unit variance, (B, C, H/p, W/p) or (B, C, T, H/p, W/p).
        """
        frames, restore = _fold_frames(x)  # (B T, 3, H, W)
        if self.use_slicing and frames.shape[0] > 1:
            latent = torch.cat([self._encode(part) for part in frames.split(1)])
        else:
            latent = self._encode(frames)
        latent = restore(latent)
        return TokenizerOutput(latent=latent) if return_dict else (latent,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents.

        Args:
            z: (B, C, H, W) or (B, C, T, H, W).
            return_dict: whether to wrap the result.
            generator: accepted for the interface; decoding is deterministic.

        Returns:
            Pixels of about [-1, 1], not clamped.
        """
        frames, restore = _fold_frames(z)  # (B T, C, H, W)
        if self.use_slicing and frames.shape[0] > 1:
            sample = torch.cat([self._decode(part) for part in frames.split(1)])
        else:
            sample = self._decode(frames)
        sample = restore(sample)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode `sample`."""
        return self.decode(self.encode(sample, return_dict=False)[0], return_dict=return_dict)

    def _encode(self, x: Tensor) -> Tensor:
        grid = tuple(size // self.config.patch_size for size in x.shape[-2:])
        tokens = self.patch_embed(patchify(x.unsqueeze(2), self.patch))  # (B, N, De)
        tokens = self._run(self.encoder_blocks, tokens, grid)
        tokens = self.to_latent(self.encoder_norm(tokens))  # (B, N, C)
        latent = self._normalize(tokens.float().transpose(1, 2)).to(tokens.dtype)  # (B, C, N)
        return latent.unflatten(-1, grid)  # (B, C, H, W)

    def _normalize(self, latent: Tensor) -> Tensor:
        """Apply batch norm to (B, C, N) in float32 whatever the model's dtype: this defines the scale of the code."""
        norm = self.latent_norm
        if norm.training:
            return norm(latent)
        mean, var = (norm.get_buffer(name).float() for name in ("running_mean", "running_var"))  # (C,)
        return F.batch_norm(latent, mean, var, eps=norm.eps)  # (B, C, N)

    def _decode(self, z: Tensor) -> Tensor:
        grid = tuple(z.shape[-2:])
        tokens = self.from_latent(z.flatten(2).transpose(1, 2))  # (B, N, Dd)
        tokens = self._run(self.decoder_blocks, tokens, grid)
        tokens = self.to_pixels(self.decoder_norm(tokens))  # (B, N, P)
        if self.refiner is None:
            return unpatchify(tokens, (1, *grid), self.patch).squeeze(2)  # (B, 3, H, W)
        scale = self.config.patch_size // self.config.refiner_patch
        features = unpatchify(tokens, (1, *grid), (1, scale, scale)).squeeze(2)  # (B, R, H/r, W/r)
        return self.refiner(features)  # (B, 3, H, W)

    def _run(self, blocks: nn.ModuleList, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        head_dim = self.config.attention_head_dim
        positions = grid_positions(grid, tokens.device)  # (N, 2)
        rotary = rotary_embedding(positions, (head_dim // 2, head_dim // 2), self.config.rope_theta)
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, rotary)
            else:
                tokens = block(tokens, rotary)  # (B, N, D)
        return tokens

    def normalize_latents(self, z: Tensor) -> Tensor:
        """Return the latents: they already have unit variance."""
        return z

    def denormalize_latents(self, z: Tensor) -> Tensor:
        """Return the latents, as `normalize_latents` does."""
        return z

    @torch.no_grad()
    def preview(self, z: Tensor) -> Tensor:
        """Show latents by the decoder, (B, C, H, W) to (B, 3, H p, W p), or by a linear map, to (B, 3, 4H, 4W).

        The linear map serves large latents, and where offloading has put the decoder's weights aside.
        Guided estimates of a finished image spread up to four times as far in the first steps as latents of encoded
        images, which would saturate every colour; they are scaled back to the spread of encoded ones.
        """
        z = limit_spread(z[:, :, 0] if z.ndim == 5 else z)  # (B, C, H, W)
        weight = self.from_latent.weight
        if z.shape[-2] * z.shape[-1] > PREVIEW_TOKENS or weight.is_meta:
            return linear_preview(z, self.preview_factors)
        return self._decode(z.to(weight.dtype)).float().clamp(-1, 1)  # (B, 3, H p, W p)


def limit_spread(z: Tensor, most: float = PREVIEW_SPREAD) -> Tensor:
    """Scale the latents of each image down to a standard deviation of at most `most`; (B, C, H, W), float32."""
    z = z.float()
    return z * (most / z.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)).clamp(max=1)


def _fold_frames(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Fold the frames of a clip into the batch; returns the frames and the function that unfolds a result."""
    if x.ndim == 4:
        return x, lambda y: y
    if x.ndim != 5:
        raise ValueError(f"expected (B, C, H, W) or (B, C, T, H, W), got a tensor of shape {tuple(x.shape)}")
    b, t = x.shape[0], x.shape[2]
    frames = x.transpose(1, 2).flatten(0, 1)  # (B T, C, H, W)
    return frames, lambda y: y.unflatten(0, (b, t)).transpose(1, 2)
