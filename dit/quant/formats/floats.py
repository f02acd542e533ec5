"""Floating-point formats and tables: fp8, 4-bit floats with a scale a group, normal quantiles."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from dit.quant.formats.base import EPS, Format, Scales, Shapes, group_count, group_size, largest, ungrouped
from dit.quant.formats.levels import by_code, nearest_code, neighbouring_levels
from dit.quant.formats.packing import pack_nibbles, unpack_nibbles

FP8_MAX = 448.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E1M2 = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
E3M0 = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of the normal distribution, scaled to -1 to 1 (QLoRA, arXiv 2305.14314, appendix E)."""


class Fp8(Format):
    """weight = weight_scale[n] * float8_e4m3fn: weight (N, K) and weight_scale fp32 (N,), BFL's layout "fp8r"."""

    name, bits, fixed_group = "fp8", 8, True

    def scales(self, grouped: Tensor, clip: float | Tensor | None = None, importance: Tensor | None = None) -> Scales:
        """See `Format`; the scale maps the row's largest weight to 448."""
        step = (largest(grouped, clip) / FP8_MAX).clamp(min=EPS)  # (N, 1, 1)
        return Scales(step, None, {"weight_scale": step.flatten()})

    def snap(self, grouped: Tensor, scales: Scales) -> Tensor:
        """See `Format`."""
        return self._codes(grouped, scales).float().mul_(scales.step)

    def neighbours(self, grouped: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
        """See `Format`."""
        codes = torch.arange(256, dtype=torch.uint8, device=grouped.device).view(torch.float8_e4m3fn).float()
        levels = codes[torch.isfinite(codes)].unique()  # 253: without NaN, with one of the two zeros
        below, above = neighbouring_levels(grouped / scales.step, levels)
        return below * scales.step, above * scales.step

    def pack(self, grouped: Tensor, scales: Scales, columns: int) -> dict[str, Tensor]:
        """See `Format`."""
        codes = self._codes(grouped, scales).view(torch.uint8)  # bytes: not every operation knows float8
        return {"weight": ungrouped(codes, columns).contiguous().view(torch.float8_e4m3fn), **scales.stored}

    def stored_shapes(self, rows: int, columns: int, group: int | None = None) -> Shapes:
        """See `Format`."""
        self.resolve_group(group)
        return {"weight": ((rows, columns), torch.float8_e4m3fn), "weight_scale": ((rows,), torch.float32)}

    def _unpack(self, tensors: Mapping[str, Tensor], columns: int, group: int) -> Tensor:
        return tensors["weight"].float() * tensors["weight_scale"][:, None]

    @staticmethod
    def _codes(grouped: Tensor, scales: Scales) -> Tensor:
        return (grouped / scales.step).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


class SignMagnitude(Format):
    """weight = step[n, j] * level[code], code = sign << 3 | index: grids of eight magnitudes.

    Rounding is to nearest, and halfway to the even index, as floating-point rounding does. A negative weight that
    rounds to 0 keeps its sign in the code.
    """

    bits = 4
    clips = (1.5, 1.25, *Format.clips)
    levels: ClassVar[tuple[float, ...]]

    def snap(self, grouped: Tensor, scales: Scales) -> Tensor:
        """See `Format`."""
        values = grouped / scales.step
        magnitudes = by_code(nearest_code(values.abs(), self.levels, half_even=True), self.levels)
        return magnitudes.copysign_(values).mul_(scales.step)

    def neighbours(self, grouped: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
        """See `Format`."""
        signed = [*(-one for one in self.levels[:0:-1]), *self.levels]
        levels = torch.tensor(signed, dtype=torch.float32, device=grouped.device)
        below, above = neighbouring_levels(grouped / scales.step, levels)
        return below * scales.step, above * scales.step

    def codes(self, grouped: Tensor, scales: Scales) -> Tensor:
        """Return the 4-bit code of each weight, uint8 (N, G * g)."""
        values = (grouped / scales.step).flatten(1)
        return nearest_code(values.abs(), self.levels, half_even=True) | (torch.signbit(values).to(torch.uint8) << 3)

    def pack(self, grouped: Tensor, scales: Scales, columns: int) -> dict[str, Tensor]:
        """See `Format`."""
        return {"weight": pack_nibbles(self.codes(grouped, scales)), **scales.stored}

    def dequantize(self, packed: Tensor, step: Tensor, columns: int, group: int) -> Tensor:
        """Return the weight (N, columns) of nibbles (N, G * g / 2) and steps (N, G, 1)."""
        signed = (*self.levels, *(-one for one in self.levels))
        values = by_code(unpack_nibbles(packed), signed).unflatten(1, (-1, group))  # (N, G, g)
        return ungrouped(values.mul_(step), columns)


class Float4(SignMagnitude):
    """4-bit floats with a scale a group (FP4DiT, arXiv 2503.15465).

    weight uint8 (N, G * g / 2), even inputs in low nibbles, and weight_scale bf16 (N, G).
    """

    group = 128

    def __init__(self, name: str, levels: tuple[float, ...]) -> None:
        self.name, self.levels = name, levels  # pyright: ignore[reportAttributeAccessIssue]
        self.uniform = len({high - low for low, high in pairwise(levels)}) == 1

    def scales(self, grouped: Tensor, clip: float | Tensor | None = None, importance: Tensor | None = None) -> Scales:
        """See `Format`; the scale maps the group's largest weight to the largest level."""
        return _bfloat16_scales(largest(grouped, clip) / self.levels[-1])

    def stored_shapes(self, rows: int, columns: int, group: int | None = None) -> Shapes:
        """See `Format`."""
        return _nibble_shapes(rows, columns, self.resolve_group(group))

    def _unpack(self, tensors: Mapping[str, Tensor], columns: int, group: int) -> Tensor:
        return self.dequantize(tensors["weight"], tensors["weight_scale"].float()[..., None], columns, group)


class NormalFloat4(Format):
    """weight = weight_scale[n, j] * quantile[code]: 16 quantiles of the normal distribution (NF4, arXiv 2305.14314).

    weight uint8 (N, G * g / 2), even inputs in low nibbles, and weight_scale bf16 (N, G).
    """

    name, bits, group = "nf4", 4, 64

    def scales(self, grouped: Tensor, clip: float | Tensor | None = None, importance: Tensor | None = None) -> Scales:
        """See `Format`; the scale is the group's largest weight."""
        return _bfloat16_scales(largest(grouped, clip))

    def snap(self, grouped: Tensor, scales: Scales) -> Tensor:
        """See `Format`."""
        return by_code(nearest_code(grouped / scales.step, NF4), NF4).mul_(scales.step)

    def neighbours(self, grouped: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
        """See `Format`."""
        levels = torch.tensor(NF4, dtype=torch.float32, device=grouped.device)
        below, above = neighbouring_levels(grouped / scales.step, levels)
        return below * scales.step, above * scales.step

    def pack(self, grouped: Tensor, scales: Scales, columns: int) -> dict[str, Tensor]:
        """See `Format`."""
        return {"weight": pack_nibbles(nearest_code(grouped / scales.step, NF4).flatten(1)), **scales.stored}

    def stored_shapes(self, rows: int, columns: int, group: int | None = None) -> Shapes:
        """See `Format`."""
        return _nibble_shapes(rows, columns, self.resolve_group(group))

    def _unpack(self, tensors: Mapping[str, Tensor], columns: int, group: int) -> Tensor:
        values = by_code(unpack_nibbles(tensors["weight"]), NF4).unflatten(1, (-1, group))  # (N, G, g)
        return ungrouped(values.mul_(tensors["weight_scale"].float()[..., None]), columns)


def _bfloat16_scales(step: Tensor) -> Scales:
    """Return scales whose steps (N, G, 1) are rounded to bf16."""
    stored = step.clamp(min=EPS).to(torch.bfloat16)
    return Scales(stored.float(), None, {"weight_scale": stored.squeeze(-1)})


def _nibble_shapes(rows: int, columns: int, group: int) -> Shapes:
    count = group_count(columns, group)
    packed = count * group_size(columns, group) // 2
    return {"weight": ((rows, packed), torch.uint8), "weight_scale": ((rows, count), torch.bfloat16)}
