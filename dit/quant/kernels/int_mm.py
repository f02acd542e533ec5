"""Products of int8 matrices by `torch._int_mm`, on CPUs and GPUs; int4 and int6 weights are unpacked part by part."""

from __future__ import annotations

import torch
from torch import Tensor

from dit.quant.activations import Codes
from dit.quant.formats import weight_format
from dit.quant.formats.packing import int4_to_int8, unpack_sixes
from dit.quant.kernels.contract import LinearKernel, Weights, compute_dtype, has_integer_activations

PART = 1152
"""Outputs whose weights are unpacked, and multiplied, at a time."""
SUMS = 2**20
"""Sums of products that are held at a time: they leave the caches before they are scaled otherwise."""
LEAST_ROWS = 17
"""CUDA's product wants more than 16 rows."""


def multiply(weights: Weights, x: Tensor, codes: Codes | None) -> Tensor:
    """Multiply codes by the weights' codes, scale, add the bias.

    Args:
        weights: of the layer.
        x: (M, K); only its dtype is read.
        codes: of the inputs, signed.

    Returns:
        (M, N).
    """
    assert codes is not None
    values, missing = codes.values, LEAST_ROWS - len(codes.values)
    if values.device.type == "cuda" and missing > 0:
        values = torch.cat([values, values.new_zeros(missing, values.shape[1])])
    out = torch.empty(len(codes.values), weights.rows, dtype=x.dtype, device=x.device)  # (M, N)
    width = weights.rows if x.device.type == "cuda" else PART
    unpacked = None
    for start in range(0, weights.rows, width):
        end = min(start + width, weights.rows)
        unpacked = _part(weights, start, end, unpacked)
        _multiply_part(weights, values, codes.scale, unpacked, out, slice(start, end))
    return out


def _part(weights: Weights, start: int, end: int, memory: Tensor | None) -> Tensor:
    """Return the codes of some outputs' weights, int8, (n, K); they may be in the memory that is given."""
    tensors = weights.tensors
    if weights.scheme.weights == "int8":
        return tensors["weight"][start:end]
    if weights.scheme.weights == "int6":
        return unpack_sixes(tensors["weight"][start:end], weights.columns).view(torch.int8) - 32
    packed, multiplier, zero = (tensors[name][start:end] for name in ("weight", "weight_multiplier", "weight_zero"))
    group = weights.scheme.group or weight_format("int4").group
    kept = None if memory is None or len(memory) != end - start else memory
    return int4_to_int8(packed, multiplier, zero, group, weights.columns, out=kept)


def _multiply_part(
    weights: Weights, values: Tensor, scale: Tensor, unpacked: Tensor, out: Tensor, columns: slice
) -> None:
    """Fill some columns of the output (M, N)."""
    dtype = compute_dtype(out.dtype)
    steps = weights.tensors["weight_scale"][columns].float()  # (n,)
    bias = None if weights.bias is None else weights.bias[columns].to(dtype)
    count = len(out)
    height = max(SUMS // len(unpacked), LEAST_ROWS) if out.device.type == "cpu" else count
    transposed = unpacked.t()  # (K, n)
    for start in range(0, count, height):
        end = min(start + height, count)
        sums = torch._int_mm(values[start : max(end, min(LEAST_ROWS, len(values)))], transposed)[: end - start]
        scaled = sums.float().mul_(steps)  # (m, n)
        factor = scale if len(scale) == 1 else scale[start:end]  # (m, 1)
        part = out[start:end, columns]
        if bias is None:
            part.copy_(scaled.mul_(factor))
        else:
            part.copy_(torch.addcmul(bias, scaled.to(dtype), factor.to(dtype)))


def _refusal(weights: Weights, x: Tensor) -> str:
    if weights.scheme.weights not in ("int8", "int6", "int4") or not has_integer_activations(weights.scheme):
        return "it multiplies integers with one scale a token"
    if x.device.type not in ("cpu", "cuda"):
        return f"torch has no product of int8 matrices on {x.device.type}"
    if x.device.type == "cuda" and (weights.columns % 8 or weights.rows % 8):
        return f"CUDA's product wants multiples of 8, the layer has {weights.columns} inputs and {weights.rows} outputs"
    return ""


KERNEL = LinearKernel("int_mm", multiply, _refusal, "signed")
