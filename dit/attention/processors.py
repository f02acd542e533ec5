"""Attention processors of diffusers that call `F.scaled_dot_product_attention` themselves, made to ask a backend.

About half of diffusers' processors (CogVideoX, Mochi, SD3, PixArt, DiT, HunyuanDiT, Lumina2, CogView4 ...) don't go
through its dispatcher. `asking` returns a processor that does what such a one does, line by line: it has the same code,
in which `F.scaled_dot_product_attention` means the dispatcher. So it stays right when diffusers changes its code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

SDPA = "scaled_dot_product_attention"
DISPATCH = "dispatch_attention_fn"

Attend = Callable[..., Tensor]
"""Takes query, key, value (B, N, K, E) and the further arguments of `F.scaled_dot_product_attention` by name."""


class _Functions:
    """`torch.nn.functional` with another attention."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attend: (B, K, N, E) in and out."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, N, K, E)
        out = self.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)  # (B, N, K, E)
        return out.transpose(1, 2)

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


def attends_itself(processor: Any) -> bool:
    """Return whether `asking` can make such a processor ask: its call names the function, through a module `F`."""
    return not isinstance(processor, nn.Module) and _call_of(type(processor)) is not None


def asking(processor: Any, attend: Attend) -> Any:
    """Return a copy of a processor whose attention is another function's.

    Args:
        processor: one for which `attends_itself`.
        attend: the function.

    Returns:
        A processor of a subclass, with the same attributes.

    Raises:
        ValueError: the processor can't be made to ask.
    """
    call = None if isinstance(processor, nn.Module) else _call_of(type(processor))
    if call is None:
        raise ValueError(f"{type(processor).__name__} doesn't call F.{SDPA} in a way that can be replaced")
    names = {**call.__globals__, "F": _Functions(attend)}
    names.pop("__name__")  # or torch.compile would look names up in the module of that name
    again = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    again.__kwdefaults__, again.__annotations__ = call.__kwdefaults__, dict(call.__annotations__)
    cls = type(processor)
    asks = type(cls.__name__, (cls,), {"__call__": again, "__module__": cls.__module__})
    made = object.__new__(asks)
    vars(made).update(vars(processor))
    return made


def mentions(thing: Any, *names: str) -> bool:
    """Return whether the methods of an object's class, or what they call by name in its module, use a name."""
    return any(_uses(cls, names) for cls in type(thing).__mro__ if cls.__module__.startswith(("diffusers.", "dit.")))


@cache
def _call_of(cls: type) -> FunctionType | None:
    """Return the `__call__` that names the function, if nothing but a plain function of a module with `F` does."""
    call = next((vars(one)["__call__"] for one in cls.__mro__ if "__call__" in vars(one)), None)
    if not isinstance(call, FunctionType) or hasattr(call, "__wrapped__") or SDPA not in call.__code__.co_names:
        return None
    functions = call.__globals__.get("F")
    return call if isinstance(functions, ModuleType) and functions is F else None


def _uses(cls: type, names: tuple[str, ...]) -> bool:
    codes = [one.__code__ for one in vars(cls).values() if isinstance(one, FunctionType)]
    return any(name in code.co_names for code in codes for name in names) or any(
        name in inner.co_names
        for code in codes
        for constant in code.co_consts
        if isinstance(inner := constant, CodeType)
        for name in names
    )
