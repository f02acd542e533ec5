"""All kernels for quantized linear layers, and the choice among them."""

from __future__ import annotations

from torch import Tensor

from dit.quant.kernels import dequantize, int_mm, onednn, scaled_mm, triton_int8
from dit.quant.kernels.contract import LinearKernel, Weights


def linear_kernels() -> dict[str, LinearKernel]:
    """Return the kernels by name, the fastest first; the last can multiply everything."""
    found = (onednn.KERNEL, scaled_mm.KERNEL, triton_int8.KERNEL, int_mm.KERNEL, dequantize.KERNEL)
    return {one.name: one for one in found}


def choose_kernel(weights: Weights, x: Tensor, name: str = "auto") -> LinearKernel:
    """Return the kernel that multiplies inputs.

    Args:
        weights: of the layer.
        x: (M, K); shape, dtype and device are read.
        name: "auto", or one of `linear_kernels()`.

    Raises:
        ValueError: there is none of this name, or it can't.
    """
    kernels = linear_kernels()
    if name != "auto" and name not in kernels:
        raise ValueError(f"kernel is {name!r}; use 'auto' or one of {', '.join(kernels)}")
    reasons = []
    for one in kernels.values() if name == "auto" else (kernels[name],):
        reason = one.refusal(weights, x)
        if not reason:
            return one
        reasons.append(f"{one.name}: {reason}")
    raise ValueError(f"no kernel multiplies {weights.scheme} on {x.device} ({'; '.join(reasons)}); use kernel='auto'")
