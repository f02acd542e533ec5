"""Products of int8 matrices on NVIDIA GPUs that scale, add and activate before they write: by Triton.

`torch._int_mm` writes sums in 32 bits, which are then read, scaled and written again: with 1,152 inputs that takes as
long as the product. Here the sums of a tile stay in registers until the output is final. `finish_sums` is the same end
for sums that `torch._int_mm` wrote; `unpack_int4` and `regroup_int4` make int8 weights of 4-bit ones.
"""

# ruff: noqa: ANN001, ANN201, ANN202, N803 - Triton has its own types
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit.attention.kernels.triton_forward import IS_INTERPRETED, narrow
from dit.quant.activations import SMALLEST
from dit.quant.kernels.contract import After

AFTER = {"": 0, "gelu_tanh": 1, "gelu": 2}
"""Activation functions as the kernels number them."""
GROUP = 8
"""Tiles of rows that are computed one after the other, so that weights stay in the cache."""
WIDENS = tl.constexpr(IS_INTERPRETED)
"""The interpreter has no products of bfloat16; those of float32 are the same."""


@triton.jit
def _activate(x, AFTER: tl.constexpr):
    """Apply GELU, by its tanh form (1) or exactly (2)."""
    if AFTER == 1:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * (1 - 1 / (tl.exp(2 * inner) + 1))  # 1 + tanh over 2
    if AFTER == 2:
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    return x


@triton.jit
def _finish(
    sums, rows, columns, is_row, is_column, row_scale, ROW_SCALE, column_scale, bias, input_sums, offset,
    HAS_BIAS: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """Scale the sums of a tile and add the bias, (BLOCK_M, BLOCK_N) float32."""
    total = sums.to(tl.float32) * tl.load(column_scale + columns, mask=is_column, other=0.0)[None, :]
    if HAS_SUMS:  # codes are less than the inputs by an offset
        total += offset * tl.load(input_sums + columns, mask=is_column, other=0.0)[None, :]
    total *= tl.load(row_scale + rows * ROW_SCALE, mask=is_row, other=0.0)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def product_kernel(
    codes, codes_described, weight, weight_described, out, row_scale, ROW_SCALE, column_scale, bias, input_sums,
    branch, up, M, N, K, offset, M_CLASS,
    HAS_BIAS: tl.constexpr, HAS_SUMS: tl.constexpr, AFTER: tl.constexpr, RANK: tl.constexpr, TMA: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute one tile of codes (M, K) times weight (N, K) transposed, scaled, with bias, branch and activation."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    number = tl.program_id(0)
    group = number // (GROUP * tiles_n)
    first = group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    tile_m = first + number % (GROUP * tiles_n) % height
    tile_n = number % (GROUP * tiles_n) // height
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    is_row, is_column = rows < M, columns < N
    inner = tl.arange(0, BLOCK_K)
    # 1. sums of products of codes, exact
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for k in range(0, K, BLOCK_K):
        if TMA:
            a = codes_described.load([tile_m * BLOCK_M, k])
            b = weight_described.load([tile_n * BLOCK_N, k])
        else:
            is_inner = k + inner < K
            a = tl.load(
                codes + rows[:, None] * K + (k + inner)[None, :], mask=is_row[:, None] & is_inner[None, :], other=0
            )
            b = tl.load(
                weight + columns[:, None] * K + (k + inner)[None, :],
                mask=is_column[:, None] & is_inner[None, :],
                other=0,
            )
        sums = tl.dot(a, tl.trans(b), sums, out_dtype=tl.int32)
    # 2. scales and bias
    total = _finish(
        sums, rows, columns, is_row, is_column, row_scale, ROW_SCALE, column_scale, bias, input_sums, offset,
        HAS_BIAS, HAS_SUMS,
    )  # fmt: skip
    # 3. the low-rank branch
    if RANK > 0:
        r = tl.arange(0, RANK)
        thin = tl.load(branch + rows[:, None] * RANK + r[None, :], mask=is_row[:, None], other=0.0)
        wide = tl.load(up + columns[:, None] * RANK + r[None, :], mask=is_column[:, None], other=0.0)
        if WIDENS:
            total += tl.dot(thin.to(tl.float32), tl.trans(wide).to(tl.float32), input_precision="ieee")
        else:
            total = tl.dot(thin, tl.trans(wide), total)
    # 4. the output
    total = _activate(total, AFTER)
    places = out + rows[:, None] * N + columns[None, :]
    tl.store(places, narrow(total, out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def finish_kernel(
    sums, SUMS_ROW, out, OUT_ROW, row_scale, ROW_SCALE, column_scale, bias, input_sums, M, N, offset,
    HAS_BIAS: tl.constexpr, HAS_SUMS: tl.constexpr, AFTER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scale a tile of sums that are in memory, add the bias and activate."""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    is_row, is_column = rows < M, columns < N
    is_real = is_row[:, None] & is_column[None, :]
    tile = tl.load(sums + rows[:, None] * SUMS_ROW + columns[None, :], mask=is_real, other=0)
    total = _finish(
        tile, rows, columns, is_row, is_column, row_scale, ROW_SCALE, column_scale, bias, input_sums, offset,
        HAS_BIAS, HAS_SUMS,
    )  # fmt: skip
    total = _activate(total, AFTER)
    tl.store(out + rows[:, None] * OUT_ROW + columns[None, :], narrow(total, out.dtype.element_ty), mask=is_real)


@triton.jit
def unpack_kernel(packed, multiplier, zero, out, HALF, GROUPS, COLUMNS, BLOCK: tl.constexpr):
    """Unpack one group of one row: byte i holds code i in its low and code i + HALF in its high nibble."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    is_byte = i < HALF
    bytes_ = tl.load(packed + (row * GROUPS + group) * HALF + i, mask=is_byte, other=0).to(tl.int32)
    factor = tl.load(multiplier + row * GROUPS + group).to(tl.int32)
    middle = tl.load(zero + row * GROUPS + group).to(tl.int32)
    column = group * HALF * 2 + i
    low = ((bytes_ & 15) - middle) * factor
    high = ((bytes_ >> 4) - middle) * factor
    tl.store(out + row * COLUMNS + column, low.to(tl.int8), mask=is_byte & (column < COLUMNS))
    tl.store(out + row * COLUMNS + column + HALF, high.to(tl.int8), mask=is_byte & (column + HALF < COLUMNS))


@triton.jit
def regroup_kernel(packed, scales, row_scale, out, GROUP, GROUPS, COLUMNS, BLOCK: tl.constexpr):
    """Make int8 codes of BLOCK bytes of a row: two neighbouring 4-bit codes each, whose groups have scales."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    width = GROUPS * GROUP // 2  # bytes of a row
    is_byte = i < width
    bytes_ = tl.load(packed + row * width + i, mask=is_byte, other=0).to(tl.int32)
    scale = tl.load(scales + row * GROUPS + 2 * i // GROUP, mask=is_byte, other=0.0).to(tl.float32)
    factor = scale / tl.load(row_scale + row)
    low = (((bytes_ & 15) ^ 8) - 8).to(tl.float32) * factor  # extends the sign
    high = (((bytes_ >> 4) ^ 8) - 8).to(tl.float32) * factor
    low = (low + 12582912.0) - 12582912.0  # halves to even
    high = (high + 12582912.0) - 12582912.0
    both = tl.interleave(low.to(tl.int32).to(tl.int8), high.to(tl.int32).to(tl.int8))  # (2 BLOCK,)
    column = tl.program_id(1) * BLOCK * 2 + tl.arange(0, BLOCK * 2)
    tl.store(out + row * COLUMNS + column, both, mask=column < COLUMNS)


def multiply_int8(
    codes: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    input_sums: Tensor | None = None,
    offset: int = 0,
    branch: Tensor | None = None,
    up: Tensor | None = None,
    after: After = "",
) -> Tensor:
    """Return after(row_scale * (codes weight^T column_scale + offset input_sums) + bias + branch up^T).

    Args:
        codes: int8, (M, K).
        weight: int8, (N, K).
        row_scale: float32, (M, 1), or (1, 1) for all rows.
        column_scale: float32, (N,).
        dtype: of the output.
        bias: (N,).
        input_sums: float32, (N,), what each output's weights sum up to.
        offset: by how much codes are less than they stand for.
        branch: inputs times the low-rank factor `down`, (M, r), with r a power of two from 16 on.
        up: (N, r), of the dtype of `branch`.
        after: activation function, see `dit.quant.kernels.contract.Use`.

    Returns:
        (M, N).

    Raises:
        ValueError: a rank that the kernel doesn't take.
    """
    rows, inner = codes.shape
    columns = len(weight)
    rank = 0 if branch is None else branch.shape[1]
    if rank and (rank < 16 or rank & (rank - 1)):
        raise ValueError(f"rank is {rank}; the kernel takes powers of two from 16 on")
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    if not rows or not columns:
        return out
    codes, weight = codes.contiguous(), weight.contiguous()
    described: list[Any] = [codes, weight]
    by_tma = _can_be_described(codes) and _can_be_described(weight)
    kernel = tuned_product(by_tma)
    if by_tma:
        descriptor = import_module("triton.tools.tensor_descriptor").TensorDescriptor
        described = [descriptor(one, list(one.shape), list(one.stride()), [128, 64]) for one in (codes, weight)]

    def pointer(x: Tensor | None) -> Tensor:
        """Return a tensor, or any where a call has no use for one."""
        return out if x is None else x

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (-(-rows // meta["BLOCK_M"]) * -(-columns // meta["BLOCK_N"]),)

    settings = _INTERPRETED if IS_INTERPRETED else {}
    if IS_INTERPRETED and by_tma:
        _set_boxes({"codes_described": described[0], "weight_described": described[1], **settings})
        settings = {**settings, "TMA": True}
    kernel[grid](
        codes, described[0], weight, described[1], out, row_scale, 0 if len(row_scale) == 1 else 1, column_scale,
        pointer(bias), pointer(input_sums), pointer(branch), pointer(up), rows, columns, inner, float(offset),
        min(rows, 8192).bit_length(), HAS_BIAS=bias is not None, HAS_SUMS=input_sums is not None, AFTER=AFTER[after],
        RANK=rank, GROUP=GROUP, **settings,
    )  # fmt: skip
    return out


def finish_sums(
    sums: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    input_sums: Tensor | None = None,
    offset: int = 0,
    after: After = "",
) -> None:
    """Make the output of sums of products of codes, in one pass; see `multiply_int8`.

    Args:
        sums: int32, (M, N).
        row_scale: float32, (M, 1) or (1, 1).
        column_scale: float32, (N,).
        out: (M, N), its rows contiguous.
        bias: (N,).
        input_sums: float32, (N,).
        offset: by how much codes are less than they stand for.
        after: activation function.
    """
    rows, columns = out.shape
    block_m, block_n = (4, 512) if columns >= 512 else (32, 64)
    kernel: Any = finish_kernel
    kernel[(triton.cdiv(rows, block_m), triton.cdiv(columns, block_n))](
        sums, sums.stride(0), out, out.stride(0), row_scale, 0 if len(row_scale) == 1 else 1, column_scale,
        out if bias is None else bias, out if input_sums is None else input_sums, rows, columns, float(offset),
        HAS_BIAS=bias is not None, HAS_SUMS=input_sums is not None, AFTER=AFTER[after], BLOCK_M=block_m,
        BLOCK_N=block_n,
    )  # fmt: skip


def unpack_int4(weight: Tensor, multiplier: Tensor, zero: Tensor, group: int, columns: int) -> Tensor:
    """Unpack two-level 4-bit weights to int8, as `dit.quant.formats.packing.int4_to_int8` does.

    Args:
        weight: uint8, (N, G * group / 2), split halves.
        multiplier: uint8, (N, G).
        zero: uint8, (N, G).
        group: inputs that share a multiplier; 0 is the whole row.
        columns: K.

    Returns:
        int8, (N, K).
    """
    rows, groups = multiplier.shape
    half = (group or columns + columns % 2) // 2
    out = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    kernel: Any = unpack_kernel
    kernel[(rows, groups)](
        weight.contiguous(), multiplier.contiguous(), zero.contiguous(), out, half, groups, columns,
        BLOCK=triton.next_power_of_2(half),
    )  # fmt: skip
    return out


def regroup_int4(weight: Tensor, scales: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Round 4-bit weights with a scale a group to int8 with a scale a row, so that one product of integers takes them.

    A weight moves by at most half a step of its row: 1 / 254 of the largest that the row's scales can hold, a
    fifteenth of what rounding to 4 bits cost where groups are alike.

    Args:
        weight: uint8, (N, G * g / 2), codes from -8 to 7 in two's complement, even inputs in low nibbles.
        scales: (N, G).
        columns: K.

    Returns:
        int8, (N, K), and the scales of the rows, float32, (N,).
    """
    rows, groups = scales.shape
    row_scale = (scales.float().abs().amax(1) * (8 / 127)).clamp(min=SMALLEST)  # (N,)
    out = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    width = weight.shape[1]
    block = min(triton.next_power_of_2(width), 1024)
    kernel: Any = regroup_kernel
    kernel[(rows, triton.cdiv(width, block))](
        weight.contiguous(), scales.contiguous(), row_scale, out, 2 * width // groups, groups, columns, BLOCK=block
    )
    return out, row_scale


_INTERPRETED = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "TMA": False}


def _set_boxes(arguments: dict[str, Any]) -> None:
    """Give the descriptions of both matrices the tiles of a configuration."""
    if not isinstance(arguments["codes_described"], Tensor):
        arguments["codes_described"].block_shape = [arguments["BLOCK_M"], arguments["BLOCK_K"]]
        arguments["weight_described"].block_shape = [arguments["BLOCK_N"], arguments["BLOCK_K"]]


def _can_be_described(x: Tensor) -> bool:
    """Return whether the tensor memory accelerator of Hopper reads tiles of a matrix: it wants multiples of 16."""
    has_tma = x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (9, 0)
    return has_tma and x.data_ptr() % 16 == 0 and x.shape[1] % 16 == 0


@cache
def tuned_product(by_tma: bool) -> Any:
    """Return the kernel with the configurations that are tried at its first call for each shape on a GPU.

    Args:
        by_tma: whether tiles are loaded by the tensor memory accelerator, or by asynchronous copies.
    """
    if IS_INTERPRETED:
        return product_kernel
    tiles = [(128, 256, 128, 8, 3), (128, 128, 128, 8, 4), (128, 128, 128, 4, 3), (64, 64, 128, 4, 4)]
    configs = [
        triton.Config(
            {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "TMA": by_tma}, num_warps=warps, num_stages=stages,
            pre_hook=_set_boxes,
        )
        for m, n, k, warps, stages in tiles
    ]  # fmt: skip
    return triton.autotune(configs, key=["M_CLASS", "N", "K", "RANK", "AFTER"])(product_kernel)
