"""The contract of kernels for quantized linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.quant.activations import Codes
from dit.quant.scheme import Scheme


@dataclass(frozen=True)
class Weights:
    """The weights of a quantized layer.

    Attributes:
        scheme: how they are quantized; `group` and `rotate` are resolved.
        tensors: as stored, see `dit.quant.formats`; "weight" of int8 may be a `PrepackedWeight`.
        rows: outputs N.
        columns: inputs K.
        bias: (N,) or None.
    """

    scheme: Scheme
    tensors: Mapping[str, Tensor]
    rows: int
    columns: int
    bias: Tensor | None


@dataclass(frozen=True)
class LinearKernel:
    """What multiplies quantized weights.

    Attributes:
        name: in reports.
        function: (weights, inputs (M, K) of a float dtype, their codes) -> (M, N) in the inputs' dtype, bias included.
            The inputs are balanced and rotated.
        refusal: weights, inputs -> why the kernel can't multiply them; empty if it can.
        codes: whether the function wants the inputs quantized to integers: "signed", "unsigned" or "" (it is given
            None).
    """

    name: str
    function: Callable[[Weights, Tensor, Codes | None], Tensor]
    refusal: Callable[[Weights, Tensor], str]
    codes: str = ""


def has_integer_activations(scheme: Scheme) -> bool:
    """Return whether products of whole integers give a layer's output: one scale a token or for all."""
    return scheme.activations in ("int8", "int6", "int4") and scheme.activation_group is None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that scales and sums are in: bfloat16 keeps them, all others are computed in float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
