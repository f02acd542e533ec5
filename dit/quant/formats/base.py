"""What a weight format is: groups along the inputs, scales, the grid of representable values, and stored tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12
"""The smallest step: rows and groups of zeros have it, so that nothing is ever divided by 0."""

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of stored tensors by name."""


@dataclass(frozen=True, eq=False)
class Scales:
    """How far apart the representable values of each group of weights are.

    Attributes:
        step: (N, G, 1) fp32, the effective step, after the stored scales were rounded to how they are stored.
        zero: (N, G, 1) fp32, the code that stands for 0; None for symmetric formats.
        stored: the tensors that are saved beside "weight". Those of shape (N, G) hold one value a group, those of
            shape (N,) one a row, scalars one a layer.
    """

    step: Tensor
    zero: Tensor | None
    stored: dict[str, Tensor]

    def of_group(self, index: int) -> Scales:
        """Return the scales of one group of every row, as scales of a weight with that group alone."""
        part = slice(index, index + 1)
        stored = {name: one[:, part] if one.ndim == 2 else one for name, one in self.stored.items()}
        return Scales(self.step[:, part], None if self.zero is None else self.zero[:, part], stored)

    def where(self, rows: Tensor, other: Scales) -> Scales:
        """Take these scales in some rows and those of `other` in the rest.

        Args:
            rows: (N,) bool, true where these scales are taken.
            other: scales of the same weight in the same format.
        """

        def choose(mine: Tensor, theirs: Tensor) -> Tensor:
            if mine.ndim == 0:
                return mine
            return torch.where(rows.view(-1, *[1] * (mine.ndim - 1)), mine, theirs)

        zero = None if self.zero is None or other.zero is None else choose(self.zero, other.zero)
        stored = {name: choose(one, other.stored[name]) for name, one in self.stored.items()}
        return Scales(choose(self.step, other.step), zero, stored)


class Format(ABC):
    """How the weight (N, K) of a linear layer is stored: a grid of values for each group of inputs.

    Weights come in groups, (N, G, g) as `grouped` makes them: g neighbouring inputs share a scale. Rows are independent
    of each other, except for scales of the whole layer, which depend on the largest weight and on nothing else.

    Attributes:
        name: as in `weight_format`.
        bits: of a code, without scales.
        group: inputs that share a scale unless the caller says otherwise; 0 is the whole row.
        fixed_group: whether no other group can be stored.
        uniform: whether neighbouring values are equally far apart within a group.
        searches: whether `scales` without `clip` already looks for the least squared error; the others take the scale
            that holds the largest weight.
        clips: factors of the range worth trying when looking for the least squared error.
    """

    name: str
    bits: int
    group: int = 0
    fixed_group: bool = False
    uniform: bool = False
    searches: bool = False
    clips: tuple[float, ...] = tuple(1 - 0.025 * n for n in range(1, 19))

    def resolve_group(self, group: int | None) -> int:
        """Return the group that is stored when a scheme asks for `group`: None is the format's own, 0 the whole row.

        Raises:
            ValueError: this format can't store that group.
        """
        if group is None:
            return self.group
        if isinstance(group, bool) or not isinstance(group, int) or group < 0 or group % 2:
            raise ValueError(f"group is {group!r}; use an even number, 0 for the whole row, or None")
        if self.fixed_group and group != self.group:
            own = f"groups of {self.group}" if self.group else "one scale a row (group 0)"
            raise ValueError(f"group is {group}, but {self.name} always has {own}; leave group out")
        return group

    @abstractmethod
    def scales(self, grouped: Tensor, clip: float | Tensor | None = None, importance: Tensor | None = None) -> Scales:
        """Choose the scales of a weight.

        Args:
            grouped: (N, G, g) fp32.
            clip: factor of the range that is held, a number or (N, G, 1); formats with a scale a row have G = 1. None
                is the whole range, or the best one where the format `searches`.
            importance: weight of each input's squared error, to broadcast to (N, G, g); for formats that search, and
                only without `clip`.

        Raises:
            ValueError: weights or `clip` that are not finite, or a `clip` that is not positive.
        """

    @abstractmethod
    def snap(self, grouped: Tensor, scales: Scales) -> Tensor:
        """Return the nearest representable values, dequantized, (N, G, g)."""

    @abstractmethod
    def neighbours(self, grouped: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
        """Return the largest representable values <= the weights, and the smallest ones above them, (N, G, g) each.

        Beyond the range both are its end.
        """

    @abstractmethod
    def pack(self, grouped: Tensor, scales: Scales, columns: int) -> dict[str, Tensor]:
        """Make the tensors to save, "weight" and those of the scales; exact for values on the grid.

        Args:
            grouped: (N, G, g) fp32, values as `snap` returns them.
            scales: of these values.
            columns: K, the inputs of the layer without the padding of the last group.
        """

    @abstractmethod
    def stored_shapes(self, rows: int, columns: int, group: int | None = None) -> Shapes:
        """Return shape and dtype of all tensors that `pack` makes of a weight (rows, columns)."""

    def unpack(self, tensors: Mapping[str, Tensor], columns: int, group: int | None = None) -> Tensor:
        """Return the weight (N, columns) in fp32 that saved tensors stand for.

        Raises:
            ValueError: a tensor is missing, or has another shape or dtype than this format's at this group.
        """
        self.check_shapes(tensors, columns, group)
        return self._unpack(tensors, columns, group_size(columns, self.resolve_group(group)))

    @abstractmethod
    def _unpack(self, tensors: Mapping[str, Tensor], columns: int, group: int) -> Tensor:
        """Unpack tensors of the right shapes; `group` is resolved."""

    def check_shapes(self, tensors: Mapping[str, Tensor], columns: int, group: int | None = None) -> None:
        """Refuse tensors that this format does not store for a layer with that many inputs.

        Raises:
            ValueError: a tensor is missing, or has another shape or dtype.
        """
        if "weight" not in tensors:
            raise ValueError(f"{self.name} weights lack the tensor 'weight'; stored are {', '.join(tensors) or 'none'}")
        rows = tensors["weight"].shape[0]
        for name, (shape, dtype) in self.stored_shapes(rows, columns, group).items():
            if name not in tensors:
                raise ValueError(f"{self.name} weights lack the tensor {name!r}; stored are {', '.join(tensors)}")
            found = tensors[name]
            if tuple(found.shape) != shape or found.dtype != dtype:
                raise ValueError(
                    f"{name} is {found.dtype} {tuple(found.shape)}; {self.name} with {columns} inputs and group "
                    f"{self.resolve_group(group)} has {dtype} {shape}: does the file say another group or format?"
                )

    def check(self, tensors: Mapping[str, Tensor], columns: int, group: int | None = None) -> None:
        """Refuse tensors of wrong shapes and scales that can't be scales, as damaged files have.

        Raises:
            ValueError: see `check_shapes`; or a scale that is NaN, infinite or negative.
        """
        self.check_shapes(tensors, columns, group)
        for name, tensor in tensors.items():
            if name.startswith("weight_scale") and tensor.dtype != torch.uint8:
                values = tensor.float()
                wrong = int((~torch.isfinite(values) | (values < 0)).sum())
                if wrong:
                    raise ValueError(
                        f"{name} has {wrong} of {values.numel()} values that are NaN, infinite or negative"
                    )


def group_size(columns: int, group: int) -> int:
    """Return how many inputs share a scale: `group`, or for 0 the row, rounded up to an even number."""
    return group or columns + columns % 2


def group_count(columns: int, group: int) -> int:
    """Return how many groups a row of `columns` inputs has; 0 is one group."""
    return -(-columns // group_size(columns, group))


def grouped(weight: Tensor, group: int) -> Tensor:
    """Cut the rows of a weight into groups of neighbouring inputs.

    Args:
        weight: (N, K), floating point.
        group: inputs of a group; 0 is the whole row, rounded up to an even number.

    Returns:
        (N, G, g) fp32, the last group padded with zeros.

    Raises:
        ValueError: not a matrix of floating-point numbers, empty, or not finite.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}; use a floating-point matrix (N, K)")
    weight = weight.detach().float()
    require_finite("weight", weight)
    rows, columns = weight.shape
    size, count = group_size(columns, group), group_count(columns, group)
    padding = size * count - columns
    if padding:
        weight = F.pad(weight, (0, padding))
    return weight.reshape(rows, count, size)


def ungrouped(grouped: Tensor, columns: int) -> Tensor:
    """Undo `grouped`: (N, G, g) to (N, columns)."""
    return grouped.flatten(1)[:, :columns]


def value_range(grouped: Tensor, clip: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest weight of each group, (N, G, 1) each, 0 included, times `clip`.

    Raises:
        ValueError: weights or `clip` that are not finite, or a `clip` that is not positive.
    """
    low, high = torch.aminmax(grouped, dim=-1, keepdim=True)
    require_finite("weight", low - high)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if clip is None:
        return low, high
    factor = torch.as_tensor(clip, dtype=torch.float32, device=grouped.device)
    if not bool(((factor > 0) & torch.isfinite(factor)).all()):
        raise ValueError("clip has values that are not positive or not finite; use factors of the range such as 0.9")
    return low * factor, high * factor


def largest(grouped: Tensor, clip: float | Tensor | None = None) -> Tensor:
    """Return the largest absolute weight of each group, (N, G, 1), times `clip`; errors as in `value_range`."""
    low, high = value_range(grouped, clip)
    return torch.maximum(high, -low)


def require_finite(name: str, values: Tensor) -> None:
    """Raise for numbers that can't be quantized.

    Raises:
        ValueError: NaN or infinite values; the message says how many, of which kind, and the first row.
    """
    wrong = ~torch.isfinite(values)
    if not bool(wrong.any()):
        return
    kind = "NaN" if bool(torch.isnan(values).any()) else "infinite"
    where = wrong.nonzero()[0].tolist()
    raise ValueError(
        f"{name} has {int(wrong.sum())} values that are not finite, the first in row {where[0]} (some are {kind}); "
        "such a layer can't be quantized: repair the checkpoint or leave the layer out"
    )
