"""Memory for intermediate results on a CPU that a thread uses again and again.

Memory that is new to a process is cleared page by page when it is first written, which takes longer than writing it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from threading import local

import torch
from torch import Tensor

MOST_BYTES = 2**24
"""Larger tensors are made anew: they would be held for the rest of the process."""

_KEPT = local()


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor on the CPU with any content, valid until the same name is asked for again in this thread.

    Args:
        name: what it is used for; tensors of several names don't overlap.
        shape: of the tensor.
        dtype: of the tensor.
    """
    count = math.prod(shape)
    if count * dtype.itemsize > MOST_BYTES:
        return torch.empty(*shape, dtype=dtype)
    held: dict[tuple[str, torch.dtype], Tensor] = vars(_KEPT).setdefault("held", {})
    key = name, dtype
    if key not in held or held[key].numel() < count:
        with torch.inference_mode(False):  # or calls outside of that mode couldn't write to it
            held[key] = torch.empty(count, dtype=dtype)
    return held[key][:count].view(*shape)
