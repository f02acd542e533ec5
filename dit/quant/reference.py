"""Quantization of activations as it is defined, to be read and compared with; the fast ways stand elsewhere.

Every function rounds its input to the nearest values that the format can hold, and returns these values as numbers:
what a layer that works with codes computes, up to the order of its sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.quant.scheme import LEVELS, Scheme

LARGEST_FP8 = 448.0
"""Largest number of float8 e4m3."""
LARGEST_FP4 = 6.0
FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What e2m1 can hold."""
NVFP4_GROUP = 16
SMALLEST = 1e-12
"""Least scale; rows of zeros have it."""


def fake_quantize_activations(
    x: Tensor, scheme: Scheme, input_scale: Tensor | None = None, sample_rows: int | None = None
) -> Tensor:
    """Round activations to what their format can hold.

    Args:
        x: (..., K), balanced and rotated before that.
        scheme: its `activations` name the format, its `activation_group` the neighbours that share a scale; without
            groups a token has one scale.
        input_scale: one scale for all tokens, (1,); None finds them in `x`.
        sample_rows: tokens of a sample, for schemes with a scale for each sample; None means x is one sample, or, of
            three and more axes, that the last but one is that of a sample's tokens.

    Returns:
        float32, (..., K).

    Raises:
        ValueError: a static scheme without `input_scale`.
    """
    if scheme.activations == "none":
        return x.float()
    if scheme.static and input_scale is None:
        raise ValueError("the scheme has static activations: give their input_scale, which calibration finds")
    if scheme.activations == "nvfp4":
        return fake_quantize_nvfp4(x.float(), input_scale)
    groups = _grouped(x.float(), scheme.activation_group or x.shape[-1])  # (..., G, g)
    largest = groups.abs().amax(dim=-1, keepdim=True)  # (..., G, 1)
    if scheme.per_sample and largest.numel():
        samples = largest.reshape(-1, x.shape[-2] if sample_rows is None else sample_rows)  # (S, rows)
        largest = samples.amax(dim=-1, keepdim=True).expand_as(samples).reshape(largest.shape)
    if scheme.activations == "fp8":
        scale = (largest / LARGEST_FP8).clamp(min=SMALLEST) if input_scale is None else input_scale.float()
        rounded = (groups / scale).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn).float() * scale
    else:
        levels, shift = LEVELS[scheme.activations], scheme.shift
        lowest, highest = (0, 2 * levels + 1) if shift else (-levels, levels)
        scale = round_up_to_bfloat16((largest + shift) / highest) if input_scale is None else input_scale.float()
        rounded = ((groups + shift) / scale).round().clamp(lowest, highest) * scale - shift  # (..., G, g)
    return rounded.flatten(-2)[..., : x.shape[-1]]  # (..., K)


def fake_quantize_nvfp4(x: Tensor, input_scale: Tensor | None = None) -> Tensor:
    """Round to NVFP4: e2m1 numbers, a float8 scale for 16 of them, and one for each token, or for all.

    Args:
        x: float32, (..., K).
        input_scale: one scale for all tokens, (1,); None gives each token the one that its largest number needs.

    Returns:
        float32, (..., K).
    """
    groups = _grouped(x, NVFP4_GROUP)  # (..., G, 16)
    largest = groups.abs().amax(dim=-1, keepdim=True)  # (..., G, 1)
    if input_scale is None:
        outer = (largest.amax(dim=-2, keepdim=True) / (LARGEST_FP4 * LARGEST_FP8)).clamp(min=SMALLEST)  # (..., 1, 1)
    else:
        outer = input_scale.float()
    inner = (largest / LARGEST_FP4 / outer).clamp(max=LARGEST_FP8).to(torch.float8_e4m3fn).float()  # (..., G, 1)
    scale = inner * outer
    values = torch.tensor(FP4_MAGNITUDES, device=x.device)
    magnitude = (groups.abs() / scale.clamp(min=SMALLEST)).clamp(max=LARGEST_FP4)  # (..., G, 16)
    above = torch.bucketize(magnitude, values).clamp(min=1)  # index of the next value that is not smaller
    lower, upper = values[above - 1], values[above]
    middle = (lower + upper) / 2
    takes_upper = (magnitude > middle) | ((magnitude == middle) & (above % 2 == 0))  # halves go to even codes
    rounded = torch.where(takes_upper, upper, lower) * groups.sign() * scale
    return rounded.flatten(-2)[..., : x.shape[-1]]  # (..., K)


def round_up_to_bfloat16(scale: Tensor) -> Tensor:
    """Return the least numbers of bfloat16 that are not smaller than positive ones, and at least `SMALLEST`.

    A scale that is rounded down would give the largest number of a row a code beyond the last one.

    Args:
        scale: float32.

    Returns:
        float32, the same shape.
    """
    scale = scale.clamp(min=SMALLEST)
    near = scale.to(torch.bfloat16)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near.float() >= scale, near, above).float()


def _grouped(x: Tensor, group: int) -> Tensor:
    """Cut (..., K) into (..., G, g), zeros at the end where the last group is not full."""
    return F.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
