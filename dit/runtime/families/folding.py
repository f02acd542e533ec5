"""Exact rescalings between neighbouring layers.

If the inputs of some linear layers are scaled channel by channel by 1 / s, and the columns of their weights by s, the
network computes what it did. Where the layers before can produce the scaled inputs by themselves, this costs nothing:
quantizers use it to even out channels (SmoothQuant, arXiv 2211.10438).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Scaled:
    """A layer whose output, or a part of it, is scaled.

    Args:
        name: name within the block.
        part: (index, count) of the equal parts of the output that is meant.
        plus_one: the output y is used as 1 + y, as adaLN does.
    """

    name: str
    part: tuple[int, int] = (0, 1)
    plus_one: bool = False


@dataclass(frozen=True)
class Fold:
    """Layers that make an input, and the linear layers that take it.

    Args:
        producers: all whose output adds to or multiplies the input, so that scaling them scales it.
        consumers: all that take it, by their names in the block.
        blocks: regular expression of the blocks' names.
        unless: a layer whose presence in the block forbids it, because that makes the input too.
    """

    producers: tuple[Scaled, ...]
    consumers: tuple[str, ...]
    blocks: str = ".*"
    unless: str | None = None


@dataclass(frozen=True)
class FoldedGroup:
    """A `Fold` found in a model; names are normalised and of the whole model.

    Args:
        producers: layers whose output is scaled.
        consumers: linear layers whose input it is.
        width: number of channels.
    """

    producers: tuple[Scaled, ...]
    consumers: tuple[str, ...]
    width: int

    @torch.no_grad()
    def apply(self, modules: Mapping[str, nn.Module], scale: Tensor) -> "Rescaling":
        """Divide the producers' outputs by `scale` and multiply the consumers' columns by it.

        Args:
            modules: the model's modules by normalised name.
            scale: positive, (width,).

        Returns:
            What takes it back, to the last bit: it holds copies of the weights.

        Raises:
            ValueError: `scale` has another shape or is not positive, or a layer has an adapter.
        """
        if tuple(scale.shape) != (self.width,) or not (scale > 0).all():
            raise ValueError(f"the scale must be positive and of shape ({self.width},), got {tuple(scale.shape)}")
        for name in (*(entry.name for entry in self.producers), *self.consumers):
            if hasattr(modules[name], "base_layer"):
                raise ValueError(f"{name} has an adapter, which would not be rescaled: merge it or unload it first")
        changes: list[_Change] = []
        for producer in self.producers:
            for name in ("weight", "bias"):
                parameter = getattr(modules[producer.name], name, None)
                if parameter is not None:
                    one = float(producer.plus_one and name == "bias")
                    changes.append(
                        _Change(f"{producer.name}.{name}", parameter, producer.part, partial(_divide, scale, one))
                    )
        for name in self.consumers:
            weight: Any = modules[name].weight  # (out, width)
            changes.append(_Change(f"{name}.weight", weight, (0, 1), partial(_multiply, scale)))
        for change in changes:
            change.make()
        return Rescaling(changes)


class _Change:
    """A part of a parameter that is rescaled.

    Args:
        name: of the parameter, for messages.
        parameter: where it stands.
        part: (index, count) of the equal parts of its rows.
        function: from the old values to the new ones; elementwise, so that equal inputs give equal bits.
    """

    def __init__(
        self, name: str, parameter: Tensor, part: tuple[int, int], function: Callable[[Tensor], Tensor]
    ) -> None:
        self.name, self.parameter, self.part, self.function = name, parameter, part, function
        self.original = self.rows.clone()  # (width, ...)

    @property
    def rows(self) -> Tensor:
        """A view of the part as it is now."""
        index, count = self.part
        return self.parameter.chunk(count, dim=0)[index]

    def make(self) -> None:
        """Rescale."""
        self.rows.copy_(self.function(self.original))

    def stands(self) -> bool:
        """Return whether the part is as `make` left it, moved and converted perhaps."""
        rows = self.rows
        return torch.allclose(rows, self.function(self.original).to(rows), rtol=0, atol=0, equal_nan=True)

    def undo(self) -> None:
        """Put the old values back."""
        self.rows.copy_(self.original)


class Rescaling:
    """What `FoldedGroup.apply` did to a model.

    Rescalings that share a layer are undone in the reverse order, as `Attachment.on_detach` does.
    """

    def __init__(self, changes: list[_Change]) -> None:
        self._changes = changes

    @property
    def nbytes(self) -> int:
        """Bytes of the copies that it holds."""
        return sum(change.original.nbytes for change in self._changes)

    @torch.no_grad()
    def undo(self) -> None:
        """Put the weights back as they were, to the last bit. A second call does nothing.

        Raises:
            ValueError: a weight was changed since; nothing is put back.
        """
        for change in self._changes:
            if not change.stands():
                raise ValueError(
                    f"{change.name} was changed after it was rescaled: undo that first (later rescalings, merged "
                    "adapters), then try again"
                )
        for change in self._changes:
            change.undo()
        self._changes = []


def resolve_folds(folds: Sequence[Fold], blocks: Sequence[str], modules: Mapping[str, nn.Module]) -> list[FoldedGroup]:
    """Find the folds that a model's blocks have.

    A fold is left out of a block that lacks a layer, or where the sizes don't fit (grouped key and value heads).

    Args:
        folds: what to look for.
        blocks: normalised names of the blocks.
        modules: the model's modules by normalised name.
    """
    groups = []
    for block in blocks:
        for fold in folds:
            if re.fullmatch(fold.blocks, block):
                group = _resolve(fold, block, modules)
                groups += [] if group is None else [group]
    return groups


def _resolve(fold: Fold, block: str, modules: Mapping[str, nn.Module]) -> FoldedGroup | None:
    producers = [Scaled(f"{block}.{entry.name}", entry.part, entry.plus_one) for entry in fold.producers]
    consumers = [f"{block}.{name}" for name in fold.consumers]
    if fold.unless and f"{block}.{fold.unless}" in modules:
        return None
    takers = [modules.get(name) for name in consumers]
    widths = {getattr(module, "in_features", 0) for module in takers}
    width = widths.pop()
    if widths or not width:
        return None  # a layer is missing, or they take different inputs
    for entry in producers:
        module = modules.get(entry.name)
        weight = getattr(module, "weight", None)
        if weight is None or weight.shape[0] != width * entry.part[1]:
            return None
        if entry.plus_one and getattr(module, "bias", None) is None:
            return None  # without a bias the 1 of 1 + y can't be scaled
    return FoldedGroup(tuple(producers), tuple(consumers), width)


def _like(scale: Tensor, rows: Tensor) -> Tensor:
    """Return the scale (width,) as it broadcasts over the rows (width, ...)."""
    return scale.to(rows).reshape(-1, *[1] * (rows.ndim - 1))  # (width, 1, ...)


def _divide(scale: Tensor, one: float, rows: Tensor) -> Tensor:
    """Return rows (width, ...) that give an output over the scale (width,)."""
    return (rows + one) / _like(scale, rows) - one


def _multiply(scale: Tensor, weight: Tensor) -> Tensor:
    """Return a weight (out, width) that takes an input over the scale (width,)."""
    return weight * scale.to(weight)
