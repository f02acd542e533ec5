"""MultiScaleTokenizer: base of tokenizers that encode an image scale by scale, coarse to fine.

An image is the sum of its scales' maps. Subclasses say how a scale is coded and added; everything that only walks
through the scales is here. Where one model serves many schedules of scales, methods take the schedule as `grids`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.utils import BaseOutput
from torch import Tensor

from dit.layers.scales import Grid
from dit.runtime._typing import Typed
from dit.tokenizers.base import TokenizerOutput, VisualTokenizer

PREVIEW_SIDE = 8
"""Latent pixels along the longer side of what `preview` decodes."""


@dataclass
class MultiScaleCodes(BaseOutput):
    """An image as tokens.

    Attributes:
        indices: tokens of each scale, coarse to fine: codebook entries (B, N_s) int64, or bits (B, N_s, d) int64.
        latent: their sum, (B, C, H, W): what the decoder sees.
    """

    indices: list[Tensor]
    latent: Tensor


class MultiScaleTokenizer(Typed, VisualTokenizer):
    """Base of tokenizers with scales; stands before `ModelMixin` among the bases, since it has a `forward`.

    Subclasses have `quantize`, `decode`, `start_latents`, `accumulate`, `next_input`, and the attributes `config`
    (`latent_channels`, `block_out_channels`), `grids` and `backbone` (a `ViTAutoencoder` or None).
    """

    grids: tuple[Grid, ...]
    backbone: Any
    quantize: Callable[..., Any]
    start_latents: Callable[..., Tensor]
    accumulate: Callable[..., Tensor]
    next_input: Callable[..., Tensor]

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels along a side of a latent pixel."""
        if self.backbone is not None:
            return self.backbone.spatial_compression_ratio
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def temporal_compression_ratio(self) -> int:
        """Frames of a latent frame: 1."""
        return 1

    @property
    def latent_channels(self) -> int:
        """Channels C of the latent."""
        return self.config.latent_channels

    def encode(
        self, x: Tensor, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> TokenizerOutput | tuple[Tensor]:
        """Encode images (B, 3, H f, W f) to quantised latents (B, C, H, W); `generator` is not used."""
        latent = self.quantize(x).latent  # (B, C, H, W)
        return TokenizerOutput(latent=latent) if return_dict else (latent,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode `sample`."""
        return self.decode(self.encode(sample, return_dict=False)[0], return_dict=return_dict)

    def normalize_latents(self, z: Tensor) -> Tensor:
        """Return the latents: next-scale models work on the tokenizer's own scale."""
        return z

    def denormalize_latents(self, z: Tensor) -> Tensor:
        """Return the latents, as `normalize_latents` does."""
        return z

    @torch.no_grad()
    def preview(self, z: Tensor) -> Tensor:
        """Generate a latent (B, C, H, W) small: the decoder on at most 8 latent pixels a side, (B, 3, h f, w f)."""
        longest = max(z.shape[-2:])
        if longest > PREVIEW_SIDE:
            size = tuple(max(side * PREVIEW_SIDE // longest, 1) for side in z.shape[-2:])
            z = F.interpolate(z, size=size, mode="area")  # (B, C, h, w)
        return self.decode(z, return_dict=False)[0].float().clamp(-1, 1)  # (B, 3, h f, w f)

    # ------------------------------------------------------------------- scales

    def partial_sums(self, indices: Sequence[Tensor], grids: Sequence[Grid] | None = None) -> list[Tensor]:
        """Return what the first scale, the first two, ... and all of them add up to; differentiable, for training.

        Args:
            indices: tokens of each scale, as `quantize` returns them; fewer scales give fewer sums.
            grids: another schedule of token maps, for models that serve many.

        Returns:
            (B, C, H, W) for each scale, float32.
        """
        return list(self._sums(indices, _schedule(grids)))

    def indices_to_latents(self, indices: Sequence[Tensor], grids: Sequence[Grid] | None = None) -> Tensor:
        """Sum up the tokens of the first scales (or all) to a latent (B, C, H, W); see `partial_sums`."""
        *_, latents = self._sums(indices, _schedule(grids))  # (B, C, H, W) each
        return latents

    @torch.no_grad()
    def teacher_inputs(self, indices: Sequence[Tensor], grids: Sequence[Grid] | None = None) -> Tensor:
        """Return the generator's inputs for images that are known, all scales from the second on in one row.

        Args:
            indices: tokens of each scale; those of the last scale are not needed. Fewer scales give the inputs up to
                the scale after them.
            grids: another schedule of token maps, for models that serve many.

        Returns:
            (B, L - N_0, C), float32; with `patchify` p the width is C p p.
        """
        schedule = _schedule(grids)
        sums = self._sums(indices[: len(grids or self.grids) - 1], schedule)
        inputs = [self.next_input(latents, scale, **schedule) for scale, latents in enumerate(sums, 1)]  # (B, N, C)
        return torch.cat(inputs, dim=1)  # (B, L - N_0, C)

    def _sums(self, indices: Sequence[Tensor], schedule: dict[str, Any]) -> Iterator[Tensor]:
        """Return the growing latent (B, C, H, W) after each scale."""
        start = self.start_latents(indices[0].shape[0], **schedule)  # (B, C, H, W)
        added = itertools.accumulate(
            enumerate(indices), lambda done, one: self.accumulate(done, one[1], one[0], **schedule), initial=start
        )
        return itertools.islice(added, 1, None)


def _schedule(grids: Sequence[Grid] | None) -> dict[str, Any]:
    """Return the argument that hands a schedule on; models with one schedule don't take it."""
    return {} if grids is None else {"grids": grids}
