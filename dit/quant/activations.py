"""Quantize activations to integers, a scale for each token: the fast way on a CPU, and the plain one elsewhere.

The definition is `dit.quant.reference.fake_quantize_activations`. On a CPU every pass over the numbers counts: the
largest magnitude of a row is found among the bits of its numbers, as integers order like the magnitudes and torch
compares them several times faster; rounding is one addition of 1.5 * 2^23, after which the lowest byte is the code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dit.runtime.scratch import scratch

ROUNDER = 12_582_912.0
"""1.5 * 2^23: a float32 above it keeps no fraction, and its lowest bits are the whole number added."""
OFFSET = 128
"""Code of the value 0 in unsigned codes."""
SMALLEST = 1e-12
"""Least scale; rows of zeros have it."""
BLOCK_NUMBERS = 2**18
"""Numbers of a row block that is worked on at a time: what the caches hold in float32."""
LEVELS = {"int8": 127, "int6": 31, "int4": 7}
"""Largest code by format."""


class Codes(NamedTuple):
    """Quantized activations.

    Attributes:
        values: int8, or uint8 with `OFFSET` as zero, (M, K).
        scale: float32, a scale that bfloat16 holds exactly, (M, 1); or (1, 1) for static scales.
    """

    values: Tensor
    scale: Tensor


def quantize_rows(x: Tensor, levels: int = 127, *, unsigned: bool = False, scale: Tensor | None = None) -> Codes:
    """Quantize the rows of activations, symmetrically.

    A row that holds NaN or infinity gets such a scale, so that what is computed of it isn't finite either.

    Args:
        x: (M, K), of any float dtype.
        levels: largest code.
        unsigned: return codes + `OFFSET` as uint8.
        scale: static, float32, one number; None finds one for each row.

    Returns:
        The codes and their scales.
    """
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
        return _quantize_on_cpu(x.contiguous(), levels, unsigned, scale)
    steps = row_scales(x, levels) if scale is None else scale.reshape(1, 1)  # (M, 1)
    codes = (x.float() / steps).round_().clamp_(-levels, levels)  # (M, K)
    values = codes.add_(OFFSET).to(torch.uint8) if unsigned else codes.to(torch.int8)
    return Codes(values, steps)


def row_scales(x: Tensor, levels: int) -> Tensor:
    """Return the scales of rows (M, K): the largest magnitude over the largest code, rounded up to a bfloat16.

    Args:
        x: (M, K).
        levels: largest code.

    Returns:
        float32, (M, 1).
    """
    return _round_up(x.abs().amax(dim=-1, keepdim=True).float() / levels)


def _round_up(scale: Tensor) -> Tensor:
    """Return the next numbers, at least `SMALLEST`, that bfloat16 holds; NaN and infinity stay."""
    bits = scale.clamp(min=SMALLEST).view(torch.int32)
    return bits.add(0xFFFF).bitwise_and_(-0x10000).view(torch.float32)


def _quantize_on_cpu(x: Tensor, levels: int, unsigned: bool, scale: Tensor | None) -> Codes:
    rows, columns = x.shape
    values = torch.empty(rows, columns, dtype=torch.int8)  # (M, K)
    scales = torch.empty(rows, 1) if scale is None else scale.reshape(1, 1)
    step = max(BLOCK_NUMBERS // max(columns, 1), 1)
    height = min(step, rows)
    exact = scratch("quantize_rows exact", (height, columns), torch.float32)  # (m, K)
    magnitudes = scratch("quantize_rows magnitudes", (height, columns), x.dtype)  # (m, K)
    bits = torch.int16 if x.dtype == torch.bfloat16 else torch.int32
    rounder = ROUNDER + (OFFSET if unsigned else 0)
    for start in range(0, rows, step):
        part = x[start : start + step]
        numbers = exact[: len(part)]
        if scale is None:
            torch.abs(part, out=magnitudes[: len(part)])
            largest = magnitudes[: len(part)].view(bits).amax(dim=-1, keepdim=True).view(x.dtype)  # (m, 1)
            steps = _round_up(largest.float().div_(levels))
            scales[start : start + step] = steps
        else:
            steps = scales
        numbers.copy_(part).mul_(steps.reciprocal())
        if scale is not None:
            numbers.clamp_(-levels, levels)
        values[start : start + step].copy_(numbers.add_(rounder).view(torch.int32))  # keeps the lowest byte
    return Codes(values.view(torch.uint8) if unsigned else values, scales)
