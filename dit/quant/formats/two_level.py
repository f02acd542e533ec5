"""Two-level 4-bit integers, which unpack to int8 exactly: int4."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dit.quant.formats.base import EPS, Format, Scales, Shapes, group_count, group_size, value_range
from dit.quant.formats.packing import int4_to_int8, pack_split_halves

CODES = 15
LIMIT = 127
ROW_FACTORS = (0.97, 1.0, 1.04, 1.1)
"""Row scales that are tried, in units of the smallest one that holds the row's largest weight in 8 bits."""
MULTIPLIERS = 4
"""Multipliers that are tried a group, from the one that holds the whole range downwards."""
CHUNK = 1 << 17
"""Weights that are searched at a time: they and what is computed of them stay in the processor's cache."""


class Int4(Format):
    """weight = weight_scale[n] * multiplier[n, j] * (code - zero[n, j]), code 0 to 15 (QServe, arXiv 2405.04532).

    The multiplier is a whole number and |multiplier * (code - zero)| <= 127 for every code in use, so that unpacking
    gives an int8 matrix with one scale a row, and a single int8 product computes the layer. Stored are weight uint8
    (N, G * g / 2), in each group the codes of its first half in low nibbles and those of its second half in high ones,
    weight_scale fp32 (N,), weight_multiplier uint8 (N, G) and weight_zero uint8 (N, G).

    weight_scale has 16 significant bits: its products with numbers of 7 bits are then exact in fp32, in any order.
    """

    name, bits, group, uniform, searches = "int4", 4, 64, True, True

    def scales(self, grouped: Tensor, clip: float | Tensor | None = None, importance: Tensor | None = None) -> Scales:
        """See `Format`; without `clip` row scales, multipliers and zeros are those of the least squared error."""
        low, high = value_range(grouped, clip)
        if clip is not None:
            row, multiplier, zero = _fit(low, high)
        else:
            rows = max(1, CHUNK // grouped[0].numel())
            weights = None if importance is None else importance.expand(grouped.shape)
            chunks = [slice(start, start + rows) for start in range(0, len(grouped), rows)]
            parts = [
                _search(grouped[one], low[one], high[one], None if weights is None else weights[one]) for one in chunks
            ]
            row, multiplier, zero = (torch.cat(one) for one in zip(*parts, strict=True))
        stored = {
            "weight_scale": row.flatten(),
            "weight_multiplier": multiplier.squeeze(-1).to(torch.uint8),
            "weight_zero": zero.squeeze(-1).to(torch.uint8),
        }
        return Scales(row * multiplier, zero, stored)

    def snap(self, grouped: Tensor, scales: Scales) -> Tensor:
        """See `Format`."""
        return (grouped / scales.step).round_().clamp_(*_ends(scales)).mul_(scales.step)

    def neighbours(self, grouped: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
        """See `Format`."""
        lowest, highest = _ends(scales)
        below = (grouped / scales.step).floor_()
        above = (below + 1).clamp_(lowest, highest)
        return below.clamp_(lowest, highest) * scales.step, above * scales.step

    def pack(self, grouped: Tensor, scales: Scales, columns: int) -> dict[str, Tensor]:
        """See `Format`."""
        lowest, highest = _ends(scales)
        codes = (grouped / scales.step).round_().clamp_(lowest, highest).add_(_zero_of(scales))
        return {"weight": pack_split_halves(codes.to(torch.uint8)), **scales.stored}

    def stored_shapes(self, rows: int, columns: int, group: int | None = None) -> Shapes:
        """See `Format`."""
        group = self.resolve_group(group)
        count = group_count(columns, group)
        return {
            "weight": ((rows, count * group_size(columns, group) // 2), torch.uint8),
            "weight_scale": ((rows,), torch.float32),
            "weight_multiplier": ((rows, count), torch.uint8),
            "weight_zero": ((rows, count), torch.uint8),
        }

    def check(self, tensors: Mapping[str, Tensor], columns: int, group: int | None = None) -> None:
        """See `Format`; a multiplier of 0 and a zero above 15 are refused too."""
        super().check(tensors, columns, group)
        if bool((tensors["weight_multiplier"] == 0).any()) or bool((tensors["weight_zero"] > CODES).any()):
            raise ValueError(
                "weight_multiplier has zeros or weight_zero values above 15: int4 files have 1 to 127, 0 to 15"
            )

    def _unpack(self, tensors: Mapping[str, Tensor], columns: int, group: int) -> Tensor:
        weight, multiplier, zero = (tensors[name] for name in ("weight", "weight_multiplier", "weight_zero"))
        return int4_to_int8(weight, multiplier, zero, group, columns).float() * tensors["weight_scale"][:, None]


def _ends(scales: Scales) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest code - zero that fit in 4 bits and, times the multiplier, in 8."""
    return _code_ends(scales.stored["weight_multiplier"].float()[..., None], _zero_of(scales))


def _zero_of(scales: Scales) -> Tensor:
    if scales.zero is None:
        raise ValueError("scales.zero is None: these scales are of a symmetric format, not of int4")
    return scales.zero


def _code_ends(multiplier: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    limit = (LIMIT / multiplier).floor_()
    return torch.maximum(-zero, -limit), torch.minimum(CODES - zero, limit)


def _short(scale: Tensor) -> Tensor:
    """Round positive fp32 numbers to 16 significant bits."""
    return ((scale.contiguous().view(torch.int32) + 0x80) & ~0xFF).view(torch.float32)


def _smallest_row_scale(low: Tensor, high: Tensor) -> Tensor:
    """Return the row scale at which the row's largest weight is 127, (N, 1, 1)."""
    return (torch.maximum(high, -low).amax(1, keepdim=True) / LIMIT).clamp(min=EPS)


def _zero(low: Tensor, step: Tensor, full_step: Tensor) -> Tensor:
    """Return the code of 0, so that a range that is too wide is cut at both ends alike."""
    return (-low / torch.maximum(step, full_step)).round_().clamp_(0, CODES)


def _full_step(low: Tensor, high: Tensor) -> Tensor:
    return (high / CODES - low / CODES).clamp(min=EPS)


def _fit(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose row scale, multiplier and zero so that each group's range is held as it is.

    Returns:
        Row scale (N, 1, 1), multiplier and zero (N, G, 1), fp32.
    """
    full = _full_step(low, high)
    smallest = _smallest_row_scale(low, high)
    best = torch.full_like(smallest, torch.inf)
    row = _short(smallest)
    for factor in ROW_FACTORS:
        candidate = _short(smallest * factor)
        multiplier = (full / candidate).round_().clamp_(1, LIMIT)
        mismatch = (multiplier * candidate / smallest - full / smallest).square_().sum(1, keepdim=True)
        better = mismatch < best
        best, row = torch.where(better, mismatch, best), torch.where(better, candidate, row)
    multiplier = (full / row).round_().clamp_(1, LIMIT)
    return row, multiplier, _zero(low, row * multiplier, full)


def _search(grouped: Tensor, low: Tensor, high: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Choose row scale, multiplier and zero by the least squared error.

    Args:
        grouped: (N, G, g).
        low: (N, G, 1), the smallest weight of each group or 0.
        high: (N, G, 1), the largest.
        importance: (N, G, g), weights of the squared errors.

    Returns:
        Row scale (N, 1, 1), multiplier and zero (N, G, 1), fp32.
    """
    full = _full_step(low, high)
    smallest = _smallest_row_scale(low, high)
    unit = grouped / smallest  # errors in these units neither overflow nor vanish
    best_of_row = torch.full_like(smallest, torch.inf)
    row, multiplier, zero = smallest, torch.ones_like(low), torch.zeros_like(low)
    for factor in ROW_FACTORS:
        scale = _short(smallest * factor)
        error, found, found_zero = _best_multiplier(unit, low, full, scale, smallest, importance)
        total = error.sum(1, keepdim=True)
        better = total < best_of_row
        best_of_row, row = torch.where(better, total, best_of_row), torch.where(better, scale, row)
        multiplier = torch.where(better, found, multiplier)
        zero = torch.where(better, found_zero, zero)
    least = _error(unit, row / smallest, multiplier, zero, importance)
    for shift in (-1, 1):
        moved = (zero + shift).clamp_(0, CODES)
        error = _error(unit, row / smallest, multiplier, moved, importance)
        better = error < least
        least, zero = torch.where(better, error, least), torch.where(better, moved, zero)
    return row, multiplier, zero


def _best_multiplier(
    unit: Tensor, low: Tensor, full: Tensor, scale: Tensor, smallest: Tensor, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the least error of each group at a row scale, with the multiplier and zero that have it, (N, G, 1)."""
    widest = (full / scale).ceil_().clamp_(1, LIMIT)
    least = torch.full_like(low, torch.inf)
    multiplier, zero = widest, torch.zeros_like(low)
    for less in range(MULTIPLIERS):
        candidate = (widest - less).clamp_(min=1)
        at = _zero(low, candidate * scale, full)
        error = _error(unit, scale / smallest, candidate, at, importance)
        better = error < least
        least = torch.where(better, error, least)
        multiplier, zero = torch.where(better, candidate, multiplier), torch.where(better, at, zero)
    return least, multiplier, zero


def _error(unit: Tensor, scale: Tensor, multiplier: Tensor, zero: Tensor, importance: Tensor | None) -> Tensor:
    """Return the squared error of each group, (N, G, g) -> (N, G, 1)."""
    step = scale * multiplier
    wrong = (unit / step).round_().clamp_(*_code_ends(multiplier, zero)).mul_(step).sub_(unit).square_()
    if importance is not None:
        wrong.mul_(importance)
    return wrong.sum(-1, keepdim=True)
