"""Formats of other libraries' checkpoints, so that these are held as they are: 4-bit groups, NF4 and NVFP4 variants."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dit.quant.formats.base import EPS, Format, Scales, Shapes, group_count, group_size, largest, ungrouped, value_range
from dit.quant.formats.floats import E2M1, FP8_MAX, NormalFloat4
from dit.quant.formats.microscaling import SMALLEST_FP8, NvFp4
from dit.quant.formats.packing import pack_nibbles, unpack_nibbles

LOWEST, HIGHEST, CODES = -8, 7, 15


class GroupInt4(Format):
    """weight = weight_scale[n, j] * code, code from -8 to 7: SVDQuant's and SDNQ's symmetric 4-bit integers.

    weight uint8 (N, G * g / 2), codes in two's complement, even inputs in low nibbles, and weight_scale (N, G), in
    bfloat16, or float32 for checkpoints whose scales need it.
    """

    bits, group, uniform = 4, 64, True

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype  # pyright: ignore[reportAttributeAccessIssue]

    def scales(self, grouped: Tensor, clip: float | Tensor | None = None, importance: Tensor | None = None) -> Scales:
        """See `Format`; the scale is the smallest with which all weights of a group have codes."""
        low, high = value_range(grouped, clip)
        stored = torch.maximum(low / LOWEST, high / HIGHEST).clamp(min=EPS).to(self.dtype)  # (N, G, 1)
        return Scales(stored.float(), None, {"weight_scale": stored.squeeze(-1)})

    def snap(self, grouped: Tensor, scales: Scales) -> Tensor:
        """See `Format`."""
        return self._codes(grouped, scales).mul_(scales.step)

    def neighbours(self, grouped: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
        """See `Format`."""
        below = (grouped / scales.step).floor_()
        above = (below + 1).clamp_(LOWEST, HIGHEST)
        return below.clamp_(LOWEST, HIGHEST) * scales.step, above * scales.step

    def pack(self, grouped: Tensor, scales: Scales, columns: int) -> dict[str, Tensor]:
        """See `Format`."""
        codes = self._codes(grouped, scales).flatten(1).to(torch.int8)
        return {"weight": pack_nibbles(codes.view(torch.uint8) & 15), **scales.stored}

    def stored_shapes(self, rows: int, columns: int, group: int | None = None) -> Shapes:
        """See `Format`."""
        return _shapes(rows, columns, self.resolve_group(group), {"weight_scale": self.dtype})

    def _unpack(self, tensors: Mapping[str, Tensor], columns: int, group: int) -> Tensor:
        codes = (unpack_nibbles(tensors["weight"]) ^ 8).view(torch.int8) - 8  # extends the sign
        values = codes.float().unflatten(1, (-1, group))  # (N, G, g)
        return ungrouped(values.mul_(tensors["weight_scale"].float()[..., None]), columns)

    @staticmethod
    def _codes(grouped: Tensor, scales: Scales) -> Tensor:
        return (grouped / scales.step).round_().clamp_(LOWEST, HIGHEST)


class AffineInt4(Format):
    """weight = weight_scale[n, j] * code + weight_offset[n, j], code 0 to 15: AWQ's and SDNQ's unsigned integers.

    weight uint8 (N, G * g / 2), even inputs in low nibbles, weight_scale and weight_offset fp32 (N, G).
    """

    name, bits, group, uniform = "int4_affine", 4, 64, True

    def scales(self, grouped: Tensor, clip: float | Tensor | None = None, importance: Tensor | None = None) -> Scales:
        """See `Format`; the values go from the smallest to the largest weight of each group."""
        low, high = value_range(grouped, clip)
        step = (high / CODES - low / CODES).clamp(min=EPS)  # (N, G, 1)
        stored = {"weight_scale": step.squeeze(-1), "weight_offset": low.squeeze(-1)}
        return Scales(step, -low / step, stored)

    def snap(self, grouped: Tensor, scales: Scales) -> Tensor:
        """See `Format`."""
        return self._codes(grouped, scales).mul_(scales.step).add_(_offset(scales))

    def neighbours(self, grouped: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
        """See `Format`."""
        offset = _offset(scales)
        below = ((grouped - offset) / scales.step).floor_()
        above = (below + 1).clamp_(0, CODES)
        return (below.clamp_(0, CODES) * scales.step).add_(offset), (above * scales.step).add_(offset)

    def pack(self, grouped: Tensor, scales: Scales, columns: int) -> dict[str, Tensor]:
        """See `Format`."""
        return {"weight": pack_nibbles(self._codes(grouped, scales).flatten(1).to(torch.uint8)), **scales.stored}

    def stored_shapes(self, rows: int, columns: int, group: int | None = None) -> Shapes:
        """See `Format`."""
        floats = {"weight_scale": torch.float32, "weight_offset": torch.float32}
        return _shapes(rows, columns, self.resolve_group(group), floats)

    def check(self, tensors: Mapping[str, Tensor], columns: int, group: int | None = None) -> None:
        """See `Format`; offsets that are not finite are refused too."""
        super().check(tensors, columns, group)
        if not bool(torch.isfinite(tensors["weight_offset"]).all()):
            raise ValueError("weight_offset has values that are NaN or infinite")

    def _unpack(self, tensors: Mapping[str, Tensor], columns: int, group: int) -> Tensor:
        values = unpack_nibbles(tensors["weight"]).float().unflatten(1, (-1, group))  # (N, G, g)
        values.mul_(tensors["weight_scale"][..., None]).add_(tensors["weight_offset"][..., None])
        return ungrouped(values, columns)

    @staticmethod
    def _codes(grouped: Tensor, scales: Scales) -> Tensor:
        return ((grouped - _offset(scales)) / scales.step).round_().clamp_(0, CODES)


class NormalFloat4Fp32(NormalFloat4):
    """NF4 with a float32 scale a group, as bitsandbytes stores it: weight_scale fp32 (N, G), else as `NormalFloat4`."""

    name = "nf4_fp32"

    def scales(self, grouped: Tensor, clip: float | Tensor | None = None, importance: Tensor | None = None) -> Scales:
        """See `Format`; the scale is the group's largest weight."""
        step = largest(grouped, clip).clamp(min=EPS)  # (N, G, 1)
        return Scales(step, None, {"weight_scale": step.squeeze(-1)})

    def stored_shapes(self, rows: int, columns: int, group: int | None = None) -> Shapes:
        """See `Format`."""
        return _shapes(rows, columns, self.resolve_group(group), {"weight_scale": torch.float32})


class NvFp4Rows(NvFp4):
    """NVFP4 with an outer scale for each row, as SVDQuant stores it: weight_scale_2 fp32 (N,), else as `NvFp4`."""

    name = "nvfp4_rows"

    def scales(self, grouped: Tensor, clip: float | Tensor | None = None, importance: Tensor | None = None) -> Scales:
        """See `Format`; the outer scale is that of the row's largest weight, clipped or not."""
        low, high = value_range(grouped)
        row = (torch.maximum(high, -low).amax(1, keepdim=True) / (FP8_MAX * E2M1[-1])).clamp(min=EPS)  # (N, 1, 1)
        ratio = (largest(grouped, clip) / E2M1[-1] / row).clamp_(SMALLEST_FP8, FP8_MAX)
        stored = ratio.to(torch.float8_e4m3fn)  # (N, G, 1)
        scales = {"weight_scale": stored.squeeze(-1), "weight_scale_2": row.flatten()}
        return Scales(stored.float() * row, None, scales)

    def stored_shapes(self, rows: int, columns: int, group: int | None = None) -> Shapes:
        """See `Format`."""
        return {**super().stored_shapes(rows, columns, group), "weight_scale_2": ((rows,), torch.float32)}

    def _unpack(self, tensors: Mapping[str, Tensor], columns: int, group: int) -> Tensor:
        step = tensors["weight_scale"].float() * tensors["weight_scale_2"][:, None]
        return self.dequantize(tensors["weight"], step[..., None], columns, group)


def _offset(scales: Scales) -> Tensor:
    """Return the offsets of groups, (N, G, 1)."""
    return scales.stored["weight_offset"][..., None]


def _shapes(rows: int, columns: int, group: int, per_group: Mapping[str, torch.dtype]) -> Shapes:
    """Return the shapes of nibbles and of values of each group."""
    count = group_count(columns, group)
    packed = count * group_size(columns, group) // 2
    groups = {name: ((rows, count), dtype) for name, dtype in per_group.items()}
    return {"weight": ((rows, packed), torch.uint8), **groups}
