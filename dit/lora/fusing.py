"""One LoRA of a fused layer to one each of its parts, and back; the weight's difference stays the same.

A fused layer's rows are those of its parts, one part after the other. Its LoRA therefore gives each part the same
first factor and a share of the rows of the second. Backwards, parts with one first factor keep it; others are put
side by side, so that the rank is the sum of theirs and the second factor has a block for each on its diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import reduce

import torch
from torch import Tensor

from dit.lora.files import LoraFileError
from dit.lora.layers import LoraLayer
from dit.runtime.families.layer_names.rule import LayerNames

MLP_RATIO = 4
"""Rows of the feed-forward's part per input, in every published network with a part of that kind."""


def swap_halves(layer: LoraLayer) -> LoraLayer:
    """Return the LoRA of the same layer with the halves of its rows exchanged.

    Raises:
        LoraFileError: the rows are odd.
    """
    if layer.up.shape[0] % 2:
        raise LoraFileError(
            f"{_key(layer)} has {layer.up.shape[0]} rows, expected an even number: a shift and a scale."
        )

    def swapped(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.cat(tensor.chunk(2)[::-1])

    up = swapped(layer.up)
    assert up is not None
    return replace(layer, up=up, bias=swapped(layer.bias), magnitude=swapped(layer.magnitude))


# ---------------------------------------------------------------------- splitting


def split(layer: LoraLayer, rule: LayerNames) -> list[LoraLayer | None]:
    """Split the LoRA of a fused layer.

    Args:
        layer: of the original layer.
        rule: its parts.

    Returns:
        One LoRA a part; None for a part that the LoRA leaves as it is.

    Raises:
        LoraFileError: the rows can't be those of these parts.
    """
    if len(rule.parts) == 1:
        return [swap_halves(layer) if rule.swapped else layer]
    sizes = _sizes_of_whole(layer, rule)
    ups = layer.up.split(sizes)
    biases = [None] * len(sizes) if layer.bias is None else layer.bias.split(sizes)
    magnitudes = [None] * len(sizes) if layer.magnitude is None else layer.magnitude.split(sizes)
    columns = _columns(ups) if layer.bias is None and layer.magnitude is None else _equal_blocks(ups)
    if columns is None:
        return [
            replace(layer, up=up, bias=bias, magnitude=magnitude)
            for up, bias, magnitude in zip(ups, biases, magnitudes, strict=True)
        ]
    parts: list[LoraLayer | None] = []
    for up, bias, magnitude, (start, stop) in zip(ups, biases, magnitudes, columns, strict=True):
        alpha = float(Fraction(layer.alpha) * (stop - start) / layer.rank)
        part = replace(
            layer, down=layer.down[start:stop], up=up[:, start:stop], alpha=alpha, bias=bias, magnitude=magnitude
        )
        parts.append(part if stop > start else None)
    return parts


def _sizes_of_whole(layer: LoraLayer, rule: LayerNames) -> list[int]:
    """Return the rows of each part of a fused layer."""
    rows, inputs, count = layer.up.shape[0], layer.down.shape[1], len(rule.parts)
    if rule.sizes == "mlp":
        sizes = [inputs] * (count - 1) + [rows - (count - 1) * inputs]
    elif rule.sizes == "square":
        sizes = [inputs] * count
    elif rule.sizes == "grouped":
        sizes = [inputs] + [(rows - inputs) // (count - 1)] * (count - 1)
    else:
        sizes = [rows // count] * count
    if sum(sizes) != rows or min(sizes) < 1:
        raise LoraFileError(
            f"{_key(layer)} has {rows} rows for {inputs} inputs, which can't be the rows of {', '.join(rule.parts)}. "
            "Is it of another model?"
        )
    return sizes


def _equal_blocks(ups: Sequence[Tensor]) -> list[tuple[int, int]] | None:
    """Return the columns of each part if they are equal blocks and all else is zero; None if not."""
    rank, count = ups[0].shape[1], len(ups)
    if rank % count:
        return None
    step = rank // count
    blocks = [(index * step, (index + 1) * step) for index in range(count)]
    if not any(bool(up.any()) for up in ups):
        return None
    columns = zip(ups, blocks, strict=True)
    outside = (bool(up[:, :start].any()) or bool(up[:, stop:].any()) for up, (start, stop) in columns)
    return None if any(outside) else blocks


def _columns(ups: Sequence[Tensor]) -> list[tuple[int, int]] | None:
    """Return the columns that each part has to itself, in the order of the parts; None if parts share columns."""
    equal = _equal_blocks(ups)
    if equal is not None:
        return equal
    used = torch.stack([(up != 0).flatten(2).any(-1).any(0) if up.ndim > 2 else (up != 0).any(0) for up in ups])
    if bool((used.sum(0) > 1).any()) or not bool(used.any()):
        return None
    edges, position = [], 0
    for index, columns in enumerate(used):
        own = columns.nonzero().flatten().tolist()
        if own and own[0] < position:
            return None
        stop = own[-1] + 1 if own else position
        edges.append((position, stop))
        position = stop
        if own and not bool(used[index + 1 :].any()):
            edges[-1] = (edges[-1][0], used.shape[1])  # columns of zeros at the end
            position = used.shape[1]
    return edges


# ------------------------------------------------------------------------- fusing


def fuse(parts: Sequence[LoraLayer | None], rule: LayerNames, name: str) -> LoraLayer:
    """Fuse the LoRAs of the parts of an original layer.

    The difference of the weight is exactly theirs, with one rounding where their scales differ by no power of two.

    Args:
        parts: in the order of the rule; None for a part without one.
        rule: the parts.
        name: of the original layer, for messages.

    Raises:
        LoraFileError: the parts can't be one layer.
    """
    there = [part for part in parts if part is not None]
    if len(rule.parts) == 1:
        return swap_halves(there[0]) if rule.swapped else there[0]
    _check_together(there, parts, name)
    sizes = _sizes_of_parts(parts, rule, name)
    first = there[0]
    if all(_same_factor(part, first) for part in there):
        down, alpha, rank = first.down, first.alpha, first.rank
        ups = [_rows(size, rank, first) if part is None else part.up for part, size in zip(parts, sizes, strict=True)]
        up = torch.cat([value.to(_dtype(ups)) for value in ups])
    else:
        rank = sum(part.rank for part in there)
        alpha = float(Fraction(first.alpha) * rank / first.rank)
        down = torch.cat([part.down.to(_dtype([one.down for one in there])) for part in there])
        up = _block_diagonal(parts, sizes, first, rank)
    return LoraLayer(
        down,
        up,
        alpha,
        _vector([None if part is None else part.bias for part in parts], sizes),
        _vector([None if part is None else part.magnitude for part in parts], sizes),
        first.keys,
    )


def _check_together(there: Sequence[LoraLayer], parts: Sequence[LoraLayer | None], name: str) -> None:
    """Refuse parts of different inputs, and DoRA on some parts only."""
    inputs = {tuple(part.down.shape[1:]) for part in there}
    if len(inputs) > 1:
        raise LoraFileError(f"the parts of {name} have the inputs {sorted(inputs)}, expected the same for all.")
    lengths = [part is not None and part.magnitude is not None for part in parts]
    if any(lengths) and not all(lengths):
        raise LoraFileError(
            f"{name} is one layer there, and only {sum(lengths)} of its {len(parts)} parts have a magnitude (DoRA): "
            "that of the rest is the length of the model's own rows, which the file doesn't hold. Convert to a dialect "
            "with diffusers' layers (diffusers, peft, onetrainer) instead."
        )


def _same_factor(part: LoraLayer, first: LoraLayer) -> bool:
    return (
        part.alpha == first.alpha
        and part.down.dtype == first.down.dtype
        and part.down.shape == first.down.shape
        and torch.equal(part.down, first.down)
    )


def _sizes_of_parts(parts: Sequence[LoraLayer | None], rule: LayerNames, name: str) -> list[int]:
    """Return the rows of each part, also of those without a LoRA.

    Raises:
        LoraFileError: the parts that are there don't tell.
    """
    found = [None if part is None else part.up.shape[0] for part in parts]
    inputs = next(part.down.shape[1] for part in parts if part is not None)
    if rule.sizes == "mlp":
        usual: Sequence[int | None] = [inputs] * (len(parts) - 1) + [MLP_RATIO * inputs]
    elif rule.sizes == "grouped":
        shared = next((size for size in found[1:] if size is not None), None)
        usual = [inputs] + [shared] * (len(parts) - 1)
    elif rule.sizes == "square":
        usual = [inputs] * len(parts)
    else:
        usual = [next(size for size in found if size is not None)] * len(parts)
    sizes = [other if size is None else size for size, other in zip(found, usual, strict=True)]
    if any(size is None for size in sizes):
        raise LoraFileError(
            f"{name} is one layer of {', '.join(rule.parts)} there, and how many rows the last of them have can't be "
            "told from the first. Convert to a dialect with diffusers' layers (diffusers, peft, onetrainer) instead."
        )
    if rule.sizes in ("equal", "square") and len(set(sizes)) > 1:
        raise LoraFileError(
            f"the parts of {name} have {sizes} rows, expected the same for all. Is it of another model?"
        )
    return [size for size in sizes if size is not None]


def _block_diagonal(parts: Sequence[LoraLayer | None], sizes: Sequence[int], first: LoraLayer, rank: int) -> Tensor:
    """Return the second factor of all parts, each part's on its own rows and columns, at the scale of the first."""
    there = [part for part in parts if part is not None]
    up = _rows(sum(sizes), rank, first).to(_dtype([part.up for part in there]))
    row = column = 0
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            up[row : row + size, column : column + part.rank] = _at_scale_of(part, first).to(up.dtype)
            column += part.rank
        row += size
    return up


def _at_scale_of(part: LoraLayer, first: LoraLayer) -> Tensor:
    """Return a second factor for the scale of another layer."""
    mine, wanted = Fraction(part.alpha) / part.rank, Fraction(first.alpha) / first.rank
    if mine == wanted:
        return part.up
    if not wanted:
        raise LoraFileError(f"{_key(first)} has an alpha of 0 and a neighbour in the same layer hasn't; remove it.")
    return (part.up.double() * float(mine / wanted)).to(part.up.dtype)


def _vector(values: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """Join vectors, zeros for those that are missing; None if all are."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    dtype = _dtype(there)
    return torch.cat(
        [
            there[0].new_zeros(size, dtype=dtype) if value is None else value.to(dtype)
            for value, size in zip(values, sizes, strict=True)
        ]
    )


def _rows(size: int, rank: int, like: LoraLayer) -> Tensor:
    return like.up.new_zeros(size, rank, *like.up.shape[2:])


def _dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _key(layer: LoraLayer) -> str:
    return layer.keys.get("up", "a second factor")
