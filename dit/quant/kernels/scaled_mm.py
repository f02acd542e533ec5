"""Products of float8 matrices with a scale a row by `torch._scaled_mm`, on GPUs that have them (Hopper, Ada, newer)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit.quant.activations import SMALLEST
from dit.quant.kernels.contract import LinearKernel, Use, Weights, activate
from dit.quant.kernels.triton_int8 import why_no_triton

LARGEST = 448.0
"""Largest number of float8 e4m3."""
CAPABILITY = (8, 9)


def multiply(weights: Weights, x: Tensor, use: Use) -> Tensor:
    """Round activations to float8, a scale for each token, and multiply.

    Args:
        weights: of the layer.
        x: (M, K).
        use: of the weights.

    Returns:
        (M, N) in the dtype of `x`.
    """
    rounded, scale = rounded_rows(x, weights.tensors.get("input_scale"))  # (M, K), (M, 1)
    out = torch._scaled_mm(
        rounded,
        weights.tensors["weight"].t(),
        scale_a=scale,
        scale_b=weights.tensors["weight_scale"].reshape(1, -1).float(),
        bias=None if weights.bias is None else weights.bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,  # the only one that products with scales of rows have
        use_fast_accum=True,
    )  # (M, N)
    return activate(out.to(x.dtype), use.after)


def rounded_rows(x: Tensor, static: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round activations to float8 with a scale for each token: in one pass where Triton is there and they are on a GPU.

    Args:
        x: (M, K).
        static: scale of all tokens, one number, or None.

    Returns:
        (M, K) of float8 e4m3 and the scales, float32, (M, 1).
    """
    if x.device.type == "cuda" and not why_no_triton():
        from dit.quant.kernels.triton_rows import round_rows_to_float8

        return round_rows_to_float8(x, static)
    if static is None:
        scale = (x.abs().amax(dim=-1, keepdim=True).float() / LARGEST).clamp(min=SMALLEST)  # (M, 1)
    else:
        scale = static.reshape(1, 1).expand(len(x), 1).contiguous()
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def _refusal(weights: Weights, x: Tensor) -> str:
    if weights.scheme.weights != "fp8" or weights.scheme.activations != "fp8" or weights.scheme.group:
        return "it multiplies float8 with a scale a row"
    if x.device.type != "cuda":
        return f"it runs on CUDA, the inputs are on {x.device.type}"
    if torch.cuda.get_device_capability(x.device) < CAPABILITY:
        return "the GPU has no products of float8"
    if weights.columns % 16 or weights.rows % 16:
        return f"it wants multiples of 16, the layer has {weights.columns} inputs and {weights.rows} outputs"
    return ""


KERNEL = LinearKernel("scaled_mm", multiply, _refusal)
