"""Quantize activations in one pass on a GPU: the scale of each row and its codes, by Triton.

The definition is `dit.quant.reference.fake_quantize_activations`, written in torch it reads and writes the numbers five
times. The environment variable TRITON_INTERPRET=1, set before triton is imported, makes this run on a CPU, slowly.
"""

# ruff: noqa: ANN001, ANN201, N803, PLR0124 - Triton has its own types
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit.attention.kernels.triton_forward import narrow
from dit.quant.activations import SMALLEST, Codes, Form

LARGEST_FP8 = 448.0
"""Largest number of float8 e4m3."""
WIDEST = 2**17
"""Most numbers of a row."""


@triton.jit
def rows_kernel(
    x, X_ROW, codes, scales, given_scale, COLUMNS, limit, shift, low, high, offset, smallest, SCALE_STRIDE,
    GIVEN: tl.constexpr, FLOAT8: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Quantize a row in parts of BLOCK numbers; GIVEN reads its scale instead of finding it.

    `limit` is the largest code, `low` and `high` the ends of the codes, `offset` what is added to a code.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    if GIVEN:
        scale = tl.load(given_scale + row * SCALE_STRIDE)
        poison = 0.0
    else:
        largest = tl.zeros([BLOCK], tl.float32)
        spoiled = tl.zeros([BLOCK], tl.float32)
        for part in tl.static_range(PARTS):
            place = part * BLOCK + columns
            values = tl.load(x + row * X_ROW + place, mask=place < COLUMNS, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(values))
            spoiled += values * 0  # NaN and infinity, which codes don't have
        poison = tl.sum(spoiled, 0)
        scale = tl.maximum((tl.max(largest, 0) + shift) / limit, smallest)
        if not FLOAT8:  # the next number that bfloat16 holds
            scale = ((scale.to(tl.int32, bitcast=True) + 0xFFFF) & -65536).to(tl.float32, bitcast=True)
        scale = scale + poison
        tl.store(scales + row, scale)
    for part in tl.static_range(PARTS):
        place = part * BLOCK + columns
        is_real = place < COLUMNS
        values = tl.load(x + row * X_ROW + place, mask=is_real, other=0.0).to(tl.float32)
        values = tl.where(values * 0 == 0, values, 0.0)  # their scale is NaN
        values = (values + shift) / tl.where(scale == scale, scale, 1.0)
        values = tl.minimum(tl.maximum(values, low), high)
        if FLOAT8:
            tl.store(codes + row * COLUMNS + place, narrow(values, codes.dtype.element_ty), mask=is_real)
        else:
            # halves to even: a float32 near 1.5 * 2^23 keeps no fraction
            values = (values + 12582912.0) - 12582912.0 + offset
            tl.store(codes + row * COLUMNS + place, values.to(tl.int32).to(tl.int8), mask=is_real)  # wraps around


def quantize_rows_by_triton(
    x: Tensor,
    levels: int = 127,
    *,
    unsigned: bool = False,
    scale: Tensor | None = None,
    samples: int | None = None,
    shift: float = 0.0,
) -> Codes:
    """Quantize the rows of activations, as `dit.quant.activations.quantize_rows` does.

    Args:
        x: (M, K), of any float dtype.
        levels: largest code.
        unsigned: return codes + `dit.quant.activations.OFFSET` as uint8.
        scale: static, float32, one number.
        samples: S, equal parts of the rows that have one scale each; None gives each row its own.
        shift: no input is below its negative.

    Returns:
        The codes and their scales.
    """
    form = Form(levels, unsigned, shift)
    steps = None if scale is None else scale.reshape(1, 1).float()
    if samples is not None:
        own = _launch(x, form, None)[1]  # (M, 1); NaN stays
        steps = own.view(samples, -1).amax(dim=-1, keepdim=True)  # (S, 1)
    codes, found = _launch(x, form, steps)
    return Codes(codes.view(torch.uint8) if unsigned else codes, found)


def round_rows_to_float8(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round the rows of activations to float8 e4m3.

    Args:
        x: (M, K), of any float dtype.
        scale: static, float32, one number; None gives each row its own.

    Returns:
        (M, K) of float8 and the scales, float32, (M, 1).
    """
    x = _rows(x)
    rows, columns = x.shape
    out = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    given = None if scale is None else scale.reshape(1).float().expand(rows).contiguous()
    found = torch.empty(rows, dtype=torch.float32, device=x.device) if given is None else given
    _call(x, out, found, given, LARGEST_FP8, 0.0, -LARGEST_FP8, LARGEST_FP8, 0.0, scale_stride=1, is_float8=True)
    return out, found[:, None]


def _launch(x: Tensor, form: Form, steps: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return codes as int8 (M, K) and scales, (M, 1), or those that are given."""
    x = _rows(x)
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    given, stride = None, 0
    if steps is not None:
        given = steps.flatten() if len(steps) == 1 else steps.flatten().repeat_interleave(rows // len(steps))
        stride = 0 if len(steps) == 1 else 1
    found = torch.empty(rows, dtype=torch.float32, device=x.device) if given is None else given
    _call(x, codes, found, given, form.highest, form.shift, form.lowest, form.highest, form.offset, scale_stride=stride)
    return codes, found[:, None] if steps is None else steps


def _call(
    x: Tensor, codes: Tensor, scales: Tensor, given: Tensor | None, limit: float, shift: float, low: float,
    high: float, offset: float, *, scale_stride: int, is_float8: bool = False,
) -> None:  # fmt: skip
    rows, columns = x.shape
    block = min(triton.next_power_of_2(max(columns, 16)), 8192)
    kernel: Any = rows_kernel
    if not rows or not columns:
        return
    kernel[(rows,)](
        x, x.stride(0), codes, scales, scales if given is None else given, columns, float(limit), float(shift),
        float(low), float(high), float(offset), SMALLEST, scale_stride, GIVEN=given is not None, FLOAT8=is_float8,
        BLOCK=block, PARTS=triton.cdiv(columns, block), num_warps=min(max(block // 512, 1), 8),
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """Return a matrix whose rows are contiguous.

    Raises:
        ValueError: rows that are too long.
    """
    if x.shape[1] > WIDEST:
        raise ValueError(f"rows have {x.shape[1]} numbers, the kernel takes up to {WIDEST}")
    return x if x.stride(-1) == 1 else x.contiguous()
