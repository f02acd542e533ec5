"""The natten kernel: neighborhood patterns by NATTEN's fused kernels (arXiv 2504.16922), if it is installed.

It computes what `NeighborhoodRule` says on visual tokens in raster order, whatever the blocks of the map are. Axes
along which a query sees only its own place go into the batch, as NATTEN's smallest window is 2.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.kernels.contract import SparseKernel, Tail, register_kernel
from dit.attention.patterns.neighborhood import NeighborhoodRule


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
) -> tuple[Tensor, Tensor | None]:
    """Compute what `SparseFunction` says, without masked keys and tail."""
    if key_mask is not None or tail is not None:
        raise ValueError("the natten kernel has neither key_mask nor tail; use kernel='gather' or 'triton'")
    rule: Any = block_map.rule
    batch, length, heads, width = query.shape
    moved = [axis for axis in range(3) if rule.window[axis] == 1]
    kept = [axis for axis in range(3) if rule.window[axis] > 1]
    order = (0, *(1 + axis for axis in moved), *(1 + axis for axis in kept), 4, 5)
    back = tuple(order.index(i) for i in range(6))
    sizes = [rule.grid.shape[axis] for axis in kept]
    shape = (batch, *rule.grid.shape, heads, width)

    def as_grid(x: Tensor) -> Tensor:
        return x.view(shape).permute(order).reshape(-1, *sizes, heads, width)  # (B', ..., K, E)

    def as_sequence(x: Tensor) -> Tensor:
        """Bring (B', ..., K, C) back to (B, N, K, C)."""
        places = [rule.grid.shape[axis] for axis in moved]
        return x.reshape(batch, *places, *sizes, heads, -1).permute(back).reshape(batch, length, heads, -1)

    options = {
        name: tuple(getattr(rule, ours)[axis] for axis in kept)
        for name, ours in (("kernel_size", "window"), ("stride", "stride"), ("dilation", "dilation"))
    }
    causal = tuple(rule.causal[axis] for axis in kept)
    function = getattr(import_module("natten"), f"na{len(kept)}d")
    found = function(
        *map(as_grid, (query, key, value)), **options, is_causal=causal, scale=scale, return_lse=return_lse
    )
    if not return_lse:
        return as_sequence(found), None
    out, lse = found
    return as_sequence(out), as_sequence(lse[..., None])[..., 0].transpose(1, 2).float()  # (B, K, N)


def _why_not(query: Tensor, key: Tensor, block_map: BlockMap) -> str:
    """Say why a call can't be computed: only maps that are all of a neighborhood rule, without exact tokens."""
    rule = block_map.rule
    if not isinstance(rule, NeighborhoodRule):
        return "it computes the pattern 'neighborhood' only"
    if block_map.queries.grid != rule.grid or block_map.keys.grid != rule.grid or rule.grid.exact_length:
        return "it has no text or extra tokens"
    if any(side * step > size for side, step, size in zip(rule.window, rule.dilation, rule.grid.shape, strict=True)):
        return f"the window {rule.window} with the dilation {rule.dilation} is larger than the grid {rule.grid.shape}"
    if rule.window == (1, 1, 1) or any(step > side for step, side in zip(rule.stride, rule.window, strict=True)):
        return f"the window {rule.window} is a single token or smaller than the stride {rule.stride}"
    return _why_not_all_of(rule, block_map) or _trial(query.device, query.dtype, query.shape[-1])


def _why_not_all_of(rule: NeighborhoodRule, block_map: BlockMap) -> str:
    """Say how a map differs from all pairs of its rule."""
    counts = rule.block_counts(block_map.queries, block_map.keys)
    if counts is None:
        return "the blocks of the map aren't tiles, so that it isn't known to be all of the rule"
    sizes = block_map.queries.sizes[0, 0, :, None].to(counts.device) * block_map.keys.sizes[0, 0].to(counts.device)
    visits = block_map.visits.to(counts.device)
    asked = visits if block_map.partial is None else visits & block_map.partial.to(counts.device)
    if bool((visits != (counts > 0)).any()) or bool((visits & ~asked & (counts < sizes)).any()):
        return "the map isn't all of its rule"
    return ""


@cache
def _trial(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Attend once among a few tokens; return why that fails."""
    try:
        tokens = torch.zeros(1, 4, 4, 1, width, device=device, dtype=dtype)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a trial is too small to care about speed
            import_module("natten").na2d(tokens, tokens, tokens, kernel_size=3)
    except (RuntimeError, ValueError, ImportError, NotImplementedError, AttributeError, AssertionError) as error:
        return f"natten can't: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    return ""


register_kernel(SparseKernel("natten", attend, package="natten", why_not=_why_not))
