"""Bring keys and values into the order in which the Triton kernel reads them, in fewer bits if asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit.attention.kernels.triton_forward import narrow


@triton.jit
def pack_kernel(
    x, X_B, X_N, X_K, source, SOURCE_B, SOURCE_K, key_mask, MASK_B, mean, channel_scale, out, piece_scales,
    K, E, packed,
    HAS_MASK: tl.constexpr, INT8: tl.constexpr, FP8: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Copy one piece of BLOCK_N keys of a head; INT8 finds the scale of the piece, FP8 writes column by column."""
    piece = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    n = piece * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, WIDTH)
    rows = tl.load(source + batch * SOURCE_B + head * SOURCE_K + n)  # int64, -1 for none
    is_key = rows >= 0
    rows = tl.where(is_key, rows, 0)
    if HAS_MASK:
        is_key = is_key & (tl.load(key_mask + batch.to(tl.int64) * MASK_B + rows) != 0)
    is_real = is_key[:, None] & (e < E)[None, :]
    places = x + batch.to(tl.int64) * X_B + head * X_K + rows[:, None] * X_N + e[None, :]
    values = tl.load(places, mask=is_real, other=0.0)  # (BLOCK_N, WIDTH)
    wide = (batch * K + head).to(tl.int64)
    if INT8:
        values = values.to(tl.float32) - tl.load(mean + wide * E + e, mask=e < E, other=0.0)[None, :]
        values = tl.where(is_real, values, 0.0)
        poison = tl.sum(tl.sum(values * 0, 1), 0)  # NaN of any key becomes that of the piece: int8 has none
        values = tl.where(values * 0 == 0, values, 0.0)
        scale = tl.maximum(tl.max(tl.max(tl.abs(values), 1), 0) / 127, 1e-20)
        values = values / scale
        values = (values + tl.where(values < 0, -0.5, 0.5)).to(tl.int8)
        tl.store(piece_scales + wide * tl.num_programs(0) + piece, scale + poison)
    if FP8:
        factor = tl.load(channel_scale + wide * E + e, mask=e < E, other=1.0)
        values = narrow(values.to(tl.float32) / factor[None, :], out.dtype.element_ty)
        places = out + (wide * E + e)[:, None] * packed + n[None, :]
        tl.store(places, tl.trans(values), mask=(e < E)[:, None])
    else:
        tl.store(out + (wide * packed + n)[:, None] * E + e[None, :], values, mask=(e < E)[None, :])


@dataclass(frozen=True, slots=True)
class Packed:
    """Keys or values as a matrix.

    Args:
        rows: (R, C), contiguous rows.
        row_batch: rows between one sample and the next.
        row_head: rows between one head and the next.
        column_head: columns between one head and the next.
        scales: float32, factors of the numbers in fewer bits: (B, K, Q) of pieces, or (B, K, E) of channels.
    """

    rows: Tensor
    row_batch: int
    row_head: int
    column_head: int
    scales: Tensor | None = None


def as_they_are(x: Tensor) -> Packed:
    """Describe keys or values (B, M, K, E) that stand in the layout's order already."""
    batch, length, heads, width = x.shape
    if x.transpose(1, 2).is_contiguous():  # as networks have them whose heads stand first
        return Packed(x.transpose(1, 2).reshape(batch * heads * length, width), heads * length, length, 0)
    return Packed(x.reshape(batch * length, heads * width), length, 0, width)


def pack(x: Tensor, source: Tensor, key_mask: Tensor | None, block_n: int) -> Packed:
    """Copy keys or values (B, M, K, E) in the order of `source`, (B', K', P); missing and masked ones become zeros."""
    batch, _, heads, width = x.shape
    out = x.new_empty(batch * heads * source.shape[-1], width)
    _pack(x, source, key_mask, block_n, out)
    return Packed(out, heads * source.shape[-1], source.shape[-1], 0)


def pack_int8(x: Tensor, source: Tensor, key_mask: Tensor | None, block_n: int, mean: Tensor) -> Packed:
    """Copy keys less their mean (B, K, E) in 8 bits, one scale for each piece (SageAttention, arXiv 2410.02367)."""
    batch, _, heads, width = x.shape
    out = x.new_empty(batch * heads * source.shape[-1], width, dtype=torch.int8)
    scales = x.new_empty(batch, heads, source.shape[-1] // block_n, dtype=torch.float32)
    _pack(x, source, key_mask, block_n, out, mean=mean, scales=scales)
    return Packed(out, heads * source.shape[-1], source.shape[-1], 0, scales)


def pack_fp8(x: Tensor, source: Tensor, key_mask: Tensor | None, block_n: int) -> Packed:
    """Copy values as float8 (e4m3) column by column, one scale for each channel (SageAttention2, arXiv 2411.10958).

    A NaN makes its whole channel of the head NaN.
    """
    batch, length, heads, width = x.shape
    real = x if key_mask is None else x.masked_fill(~key_mask[..., None, None], 0)
    largest = real.amax(1).float().maximum(-real.amin(1).float()) if length else x.new_zeros(batch, heads, width)
    scales = (largest / 448).clamp(min=1e-20)  # (B, K, E)
    out = x.new_empty(batch * heads * width, source.shape[-1], dtype=torch.float8_e4m3fn)
    _pack(x, source, key_mask, block_n, out, channel_scale=scales.contiguous())
    return Packed(out, heads * width, width, 0, scales.contiguous())


def mean_key(key: Tensor, key_mask: Tensor | None) -> Tensor:
    """Return the mean of the keys (B, M, K, E) of a head, (B, K, E), float32; any would leave the softmax as it is."""
    if key_mask is None:
        mean = key.mean(1, dtype=torch.float32)  # (B, K, E)
    else:
        total = key.masked_fill(~key_mask[..., None, None], 0).sum(1, dtype=torch.float32)  # (B, K, E)
        mean = total / key_mask.sum(1).clamp(min=1)[:, None, None]
    return mean.nan_to_num(0, 0, 0).contiguous()


def _pack(
    x: Tensor,
    source: Tensor,
    key_mask: Tensor | None,
    block_n: int,
    out: Tensor,
    *,
    mean: Tensor | None = None,
    scales: Tensor | None = None,
    channel_scale: Tensor | None = None,
) -> None:
    batch, _, heads, width = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    flat = source.expand(batch, heads, -1)
    kernel: Any = pack_kernel
    kernel[source.shape[-1] // block_n, heads, batch](
        x, x.stride(0), x.stride(1), x.stride(2), flat, flat.stride(0), flat.stride(1),
        x if key_mask is None else key_mask.to(torch.uint8), 0 if key_mask is None else key_mask.shape[1],
        mean, channel_scale, out, scales, heads, width, source.shape[-1],
        HAS_MASK=key_mask is not None, INT8=mean is not None, FP8=channel_scale is not None,
        BLOCK_N=block_n, WIDTH=triton.next_power_of_2(max(width, 16)),
    )  # fmt: skip
