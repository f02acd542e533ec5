"""Linear layers whose float32 products run where this processor is fast.

torch hands float32 products on a CPU to MKL, and MKL keeps its AVX-512 code for Intel's processors: on others it runs
at half their speed. oneDNN, which torch has too (its convolutions run there), asks the processor what it can do.
Nothing is approximated: both sum the same float32 products, in another order.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

MIN_MACS = 1_500_000
"""Multiply-adds from which oneDNN's longer way to the product (10 microseconds) is made up for."""


@cache
def mkl_is_slow() -> bool:
    """Whether MKL leaves AVX-512 unused here, and oneDNN is there to use it."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return wide and both and "GenuineIntel" not in _vendor() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, by oneDNN where that is faster.

    oneDNN's product has no gradient, and neither compilers nor those who count operations know it: they get torch's.

    Args:
        x: (..., D_in).
        weight: (D_out, D_in).
        bias: (D_out,) or None.

    Returns:
        (..., D_out).
    """
    if not torch.compiler.is_compiling() and _suits(x, weight):
        return _by_onednn(x, weight, bias)  # (..., D_out)
    return F.linear(x, weight, bias)  # (..., D_out)


class Linear(nn.Linear):
    """`torch.nn.Linear`, see `linear`: the same weights, the same results but for the last bits."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., D_in) to (..., D_out)."""
        return linear(input, self.weight, self.bias)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product, whatever its size."""
    product: Any = torch.ops.mkldnn._linear_pointwise
    return product(x, weight, bias, "none", [], "")  # (..., D_out)


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can form a product, and faster."""
    return (
        x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.is_cpu
        and weight.is_cpu
        and mkl_is_slow()
        and x.numel() * weight.shape[0] >= MIN_MACS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not is_in_torch_dispatch_mode()
        and type(x) is Tensor  # a quantized weight, say, would see the product itself
        and type(weight) in (Tensor, nn.Parameter)
    )


def _vendor() -> str:
    """The processor's maker: "GenuineIntel", "AuthenticAMD", ...; Python doesn't tell it."""
    listing = Path("/proc/cpuinfo")
    if not listing.is_file():
        return os.environ.get("PROCESSOR_IDENTIFIER", "GenuineIntel")  # Windows; unknown makers get torch's way
    lines = (line.partition(":") for line in listing.read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "vendor_id"), "GenuineIntel")
