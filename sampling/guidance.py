"""Classifier-free guidance and its variants. Pure functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def classifier_free_guidance(cond: Tensor, uncond: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Extrapolate from the unconditional towards the conditional prediction (arXiv 2207.12598, eq. 6).

    The paper's weight is `w` with `scale = 1 + w`; here 1 is 'no guidance' and 0 'unconditional', as in diffusers.

    Args:
        cond: prediction with the condition, (B, C, ...), any float dtype.
        uncond: prediction without it, the same shape.
        scale: guidance scale.
        rescale: 0 leaves the result alone, 1 gives it the spread of `cond` (see `rescale_to`).

    Returns:
        The guided prediction, (B, C, ...).
    """
    guided = uncond + scale * (cond - uncond)  # (B, C, ...)
    return rescale_to(guided, cond, rescale) if rescale > 0 else guided


def rescale_to(guided: Tensor, reference: Tensor, strength: float) -> Tensor:
    """Rescale each guided sample's standard deviation to the reference's (arXiv 2305.08891, eq. 15-16).

    Large scales overexpose images because guidance enlarges the prediction; this undoes the enlargement.

    Args:
        guided: guided prediction, (B, C, ...).
        reference: conditional prediction, (B, C, ...).
        strength: 0 (nothing) to 1 (fully).

    Returns:
        The rescaled prediction, (B, C, ...).

    Raises:
        ValueError: `strength` is outside [0, 1].
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"rescale strength {strength} is outside [0, 1].")
    dims = tuple(range(1, guided.ndim))
    spread = guided.float().std(dim=dims, keepdim=True)  # (B, 1, ...)
    target = reference.float().std(dim=dims, keepdim=True)  # (B, 1, ...)
    rescaled = guided * (target / spread.clamp_min(1e-8)).to(guided.dtype)  # (B, C, ...)
    return torch.lerp(guided, rescaled, strength)


def in_interval(sigma: float, interval: tuple[float, float] | None) -> bool:
    """Tell whether guidance acts at a noise level (guidance intervals, arXiv 2404.07724).

    Args:
        sigma: noise level of the step, 1 is pure noise in flow matching.
        interval: lowest and highest sigma with guidance, both included; None is always.

    Returns:
        True when the guided prediction is to be used.

    Raises:
        ValueError: the interval is empty.
    """
    if interval is None:
        return True
    low, high = interval
    if not low <= high:
        raise ValueError(f"guidance interval {interval} is empty: expected (lowest sigma, highest sigma).")
    return low <= sigma <= high
