"""Attention in few bits: queries, keys, weights and values as integers, block by block, as GPUs compute it.

SageAttention (arXiv 2410.02367), SageAttention2 (arXiv 2411.10958) and PAROAttention (arXiv 2506.16054) put one scale
on each block of tokens, because that is what the loop of flash attention can multiply by. `quantized_attention` does
the same arithmetic with numbers that hold the integers exactly: it tells what an image loses, on any device, and is
slower than plain attention. The backend "int8" computes scores in integers on CUDA by the block-sparse Triton kernel
(see `kernels.triton`) with a map of all blocks; "int4" has no kernel anywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.grid import TokenGrid
from dit.attention.kernels.contract import sparse_kernel
from dit.attention.kernels.products import as_key_mask
from dit.attention.layout import AXIS_ORDERS, Layout, axes_layout, raster_layout
from dit.quant.attention_maps import MapQuantizer, quantize_even, score_orders

SMALLEST = 1e-20
"""Least scale: blocks of zeros have it."""
KERNEL = "triton_int8"
"""The block-sparse kernel whose scores are in int8."""
Steps = Literal["block", "row"]


@dataclass(frozen=True)
class AttentionBits:
    """In how many bits attention is computed, and how it is prepared for that.

    Args:
        qk: bits of queries and keys, 2 to 8; None leaves them as they are.
        pv: bits of weights and values; None leaves them as they are.
        block: tokens of a block of queries, and of one of keys.
        smooth_k: take the mean of all keys off each: every query's scores move by one number, which its softmax doesn't
            see (SageAttention, section 4.2).
        smooth_q: take the mean of a block off its queries, and add what it scores in full precision (SageAttention2,
            section 3.2); for 4 bits.
        smooth_v: take the mean of all values off each, and add it to the result, whose weights sum up to 1.
        weight_steps: distance of the levels of the weights: "block" by the largest of the block, as PAROAttention
            describes it; "row" the same for all, 1 / (2^pv - 1), as its released kernel has it.

    Results are divided by the sum of the rounded weights. The released kernels of both projects sum them up before they
    round, which doubles the error where many weights are small.

    Raises:
        ValueError: a number out of its range.
    """

    qk: int | None = 8
    pv: int | None = 8
    block: int = 64
    smooth_k: bool = True
    smooth_q: bool = False
    smooth_v: bool = False
    weight_steps: Steps = "block"

    def __post_init__(self) -> None:
        for name in ("qk", "pv"):
            bits = getattr(self, name)
            if bits is not None and (not isinstance(bits, int) or not 2 <= bits <= 8):
                raise ValueError(
                    f"{name}_bits is {bits!r}; use a whole number from 2 to 8, or None for no quantization"
                )
        if self.block < 1:
            raise ValueError(f"block is {self.block}; use at least 1, such as 64")
        if self.weight_steps not in ("block", "row"):
            raise ValueError(f"weight_steps is {self.weight_steps!r}; use 'block' or 'row'")


INT8 = AttentionBits()
INT4 = AttentionBits(4, 4, smooth_q=True, smooth_v=True)


def quantized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    qk_bits: int | None = 8,
    pv_bits: int | None = 8,
    block: int = 64,
    smooth_k: bool = True,
    smooth_q: bool = False,
    smooth_v: bool = False,
    weight_steps: Steps = "block",
    map_quantizer: MapQuantizer | None = None,
    layout: Layout | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute attention as kernels with integers do: the reference of what they lose.

    Args:
        query: (B, N, K, E).
        key: (B, M, K, E).
        value: (B, M, K, E).
        attn_mask: bool, True where a query may look, (B, M) or broadcastable to (B, K, N, M); of another dtype it is
            added to the scores.
        qk_bits: see `AttentionBits`, as the next six.
        pv_bits: weights have the levels 0 to 2^pv_bits - 1, values -(2^(pv_bits - 1) - 1) to 2^(pv_bits - 1) - 1 with a
            scale for each channel of a block.
        block: tokens of a block.
        smooth_k: take the mean key off.
        smooth_q: take the mean query of each block off.
        smooth_v: take the mean value off.
        weight_steps: "block" or "row".
        map_quantizer: rounds weights relative to the largest so far of their query, instead of even levels; see
            `dit.quant.attention_maps`.
        layout: an order of the tokens of self-attention, so that tokens of a block are alike; its blocks are not used.
        scale: factor of the scores; None means 1 / sqrt(E).

    Returns:
        (B, N, K, E) in the query's dtype. A query without a key gets zeros.

    Raises:
        ValueError: shapes or numbers out of their range, a gradient is wanted, or a layout with a mask of pairs.
    """
    bits = AttentionBits(qk_bits, pv_bits, block, smooth_k, smooth_q, smooth_v, weight_steps)
    _check(query, key, value)
    factor = float(query.shape[-1] ** -0.5) if scale is None else scale
    mask = attn_mask[:, None, None, :] if attn_mask is not None and attn_mask.ndim == 2 else attn_mask
    key_mask = as_key_mask(mask, key.shape[0], key.shape[1])  # (B, M)
    q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))  # (B, K, N, E)
    if layout is not None:
        _check_layout(layout, query, key, mask)
        q, k, v = (layout.permute(x) for x in (q, k, v))
    out = _attend(q, k, v, _Mask.of(mask), key_mask, bits, factor, map_quantizer)  # (B, K, N, E)
    if layout is not None:
        out = layout.restore(out)
    return out.transpose(1, 2).to(query.dtype)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: _Mask, key_mask: Tensor | None, bits: AttentionBits, scale: float,
    map_quantizer: MapQuantizer | None,
) -> Tensor:  # fmt: skip
    """Attend (B, K, N, E) to (B, K, M, E): the loop of flash attention (arXiv 2307.08691) over blocks of keys."""
    length, size = query.shape[2], bits.block
    mean_value = _mean(value, key_mask) if bits.smooth_v else None  # (B, K, 1, E)
    if bits.smooth_k:
        key = key - _mean(key, key_mask)
    if mean_value is not None:
        value = value - mean_value
    if key_mask is not None:  # what nobody looks at has no say in the scales
        hidden = ~key_mask[:, None, :, None]  # (B, 1, M, 1)
        key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
    q = _Integers.of_queries(_blocks(query, size), bits)  # (B, K, n, b, E)
    rows = q.codes.shape[:-1]
    out, largest, total = q.codes.new_zeros(q.codes.shape), q.codes.new_full(rows, -torch.inf), q.codes.new_zeros(rows)
    for start in range(0, key.shape[2], size):
        some = slice(start, min(start + size, key.shape[2]))
        # 1. scores: integers times integers, their two scales, what smoothing took off the queries
        k = _Integers.of(key[:, :, None, some], bits.qk, (-2, -1))  # (B, K, 1, c, E)
        scores = q.codes @ k.codes.mT * (q.step * k.step * scale)  # (B, K, n, b, c)
        if q.mean is not None:
            scores = scores + q.mean @ key[:, :, None, some].mT * scale
        scores = mask.apply(scores, some, length)
        # 2. weights relative to the largest score so far
        new = torch.maximum(largest, scores.amax(-1))  # (B, K, n, b)
        level = new.masked_fill(new.isneginf(), 0)
        weights = (scores - level[..., None]).exp()  # (B, K, n, b, c)
        shrunk = (largest - level).exp()
        # 3. weights times values, integers again
        rounded = _round_weights(weights, bits, map_quantizer)
        v = _Integers.of(value[:, :, None, some], bits.pv, (-2,))  # (B, K, 1, c, E)
        out = out * shrunk[..., None] + rounded @ (v.codes * v.step)
        total = total * shrunk + rounded.sum(-1)
        largest = new
    out = out / total.masked_fill(total == 0, 1)[..., None]  # (B, K, n, b, E)
    if mean_value is not None:
        out = out + torch.where(total[..., None] > 0, mean_value[:, :, None], 0)
    return out.flatten(2, 3)[:, :, :length]  # (B, K, N, E)


def _round_weights(weights: Tensor, bits: AttentionBits, map_quantizer: MapQuantizer | None) -> Tensor:
    """Round the weights of a block of keys, (B, K, n, b, c)."""
    if map_quantizer is not None:
        return map_quantizer(weights)
    if bits.pv is None:
        return weights
    if bits.weight_steps == "row":
        return quantize_even(weights, bits.pv)
    step = weights.amax((-2, -1), keepdim=True) / (2**bits.pv - 1)  # (B, K, n, 1, 1)
    return quantize_even(weights, bits.pv, step.clamp(min=SMALLEST))


@dataclass(frozen=True)
class _Integers:
    """Numbers as integers times a scale; without a limit of bits the numbers themselves and 1.

    Attributes:
        codes: whole numbers, in float32, which holds their products and sums exactly.
        step: what they are multiplied by, broadcast.
        mean: what was taken off before, or None.
    """

    codes: Tensor
    step: Tensor
    mean: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, bits: int | None, axes: tuple[int, ...]) -> _Integers:
        """Quantize symmetrically, with one scale for all numbers along some axes."""
        if bits is None:
            return cls(x, x.new_ones(()))
        highest = 2 ** (bits - 1) - 1
        step = (x.abs().amax(axes, keepdim=True) / highest).clamp(min=SMALLEST)
        return cls((x / step).round(), step)

    @classmethod
    def of_queries(cls, blocks: Tensor, bits: AttentionBits) -> _Integers:
        """Quantize queries block by block, (B, K, n, b, E), less the mean of each block if asked."""
        if not bits.smooth_q:
            return cls.of(blocks, bits.qk, (-2, -1))
        mean = blocks.mean(-2, keepdim=True)  # (B, K, n, 1, E)
        found = cls.of(blocks - mean, bits.qk, (-2, -1))
        return cls(found.codes, found.step, mean)


@dataclass(frozen=True)
class _Mask:
    """What is added to scores, or may not be looked at.

    Attributes:
        pairs: broadcastable to (B, K, N, M), bool or a number; None lets all look everywhere.
    """

    pairs: Tensor | None

    @classmethod
    def of(cls, mask: Tensor | None) -> _Mask:
        """Take a mask of up to four axes."""
        return cls(None if mask is None else mask[(None,) * (4 - mask.ndim)])

    def apply(self, scores: Tensor, keys: slice, length: int) -> Tensor:
        """Mask the scores of all N queries for some keys, (B, K, n, b, c)."""
        if self.pairs is None:
            return scores
        part = self.pairs[..., keys] if self.pairs.shape[-1] > 1 else self.pairs  # (B', K', N', c)
        if part.shape[2] == 1:
            part = part[:, :, None]  # (B', K', 1, 1, c)
        else:
            missing = scores.shape[2] * scores.shape[3] - length
            part = F.pad(part, (0, 0, 0, missing)).unflatten(2, (-1, scores.shape[3]))  # (B', K', n, b, c)
        return scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part


def _blocks(x: Tensor, size: int) -> Tensor:
    """Cut (B, K, N, E) into blocks, (B, K, n, b, E); the last is filled up with its last token."""
    missing = -x.shape[2] % size
    if missing:
        x = torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1)], dim=2)
    return x.unflatten(2, (-1, size))


def _mean(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Return the mean of the keys or values (B, K, M, E) that are looked at, (B, K, 1, E)."""
    if key_mask is None:
        return x.mean(2, keepdim=True)
    seen = key_mask[:, None, :, None]  # (B, 1, M, 1)
    return x.masked_fill(~seen, 0).sum(2, keepdim=True) / seen.sum(2, keepdim=True).clamp(min=1)


# ---------------------------------------------------------------------------- the order


def choose_axes(
    query: Tensor, key: Tensor, grid: TokenGrid, *, block: int = 64, orders: Sequence[str] = AXIS_ORDERS
) -> tuple[str, ...]:
    """Choose for each head the order of the axes in which its attention is easiest to quantize and to leave out.

    The offline part of PAROAttention (arXiv 2506.16054, section 3): the order is the same for all prompts and steps, so
    one call of a layer tells it. Its result is what the pattern "paro" and `axes_layout` take. All scores of a head are
    held at once.

    Args:
        query: (B, N, K, E), of one layer and step.
        key: (B, N, K, E).
        grid: the tokens.
        block: tokens of a block.
        orders: some of `dit.attention.layout.AXIS_ORDERS`; orders that leave the sequence as another does are one.

    Returns:
        An order for each of the K heads.
    """
    layouts: dict[bytes, tuple[str, Layout]] = {}
    for name in orders:
        layout = axes_layout(grid, name, block)
        layouts.setdefault(layout.order.numpy().tobytes(), (name, layout))
    names = [name for name, _ in layouts.values()]
    found = []
    for head in range(query.shape[2]):
        q, k = (x[:, :, head : head + 1].transpose(1, 2).float() for x in (query, key))  # (B, 1, N, E)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        weights = (scores - scores.amax(-1, keepdim=True)).exp()  # (B, 1, N, N), relative to the largest of each query
        maps = [_reordered(weights, layout) for _, layout in layouts.values()]
        found.append(names[score_orders(maps, block)[0]])
    return tuple(found)


def _reordered(weights: Tensor, layout: Layout) -> Tensor:
    """Bring both axes of a map (..., N, N) into the order of a layout."""
    order = layout.order[0, 0].to(weights.device)
    return weights.index_select(-2, order).index_select(-1, order)


# ------------------------------------------------------------------------- the backends


def attend_int8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend with the arguments that diffusers' networks give a backend, (B, N, K, E), scores in int8.

    On CUDA by the Triton kernel (weights and values stay in 16 bits), on a CPU by `quantized_attention` (weights and
    values in int8 too), with a warning.
    """
    key, value, mask = _prepared(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if query.device.type == "cuda":
        key_mask = as_key_mask(mask, key.shape[0], key.shape[1])  # (B, M)
        if mask is None or key_mask is not None:
            return attend_by_kernel(query, key, value, key_mask, scale)
        _warn("int8", "its kernel takes masks of keys only, and this one is of pairs")
    else:
        _warn("int8", f"there is no kernel for {query.device.type}")
    return quantized_attention(query, key, value, mask, scale=scale)


def attend_int4(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend with the arguments that diffusers' networks give a backend, (B, N, K, E), in 4 bits; emulated."""
    key, value, mask = _prepared(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    _warn("int4", "no GPU that we have kernels for multiplies 4 bits")
    return quantized_attention(
        query, key, value, mask, qk_bits=INT4.qk, pv_bits=INT4.pv, smooth_q=INT4.smooth_q, smooth_v=INT4.smooth_v,
        scale=scale,
    )  # fmt: skip


def attend_by_kernel(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attend by the block-sparse Triton kernel with scores in int8 and a map of all blocks.

    Args:
        query: (B, N, K, E).
        key: (B, M, K, E).
        value: (B, M, K, E).
        key_mask: bool, (B, M).
        scale: factor of the scores; None means 1 / sqrt(E).

    Returns:
        (B, N, K, E).

    Raises:
        ValueError: the kernel can't compute it here; the message says why.
    """
    block_map = _all_blocks(query.shape[1], key.shape[1], str(query.device))
    kernel = sparse_kernel(KERNEL)
    reason = kernel.refusal(query, key, block_map)
    if reason:
        raise ValueError(f"the backend 'int8' can't compute this call ({reason}); use 'native'")
    factor = float(query.shape[-1] ** -0.5) if scale is None else scale
    return kernel.function(query, key, value, block_map, scale=factor, key_mask=key_mask)[0]


def refusal_int8(device: torch.device | str, dtype: torch.dtype) -> str:
    """Return why "int8" can't be chosen; empty if it can.

    Args:
        device: where the tensors are.
        dtype: of query, key and value.
    """
    reason = refusal_int4(device, dtype)
    if reason or torch.device(device).type != "cuda":
        return reason
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    kernel = sparse_kernel(KERNEL)
    return kernel.refusal(
        torch.empty(1, 16, 1, 16, device=device, dtype=dtype),
        torch.empty(1, 16, 1, 16, device=device, dtype=dtype),
        _all_blocks(16, 16, str(device)),
    )


def refusal_int4(device: torch.device | str, dtype: torch.dtype) -> str:
    """Return why "int4" can't be chosen; empty if it can.

    Args:
        device: where the tensors are; it is emulated on all.
        dtype: of query, key and value.
    """
    return "" if dtype.is_floating_point else f"it has no {str(dtype).removeprefix('torch.')}"


@lru_cache(maxsize=32)
def _all_blocks(queries: int, keys: int, device: str) -> BlockMap:
    """Return a map of which every block of queries visits every block of keys."""
    rows, columns = (raster_layout(TokenGrid(1, 1, length)) for length in (queries, keys))
    visits = torch.ones(1, 1, rows.count, columns.count, dtype=torch.bool)
    return BlockMap(rows, columns, visits).to(device)


def _prepared(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return keys and values with as many heads as the queries, and the mask.

    Raises:
        ValueError: dropout, or a gradient is wanted.
    """
    if dropout_p:
        raise ValueError(f"attention in few bits has no dropout, got {dropout_p}; use the native backend")
    _check_gradient(query, key, value)
    if enable_gqa:  # each head of keys serves several heads of queries
        key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))  # (B, M, K, E)
    if is_causal:
        attn_mask = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device).tril()[None, None]
    return key, value, attn_mask


def _warn(name: str, reason: str) -> None:
    if torch.compiler.is_compiling():
        return
    warnings.warn(
        f"attention backend {name!r} emulates its integers here, slower than plain attention: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if (
        query.ndim != 4
        or key.shape != value.shape
        or key.shape[0] != query.shape[0]
        or key.shape[2:] != query.shape[2:]
    ):
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} don't fit; expected "
            "(B, N, K, E), (B, M, K, E) and (B, M, K, E)"
        )
    _check_gradient(query, key, value)


def _check_gradient(query: Tensor, key: Tensor, value: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise ValueError("attention in few bits has no gradient; use the native backend for training, or torch.no_grad")


def _check_layout(layout: Layout, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
    if query.shape[1] != key.shape[1] or layout.grid.length != query.shape[1] or mask is not None:
        masked = "no mask" if mask is None else "a mask"
        raise ValueError(
            f"a layout of {layout.grid.length} tokens can't order {query.shape[1]} queries and {key.shape[1]} keys "
            f"with {masked}; it is for self-attention among all of its tokens"
        )
