"""Products of int8 matrices by `torch._int_mm`, on CPUs and GPUs; int4 and int6 weights are unpacked part by part.

On GPUs the sums become the output in one pass of a Triton kernel, where Triton is there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit.quant.activations import OFFSET, spread_scales
from dit.quant.formats import weight_format
from dit.quant.formats.packing import int4_to_int8, unpack_sixes
from dit.quant.kernels.contract import LinearKernel, Use, Weights, activate, compute_dtype, has_integer_activations
from dit.quant.kernels.triton_int8 import why_no_triton
from dit.runtime.scratch import scratch

PART = 1152
"""Outputs whose weights are unpacked, and multiplied, at a time."""
ROWS = 512
"""Rows of the output that are worked on at a time on a CPU: sums leave the caches before they are scaled otherwise."""
LEAST_ROWS = 17
"""CUDA's product wants more than 16 rows."""


def multiply(weights: Weights, x: Tensor, use: Use) -> Tensor:
    """Multiply codes by the weights' codes, scale, add the bias.

    Args:
        weights: of the layer.
        x: (M, K); only its dtype is read.
        use: of the weights, with signed codes of the inputs.

    Returns:
        (M, N).
    """
    codes = use.codes
    assert codes is not None
    scale = spread_scales(codes)
    values, missing = codes.values, LEAST_ROWS - len(codes.values)
    if values.device.type == "cuda" and missing > 0:
        values = torch.cat([values, values.new_zeros(missing, values.shape[1])])
    if values.device.type == "cuda" and not why_no_triton():
        return _multiply_on_gpu(weights, values, scale, x, use)
    out = torch.empty(len(codes.values), weights.rows, dtype=x.dtype, device=x.device)  # (M, N)
    width = weights.rows if x.device.type == "cuda" else PART
    unpacked = None
    for start in range(0, weights.rows, width):
        end = min(start + width, weights.rows)
        unpacked = _part(weights, start, end, unpacked)
        _multiply_part(weights, values, scale, unpacked, out, slice(start, end))
    return activate(out, use.after)


def _multiply_on_gpu(weights: Weights, values: Tensor, scale: Tensor, x: Tensor, use: Use) -> Tensor:
    """Multiply codes (M', K), and scale, add and activate in one pass over the sums; (M, N)."""
    from dit.quant.kernels.triton_product import finish_sums

    out = torch.empty(len(x), weights.rows, dtype=x.dtype, device=x.device)  # (M, N)
    sums = torch._int_mm(values, _part(weights, 0, weights.rows, None).t())  # (M', N)
    finish_sums(
        sums[: len(x)],
        scale,
        weights.tensors["weight_scale"].float(),
        out,
        bias=weights.shifted_bias(torch.float32),
        input_sums=weights.input_sums,
        offset=OFFSET,
        after=use.after,
    )
    return out


def _part(weights: Weights, start: int, end: int, memory: Tensor | None) -> Tensor:
    """Return the codes of some outputs' weights, int8, (n, K); they may be in the memory that is given."""
    tensors = weights.tensors
    if weights.scheme.weights == "int8":
        return tensors["weight"][start:end]
    if weights.scheme.weights == "int6":
        return unpack_sixes(tensors["weight"][start:end], weights.columns).view(torch.int8) - 32
    packed, multiplier, zero = (tensors[name][start:end] for name in ("weight", "weight_multiplier", "weight_zero"))
    group = weight_format("int4").resolve_group(weights.scheme.group)
    kept = None if memory is None or len(memory) != end - start else memory
    return int4_to_int8(packed, multiplier, zero, group, weights.columns, out=kept)


def _multiply_part(
    weights: Weights, values: Tensor, scale: Tensor, unpacked: Tensor, out: Tensor, columns: slice
) -> None:
    """Fill some columns of the output (M, N)."""
    dtype = compute_dtype(out.dtype)
    steps = weights.tensors["weight_scale"][columns].float()  # (n,)
    if len(scale) == 1 and len(values) > 1:  # static; bfloat16 might not hold it
        steps, scale = steps * scale.flatten(), torch.ones_like(scale)
    bias = weights.shifted_bias(dtype)
    bias = None if bias is None else bias[columns]
    count = len(values)
    height = min(ROWS, count) if out.device.type == "cpu" else count
    transposed = unpacked.t()  # (K, n)
    for start in range(0, len(out), height):
        rows, part = values[start : start + height], out[start : start + height, columns]
        sums = _empty("sums", len(rows), len(unpacked), torch.int32, out)
        torch._int_mm(rows, transposed, out=sums)
        exact = _empty("exact", len(part), len(unpacked), torch.float32, out)
        exact.copy_(sums[: len(part)]).mul_(steps)  # (m, n)
        if weights.input_sums is not None:
            exact.add_(weights.input_sums[columns], alpha=OFFSET)  # signed codes are less by that
        factor = scale if len(scale) == 1 else scale[start : start + height]  # (m, 1)
        if out.dtype == dtype and bias is not None:
            torch.addcmul(bias, part.copy_(exact), factor.to(dtype), out=part)
        else:
            exact.mul_(factor)
            part.copy_(exact if bias is None else exact.add_(bias))


def _empty(name: str, rows: int, columns: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return memory for an intermediate result, (rows, columns)."""
    if like.device.type == "cpu":
        return scratch(f"int_mm {name}", (rows, columns), dtype)
    return like.new_empty(rows, columns, dtype=dtype)


def _refusal(weights: Weights, x: Tensor) -> str:
    if weights.scheme.weights not in ("int8", "int6", "int4") or not has_integer_activations(weights.scheme):
        return "it multiplies integers with one scale a token"
    if x.device.type not in ("cpu", "cuda"):
        return f"torch has no product of int8 matrices on {x.device.type}"
    if x.device.type == "cuda" and (weights.columns % 8 or weights.rows % 8):
        return f"CUDA's product wants multiples of 8, the layer has {weights.columns} inputs and {weights.rows} outputs"
    return ""


KERNEL = LinearKernel("int_mm", multiply, _refusal, "signed")
