"""What a kernel of block-sparse attention is, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap

KERNELS: dict[str, str] = {
    "reference": "reference",
    "gather": "gather",
    "triton": "triton",
    "triton_int8": "triton",
    "triton_int8_fp8": "triton",
    "flex": "flex",
    "flex_compiled": "flex",
    "xformers": "xformers",
    "natten": "natten",
}
"""Kernel -> the file of this folder that registers it."""

_TABLE: dict[str, SparseKernel] = {}


@dataclass(frozen=True)
class Tail:
    """A stand-in for what a block of queries doesn't visit: one pooled key and value for each block of keys.

    Args:
        key: (B, K, m, E), the mean key of each block.
        value: (B, K, m, E), the mean value of each block.
        log_count: (B', K', m), float32, logarithm of the tokens that each stands for; -inf for empty blocks.
    """

    key: Tensor
    value: Tensor
    log_count: Tensor


class SparseFunction(Protocol):
    """The computation of a kernel."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_map: BlockMap,
        *,
        scale: float,
        key_mask: Tensor | None = None,
        tail: Tail | None = None,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to the pairs that the map says.

        Args:
            query: (B, N, K, E), in the order of the sequence.
            key: (B, M, K, E).
            value: (B, M, K, E).
            block_map: the pairs, on the same device.
            scale: factor of the scores.
            key_mask: bool, (B, M), False for keys that nobody may look at (padded text).
            tail: what stands for blocks that aren't visited; None leaves them out of the softmax.
            return_lse: also return the LSE.

        Returns:
            (B, N, K, E) and the LSE (B, K, N), float32, or None. A query without a key gets zeros and -inf.
        """
        ...


@dataclass(frozen=True)
class SparseKernel:
    """One way to compute block-sparse attention.

    Args:
        name: as `block_sparse_attention(kernel=...)` takes it.
        function: the computation.
        devices: where it runs.
        dtypes: of query, key and value.
        package: what must be installed beside torch; empty for nothing.
        has_tail: it takes a tail.
        has_gradient: autograd passes through it; for others the backward of `kernels.backward` is used.
        why_not: says of a call why the kernel can't compute it, empty if it can; beyond device, dtype and package.
    """

    name: str
    function: SparseFunction
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    package: str = ""
    has_tail: bool = False
    has_gradient: bool = False
    why_not: Callable[[Tensor, Tensor, BlockMap], str] = lambda query, key, block_map: ""

    def refusal(self, query: Tensor, key: Tensor, block_map: BlockMap, tail: bool = False) -> str:
        """Return why the kernel can't compute a call; empty if it can.

        Args:
            query: (B, N, K, E).
            key: (B, M, K, E).
            block_map: the pairs.
            tail: whether there is a tail.
        """
        if query.device.type not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, not on {query.device.type}"
        if query.dtype not in self.dtypes:
            return f"it has no {str(query.dtype).removeprefix('torch.')}"
        if self.package and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if tail and not self.has_tail:
            return "it has no tail"
        return self.why_not(query, key, block_map)


def register_kernel(kernel: SparseKernel) -> None:
    """Add a kernel to the table; called by its file."""
    _TABLE[kernel.name] = kernel


def sparse_kernel(name: str) -> SparseKernel:
    """Return the kernel of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in KERNELS:
        raise ValueError(f"there is no sparse attention kernel {name!r}; use 'auto' or one of {', '.join(KERNELS)}")
    import_module(f"dit.attention.kernels.{KERNELS[name]}")
    return _TABLE[name]


def kernel_names() -> list[str]:
    """Return the names of all kernels."""
    return list(KERNELS)
