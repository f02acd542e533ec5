"""Codes of four and six bits in bytes, and 4-bit codes of two-level scales as int8."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F


def pack_nibbles(codes: Tensor) -> Tensor:
    """Put two neighbouring 4-bit codes in a byte, the even one in the low nibble: uint8 (N, K) to (N, K / 2)."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Undo `pack_nibbles`: uint8 (N, K / 2) to (N, K)."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def pack_split_halves(codes: Tensor) -> Tensor:
    """Put two 4-bit codes in a byte: those of a group's first half in low nibbles, of its second half in high ones.

    Unpacking then writes two runs of bytes instead of every other byte.

    Args:
        codes: uint8 (N, G, g), g even.

    Returns:
        uint8 (N, G * g / 2); byte i of a group holds code i and code i + g / 2.
    """
    low, high = codes.chunk(2, dim=-1)
    return (low | (high << 4)).flatten(1)


def unpack_split_halves(packed: Tensor, group: int) -> Tensor:
    """Undo `pack_split_halves`: uint8 (N, G * group / 2) to (N, G, group)."""
    halves = packed.view(packed.shape[0], -1, group // 2)  # (N, G, g / 2)
    return torch.cat([halves & 15, halves >> 4], dim=-1)


def pack_sixes(codes: Tensor) -> Tensor:
    """Put four 6-bit codes in three bytes, lowest bits first, the last byte padded with zero bits.

    Args:
        codes: uint8 (N, K), 0 to 63.

    Returns:
        uint8 (N, ceil(K / 4) * 3).
    """
    a, b, c, d = F.pad(codes, (0, -codes.shape[1] % 4)).unflatten(1, (-1, 4)).unbind(-1)  # (N, K / 4) each
    return torch.stack([a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)], dim=-1).flatten(1)


def unpack_sixes(packed: Tensor, columns: int) -> Tensor:
    """Undo `pack_sixes`: uint8 (N, ceil(columns / 4) * 3) to (N, columns)."""
    x, y, z = packed.unflatten(1, (-1, 3)).unbind(-1)
    codes = [x & 63, (x >> 6) | ((y & 15) << 2), (y >> 4) | ((z & 3) << 4), z >> 2]
    return torch.stack(codes, dim=-1).flatten(1)[:, :columns]


def int4_to_int8(
    weight: Tensor, multiplier: Tensor, zero: Tensor, group: int, columns: int, out: Tensor | None = None
) -> Tensor:
    """Unpack two-level 4-bit weights to the int8 matrix that, times a scale a row, is the weight.

    QServe, arXiv 2405.04532, section 4.1: multiplier * (code - zero) fits in 8 bits, so that one int8 product computes
    the layer. The arithmetic is on bytes and wraps around; only the result has to fit. Rows are independent: slices of
    the rows of all tensors may be unpacked one after another.

    Args:
        weight: uint8 (N, G * group / 2), as `pack_split_halves` makes it.
        multiplier: uint8 (N, G).
        zero: uint8 (N, G), the code that stands for 0.
        group: inputs that share a multiplier; 0 is the whole row.
        columns: K, inputs without the padding of the last group.
        out: int8 (N, K), contiguous, to write to.

    Returns:
        int8 (N, K), `out` if it is given.

    Raises:
        ValueError: `out` has another shape or dtype or is not contiguous, or the tensors' shapes do not fit.
    """
    rows, (_, groups) = weight.shape[0], multiplier.shape
    group = group or columns + columns % 2
    if weight.shape[1] * 2 != groups * group or not 0 <= groups * group - columns < group:
        raise ValueError(
            f"weight {tuple(weight.shape)} and multiplier {tuple(multiplier.shape)} are not those of {columns} inputs "
            f"in groups of {group}"
        )
    if out is None:
        out = torch.empty((rows, columns), dtype=torch.int8, device=weight.device)
    elif out.shape != (rows, columns) or out.dtype != torch.int8 or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}; use a contiguous int8 tensor {(rows, columns)}")
    padded = groups * group != columns
    codes = (
        torch.empty((rows, groups * group), dtype=torch.uint8, device=weight.device)
        if padded
        else out.view(torch.uint8)
    )
    _split_nibbles(weight, codes.view(rows, groups, 2, group // 2))
    values = codes.view(rows, groups, group)
    values.mul_(multiplier[:, :, None]).sub_((multiplier * zero)[:, :, None])
    if padded:
        out.copy_(codes.view(torch.int8)[:, :columns])
    return out


def _split_nibbles(packed: Tensor, halves: Tensor) -> None:
    """Write low nibbles to halves[:, :, 0] and high ones to halves[:, :, 1], (N, G, 2, g / 2) uint8.

    Eight bytes at a time where sizes and addresses allow: byte operations on short strided runs are not vectorized.
    """
    rows, groups, _, half = halves.shape
    packed = packed.contiguous()
    if half % 8 == 0 and packed.storage_offset() % 8 == 0 and halves.storage_offset() % 8 == 0:
        packed, halves, mask = packed.view(torch.int64), halves.view(torch.int64), LOW_NIBBLES
    else:
        mask = 15
    shifted = torch.bitwise_right_shift(packed, 4).view(rows, groups, -1)
    torch.bitwise_and(packed.view(rows, groups, -1), mask, out=halves[:, :, 0])
    torch.bitwise_and(shifted, mask, out=halves[:, :, 1])
