"""An int8 weight that lies in memory only in the order that oneDNN's kernels read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class PrepackedWeight(Tensor):
    """An int8 matrix (N, K) that is held in oneDNN's order: it reads as it was, but every such reading unpacks it.

    Whatever torch does with it (moving it, saving it) happens to a plain copy, so it takes the memory of one matrix and
    nobody else has to know.

    Attributes:
        packed: the matrix, opaque.
        zeros: int64 (N,), the zero points that the product asks for.
    """

    packed: Tensor
    zeros: Tensor

    @staticmethod
    def __new__(cls: type[PrepackedWeight], weight: Tensor, requires_grad: bool = False) -> PrepackedWeight:
        """Prepack a plain int8 matrix (N, K) on a CPU; one on another device, where offloading puts it, stays plain."""
        if weight.device.type != "cpu":
            return nn.Parameter(weight, requires_grad=requires_grad)  # pyright: ignore[reportReturnType]
        device = torch.device("cpu")
        made = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=torch.int8, device=device, requires_grad=False)
        return made  # pyright: ignore[reportReturnType]

    def __init__(self, weight: Tensor, requires_grad: bool = False) -> None:
        operator: Any = torch.ops.onednn.qlinear_prepack
        self.packed = operator(weight.detach().contiguous(), None)
        self.zeros = torch.zeros(len(weight), dtype=torch.int64)

    def plain(self) -> Tensor:
        """Return the matrix, int8, (N, K)."""
        return self.packed.to_dense().t().contiguous()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PrepackedWeight({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do anything with a plain copy; detaching shares the memory."""
        if func is torch.ops.aten.detach.default:
            return args[0]
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))


def _plain(value: Any) -> Any:
    return value.plain() if isinstance(value, PrepackedWeight) else value
