"""The contract of kernels for quantized linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.quant.activations import Codes
from dit.quant.scheme import Scheme

After = Literal["", "gelu_tanh", "gelu"]


@dataclass(frozen=True)
class Weights:
    """The weights of a quantized layer.

    Attributes:
        scheme: how they are quantized; `group` and `rotate` are resolved.
        tensors: as stored, see `dit.quant.formats`; "weight" of int8 may be a `PrepackedWeight`.
        rows: outputs N.
        columns: inputs K.
        bias: (N,) or None.
        input_sums: sum of the weights of each output, float32, (N,), where inputs are shifted.
    """

    scheme: Scheme
    tensors: Mapping[str, Tensor]
    rows: int
    columns: int
    bias: Tensor | None
    input_sums: Tensor | None = None

    def shifted_bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return what is added to the product of the codes, (N,): the bias, less what the shift of the inputs adds."""
        if self.input_sums is None:
            return None if self.bias is None else self.bias.to(dtype)
        taken = self.input_sums * -self.scheme.shift
        return (taken if self.bias is None else taken.add_(self.bias)).to(dtype)


@dataclass(frozen=True)
class Use:
    """One use of quantized weights.

    Attributes:
        codes: of the inputs, for the kernels that ask for them.
        samples: parts of the inputs that have one scale each, see `Scheme.per_sample`.
        after: activation function of the output: "" (none), "gelu_tanh" or "gelu".
    """

    codes: Codes | None = None
    samples: int = 1
    after: After = ""


def activate(x: Tensor, after: After) -> Tensor:
    """Apply an activation function.

    Args:
        x: (M, N).
        after: see `Use`.
    """
    return x if not after else F.gelu(x, approximate="tanh" if after == "gelu_tanh" else "none")


@dataclass(frozen=True)
class LinearKernel:
    """What multiplies quantized weights.

    Attributes:
        name: in reports.
        function: (weights, inputs (M, K) of a float dtype, how they are used) -> (M, N) in the inputs' dtype, bias
            included. The inputs are balanced and rotated.
        refusal: weights, inputs -> why the kernel can't multiply them; empty if it can.
        codes: whether the function wants the inputs quantized to integers: "signed", "unsigned" or "".
    """

    name: str
    function: Callable[[Weights, Tensor, Use], Tensor]
    refusal: Callable[[Weights, Tensor], str]
    codes: str = ""


def has_integer_activations(scheme: Scheme) -> bool:
    """Return whether products of whole integers give a layer's output: one scale a token or for all."""
    return scheme.activations in ("int8", "int6", "int4") and scheme.activation_group is None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that scales and sums are in: bfloat16 keeps them, all others are computed in float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
