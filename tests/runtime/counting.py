"""Counts of work instead of its time: the same on every machine, busy or idle."""

import sys
from collections.abc import Callable
from types import FrameType

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def count_calls(function: Callable[[], object]) -> int:
    """How many functions are called within a call, of Python and of C; what vectorized code keeps low."""
    calls = 0

    def see(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


class CountOperations(TorchDispatchMode):
    """Counts tensor operations while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def count_operations(function: Callable[[], object]) -> int:
    """How many tensor operations run within a call."""
    with torch.no_grad(), CountOperations() as counter:
        function()
    return counter.count
