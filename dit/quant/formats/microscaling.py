"""4-bit floats whose scales have 8 bits: NVFP4 and MXFP4."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dit.quant.formats.base import EPS, Scales, Shapes, group_count, largest, value_range
from dit.quant.formats.floats import E2M1, FP8_MAX, SignMagnitude

SMALLEST_FP8 = 2.0**-9
EXPONENT_BIAS = 127
NAN_CODE = 255
SMALLEST_EXPONENT = -40
"""Of MXFP4 scales: the power of two below `EPS`."""


class NvFp4(SignMagnitude):
    """weight = weight_scale_2 * weight_scale[n, j] * e2m1 in groups of 16, the layout of BFL's and ModelOpt's files.

    weight uint8 (N, G * 8), even inputs in low nibbles, weight_scale float8_e4m3fn (N, G), and weight_scale_2, an fp32
    scalar: the largest weight of the layer, clipped or not, divided by 448 * 6.
    """

    name, group, fixed_group, levels = "nvfp4", 16, True, E2M1

    def scales(self, grouped: Tensor, clip: float | Tensor | None = None, importance: Tensor | None = None) -> Scales:
        """See `Format`; the scale maps the group's largest weight to 6."""
        low, high = value_range(grouped)
        layer = (torch.maximum(high, -low).amax() / (FP8_MAX * E2M1[-1])).clamp(min=EPS)
        ratio = (largest(grouped, clip) / E2M1[-1] / layer).clamp_(SMALLEST_FP8, FP8_MAX)
        stored = ratio.to(torch.float8_e4m3fn)  # (N, G, 1)
        return Scales(stored.float() * layer, None, {"weight_scale": stored.squeeze(-1), "weight_scale_2": layer})

    def stored_shapes(self, rows: int, columns: int, group: int | None = None) -> Shapes:
        """See `Format`."""
        count = group_count(columns, self.resolve_group(group))
        return {
            "weight": ((rows, count * self.group // 2), torch.uint8),
            "weight_scale": ((rows, count), torch.float8_e4m3fn),
            "weight_scale_2": ((), torch.float32),
        }

    def _unpack(self, tensors: Mapping[str, Tensor], columns: int, group: int) -> Tensor:
        step = tensors["weight_scale"].float() * tensors["weight_scale_2"]
        return self.dequantize(tensors["weight"], step[..., None], columns, group)


class MxFp4(SignMagnitude):
    """weight = 2^exponent[n, j] * e2m1 in groups of 32 (OCP Microscaling Formats 1.0).

    weight uint8 (N, G * 16), even inputs in low nibbles, and weight_scale uint8 (N, G), the exponent + 127 (E8M0).
    """

    name, group, fixed_group, levels = "mxfp4", 32, True, E2M1
    clips = (0.5, 2.0)

    def scales(self, grouped: Tensor, clip: float | Tensor | None = None, importance: Tensor | None = None) -> Scales:
        """See `Format`; the exponent is the largest weight's minus 2, so that weights above 6 steps are cut."""
        _, exponent = torch.frexp(largest(grouped, clip))  # largest = mantissa in [0.5, 1) * 2^exponent
        exponent = (exponent - 3).clamp(min=SMALLEST_EXPONENT)
        stored = (exponent + EXPONENT_BIAS).squeeze(-1).to(torch.uint8)
        return Scales(_power_of_two(exponent), None, {"weight_scale": stored})

    def stored_shapes(self, rows: int, columns: int, group: int | None = None) -> Shapes:
        """See `Format`."""
        count = group_count(columns, self.resolve_group(group))
        return {
            "weight": ((rows, count * self.group // 2), torch.uint8),
            "weight_scale": ((rows, count), torch.uint8),
        }

    def check(self, tensors: Mapping[str, Tensor], columns: int, group: int | None = None) -> None:
        """See `Format`; the code of NaN, 255, is refused too."""
        super().check(tensors, columns, group)
        if bool((tensors["weight_scale"] == NAN_CODE).any()):
            raise ValueError(
                f"weight_scale has codes {NAN_CODE}, which are NaN; scales of mxfp4 are 0 to {NAN_CODE - 1}"
            )

    def _unpack(self, tensors: Mapping[str, Tensor], columns: int, group: int) -> Tensor:
        exponent = tensors["weight_scale"].int() - EXPONENT_BIAS
        return self.dequantize(tensors["weight"], _power_of_two(exponent)[..., None], columns, group)


def _power_of_two(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
