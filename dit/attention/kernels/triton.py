"""The Triton kernel: block-sparse flash attention on NVIDIA GPUs, also with scores in int8 and values in float8.

Queries are gathered as the kernel loads them and results scattered as it stores them. Keys and values are copied
into the layout's order before, because many programs read them, and rows side by side can be fetched as one tile: one
reading and writing of both, against `density` x n readings by the kernel. A layout that leaves the order as it is, with
pieces of one size, needs no copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.kernels.contract import SparseKernel, Tail, register_kernel
from dit.attention.kernels.triton_lists import Lists, lists_of
from dit.attention.layout import Layout

WIDEST = 256
"""Largest head width."""

LEAST_VERSION = (3, 4)
"""Of triton: the first whose tiles are described by the host."""


@dataclass(frozen=True, slots=True)
class TritonOptions:
    """How the kernel computes.

    Args:
        int8_scores: queries and keys in 8 bits: one scale for each piece, keys less their mean
            (SageAttention, arXiv 2410.02367).
        fp8_values: weights and values in float8 e4m3, one scale for each channel of the values
            (SageAttention2, arXiv 2411.10958); needs compute capability 8.9.
        skip_below: lambda of skip-softmax (BLASST, arXiv 2512.12087): the softmax and values of a piece are left out
            where no query in it has a score within log(lambda) of the largest so far; 0 leaves nothing out.
        block_m: queries of a program, a power of two; None chooses by the blocks.
        block_n: keys of a piece, a power of two from 32 on; None chooses by the blocks.
        use_tma: load tiles by the tensor memory accelerator: None tries both on a GPU.

    Raises:
        ValueError: a number out of its range.
    """

    int8_scores: bool = False
    fp8_values: bool = False
    skip_below: float = 0.0
    block_m: int | None = None
    block_n: int | None = None
    use_tma: bool | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.skip_below < 1:
            raise ValueError(f"skip_below must be from 0 (nothing is skipped) to less than 1, got {self.skip_below}")
        for name, least in (("block_m", 16), ("block_n", 32)):
            size = getattr(self, name)
            if size is not None and (size < least or size & (size - 1)):
                raise ValueError(f"{name} must be a power of two from {least} on, got {size}")


EXACT = TritonOptions()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    tail: Tail | None = None,
    return_lse: bool = False,
    options: TritonOptions = EXACT,
) -> tuple[Tensor, Tensor | None]:
    """Compute what `SparseFunction` says; `options` say how."""
    from dit.attention.kernels import triton_forward as kernels

    batch, length, heads, width = query.shape
    block_m, block_n = _piece_sizes(block_map, width, query.element_size(), options)
    lists = lists_of(block_map, block_m, block_n)
    query = query if query.stride(-1) == 1 else query.contiguous()
    out = query.new_empty(query.shape)  # (B, N, K, E)
    lse = query.new_empty(batch, heads, length, dtype=torch.float32) if return_lse else None  # (B, K, N)
    keys, values, mean = _pack(key, value, lists, key_mask, block_n, options)
    mask = None if key_mask is None else _packed_mask(key_mask, lists.source)  # (B, K', P)
    pooled = _pooled(tail, mean, values.scales, query.dtype)
    wide = 1 << max(width - 1, 15).bit_length()

    def leading(x: Tensor | None) -> tuple[int, int]:
        """Return the strides between samples and heads, 0 where they share."""
        return (0, 0) if x is None else tuple(x.stride(i) if x.shape[i] > 1 else 0 for i in (0, 1))  # type: ignore

    loads = (False, True) if options.use_tma is None else (options.use_tma,)
    if not all(_can_be_described(x.rows) for x in (keys, values)):
        loads = (False,)
    described = [keys.rows, values.rows]
    if True in loads:
        box = (wide, block_n) if options.fp8_values else (block_n, wide)
        described = [_describe(keys.rows, (block_n, wide)), _describe(values.rows, box)]
    kernel: Any = kernels.forward_kernel
    settings = {"TMA": loads == (True,), "STAGES": 1}
    if not kernels.IS_INTERPRETED:
        itemsize = max(keys.rows.element_size(), values.rows.element_size())
        kernel, settings = kernels.tuned_kernel(itemsize, block_n, loads), {}

    def pointer(x: Tensor | None) -> Tensor:
        """Return a tensor, or any where a call has no use for one."""
        return query if x is None else x

    kernel[lists.query_pieces.shape[2], heads, batch](
        query, *query.stride()[:3], out, pointer(lse),
        keys.rows, described[0], keys.rows.stride(0), keys.row_batch, keys.row_head, keys.column_head,
        values.rows, described[1], values.rows.stride(0), values.row_batch, values.row_head, values.column_head,
        pointer(keys.scales), pointer(mean), pointer(values.scales),
        lists.query_pieces, *leading(lists.query_pieces), lists.query_order, *leading(lists.query_order),
        lists.counts, *leading(lists.counts), lists.entries, *leading(lists.entries), lists.entries.stride(2),
        lists.key_sizes, *leading(lists.key_sizes), pointer(mask), *leading(mask),
        pointer(lists.bits), pointer(lists.bits_of), 0 if lists.bits is None else lists.bits.shape[1],
        lists.key_sizes.shape[2],
        *map(pointer, pooled), *leading(pooled[2]), lists.visits, *leading(lists.visits), block_map.keys.count,
        length, heads, scale * kernels.LOG2_E, math.log2(options.skip_below) if options.skip_below else 0.0, E=width,
        HAS_BITS=lists.bits is not None, HAS_KEY_MASK=mask is not None, HAS_TAIL=tail is not None,
        HAS_LSE=lse is not None, INT8=options.int8_scores, FP8=options.fp8_values, SKIPS=options.skip_below > 0,
        BLOCK_M=block_m, BLOCK_N=block_n, WIDTH=wide, **settings,
    )  # fmt: skip
    return out, lse


def pack_for(
    key: Tensor, value: Tensor, block_map: BlockMap, key_mask: Tensor | None = None, options: TritonOptions = EXACT
) -> None:
    """Do only what `attend` does before the kernel: bring keys and values into the layout's order; to be timed.

    Args:
        key: (B, M, K, E).
        value: (B, M, K, E).
        block_map: of the call.
        key_mask: bool, (B, M).
        options: of the call.
    """
    block_m, block_n = _piece_sizes(block_map, key.shape[-1], key.element_size(), options)
    _pack(key, value, lists_of(block_map, block_m, block_n), key_mask, block_n, options)


def _pack(
    key: Tensor, value: Tensor, lists: Lists, key_mask: Tensor | None, block_n: int, options: TritonOptions
) -> tuple[Any, Any, Tensor | None]:
    """Bring keys and values into the layout's order; see `triton_pack`."""
    from dit.attention.kernels import triton_pack as packing

    source = lists.source
    must_copy = key_mask is not None or options.int8_scores or options.fp8_values or key.shape[-1] & (key.shape[-1] - 1)
    if source is None and must_copy:
        source = torch.arange(key.shape[1], device=key.device)[None, None]  # (1, 1, M)
    mean = packing.mean_key(key, key_mask) if options.int8_scores else None  # (B, K, E)
    if source is None:
        return packing.as_they_are(key), packing.as_they_are(value), None
    if mean is None:
        keys = packing.pack(key, source, key_mask, block_n)
    else:
        keys = packing.pack_int8(key, source, key_mask, block_n, mean)
    pack_values = packing.pack_fp8 if options.fp8_values else packing.pack
    return keys, pack_values(value, source, key_mask, block_n), mean


def _packed_mask(key_mask: Tensor, source: Tensor | None) -> Tensor:
    """Bring a mask of keys (B, M) into the order of the packed keys, uint8, (B, K', P)."""
    if source is None:
        return key_mask[:, None].to(torch.uint8).contiguous()
    source = source.expand(key_mask.shape[0], -1, -1)  # (B, K', P)
    picked = key_mask[:, None].expand(-1, source.shape[1], -1).gather(-1, source.clamp(min=0))
    return (picked & (source >= 0)).to(torch.uint8)


def _pooled(
    tail: Tail | None, mean: Tensor | None, value_scales: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return a tail as the kernel takes it: less what smoothing takes off the keys, by the scale of the values."""
    if tail is None:
        return None, None, None
    key, value = tail.key.float(), tail.value.float()  # (B, K, m, E)
    if mean is not None:
        key = key - mean[..., None, :]
    if value_scales is not None:
        value = value / value_scales[..., None, :]
    return key.to(dtype).contiguous(), value.to(dtype).contiguous(), tail.log_count.float().contiguous()


def _can_be_described(rows: Tensor) -> bool:
    """Return whether the tensor memory accelerator can read a matrix: it wants rows at multiples of 16 bytes."""
    return rows.stride(0) * rows.element_size() % 16 == 0 and rows.data_ptr() % 16 == 0


def _describe(rows: Tensor, box: tuple[int, int]) -> Any:
    """Return what the tensor memory accelerator reads tiles of a matrix by."""
    descriptor = import_module("triton.tools.tensor_descriptor").TensorDescriptor
    return descriptor(rows, list(rows.shape), list(rows.stride()), list(box))


def _piece_sizes(block_map: BlockMap, width: int, itemsize: int, options: TritonOptions) -> tuple[int, int]:
    """Return `BLOCK_M` and `BLOCK_N`: 128, or less for small blocks or where shared memory is short."""
    kind = ("triton sizes", width, itemsize)
    if kind not in block_map.cache:
        most = 64 if itemsize > 2 or width > 128 else 128
        block_map.cache[kind] = _best_size(block_map.queries, most), _best_size(block_map.keys, most)
    block_m, block_n = block_map.cache[kind]
    return options.block_m or block_m, options.block_n or block_n


def _best_size(layout: Layout, most: int) -> int:
    """Return the largest size of a piece that fills up at most a tenth more than smaller ones would."""
    sizes = layout.sizes  # (B', K', n)
    filled = {size: int(((sizes + size - 1) // size * size).sum()) for size in (32, 64, 128) if size <= most}
    return max(size for size, total in filled.items() if total <= 1.1 * min(filled.values()))


def _why_not(query: Tensor, key: Tensor, block_map: BlockMap, *, options: TritonOptions = EXACT) -> str:
    """Say why a call can't be computed."""
    if not block_map.is_shared and not block_map.asks_nowhere:
        return "a rule of tokens needs an order, blocks and a rule that all heads share"
    return _why_not_here(query, options)


def _why_not_here(query: Tensor, options: TritonOptions) -> str:
    """Say why no map of such queries can be computed here."""
    if tuple(map(int, version("triton").split(".")[:2])) < LEAST_VERSION:
        return f"it needs triton {'.'.join(map(str, LEAST_VERSION))}, installed is {version('triton')}"
    if query.shape[-1] > WIDEST:
        return f"heads are {query.shape[-1]} wide, it goes to {WIDEST}"
    if query.device.type == "cpu":
        if not import_module("dit.attention.kernels.triton_forward").IS_INTERPRETED:
            return "on a CPU it runs only in Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported"
        return ""
    capability = torch.cuda.get_device_capability(query.device)
    least = (8, 9) if options.fp8_values else (8, 0)
    if capability < least:
        return f"it needs compute capability {least[0]}.{least[1]}, this device has {capability[0]}.{capability[1]}"
    return ""


def _register(name: str, options: TritonOptions) -> None:
    register_kernel(
        SparseKernel(
            name,
            partial(attend, options=options),
            package="triton",
            has_tail=True,
            why_not=partial(_why_not, options=options),
        )
    )


_register("triton", EXACT)
_register("triton_int8", TritonOptions(int8_scores=True))
_register("triton_int8_fp8", TritonOptions(int8_scores=True, fp8_values=True))
