"""Bitwise self-correction: train a generator of bits on its own kind of mistakes (Infinity, arXiv 2412.04431).

In teacher forcing a generator sees faultless coarser scales; generating, it sees its own errors and piles new ones upon
them. So some bits are flipped on the way from scale to scale: each scale is coded against the sum with the flips in it,
and its labels, which stay as they are, say how to make up for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.layers.scales import Grid
from dit.tokenizers.multi_scale_bsq import MultiScaleBSQ, resize


@dataclass(frozen=True, slots=True)
class SelfCorrection:
    """A batch for training on bits.

    Attributes:
        labels: the bits to predict at each scale, (B, N_s, d p p) int64 each.
        inputs: what the generator sees, from the second scale on, (B, L - N_0, d p p), float32.
        latent: the sum with the flips, (B, d, H, W).
    """

    labels: list[Tensor]
    inputs: Tensor
    latent: Tensor


def draw_flip_shares(num_scales: int, largest: float = 0.3, generator: torch.Generator | None = None) -> list[float]:
    """Draw how many of the bits to flip at each scale: whole percents, all equally likely.

    Args:
        num_scales: how many scales.
        largest: the largest share.
        generator: of the draws.

    Raises:
        ValueError: a share outside [0, 1].
    """
    if not 0 <= largest <= 1:
        raise ValueError(f"a fraction of {largest:g} of the bits can't be flipped: expected 0 to 1 (released: 0.3)")
    device = None if generator is None else generator.device
    percents = torch.randint(0, round(100 * largest) + 1, (num_scales,), generator=generator, device=device)
    return [percent / 100 for percent in percents.tolist()]


@torch.no_grad()
def self_correct(
    vae: MultiScaleBSQ,
    features: Tensor,
    shares: Sequence[float],
    generator: torch.Generator | None = None,
    grids: Sequence[Grid] | None = None,
) -> SelfCorrection:
    """Encode features scale by scale with some of the bits flipped.

    Args:
        vae: the tokenizer; only its arithmetic of scales is used, no weights.
        features: of `vae.features`, (B, d, H, W), where H, W is the latent size of the last scale.
        shares: of the bits to flip at each of the first scales, see `draw_flip_shares`; the scales behind stay whole.
        generator: of the flips.
        grids: the schedule of token maps; None is the tokenizer's.

    Returns:
        Labels and inputs.

    Raises:
        ValueError: features of another size, a single scale, or more shares than scales.
    """
    schedule, patch = tuple(grids or vae.grids), vae.config.patchify
    size = tuple(side * patch for side in schedule[-1])
    if tuple(features.shape[-2:]) != size or len(shares) > len(schedule) or len(schedule) < 2:
        raise ValueError(
            f"got features of shape {tuple(features.shape)} and {len(shares)} shares, expected (B, d, {size[0]}, "
            f"{size[1]}) and at most a share for each of {len(schedule)} scales, of which there are at least 2"
        )
    latents, labels, inputs = torch.zeros_like(features), [], []
    for scale, (rows, columns) in enumerate(schedule):
        rest = resize(features - latents, (rows * patch, columns * patch), "area")  # (B, d, h, w)
        bits = (rest > 0).long()  # (B, d, h, w)
        fed = _flip(bits, shares[scale], generator) if scale < len(shares) else bits  # (B, d, h, w)
        labels.append(_as_tokens(bits, patch))
        latents = vae.accumulate(latents, _as_tokens(fed, patch), scale, schedule)  # (B, d, H, W)
        if scale + 1 < len(schedule):
            inputs.append(vae.next_input(latents, scale + 1, schedule))  # (B, N, d p p)
    return SelfCorrection(labels, torch.cat(inputs, dim=1), latents)


def _flip(bits: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """Invert each of the bits (B, d, h, w) with a probability; random numbers run pixel by pixel, as released."""
    device = bits.device if generator is None else generator.device
    chance = torch.rand(bits.movedim(1, -1).shape, generator=generator, device=device).to(bits.device)  # (B, h, w, d)
    return torch.where(chance.movedim(-1, 1) < share, 1 - bits, bits)  # (B, d, h, w)


def _as_tokens(maps: Tensor, patch: int) -> Tensor:
    """Cut maps (B, d, h p, w p) into tokens (B, h w, d p p)."""
    return F.pixel_unshuffle(maps, patch).flatten(2).transpose(1, 2)  # (B, N, d p p)
