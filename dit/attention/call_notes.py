"""The token grid of the network call that is being made, noted when the network is entered.

In compiled code the note is an operator of its own: the graph holds it, so that grids which depend on values (image
positions) are read when the graph runs. It writes a ticket that the attention operators of the network read, which
keeps them behind it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from dit.runtime.families import Family, UnknownFamilyError
from dit.runtime.families.tokens import TokenLayout

_NOTES: WeakValueDictionary[int, CallNote] = WeakValueDictionary()


class CallNote:
    """What is known of the call of one network.

    Args:
        model: the bare network.
        family: its row.

    Attributes:
        layout: the tokens of the newest call; None where they are not known.
        reason: why not.
        ticket: written at each call, (1,).
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model, self.family = model, family
        self.layout: TokenLayout | None = None
        self.reason = "the network was not entered through its own call"
        self.ticket = torch.zeros(1, dtype=torch.int64)
        self.number = id(self)
        _NOTES[self.number] = self

    def enter(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Note a call; where it is compiled, leave that to the graph."""
        if torch.compiler.is_compiling():
            tensors: list[Tensor] = []
            text = _describe((args, dict(kwargs)), tensors)
            torch.ops.tessera.note_call(self.ticket, tensors, text, self.number)
        else:
            self.read(args, kwargs)

    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Read the grid of a call."""
        try:
            inputs = self.family.bind(self.model, args, kwargs)
            self.layout, self.reason = self.family.token_grid(self.model, inputs), ""
        except (UnknownFamilyError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            self.layout, self.reason = None, f"the call's token grid is not known ({error})"


def _describe(value: Any, tensors: list[Tensor]) -> str:
    """Write arguments as a Python literal in which ("tensor", i) stands for the i-th tensor."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return f"('tensor', {len(tensors) - 1})"
    if isinstance(value, dict):
        return "{" + "".join([f"'{name}': {_describe(one, tensors)}, " for name, one in value.items()]) + "}"
    if isinstance(value, list):
        return "[" + "".join([_describe(one, tensors) + ", " for one in value]) + "]"
    if isinstance(value, tuple):
        return "(" + "".join([_describe(one, tensors) + ", " for one in value]) + ")"
    return f"{value}" if isinstance(value, (bool, int, float)) else "None"


def _restore(value: Any, tensors: list[Tensor]) -> Any:
    """Undo `_describe`."""
    if isinstance(value, tuple) and len(value) == 2 and value[0] == "tensor":
        return tensors[value[1]]
    if isinstance(value, dict):
        return {name: _restore(one, tensors) for name, one in value.items()}
    return type(value)(_restore(one, tensors) for one in value) if isinstance(value, list | tuple) else value


@torch.library.custom_op("tessera::note_call", mutates_args=("ticket",))
def _note_call(ticket: Tensor, tensors: list[Tensor], text: str, number: int) -> None:
    args, kwargs = _restore(ast.literal_eval(text), tensors)
    _NOTES[number].read(args, kwargs)
    ticket.add_(1)


@_note_call.register_fake
def _note_call_fake(ticket: Tensor, tensors: list[Tensor], text: str, number: int) -> None:
    return None
