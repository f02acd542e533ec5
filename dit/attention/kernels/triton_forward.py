"""Block-sparse flash attention in Triton: the kernel, and its configurations for a GPU.

One program computes a piece of up to `BLOCK_M` queries of one head. It goes through the list of the pieces of keys that
its block visits (see `triton_lists`), with a running maximum and sum (FlashAttention-2, arXiv 2307.08691), first those
whose pairs all count, without any mask, then the others, then the pooled keys of blocks that it doesn't visit. Nothing
is written by two programs.

Queries are gathered as they are loaded and results scattered as they are stored, because each is touched once; keys and
values are read by many programs, so they are brought into the layout's order before (see `triton`).

The environment variable TRITON_INTERPRET=1, set before triton is imported, makes this run on a CPU, slowly.
"""

# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
"""log2(e): exponentials are computed to base 2."""

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernel runs in Triton's interpreter, on a CPU."""

WIDENS = tl.constexpr(IS_INTERPRETED)
"""The interpreter has no products of bfloat16; those of float32 are the same, sums of products are float32 in both."""


@triton.jit
def _dot(a, b):
    """Multiply matrices, into float32; of float32 in three products of TF32 (error near that of float32)."""
    if WIDENS:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _dot_onto(accumulated, a, b, LOW: tl.constexpr):
    """Add a product of matrices to a sum in float32."""
    if WIDENS:
        return accumulated + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    if LOW:  # Hopper adds products of float8 in few bits: after those of a piece, in float32
        return tl.dot(a, b, accumulated, max_num_imprecise_acc=b.shape[0])
    return tl.dot(a, b, accumulated, input_precision="tf32x3")


@triton.jit
def narrow(x, kind: tl.constexpr):
    """Round float32 to the nearest number of a type of fewer bits, as GPUs do; the interpreter's casts cut bits off."""
    if WIDENS:
        cut: tl.constexpr = 16 if kind == tl.bfloat16 else (20 if kind == tl.float8e4nv else 0)
        if cut > 0:
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + ((1 << (cut - 1)) - 1) + ((bits >> cut) & 1)) >> cut << cut
            x = bits.to(tl.float32, bitcast=True)
    return x.to(kind)


@triton.jit
def _load_keys(
    rows, described, row, column, STRIDE,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, E: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Load BLOCK_N rows of a matrix of keys or values, from a column on."""
    if TMA:
        return described.load([row, column])
    n = tl.arange(0, BLOCK_N)
    e = tl.arange(0, WIDTH)
    place = rows + (row.to(tl.int64) + n)[:, None] * STRIDE + column + e[None, :]
    if E == WIDTH:
        return tl.load(place)
    return tl.load(place, mask=(e < E)[None, :], other=0.0)


@triton.jit
def _add_keys(
    accumulated, largest, total, scores, values,
    HAS_MASK: tl.constexpr, LOW: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Take further keys into the softmax: their scores to base 2 (BLOCK_M, J), and their values (J, E)."""
    highest = tl.maximum(largest, tl.max(scores, 1))  # (BLOCK_M,)
    level = highest
    if HAS_MASK:
        level = tl.where(highest == float("-inf"), 0.0, highest)  # nothing counts so far
    weights = tl.exp2(scores - (level - SHIFT)[:, None])  # (BLOCK_M, J)
    kept = tl.exp2(largest - level)  # (BLOCK_M,)
    total = total * kept + tl.sum(weights, 1)
    accumulated = accumulated * kept[:, None]
    accumulated = _dot_onto(accumulated, narrow(weights, values.dtype), values, LOW)
    return accumulated, highest, total


@triton.jit
def _attend(
    accumulated, largest, total, q, q_scale, first, last, entries,
    key, key_described, value, value_described, key_row, value_row, key_column, value_column, KEY_STRIDE, VALUE_STRIDE,
    key_scales, key_sizes, key_mask, bits, bits_of, rows_in_block, bit_rows, scale, threshold, E: tl.constexpr,
    OTHERS: tl.constexpr, HAS_BITS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, INT8: tl.constexpr, FP8: tl.constexpr,
    SKIPS: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr, SHIFT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Go through the entries first to last - 1 of a list; with OTHERS their pairs may not count."""
    n = tl.arange(0, BLOCK_N)
    for at in tl.range(first, last, num_stages=STAGES):
        entry = tl.load(entries + at)
        piece = entry
        if HAS_BITS:
            piece = entry & 0x3FFFFFFF
        # 1. scores to base 2
        k = _load_keys(
            key, key_described, key_row + piece * BLOCK_N, key_column, KEY_STRIDE, WIDTH, BLOCK_N, E, TMA
        )  # (BLOCK_N, WIDTH)
        if INT8:
            factor = scale * q_scale * tl.load(key_scales + piece)
            scores = tl.dot(q, tl.trans(k)).to(tl.float32) * factor  # (BLOCK_M, BLOCK_N)
        else:
            scores = _dot(q, tl.trans(k)) * scale
        # 2. pairs that don't count
        if OTHERS:
            scores = tl.where((n < tl.load(key_sizes + piece))[None, :], scores, float("-inf"))
            if HAS_BITS:  # noqa: SIM102 - known when the kernel is compiled
                if entry > 0x3FFFFFFF:
                    words = tl.load(bits_of + piece).to(tl.int64) * bit_rows + rows_in_block  # (BLOCK_M,)
                    place = bits + words[:, None] * (BLOCK_N // 32) + (n // 32)[None, :]
                    counts = (tl.load(place) >> (n % 32)[None, :]) & 1
                    scores = tl.where(counts != 0, scores, float("-inf"))
        if HAS_KEY_MASK:
            scores = tl.where(tl.load(key_mask + piece * BLOCK_N + n)[None, :] != 0, scores, float("-inf"))
        # 3. softmax, and the mean of the values
        is_needed = True
        if SKIPS:
            peak = tl.max(scores, 1)  # (BLOCK_M,)
            highest = tl.maximum(largest, peak)
            # what can't be judged is needed
            distance = tl.where(highest == float("-inf"), float("-inf"), peak - highest)
            is_nan = tl.max(tl.max((scores != scores).to(tl.int32), 1), 0)  # noqa: PLR0124
            is_needed = (tl.max(distance, 0) >= threshold) | (is_nan != 0)
        if is_needed:
            if FP8:  # values stand column by column: what products of float8 read
                v = tl.trans(
                    _load_keys(
                        value, value_described, value_row, piece * BLOCK_N, VALUE_STRIDE, BLOCK_N, WIDTH, BLOCK_N, TMA
                    )
                )  # (BLOCK_N, WIDTH)
            else:
                v = _load_keys(
                    value, value_described, value_row + piece * BLOCK_N, value_column, VALUE_STRIDE, WIDTH, BLOCK_N, E,
                    TMA,
                )  # (BLOCK_N, WIDTH)  # fmt: skip
            accumulated, largest, total = _add_keys(
                accumulated, largest, total, scores, v, OTHERS or HAS_KEY_MASK, FP8, SHIFT
            )
    return accumulated, largest, total


@triton.jit
def _attend_pooled(
    accumulated, largest, total, q, scale, keys, values, log_count, visits, key_blocks,
    WIDTH: tl.constexpr, E: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Take in one pooled key for each block that isn't visited, weighted by how many keys it stands for."""
    e = tl.arange(0, WIDTH)
    for first in range(0, key_blocks, 32):
        t = first + tl.arange(0, 32)
        is_block = t < key_blocks
        is_real = is_block[:, None] & (e < E)[None, :]
        k = tl.load(keys + t[:, None] * E + e[None, :], mask=is_real, other=0.0)  # (32, WIDTH)
        v = tl.load(values + t[:, None] * E + e[None, :], mask=is_real, other=0.0)
        bias = tl.load(log_count + t, mask=is_block, other=float("-inf"))
        skipped = tl.load(visits + t, mask=is_block, other=1) == 0
        bias = tl.where(skipped, bias * 1.4426950408889634, float("-inf"))
        scores = _dot(q, tl.trans(k)) * scale + bias[None, :]
        scores = tl.where((bias > float("-inf"))[None, :], scores, float("-inf"))
        accumulated, largest, total = _add_keys(accumulated, largest, total, scores, v, True, False, SHIFT)
    return accumulated, largest, total


@triton.jit
def forward_kernel(
    query, QUERY_B, QUERY_N, QUERY_K, out, lse,  # (B, N, K, E), (B, N, K, E), (B, K, N)
    key, key_described, KEY_STRIDE, KEY_ROW_B, KEY_ROW_K, KEY_COLUMN_K,  # matrix of packed keys
    value, value_described, VALUE_STRIDE, VALUE_ROW_B, VALUE_ROW_K, VALUE_COLUMN_K,
    key_scales, key_mean, value_scale,  # (B, K, Q), (B, K, E), (B, K, E)
    query_pieces, PIECES_B, PIECES_K, query_order, ORDER_B, ORDER_K,
    counts, COUNTS_B, COUNTS_K, entries, ENTRIES_B, ENTRIES_K, ENTRIES_N,
    key_sizes, SIZES_B, SIZES_K, key_mask, MASK_B, MASK_K,
    bits, bits_of, bit_rows, pieces_of_keys,
    tail_key, tail_value, log_count, LOG_B, LOG_K, visits, VISITS_B, VISITS_K, key_blocks,
    N, K, scale, threshold, E: tl.constexpr,
    HAS_BITS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_LSE: tl.constexpr,
    INT8: tl.constexpr, FP8: tl.constexpr, SKIPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute a piece of queries of a head of a sample.

    Upper case names are numbers, most of them strides; `scale` is already to base 2, `threshold` too. Arguments that a
    call has no use for are any pointer.
    """
    SHIFT: tl.constexpr = 8.0 if FP8 else 0.0  # weights up to 2^8 use the range of float8; it cancels out
    # the last blocks are those of exact tokens, which visit everything: they begin first
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    pieces = query_pieces + batch * PIECES_B + head * PIECES_K + number * 4
    block = tl.load(pieces)
    start = tl.load(pieces + 1)
    size = tl.load(pieces + 2)
    in_block = tl.load(pieces + 3)
    if size > 0:
        m = tl.arange(0, BLOCK_M)
        e = tl.arange(0, WIDTH)
        is_query = m < size
        order = query_order + batch * ORDER_B + head * ORDER_K + start
        rows = tl.load(order + m, mask=is_query, other=0).to(tl.int64)  # positions in the sequence
        is_real = is_query[:, None] & (e < E)[None, :]
        places = query + batch.to(tl.int64) * QUERY_B + head * QUERY_K + rows[:, None] * QUERY_N + e[None, :]
        q = tl.load(places, mask=is_real, other=0.0)  # (BLOCK_M, WIDTH)
        wide = (batch * K + head).to(tl.int64)
        q_scale = 1.0
        poison = tl.zeros([BLOCK_M], tl.float32)
        shift = tl.zeros([BLOCK_M], tl.float32)
        if INT8:
            floats = q.to(tl.float32)
            mean = tl.load(key_mean + wide * E + e, mask=e < E, other=0.0)
            shift = tl.sum(floats * mean[None, :], 1) * scale  # what smoothing took off the scores
            poison = tl.sum(floats * 0, 1)  # NaN and infinity, which int8 doesn't have
            floats = tl.where(poison[:, None] == 0, floats, 0.0)
            q_scale = tl.maximum(tl.max(tl.max(tl.abs(floats), 1), 0) / 127, 1e-20)
            floats = floats / q_scale
            q = (floats + tl.where(floats < 0, -0.5, 0.5)).to(tl.int8)
        accumulated = tl.zeros([BLOCK_M, WIDTH], tl.float32)
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        count = counts + batch * COUNTS_B + head * COUNTS_K + block * 2
        whole = tl.load(count)
        others = tl.load(count + 1)
        listed = entries + batch.to(tl.int64) * ENTRIES_B + head.to(tl.int64) * ENTRIES_K
        listed += block.to(tl.int64) * ENTRIES_N
        key_row = batch * KEY_ROW_B + head * KEY_ROW_K
        value_row = batch * VALUE_ROW_B + head * VALUE_ROW_K
        key_column = head * KEY_COLUMN_K
        value_column = head * VALUE_COLUMN_K
        scales = key_scales + wide * pieces_of_keys
        sizes = key_sizes + batch * SIZES_B + head * SIZES_K
        mask = key_mask + batch.to(tl.int64) * MASK_B + head * MASK_K
        # 1. pieces of which all pairs count
        accumulated, largest, total = _attend(
            accumulated, largest, total, q, q_scale, 0, whole, listed,
            key, key_described, value, value_described, key_row, value_row, key_column, value_column,
            KEY_STRIDE, VALUE_STRIDE, scales, sizes, mask, bits, bits_of, in_block + m, bit_rows, scale, threshold, E,
            False, HAS_BITS, HAS_KEY_MASK, INT8, FP8, SKIPS, BLOCK_N, WIDTH, TMA, SHIFT, STAGES,
        )  # fmt: skip
        # 2. others
        accumulated, largest, total = _attend(
            accumulated, largest, total, q, q_scale, whole, whole + others, listed,
            key, key_described, value, value_described, key_row, value_row, key_column, value_column,
            KEY_STRIDE, VALUE_STRIDE, scales, sizes, mask, bits, bits_of + block * pieces_of_keys, in_block + m,
            bit_rows, scale, threshold, E,
            True, HAS_BITS, HAS_KEY_MASK, INT8, FP8, SKIPS, BLOCK_N, WIDTH, TMA, SHIFT, 1,
        )  # fmt: skip
        # 3. pooled keys of blocks that aren't visited
        if HAS_TAIL:
            accumulated, largest, total = _attend_pooled(
                accumulated, largest, total, tl.load(places, mask=is_real, other=0.0), scale,
                tail_key + wide * key_blocks * E, tail_value + wide * key_blocks * E,
                log_count + batch * LOG_B + head * LOG_K,
                visits + batch * VISITS_B + head * VISITS_K + block * key_blocks, key_blocks, WIDTH, E, SHIFT,
            )  # fmt: skip
        # 4. the result, at its place in the sequence
        is_empty = total == 0
        divisor = tl.where(is_empty, 1.0, total)
        accumulated = accumulated / divisor[:, None] + poison[:, None]
        if FP8:
            accumulated = accumulated * tl.load(value_scale + wide * E + e, mask=e < E, other=0.0)[None, :]
        places = out + ((batch.to(tl.int64) * N + rows[:, None]) * K + head) * E + e[None, :]
        tl.store(places, narrow(accumulated, out.dtype.element_ty), mask=is_real)
        if HAS_LSE:
            log_sum = (largest + tl.log2(divisor) - SHIFT + shift) * 0.6931471805599453 + poison
            log_sum = tl.where(is_empty, float("-inf"), log_sum)
            tl.store(lse + wide * N + rows, log_sum, mask=is_query)


@cache
def tuned_kernel(itemsize: int, block_n: int, loads: tuple[bool, ...]) -> Any:
    """Return the kernel with the configurations that are tried at its first call on a GPU.

    Hopper loads by its tensor memory accelerator (TMA) or by asynchronous copies. As an entry of the list is loaded
    before its piece, 3 stages keep two pieces in shared memory and 5 keep three (2 and 4 win nothing): 224 of 227 KiB
    with 128 keys of 128 in bfloat16.

    Args:
        itemsize: bytes of the wider of keys and values.
        block_n: keys of a piece.
        loads: whether by TMA; both can be tried.
    """
    if itemsize == 4:
        warps_and_stages = [(4, 2), (8, 2)]
    elif block_n >= 128:
        warps_and_stages = [(8, 3), (8, 5)]
    else:
        warps_and_stages = [(8, 3), (8, 5), (4, 3)]
    configs = [
        triton.Config({"TMA": by_tma, "STAGES": stages}, num_warps=warps, num_stages=stages)
        for warps, stages in warps_and_stages
        for by_tma in loads
    ]
    decided_by = ["N", "BLOCK_M", "WIDTH", "HAS_BITS", "HAS_KEY_MASK", "HAS_TAIL", "INT8", "FP8", "SKIPS"]
    return triton.autotune(configs, key=decided_by)(forward_kernel)
