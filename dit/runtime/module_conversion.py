"""Replace linear layers by other modules and restore the same layers: for quantizers and LoRA.

A converter says what replaces one layer; which layers, their parents in the network, several parents of one layer,
layers under adapters and the way back are the same for all converters and stand here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dit.runtime.hooks import Attachment
from dit.runtime.state import layer_key, unwrap

Chosen = Callable[[str, nn.Linear], bool]
"""From the normalised name of a layer, and the layer, to whether it is converted."""


class LinearConverter(Protocol):
    """What makes the replacement of a linear layer."""

    def convert(self, name: str, linear: nn.Linear) -> nn.Module | None:
        """Make the module that replaces a layer.

        It maps (..., D_in) to (..., D_out), on the layer's device. It may hold the layer, then as `base_layer`, so that
        names stay the same. Networks may read `in_features`, `out_features`, `weight` and `bias` of it.

        Args:
            name: normalised name of the layer in its network.
            linear: the layer; it must stay as it is.

        Returns:
            The module, or None to leave the layer alone.
        """
        ...


class LinearSlot(NamedTuple):
    """Where a linear layer stands.

    Attributes:
        name: normalised name.
        parent: the module that holds it.
        child: its name there.
        linear: the layer.
    """

    name: str
    parent: nn.Module
    child: str
    linear: nn.Linear


class LinearConversion:
    """Replacements of the linear layers of a network; made once, put in and taken out any number of times.

    The replaced layers stay in memory.

    Args:
        model: the network, wrapped or not.
        converter: makes the replacements.
        chosen: which layers; None means all.

    Attributes:
        converted: the replacements by normalised name; a layer that has several parents has one for all.

    Raises:
        ValueError: no layer was converted, or one is offloaded by a hook, which would stay behind with it.
    """

    def __init__(self, model: nn.Module, converter: LinearConverter, chosen: Chosen | None = None) -> None:
        self.converted: dict[str, nn.Module] = {}
        self._replacements: list[tuple[LinearSlot, nn.Module]] = []
        self._applied = False
        made: dict[nn.Module, nn.Module | None] = {}
        for slot in linear_slots(model):
            if chosen is not None and not chosen(slot.name, slot.linear):
                continue
            if slot.linear not in made:
                made[slot.linear] = self._convert(slot, converter)
            module = made[slot.linear]
            if module is not None:
                self.converted[slot.name] = module
                self._replacements.append((slot, module))
        if not self._replacements:
            raise ValueError(f"no linear layer of {type(unwrap(model)).__name__} was converted: look at what is chosen")

    @staticmethod
    def _convert(slot: LinearSlot, converter: LinearConverter) -> nn.Module | None:
        if hasattr(slot.linear, "_hf_hook"):
            raise ValueError(f"{slot.name} is offloaded: convert the network first, then offload it")
        module = converter.convert(slot.name, slot.linear)
        return None if module is None else module.train(slot.linear.training)

    def install(self, attachment: Attachment) -> None:
        """Put the replacements in until a mechanism leaves; for its `install`.

        Args:
            attachment: of the mechanism.
        """
        for slot, module in self._replacements:
            attachment.replace(slot.parent, slot.child, module)

    def apply(self) -> Self:
        """Put the replacements in. A second call does nothing.

        Raises:
            ValueError: another module stands where a layer was; nothing is replaced.
        """
        if not self._applied:
            self._swap([(slot, slot.linear, module) for slot, module in self._replacements])
            self._applied = True
        return self

    def undo(self) -> None:
        """Put the layers back, the same objects. A second call does nothing.

        Raises:
            ValueError: another module stands where a replacement was; nothing is put back.
        """
        if self._applied:
            self._swap([(slot, module, slot.linear) for slot, module in self._replacements])
            self._applied = False

    @staticmethod
    def _swap(changes: list[tuple[LinearSlot, nn.Module, nn.Module]]) -> None:
        """Check that every slot holds the old module, then set the new ones."""
        for slot, old, _ in changes:
            if slot.parent._modules.get(slot.child) is not old:
                raise ValueError(f"{slot.name} was replaced by someone else meanwhile; undo that first, then try again")
        for slot, _, new in changes:
            setattr(slot.parent, slot.child, new)

    def __enter__(self) -> Self:
        return self.apply()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def convert_linears(model: nn.Module, converter: LinearConverter, chosen: Chosen | None = None) -> LinearConversion:
    """Replace linear layers of a network by what a converter makes of them.

    Args:
        model: the network, wrapped or not.
        converter: makes the replacements.
        chosen: which layers; None means all.

    Returns:
        What puts the layers back: with `undo()`, or at the end of a `with` block.

    Raises:
        ValueError: see `LinearConversion`.
    """
    return LinearConversion(model, converter, chosen).apply()


def linear_slots(model: nn.Module) -> Iterator[LinearSlot]:
    """Yield all linear layers of a network with their parents.

    Left out are the projections that adapters of PEFT add, but not the layers that they adapt, and the output
    projection of `torch.nn.MultiheadAttention`, which is read and never called.

    Args:
        model: the network, wrapped or not.

    Yields:
        The slots, in the order of `named_modules()`.
    """
    bare = unwrap(model)
    added: set[nn.Module] = set()  # what adapters add beside their base layer
    for name, parent in bare.named_modules():
        if parent in added:
            continue
        if "base_layer" in parent._modules:
            added.update(
                part for child, module in parent.named_children() if child != "base_layer" for part in module.modules()
            )
        for child, module in parent._modules.items():
            if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
                continue
            if module not in added:
                yield LinearSlot(layer_key(f"{name}.{child}" if name else child), parent, child, module)
