"""The table of weight formats."""

from __future__ import annotations

from functools import cache

import torch

from dit.quant.formats.base import Format
from dit.quant.formats.floats import E1M2, E2M1, E3M0, Float4, Fp8, NormalFloat4
from dit.quant.formats.imported import AffineInt4, GroupInt4, NormalFloat4Fp32, NvFp4Rows
from dit.quant.formats.integers import Int6, Int8
from dit.quant.formats.microscaling import MxFp4, NvFp4
from dit.quant.formats.two_level import Int4


@cache
def _formats() -> dict[str, Format]:
    fp4 = [Float4("e2m1", E2M1), Float4("e1m2", E1M2), Float4("e3m0", E3M0)]
    groups = [GroupInt4("int4_group", torch.bfloat16), GroupInt4("int4_group_fp32", torch.float32)]
    imported = [*groups, AffineInt4(), NormalFloat4Fp32(), NvFp4Rows()]
    own = [Int8(), Int6(), Int4(), Fp8(), *fp4, NvFp4(), MxFp4(), NormalFloat4()]
    return {one.name: one for one in (*own, *imported)}


def format_names() -> tuple[str, ...]:
    """Return the names of all weight formats."""
    return tuple(_formats())


def weight_format(name: str) -> Format:
    """Return the weight format of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in _formats():
        raise ValueError(f"weights is {name!r}; use one of {', '.join(format_names())}")
    return _formats()[name]
