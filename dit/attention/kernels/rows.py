"""Attention of some queries to some keys by plain products, on a CPU: what the dense and the gather kernel repeat.

torch's fused kernel for CPUs computes products of bfloat16 no faster than those of float32; its plain matrix products
in bfloat16 are more than twice as fast where the processor has instructions for them (AVX-512 BF16). What is left is to
keep scores in memory that is used again, because memory that is new to a process is cleared page by page, and to round
them where that does the least harm.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from threading import local
from typing import Any

import torch
from torch import Tensor

from dit.layers.linear import MIN_MACS, mkl_is_slow

SAMPLED = 64
"""Keys that tell how large the scores of a query are where its softmax is."""
PEAKY = 2.0
"""From such a mean level on it is found from all keys: a sample misses the few that matter."""
SAFE = 20
"""Scores of which the exponential and the sum of a row lose nothing in float32 and bfloat16."""
LEVEL_SCORES = 2**22
"""Most scores of queries and sampled keys that are held at a time."""

_KEPT = local()


def score_bytes(dtype: torch.dtype) -> int:
    """Return how many bytes of scores the operators of a task should write: as much as the cores' caches hold.

    oneDNN's products in float32 take new memory each time, of which more than this is cleared page by page.
    """
    return 2**21 if dtype == torch.float32 else min(torch.get_num_threads(), 8) * 2**21


def levels(query: Tensor, key: Tensor, scale: float) -> Tensor | None:
    """Estimate how large the scores are that matter to each query, by a sample of the keys.

    It is their mean under the squared softmax: for normal scores of deviation 1 their rounding errors in bfloat16 are
    least when taken from 2 (0.0018 of the output; 0.0037 from 0, 0.0035 from 4); where few keys matter it is near the
    largest.

    Args:
        query: (B, K, N, E).
        key: (B, K, M, E).
        scale: factor of the scores.

    Returns:
        (B, K, N, 1) in the query's dtype; None where scores aren't rounded.
    """
    if query.dtype == torch.float32 or key.shape[2] == 0:
        return None
    some = key[:, :, :: max(key.shape[2] // SAMPLED, 1)].mT.contiguous()  # (B, K, E, 64)
    step = max(LEVEL_SCORES // (some.shape[-1] * query.shape[0] * query.shape[1]), 1)
    parts = []
    for start in range(0, query.shape[2], step):
        doubled = (query[:, :, start : start + step] @ some).mul_(2 * scale)  # (B, K, N', 64)
        parts.append(doubled.softmax(-1).mul_(doubled).sum(-1, keepdim=True).mul_(0.5))
    level = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
    return level.nan_to_num_(0.0, 0.0, 0.0)  # a key that is NaN concerns those only who look at it


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    level: Tensor | None = None,
    hidden: Tensor | None = None,
    bias: Tensor | None = None,
    may_be_empty: bool = False,
    return_lse: bool = False,
    fused: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend; all keys at once.

    In bfloat16 scores are rounded after a level near those that matter was taken off them: what matters is then small,
    and is rounded about as finely as the fused kernel rounds its weights.

    Args:
        query: (G, R, E), contiguous.
        key: (G, M, E), contiguous.
        value: (G, M, E), contiguous.
        scale: factor of the scores.
        level: (G, R, 1), see `levels`; None leaves scores as they are.
        hidden: (R, C) or (G, R, C), of the first C keys: bool, True for pairs that don't count; or in the dtype of the
            scores what is added to them, -inf for these pairs and else 0, which is faster and wants finite scores.
        bias: (G', 1, U) with G' of 1 or G, added to the scores of the last U keys.
        may_be_empty: a query may have no key that counts; it gets zeros, and -inf as its LSE.
        return_lse: also return the LSE, (G, R), float32.
        fused: in float32 by MKL, with neither `hidden` nor `bias`, use torch's fused kernel: it never writes the scores
            down.
    """
    if query.dtype == torch.float32 and query.device.type == "cpu":
        is_added = hidden is None or hidden.dtype != torch.bool
        if mkl_is_slow() and is_added and not may_be_empty and not _suits_onednn(query, key):
            return _by_fused_kernel(query, key, value, scale, hidden, bias)
        if mkl_is_slow():
            return _by_onednn(query, key, value, scale, hidden, bias, may_be_empty, return_lse)
        if fused and hidden is None and bias is None:
            return _by_fused_kernel(query, key, value, scale, None, None)
    # 1. scores, less the level of each row
    shape = (*query.shape[:2], key.shape[1])
    scores = _scores(query, key, scale, level, shape)  # (G, R, M)
    if level is not None and float(level.mean()) > PEAKY:
        level = level + (scores.amax(-1, keepdim=True) - 1)  # (G, R, 1)
        scores = _scores(query, key, scale, level, shape)
    _mask(scores, hidden, bias)
    empty = scores.isneginf().all(-1, keepdim=True) if may_be_empty else None  # (G, R, 1)
    # 2. softmax and the mean of the values
    if not return_lse:
        weights = torch.softmax(scores, -1, out=reused("weights", shape, query))  # (G, R, M)
        out = torch.bmm(weights, value)  # (G, R, E)
        return out if empty is None else out.masked_fill(empty, 0), None
    return _with_lse(scores, value, level, empty)


@cache
def has_fast_onednn() -> bool:
    """Return whether attention in float32 gains by oneDNN's products on this processor.

    They are written for AVX-512, and double the rate of MKL's, which leaves that unused on other processors than
    Intel's (`dit.layers.linear`). AMD's Zen 4 (family 25) computes AVX-512 in two halves, at the rate of AVX2.
    """
    return mkl_is_slow() and not is_zen4()


def is_zen4() -> bool:
    """Return whether this is one of AMD's processors that compute AVX-512 in two halves."""
    return "AuthenticAMD" in _processor() and "cpu family\t: 25\n" in _processor()


@cache
def _processor() -> str:
    """Return what the system says of the first processor; empty where it doesn't."""
    listing = Path("/proc/cpuinfo")
    return listing.read_text().partition("\n\n")[0] + "\n" if listing.is_file() else ""


def _suits_onednn(query: Tensor, key: Tensor) -> bool:
    """Return whether oneDNN's products of (R, E) and (M, E) make up for the longer way to them."""
    return has_fast_onednn() and query.shape[1] * key.shape[1] * query.shape[2] >= MIN_MACS


def _mask(scores: Tensor, hidden: Tensor | None, bias: Tensor | None) -> None:
    """Add the bias to scores (G, R, M), and hide pairs."""
    if bias is not None:
        scores[..., -bias.shape[-1] :] += bias.to(scores.dtype)
    if hidden is None:
        return
    some = scores[..., : hidden.shape[-1]]
    if hidden.dtype == torch.bool:
        some.masked_fill_(hidden, -torch.inf)
    else:
        some.add_(hidden)


def _by_fused_kernel(
    query: Tensor, key: Tensor, value: Tensor, scale: float, hidden: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend in float32 by torch's fused kernel, whose products are MKL's; each query has a key that counts."""
    mask = None
    if hidden is not None or bias is not None:
        count = max(len(one) if one is not None and one.ndim == 3 else 1 for one in (hidden, bias))
        rows = 1 if hidden is None else query.shape[1]  # a bias is the same for all queries
        mask = reused("mask", (count, 1, rows, key.shape[1]), query).zero_()  # (G', 1, R', M)
        _mask(mask[:, 0], hidden, bias)
        mask = mask.expand(len(query), -1, query.shape[1], -1)
    operator: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    parts = (x[:, None] for x in (query, key, value))  # (G, 1, R, E), (G, 1, M, E)
    out, lse = operator(*parts, attn_mask=mask, scale=scale)  # (G, 1, R, E), (G, R, 1) or (G, 1, R)
    return out[:, 0], lse.reshape(query.shape[:2])


def _by_onednn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    hidden: Tensor | None,
    bias: Tensor | None,
    may_be_empty: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend in float32 by oneDNN's products, see `dit.layers.linear`; one of the G after another."""
    product: Any = torch.ops.mkldnn._linear_pointwise
    query = query * scale
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[:2]) if return_lse else None
    for number in range(len(query)):
        scores = product(query[number], key[number], None, "none", [], "")  # (R, M)
        some = hidden if hidden is None or hidden.ndim == 2 else hidden[min(number, len(hidden) - 1)]
        _mask(scores, some, None if bias is None else bias[min(number, len(bias) - 1)])
        weights = torch.softmax(scores, -1, out=reused("weights", tuple(scores.shape), scores))  # (R, M)
        out[number] = product(weights, value[number].t(), None, "none", [], "")  # (R, E)
        if may_be_empty:
            out[number].masked_fill_(scores.isneginf().all(-1, keepdim=True), 0)
        if lse is not None:
            lse[number] = scores.logsumexp(-1)
    return out, lse


def _scores(query: Tensor, key: Tensor, scale: float, level: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Return the scores less the level, (G, R, M)."""
    memory = reused("scores", shape, query)
    if level is None:
        return torch.baddbmm(query.new_empty(()), query, key.mT, beta=0, alpha=scale, out=memory)
    return torch.baddbmm(level.neg(), query, key.mT, alpha=scale, out=memory)


def _with_lse(scores: Tensor, value: Tensor, level: Tensor | None, empty: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the weighted mean of the values and the LSE; `scores` is overwritten."""
    largest = scores.amax(-1, keepdim=True)  # (G, R, 1)
    if empty is not None:
        largest = largest.masked_fill(empty, 0)
    if bool((largest.abs() < SAFE).all()):  # NaN fails too; another subtraction would be another rounding
        largest = torch.zeros_like(largest)
    else:
        scores = scores.sub_(largest)
    weights = scores.exp_()  # (G, R, M)
    total = weights.sum(-1, keepdim=True, dtype=torch.float32)  # (G, R, 1)
    out = torch.bmm(weights, value)  # (G, R, E)
    out = out.div_(total if empty is None else total.masked_fill(empty, 1))
    lse = total.log() + largest.float()  # (G, R, 1)
    return out, (lse if level is None else lse + level.float())[..., 0]


def reused(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return memory of a shape that this thread uses again under a name; what is larger than usual gets its own."""
    count = math.prod(shape)
    if like.device.type != "cpu" or count * like.element_size() > 2 * score_bytes(like.dtype):
        return like.new_empty(shape)
    held: dict[Any, Tensor] = vars(_KEPT).setdefault("held", {})
    key = name, like.dtype
    if key not in held or held[key].numel() < count:
        with torch.inference_mode(False):  # or calls outside of that mode couldn't write to it
            held[key] = torch.empty(count, dtype=like.dtype)
    return held[key][:count].view(shape)
