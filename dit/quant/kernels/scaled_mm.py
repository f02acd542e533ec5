"""Products of float8 matrices with a scale a row by `torch._scaled_mm`, on GPUs that have them (Hopper, Ada, newer)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit.quant.activations import SMALLEST
from dit.quant.kernels.contract import LinearKernel, Use, Weights, activate

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
    static = weights.tensors.get("input_scale")
    if static is None:
        scale = (x.abs().amax(dim=-1, keepdim=True).float() / LARGEST).clamp(min=SMALLEST)  # (M, 1)
    else:
        scale = static.reshape(1, 1).expand(len(x), 1).contiguous()
    rounded = (x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)  # (M, K)
    out = torch._scaled_mm(
        rounded,
        weights.tensors["weight"].t(),
        scale_a=scale,
        scale_b=weights.tensors["weight_scale"].reshape(1, -1).float(),
        bias=None,
        out_dtype=torch.bfloat16,  # the only one that products with scales of rows have
        use_fast_accum=True,
    )  # (M, N)
    if weights.bias is not None:
        out = out.add_(weights.bias.to(out.dtype))
    return activate(out.to(x.dtype), use.after)


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
