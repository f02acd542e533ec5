"""Quantize activations to integers, a scale for each token: the fast way on a CPU, and the plain one elsewhere.

The definition is `dit.quant.reference.fake_quantize_activations`. On a CPU every pass over the numbers counts: the
largest magnitude of a row is found among the bits of its numbers, as integers order like the magnitudes and torch
compares them several times faster; rounding is one addition of 1.5 * 2^23, after which the lowest byte is the code.
"""

from __future__ import annotations

from dataclasses import dataclass
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
BLOCK_NUMBERS = 2**20
"""Numbers of the rows that are worked on at a time: fewer cost more for each, more leave the caches."""


class Codes(NamedTuple):
    """Quantized activations.

    Attributes:
        values: int8, or uint8 with `OFFSET` as zero, (M, K). Of shifted inputs uint8 with 0 as zero, or these less
            `OFFSET` as int8.
        scale: float32, that bfloat16 holds exactly, (M, 1); or (S, 1), one for each S-th part of the rows, a sample; or
            (1, 1) for a static scale, any number.
    """

    values: Tensor
    scale: Tensor


def quantize_rows(
    x: Tensor,
    levels: int = 127,
    *,
    unsigned: bool = False,
    scale: Tensor | None = None,
    samples: int | None = None,
    shift: float = 0.0,
) -> Codes:
    """Quantize the rows of activations, symmetrically.

    A row that holds NaN or infinity gets such a scale, so that what is computed of it isn't finite either.

    Args:
        x: (M, K), of any float dtype.
        levels: largest code.
        unsigned: return codes + `OFFSET` as uint8.
        scale: static, float32, one number; None finds one for each row, or for each sample.
        samples: S, equal parts of the rows that have one scale each; None gives each row its own.
        shift: no input is below its negative; codes go from 0 to 2 * levels + 1 then.

    Returns:
        The codes and their scales.
    """
    form = Form(levels, unsigned, shift)
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
        if samples is None:
            return _quantize_on_cpu(x.contiguous(), form, scale)
        return _quantize_samples_on_cpu(x.contiguous(), form, samples)
    steps = row_scales(x, form) if scale is None else scale.reshape(1, 1)  # (M, 1)
    if samples is not None:
        steps = steps.view(samples, -1).amax(dim=-1, keepdim=True)  # (S, 1)
    codes = (x.float() + shift).view(len(steps), -1) / steps  # (S, M / S * K)
    codes = codes.round_().clamp_(form.lowest, form.highest).add_(form.offset).view(x.shape)  # (M, K)
    return Codes(codes.to(torch.uint8 if unsigned else torch.int8), steps)


@dataclass(frozen=True)
class Form:
    """How codes are written.

    Attributes:
        levels: largest code of symmetric ones.
        unsigned: as uint8.
        shift: see `quantize_rows`.
    """

    levels: int
    unsigned: bool = False
    shift: float = 0.0

    @property
    def lowest(self) -> int:
        """Least code."""
        return 0 if self.shift else -self.levels

    @property
    def highest(self) -> int:
        """Largest code."""
        return 2 * self.levels + 1 if self.shift else self.levels

    @property
    def offset(self) -> int:
        """What is added to a code to write it."""
        if self.shift:
            return 0 if self.unsigned else -OFFSET
        return OFFSET if self.unsigned else 0


def row_scales(x: Tensor, form: Form) -> Tensor:
    """Return the scales of rows (M, K): the largest magnitude over the largest code, rounded up to a bfloat16.

    Args:
        x: (M, K).
        form: of the codes.

    Returns:
        float32, (M, 1).
    """
    return _round_up((x.abs().amax(dim=-1, keepdim=True).float() + form.shift) / form.highest)


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


def _quantize_on_cpu(x: Tensor, form: Form, scale: Tensor | None) -> Codes:
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
            steps.copy_(_round_up(_largest(part).float().add_(form.shift).div_(form.highest)))
        _write_codes(part, steps, form, scale is not None, values[start : start + step])
    return Codes(values.view(torch.uint8) if form.unsigned else values, scales)


def _quantize_samples_on_cpu(x: Tensor, form: Form, samples: int) -> Codes:
    """Quantize with a scale for each of S equal parts of the rows."""
    rows, columns = x.shape
    values = torch.empty(rows, columns, dtype=torch.int8)  # (M, K)
    step, size = max(BLOCK_NUMBERS // max(columns, 1), 1), rows // samples
    scales = torch.empty(samples, 1)
    for sample in range(samples):
        first, end = sample * size, (sample + 1) * size
        largest = [_largest(x[start : min(start + step, end)]).amax() for start in range(first, end, step)]
        scales[sample] = _round_up(torch.stack(largest).amax().float().add(form.shift).div_(form.highest).view(1))
        for start in range(first, end, step):
            place = slice(start, min(start + step, end))
            _write_codes(x[place], scales[sample], form, False, values[place])
    return Codes(values.view(torch.uint8) if form.unsigned else values, scales)


def _largest(x: Tensor) -> Tensor:
    """Return the largest magnitudes of rows (m, K), (m, 1); NaN and infinity are larger than all numbers."""
    magnitudes = scratch("quantize_rows magnitudes", x.shape, x.dtype)
    torch.abs(x, out=magnitudes)
    bits = torch.int16 if x.dtype == torch.bfloat16 else torch.int32
    return magnitudes.view(bits).amax(dim=-1).view(x.dtype)[:, None]  # with keepdim it takes three times as long


def _write_codes(x: Tensor, steps: Tensor, form: Form, may_exceed: bool, out: Tensor) -> None:
    """Write the codes of rows (m, K).

    Args:
        x: the rows.
        steps: scales, (m, 1), or one for all.
        form: of the codes.
        may_exceed: numbers may be larger than what the scales were made for.
        out: int8, (m, K).
    """
    numbers = scratch("quantize_rows numbers", x.shape, torch.float32)
    numbers.copy_(x)
    if form.shift:
        numbers.add_(form.shift).clamp_(min=0)
    numbers.mul_(float(1 / steps) if steps.numel() == 1 else steps.reciprocal())
    if may_exceed:
        numbers.clamp_(form.lowest, form.highest)
    out.copy_(numbers.add_(ROUNDER + form.offset).view(torch.int32))  # keeps the lowest byte
