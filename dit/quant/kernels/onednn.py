"""Products of int8 matrices by oneDNN on CPUs with VNNI: the weights lie in the order that its kernels read.

`torch.ops.onednn.qlinear_pointwise` is what torch compiles quantized layers to. Activations must be unsigned: with
signed ones it runs a reference thousands of times slower. One scale a token is no option of it, so rows are scaled
after the product; one scale for all (static) is, and then the bias goes along too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from dit.quant.activations import OFFSET, Codes
from dit.quant.kernels.contract import After, LinearKernel, Use, Weights, activate, has_integer_activations
from dit.quant.kernels.prepacked import PrepackedWeight

OUTPUTS = 3 * 2**21
"""Numbers of an output that are multiplied and scaled at a time: more leave the caches between the two."""
ROWS = 512
"""Rows of a larger output that are worked on at a time."""


def multiply(weights: Weights, x: Tensor, use: Use) -> Tensor:
    """Multiply codes by prepacked weights, scale, add the bias.

    Args:
        weights: of the layer, "weight" a `PrepackedWeight`.
        x: (M, K); only its dtype is read.
        use: of the weights, with unsigned codes of the inputs.

    Returns:
        (M, N).
    """
    assert use.codes is not None
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    bias = weights.shifted_bias(dtype)
    scale = use.codes.scale
    if len(scale) < len(x):  # static, or one for each sample
        return _multiply_samples(weights, use.codes, bias, dtype, use.after).to(x.dtype)
    scale, count = scale.to(dtype), len(x)  # (M, 1), exact
    if count * weights.rows <= OUTPUTS:
        out = _scaled(_product(weights, use.codes.values, 1.0, None, dtype), scale, bias)
    else:
        out = torch.empty(count, weights.rows, dtype=dtype)  # (M, N)
        for start in range(0, count, ROWS):
            part = _product(weights, use.codes.values[start : start + ROWS], 1.0, None, dtype)  # (m, N)
            _scaled(part, scale[start : start + ROWS], bias, out[start : start + ROWS])
    return activate(out, use.after).to(x.dtype)


def _multiply_samples(weights: Weights, codes: Codes, bias: Tensor | None, dtype: torch.dtype, after: After) -> Tensor:
    """Multiply parts of the codes (M, K), each with one scale, with bias and activation function, (M, N)."""
    size = len(codes.values) // len(codes.scale)
    parts = [
        _product(weights, codes.values[first * size : (first + 1) * size], float(scale), bias, dtype, after)
        for first, scale in enumerate(codes.scale)
    ]  # (M / S, N) each
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _scaled(product: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Scale rows (M, N) by (M, 1) and add the bias (N,), in place unless there is an output."""
    out = product if out is None else out
    if bias is None:
        return torch.mul(product, scale, out=out)
    return torch.addcmul(bias, product, scale, out=out)


def _product(
    weights: Weights, values: Tensor, scale: float, bias: Tensor | None, dtype: torch.dtype, after: After = ""
) -> Tensor:
    """Return codes (M, K) times weights, scaled by the weights' scales and a number, (M, N)."""
    operator: Any = torch.ops.onednn.qlinear_pointwise
    weight: Any = weights.tensors["weight"]
    zero = 0 if weights.scheme.shift else OFFSET
    return operator(
        values, scale, zero, weight.packed, weights.tensors["weight_scale"], weight.zeros, bias,
        1.0, 0, dtype, "gelu" if after else "none", [], "tanh" if after == "gelu_tanh" else "none" if after else "",
    )  # fmt: skip


@cache
def has_vnni() -> bool:
    """Return whether this processor multiplies int8 without saturating, and torch has oneDNN."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def _refusal(weights: Weights, x: Tensor) -> str:
    if not isinstance(weights.tensors["weight"], PrepackedWeight):
        return "it multiplies prepacked int8 weights"
    if not has_integer_activations(weights.scheme):
        return "it multiplies integers with one scale a token"
    return "" if x.device.type == "cpu" else f"it runs on CPUs, the inputs are on {x.device.type}"


KERNEL = LinearKernel("onednn", multiply, _refusal, "unsigned")
