"""Products of int8 by Triton on NVIDIA GPUs: inputs are quantized in one pass, outputs are written once.

Two-level 4-bit weights become int8 exactly. Those of other libraries' files, whose groups have scales of any size, are
rounded to 8 bits for each call, `regroup_int4` says by how much; the kernel "dequantize" takes them as they are.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor

from dit.quant.activations import OFFSET, Codes, spread_scales
from dit.quant.formats import weight_format
from dit.quant.kernels.contract import LinearKernel, Use, Weights, has_integer_activations
from dit.quant.scheme import LEVELS

LEAST_VERSION = (3, 4)
"""Of triton: the first whose tiles are described by the host."""
CAPABILITY = (8, 0)
"""The first GPUs whose products of int8 Triton compiles."""
GROUPED = ("int4_group", "int4_group_fp32")
"""Formats of 4 bits with a scale for each group, as SVDQuant and SDNQ store them."""


def multiply(weights: Weights, x: Tensor, use: Use) -> Tensor:
    """Quantize the inputs, multiply their codes by the weights' codes, scale, add the bias, activate.

    Args:
        weights: of the layer.
        x: (M, K).
        use: of the weights; codes may be there already, signed ones.

    Returns:
        (M, N).
    """
    from dit.quant.kernels.triton_product import multiply_int8

    codes = use.codes if use.codes is not None else _quantize(weights, x, use)
    weight, scale = _int8(weights)  # (N, K), (N,)
    return multiply_int8(
        codes.values,
        weight,
        spread_scales(codes),
        scale,
        x.dtype,
        bias=weights.shifted_bias(torch.float32),
        input_sums=weights.input_sums,
        offset=OFFSET,
        after=use.after,
    )


def _quantize(weights: Weights, x: Tensor, use: Use) -> Codes:
    """Return signed codes of the inputs (M, K)."""
    from dit.quant.kernels.triton_rows import quantize_rows_by_triton

    return quantize_rows_by_triton(
        x,
        LEVELS[weights.scheme.activations],
        scale=weights.tensors.get("input_scale"),
        samples=None if use.samples == len(x) or not weights.scheme.per_sample else use.samples,
        shift=weights.scheme.shift,
    )


def _int8(weights: Weights) -> tuple[Tensor, Tensor]:
    """Return the weights as int8, (N, K), and a scale for each row, (N,)."""
    from dit.quant.kernels.triton_product import regroup_int4, unpack_int4

    tensors, scale = weights.tensors, weights.tensors["weight_scale"]
    if weights.scheme.weights == "int8":
        return tensors["weight"], scale.float()
    if weights.scheme.weights in GROUPED:
        return regroup_int4(tensors["weight"], scale, weights.columns)
    group = weight_format("int4").resolve_group(weights.scheme.group)
    packed, multiplier, zero = (tensors[name] for name in ("weight", "weight_multiplier", "weight_zero"))
    return unpack_int4(packed, multiplier, zero, group, weights.columns), scale.float()


@cache
def why_no_triton() -> str:
    """Return why Triton can't be used; empty if it can, on a GPU."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if tuple(map(int, version("triton").split(".")[:2])) < LEAST_VERSION:
        return f"it needs triton {'.'.join(map(str, LEAST_VERSION))}, installed is {version('triton')}"
    return ""


def _refusal(weights: Weights, x: Tensor) -> str:
    if weights.scheme.weights not in ("int8", "int4", *GROUPED) or not has_integer_activations(weights.scheme):
        return "it multiplies int8 and int4 weights and integers with one scale a token"
    if x.device.type != "cuda":
        return f"it runs on CUDA, the inputs are on {x.device.type}"
    if torch.cuda.get_device_capability(x.device) < CAPABILITY:
        return f"it needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
    return why_no_triton()


KERNEL = LinearKernel("triton_int8", multiply, _refusal)
