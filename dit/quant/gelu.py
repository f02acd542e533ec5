"""A projection and its GELU in one: kernels of quantized layers can apply the function while they write the output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from dit.quant.linear import QuantLinear


class ProjectedGELU(nn.Module):
    """A linear layer and GELU, with the parameter names of the module that it replaces.

    Args:
        proj: the layer; adapters may wrap it.
        approximate: form of GELU, as torch has it.
    """

    def __init__(self, proj: nn.Module, approximate: Literal["none", "tanh"]) -> None:
        super().__init__()
        self.proj = proj
        self.approximate: Literal["none", "tanh"] = approximate

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (..., K) to (..., N)."""
        if type(self.proj) is QuantLinear:
            return self.proj(hidden_states, "gelu_tanh" if self.approximate == "tanh" else "gelu")
        return F.gelu(self.proj(hidden_states), approximate=self.approximate)


class Fused(NamedTuple):
    """A module that is to replace another.

    Attributes:
        parent: the module that holds it.
        child: its name there.
        module: the replacement.
    """

    parent: nn.Module
    child: str
    module: ProjectedGELU


def fused_gelus(network: nn.Module) -> Iterator[Fused]:
    """Yield replacements of the modules that project by a quantized layer and apply GELU, as diffusers has them.

    Args:
        network: with quantized layers in place; it stays as it is.
    """
    for parent in list(network.modules()):
        for child, module in parent._modules.items():
            if module is not None and _is_gelu(module):
                found: Any = module
                yield Fused(parent, child, ProjectedGELU(found.proj, found.approximate).train(found.training))


def _is_gelu(module: nn.Module) -> bool:
    """Return whether a module is nothing but a quantized projection and GELU."""
    named = type(module).__name__ in ("GELU", "_GELU") and getattr(module, "approximate", None) in ("none", "tanh")
    return named and list(module._modules) == ["proj"] and type(module._modules["proj"]) is QuantLinear
