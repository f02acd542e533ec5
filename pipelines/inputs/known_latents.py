"""What is known of a clip, as latents: how it enters the denoising loop, and how a transformer is shown it.

A latent frame of a causal video autoencoder stands for several frames, of which only some may be known. A transformer
that was trained to complete clips therefore sees, beside the noisy latents, the latents of what is known and channels
that say which frames these show: the layout of Wan's image-to-video transformers (arXiv 2503.20314, section 4.1). A
latent frame of which all frames are known is shown as it is; of any other, the last frame that is known is shown alone,
as if the clip stood still.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.inputs.known_clip import KnownClip


@dataclass(frozen=True, slots=True)
class KnownLatents:
    """What a run knows of its latents.

    Attributes:
        latents: of what is known, (B, C, T', h, w); zeros where nothing is.
        shown: which frames of each latent frame these show, (1, R, T', h, w), bool, see `frames_shown`.
        noise: of the run, (B, C, T', h, w).
    """

    latents: Tensor
    shown: Tensor
    noise: Tensor

    def blend(self, latents: Tensor, sigma: float | Tensor) -> Tensor:
        """Replace what is wholly known of latents (B, C, T', h, w) by the known at noise level `sigma`, 0 to 1."""
        known = self.shown.all(dim=1, keepdim=True)  # (1, 1, T', h, w)
        return torch.where(known, torch.lerp(self.latents, self.noise, sigma), latents)

    def beside(self, latents: Tensor) -> Tensor:
        """Return what a transformer that was trained for it sees: (B, 2 C + R, T', h, w)."""
        return beside(latents, self.shown, self.latents)


def beside(noisy: Tensor, shown: Tensor, known: Tensor) -> Tensor:
    """Join noisy latents, the channels that say what is known, and the latents of what is.

    Args:
        noisy: (B, C, T', h, w).
        shown: see `frames_shown`, (B or 1, R, T', h, w), bool.
        known: (B, C, T', h, w).

    Returns:
        (B, 2 C + R, T', h, w).
    """
    return torch.cat([noisy, shown.to(noisy).expand(len(noisy), -1, -1, -1, -1), known], dim=1)


def frames_shown(known: Tensor, ratio: int) -> Tensor:
    """Return which frames of each latent frame a transformer is shown: all if all are known, else the last known one.

    The first frame has a latent frame of its own, and each further one stands for `ratio` frames; a last group that
    isn't complete is filled with its last frame.

    Args:
        known: which frames are known, (..., T, h, w), bool.
        ratio: R, frames of a latent frame.

    Returns:
        (..., R, T', h, w), bool. The first latent frame has the same value in all R channels.
    """
    groups = group_frames(known, ratio)  # (..., T', R, h, w)
    later = groups.flip(-3).cumsum(-3).flip(-3)  # known frames from each one on
    chosen = groups.all(dim=-3, keepdim=True) | (groups & (later == 1))
    return chosen.transpose(-4, -3)


def known_latents(clip: KnownClip, noise: Tensor, ratio: int, encode: Callable[[Tensor], Tensor]) -> KnownLatents:
    """Encode what is known of a clip.

    Args:
        clip: the known part.
        noise: of the run, (B, C, T', h, w).
        ratio: R, frames of a latent frame.
        encode: pixels (B, 3, T, H, W) in [-1, 1] to normalised latents (B, C, T', h, w).
    """
    cells = F.adaptive_max_pool2d(clip.mask.float(), noise.shape[-2:])[:, 0] == 0  # (T, h, w): wholly known
    shown = frames_shown(cells, ratio)[None].to(noise.device)  # (1, R, T', h, w)
    any_shown = shown.any(dim=1, keepdim=True)  # (1, 1, T', h, w)
    if not any_shown.any():
        return KnownLatents(torch.zeros_like(noise), shown, noise)
    latents = encode(_stilled(clip.filled(), cells, ratio)).to(noise)  # (B, C, T', h, w)
    return KnownLatents(torch.where(any_shown, latents, 0.0), shown, noise)


def group_frames(frames: Tensor, ratio: int) -> Tensor:
    """Group frames as the latent frames of a causal video autoencoder hold them.

    Args:
        frames: (..., T, h, w).
        ratio: R, frames of a latent frame after the first.

    Returns:
        (..., T', R, h, w): the first frame R times, then R frames each; the last frame fills up the last group.
    """
    first, rest = frames[..., :1, :, :], frames[..., 1:, :, :]
    missing = -rest.shape[-3] % ratio
    last = frames[..., -1:, :, :]
    parts = [*[first] * ratio, rest, *[last] * missing]
    return torch.cat(parts, dim=-3).unflatten(-3, (-1, ratio))


def _stilled(pixels: Tensor, cells: Tensor, ratio: int) -> Tensor:
    """Have groups of frames that aren't wholly known stand still at their last known frame.

    Args:
        pixels: filled in where nothing is known, (B, 3, T, H, W).
        cells: which cells are known, (T, h, w), bool.
        ratio: frames of a group.

    Returns:
        Whole groups, (B, 3, 1 + R (T' - 1), H, W).
    """
    size = pixels.shape[-2] // cells.shape[-2], pixels.shape[-1] // cells.shape[-1]
    known = cells.repeat_interleave(size[0], dim=-2).repeat_interleave(size[1], dim=-1).to(pixels.device)  # (T, H, W)
    chosen = frames_shown(known, ratio)  # (R, T', H, W)
    groups = group_frames(pixels, ratio)  # (B, 3, T', R, H, W)
    last = chosen.float().argmax(dim=0)[None, None, :, None]  # (1, 1, T', 1, H, W): the one frame that is shown
    still = groups.gather(3, last.expand(*groups.shape[:3], 1, -1, -1))  # (B, 3, T', 1, H, W)
    groups = torch.where(chosen.all(dim=0)[:, None], groups, still)
    return groups.flatten(2, 3)[:, :, ratio - 1 :]
