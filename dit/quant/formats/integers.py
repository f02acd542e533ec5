"""Symmetric integers with one scale a row: int8 and int6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from dit.quant.formats.base import EPS, Format, Scales, Shapes, largest, ungrouped
from dit.quant.formats.packing import pack_sixes, unpack_sixes


class SymmetricInteger(Format):
    """weight = weight_scale[n] * code, code from -limit to limit: the products of signed kernels can't overflow."""

    fixed_group, uniform = True, True
    limit: ClassVar[int]

    def scales(self, grouped: Tensor, clip: float | Tensor | None = None, importance: Tensor | None = None) -> Scales:
        """See `Format`; the scale is that of the row's largest weight."""
        step = (largest(grouped, clip) / self.limit).clamp(min=EPS)  # (N, 1, 1)
        return Scales(step, None, {"weight_scale": step.flatten()})

    def snap(self, grouped: Tensor, scales: Scales) -> Tensor:
        """See `Format`."""
        return self._codes(grouped, scales).mul_(scales.step)

    def neighbours(self, grouped: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
        """See `Format`."""
        below = (grouped / scales.step).floor_()
        above = (below + 1).clamp_(-self.limit, self.limit)
        return below.clamp_(-self.limit, self.limit) * scales.step, above * scales.step

    def _codes(self, grouped: Tensor, scales: Scales) -> Tensor:
        return (grouped / scales.step).round_().clamp_(-self.limit, self.limit)


class Int8(SymmetricInteger):
    """int8 (N, K) and weight_scale fp32 (N,)."""

    name, bits, limit = "int8", 8, 127

    def pack(self, grouped: Tensor, scales: Scales, columns: int) -> dict[str, Tensor]:
        """See `Format`."""
        codes = ungrouped(self._codes(grouped, scales), columns)
        return {"weight": codes.to(torch.int8).contiguous(), **scales.stored}

    def stored_shapes(self, rows: int, columns: int, group: int | None = None) -> Shapes:
        """See `Format`."""
        self.resolve_group(group)
        return {"weight": ((rows, columns), torch.int8), "weight_scale": ((rows,), torch.float32)}

    def _unpack(self, tensors: Mapping[str, Tensor], columns: int, group: int) -> Tensor:
        return tensors["weight"].float() * tensors["weight_scale"][:, None]


class Int6(SymmetricInteger):
    """uint8 (N, ceil(K / 4) * 3), four codes + 32 in three bytes, and weight_scale fp32 (N,)."""

    name, bits, limit = "int6", 6, 31

    def pack(self, grouped: Tensor, scales: Scales, columns: int) -> dict[str, Tensor]:
        """See `Format`."""
        codes = ungrouped(self._codes(grouped, scales), columns) + 32
        return {"weight": pack_sixes(codes.to(torch.uint8)), **scales.stored}

    def stored_shapes(self, rows: int, columns: int, group: int | None = None) -> Shapes:
        """See `Format`."""
        self.resolve_group(group)
        return {"weight": ((rows, -(-columns // 4) * 3), torch.uint8), "weight_scale": ((rows,), torch.float32)}

    def _unpack(self, tensors: Mapping[str, Tensor], columns: int, group: int) -> Tensor:
        return self.codes(tensors, columns).float() * tensors["weight_scale"][:, None]

    def codes(self, tensors: Mapping[str, Tensor], columns: int) -> Tensor:
        """Return the codes as int8 (N, K), for int8 products."""
        return unpack_sixes(tensors["weight"], columns).view(torch.int8) - 32
