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


class Codes(NamedTuple):
    """Quantized activations.

    Attributes:
        values: int8, or uint8 with `OFFSET` as zero, (M, K).
        scale: float32, that bfloat16 holds exactly, (M, 1); or (S, 1), one for each S-th part of the rows, a sample; or
            (1, 1) for a static scale, any number.
    """

    values: Tensor
    scale: Tensor


def quantize_rows(
    x: Tensor, levels: int = 127, *, unsigned: bool = False, scale: Tensor | None = None, samples: int | None = None
) -> Codes:
    """Quantize the rows of activations, symmetrically.

    A row that holds NaN or infinity gets such a scale, so that what is computed of it isn't finite either.

    Args:
        x: (M, K), of any float dtype.
        levels: largest code.
        unsigned: return codes + `OFFSET` as uint8.
        scale: static, float32, one number; None finds one for each row, or for each sample.
        samples: S, equal parts of the rows that have one scale each; None gives each row its own.

    Returns:
        The codes and their scales.
    """
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
        if samples is None:
            return _quantize_on_cpu(x.contiguous(), levels, unsigned, scale)
        return _quantize_samples_on_cpu(x.contiguous(), levels, unsigned, samples)
    steps = row_scales(x, levels) if scale is None else scale.reshape(1, 1)  # (M, 1)
    if samples is not None:
        steps = steps.view(samples, -1).amax(dim=-1, keepdim=True)  # (S, 1)
    codes = (x.float().view(len(steps), -1) / steps).round_().clamp_(-levels, levels).view(x.shape)  # (M, K)
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


def spread_scales(codes: Codes) -> Tensor:
    """Return the scales of the rows, (M, 1); a static scale stays (1, 1)."""
    count = len(codes.scale)
    return (
        codes.scale
        if count in (1, len(codes.values))
        else codes.scale.repeat_interleave(len(codes.values) // count, dim=0)
    )


def _round_up(scale: Tensor) -> Tensor:
    """Return the next numbers, at least `SMALLEST`, that bfloat16 holds; NaN and infinity stay."""
    bits = scale.clamp(min=SMALLEST).view(torch.int32)
    return bits.add(0xFFFF).bitwise_and_(-0x10000).view(torch.float32)


def _quantize_on_cpu(x: Tensor, levels: int, unsigned: bool, scale: Tensor | None) -> Codes:
    """Quantize with a scale for each row, or a static one."""
    rows, columns = x.shape
    values = torch.empty(rows, columns, dtype=torch.int8)  # (M, K)
    scales = torch.empty(rows, 1) if scale is None else scale.reshape(1, 1)
    step = max(BLOCK_NUMBERS // max(columns, 1), 1)
    for start in range(0, rows, step):
        part = x[start : start + step]  # (m, K)
        steps = scales
        if scale is None:
            steps = scales[start : start + step]
            steps.copy_(_round_up(_largest(part).float().div_(levels)))
        _write_codes(part, steps, None if scale is None else levels, unsigned, values[start : start + step])
    return Codes(values.view(torch.uint8) if unsigned else values, scales)


def _quantize_samples_on_cpu(x: Tensor, levels: int, unsigned: bool, samples: int) -> Codes:
    """Quantize with a scale for each of S equal parts of the rows."""
    rows, columns = x.shape
    values = torch.empty(rows, columns, dtype=torch.int8)  # (M, K)
    step, size = max(BLOCK_NUMBERS // max(columns, 1), 1), rows // samples
    scales = torch.empty(samples, 1)
    for sample in range(samples):
        first, end = sample * size, (sample + 1) * size
        largest = [_largest(x[start : min(start + step, end)]).amax() for start in range(first, end, step)]
        scales[sample] = _round_up(torch.stack(largest).amax().float().div_(levels).view(1))
        for start in range(first, end, step):
            place = slice(start, min(start + step, end))
            _write_codes(x[place], scales[sample], None, unsigned, values[place])
    return Codes(values.view(torch.uint8) if unsigned else values, scales)


def _largest(x: Tensor) -> Tensor:
    """Return the largest magnitudes of rows (m, K), (m, 1); NaN and infinity are larger than all numbers."""
    magnitudes = scratch("quantize_rows magnitudes", x.shape, x.dtype)
    torch.abs(x, out=magnitudes)
    bits = torch.int16 if x.dtype == torch.bfloat16 else torch.int32
    return magnitudes.view(bits).amax(dim=-1, keepdim=True).view(x.dtype)


def _write_codes(x: Tensor, steps: Tensor, levels: int | None, unsigned: bool, out: Tensor) -> None:
    """Write the codes of rows (m, K).

    Args:
        x: the rows.
        steps: scales, (m, 1), or one for all.
        levels: largest code, where numbers may exceed it; None where the scales were made for them.
        unsigned: add `OFFSET`.
        out: int8, (m, K).
    """
    numbers = scratch("quantize_rows numbers", x.shape, torch.float32)
    numbers.copy_(x).mul_(float(1 / steps) if steps.numel() == 1 else steps.reciprocal())
    if levels is not None:
        numbers.clamp_(-levels, levels)
    out.copy_(numbers.add_(ROUNDER + (OFFSET if unsigned else 0)).view(torch.int32))  # keeps the lowest byte
