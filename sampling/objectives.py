"""Training objectives. Pure functions on tensors; random numbers come from a generator that the caller seeds.

Flow matching with straight paths (rectified flow, arXiv 2209.03003; flow matching, arXiv 2210.02747): sigma 0 is
data, sigma 1 is noise, and networks predict the velocity `noise - data`, as diffusers' FlowMatchEulerDiscreteScheduler
expects.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move noise levels towards noise, as larger images need (arXiv 2403.03206, eq. 23).

    Args:
        sigmas: noise levels in [0, 1], any shape.
        shift: 1 leaves them alone; above 1 moves them up.

    Returns:
        Shifted levels in [0, 1], the same shape.

    Raises:
        ValueError: `shift` is not positive.
    """
    if shift <= 0:
        raise ValueError(f"shift {shift} must be above 0; 1 leaves the noise levels alone.")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def logit_normal_sigmas(
    batch_size: int, mean: float = 0.0, std: float = 1.0, shift: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draw noise levels whose logit is normal: most in the middle, where learning is hardest (arXiv 2403.03206).

    Args:
        batch_size: how many, B.
        mean: of the logit; above 0 means more noise.
        std: of the logit.
        shift: see `shift_sigmas`.
        generator: source of the random numbers; on the CPU.

    Returns:
        (B,) float32 in (0, 1).
    """
    normal = torch.randn(batch_size, generator=generator)  # (B,)
    return shift_sigmas(torch.sigmoid(mean + std * normal), shift)


def logit_normal_grid(batch_size: int, mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> Tensor:
    """Return the evenly spaced quantiles of `logit_normal_sigmas`: the fixed noise levels of a validation.

    Returns:
        (B,) float32 in (0, 1), ascending.
    """
    quantiles = (torch.arange(batch_size) + 0.5) / batch_size  # (B,)
    normal = torch.special.ndtri(quantiles)  # (B,)
    return shift_sigmas(torch.sigmoid(mean + std * normal), shift)


def sigmas_after_clean_frames(levels: Tensor, clean_share: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw noise levels of the chunks of clips that are made one after the other.

    Each chunk has a level of its own (Diffusion Forcing, arXiv 2407.01392, algorithm 1); of a share of the clips the
    first chunks, a random number of them, are clean, as they are when a clip is made.

    Args:
        levels: drawn for each chunk, (B, N) in (0, 1).
        clean_share: share of the clips that begin with clean chunks, 0 to 1.
        generator: source of the random numbers; on the CPU.

    Returns:
        (B, N); 0 where a chunk is clean, which the last one never is.
    """
    batch, chunks = levels.shape
    clean = (torch.rand(batch, generator=generator) * chunks).long()  # (B,) in 0 ... N - 1
    clean = torch.where(torch.rand(batch, generator=generator) < clean_share, clean, 0)
    return torch.where(torch.arange(chunks) < clean[:, None], 0.0, levels)


def interpolate(data: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Put samples on the straight line between data and noise.

    Args:
        data: (B, ...).
        noise: standard normal, the same shape.
        sigmas: (B,) in [0, 1]; or of parts of a sample, with as many dimensions as `data`.

    Returns:
        `(1 - sigma) * data + sigma * noise`, the shape of `data`.
    """
    if sigmas.ndim != data.ndim:
        sigmas = sigmas.reshape(-1, *[1] * (data.ndim - 1))  # (B, 1, ...)
    sigmas = sigmas.to(data.dtype)
    return (1 - sigmas) * data + sigmas * noise  # (B, ...)


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """Return the derivative of `interpolate` by sigma: what the network predicts."""
    return noise - data


def data_from_velocity(sample: Tensor, predicted: Tensor, sigmas: Tensor) -> Tensor:
    """Return the clean data that a predicted velocity implies.

    Args:
        sample: noisy, (B, ...).
        predicted: velocity, the same shape.
        sigmas: (B,) in [0, 1].

    Returns:
        `sample - sigma * predicted`, the same shape.
    """
    return sample - sigmas.reshape(-1, *[1] * (sample.ndim - 1)).to(sample.dtype) * predicted


def flow_matching_loss(predicted: Tensor, data: Tensor, noise: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute the mean squared error of the velocity, for each sample and in float32.

    Args:
        predicted: velocity, (B, ...), any float dtype.
        data: (B, ...).
        noise: (B, ...).
        weights: of the parts of a sample, broadcastable to (B, ...), not all zero; None weighs all alike.

    Returns:
        (B,) float32.
    """
    error = (predicted.float() - velocity(data.float(), noise.float())).square()  # (B, ...)
    if weights is None:
        return error.flatten(1).mean(dim=1)  # (B,)
    weights = weights.float().expand_as(error)
    return (error * weights).flatten(1).sum(dim=1) / weights.flatten(1).sum(dim=1)  # (B,)


def frame_change_loss(predicted: Tensor, data: Tensor, noise: Tensor, stacked: int = 1) -> Tensor:
    """Compute the mean squared error of how the velocity changes from frame to frame, halved.

    Errors that all frames share cost nothing, those of single frames as much as in `flow_matching_loss`: added to that
    loss, it has a network spend more on how things move, of which the plain loss sees little (arXiv 2502.02492,
    section 3). What predicts the velocity best is the same with and without it.

    Args:
        predicted: velocity of clips, (B, R C, T, H, W), any float dtype.
        data: (B, R C, T, H, W).
        noise: (B, R C, T, H, W).
        stacked: R, frames whose codes are stacked in the channels, one after the other.

    Returns:
        (B,) float32; zeros for clips of a single frame.
    """
    error = predicted.float() - velocity(data.float(), noise.float())  # (B, R C, T, H, W)
    frames = error.unflatten(1, (stacked, -1)).permute(0, 3, 1, 2, 4, 5).flatten(1, 2)  # (B, T R, C, H, W)
    change = frames[:, stacked:] - frames[:, stacked - 1 : -1]  # (B, T R - R, C, H, W); the first frame fills its group
    if change.shape[1] == 0:
        return error.new_zeros(len(error))
    return change.square().flatten(1).mean(dim=1) / 2  # (B,)


def next_scale_loss(logits: Tensor, tokens: Tensor, counts: Sequence[int]) -> Tensor:
    """Compute each scale's mean cross-entropy (arXiv 2404.02905, eq. 4; for bits arXiv 2412.04431, section 3.2).

    Args:
        logits: over codebook entries, (B, L, V); or of bits, (B, L, d, 2).
        tokens: the true entries, (B, L); or bits, (B, L, d).
        counts: tokens of each of S scales, L in all.

    Returns:
        Nats a token (or a bit), (B, S), float32.
    """
    rows = F.cross_entropy(logits.float().flatten(0, -2), tokens.flatten(), reduction="none")
    each = rows.unflatten(0, tokens.shape)  # (B, L) or (B, L, d)
    return torch.stack([part.flatten(1).mean(1) for part in each.split(list(counts), dim=1)], dim=1)  # (B, S)


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Compute minus the mean cosine similarity of tokens with a teacher's features (REPA, arXiv 2410.06940, eq. 8).

    Args:
        projected: hidden tokens after the projector, (B, N, z), any float dtype.
        features: of the clean image; no gradient reaches them, (B, N, z).

    Returns:
        (B,) float32, from -1 (the same directions) to 1.
    """
    return -F.cosine_similarity(projected.float(), features.detach().float(), dim=-1).mean(dim=1)  # (B,)
