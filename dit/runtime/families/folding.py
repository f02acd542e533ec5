"""Exact rescalings between neighbouring layers.

If the inputs of some linear layers are scaled channel by channel by 1 / s, and the columns of their weights by s, the
network computes what it did. Where the layers before can produce the scaled inputs by themselves, this costs nothing:
quantizers use it to even out channels (SmoothQuant, arXiv 2211.10438).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    def apply(self, modules: Mapping[str, nn.Module], scale: Tensor) -> None:
        """Divide the producers' outputs by `scale` and multiply the consumers' columns by it.

        Args:
            modules: the model's modules by normalised name.
            scale: positive, (width,).

        Raises:
            ValueError: `scale` has another shape or is not positive, or a layer has an adapter.
        """
        if tuple(scale.shape) != (self.width,) or not (scale > 0).all():
            raise ValueError(f"the scale must be positive and of shape ({self.width},), got {tuple(scale.shape)}")
        for name in (*(entry.name for entry in self.producers), *self.consumers):
            if hasattr(modules[name], "base_layer"):
                raise ValueError(f"{name} has an adapter, which would not be rescaled: merge it or unload it first")
        for producer in self.producers:
            module, (index, count) = modules[producer.name], producer.part
            for name in ("weight", "bias"):
                parameter = getattr(module, name, None)
                if parameter is not None:
                    rows = parameter.chunk(count, dim=0)[index]  # (width, ...)
                    one = float(producer.plus_one and name == "bias")
                    rows.copy_((rows + one) / _like(scale, rows) - one)
        for consumer in self.consumers:
            weight: Any = modules[consumer].weight  # (out, width)
            weight.mul_(scale.to(weight))


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
    """The scale (width,) as it broadcasts over the rows (width, ...)."""
    return scale.to(rows).reshape(-1, *[1] * (rows.ndim - 1))  # (width, 1, ...)
