"""The reference kernel: dequantize the weights, round the activations as their format would, multiply."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.layers.linear import linear
from dit.quant.formats import weight_format
from dit.quant.kernels.contract import LinearKernel, Use, Weights, activate
from dit.quant.reference import fake_quantize_activations

PART_NUMBERS = 2**22
"""Weights that are dequantized at a time: a layer's all at once would take as much memory as it had before."""


def dequantized(weights: Weights, start: int = 0, end: int | None = None) -> Tensor:
    """Return the weights of some outputs, of the balanced and rotated inputs, float32, (n, K).

    Args:
        weights: of the layer.
        start: first output.
        end: one after the last; None is all.
    """
    rows = slice(start, weights.rows if end is None else end)
    parts = {
        name: tensor[rows] if tensor.ndim and len(tensor) == weights.rows else tensor
        for name, tensor in weights.tensors.items()
    }
    return weight_format(weights.scheme.weights).unpack(parts, weights.columns, weights.scheme.group or 0)


def multiply(weights: Weights, x: Tensor, use: Use) -> Tensor:
    """Multiply by dequantized weights.

    Args:
        weights: of the layer.
        x: (M, K).
        use: of the weights.

    Returns:
        (M, N).
    """
    if weights.scheme.activations != "none":
        scale = weights.tensors.get("input_scale")
        x = fake_quantize_activations(x, weights.scheme, scale, len(x) // use.samples).to(x.dtype)
    step = max(PART_NUMBERS // weights.columns, 1)
    outputs = []
    for start in range(0, weights.rows, step):
        end = min(start + step, weights.rows)
        bias = None if weights.bias is None else weights.bias[start:end].to(x.dtype)
        part = dequantized(weights, start, end).to(x.dtype)
        outputs.append((linear if x.requires_grad is False else F.linear)(x, part, bias))  # (M, n)
    return activate(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1), use.after)  # (M, N)


def _refusal(weights: Weights, x: Tensor) -> str:
    return ""


KERNEL = LinearKernel("dequantize", multiply, _refusal)
