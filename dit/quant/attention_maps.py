"""Quantization of attention maps: levels for numbers between 0 and 1 of which few are large, and how hard a map is.

After a softmax most weights are tiny and a few are large, which evenly spaced levels hold badly. AdaLog spaces levels
by a logarithm whose base is searched, TanQ by a tangent, denser near 1. Neither gives a product of integers: they say
what a kernel that looks values up in a table would lose. PAROAttention keeps even levels and brings tokens into an
order in which the numbers of a block are alike.

All functions are elementwise or reduce the last axes, and take maps of any leading shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

RESOLUTION = 37
"""r of AdaLog: bases are powers of 2^(1 / 37)."""
SMALLEST = 1e-15
"""Weights below it count as this."""
ADALOG_BASES = tuple(range(10, 139))
"""q of AdaLog that are tried: bases from 1.2 to 13."""
TANQ_ANGLES = tuple(math.pi / 2 * step / 50 for step in range(1, 50))
"""a of TanQ that are tried; towards 0 its levels become even."""
ORDER_BALANCE = 0.5
"""Weight of sparsity beside incoherence in the score of an order."""
NEGLIGIBLE = 1e-3
"""Weights below it, relative to the largest of their query, count as none in the score of an order."""
SPARSE_SHARE = 0.95
"""A block is sparse where at least this share of its weights is negligible."""

Candidate = TypeVar("Candidate", int, float)

MapQuantizer = Callable[[Tensor], Tensor]
"""From weights in [0, 1] to the values that a format holds, elementwise or row by row, of the same shape."""


def quantize_even(weights: Tensor, bits: int, step: Tensor | float | None = None) -> Tensor:
    """Round weights to even levels 0 to 2^bits - 1: what integer products can work with.

    Args:
        weights: in [0, 1], any shape.
        bits: from 2 to 8.
        step: distance of the levels, broadcast to `weights`; None is 1 / (2^bits - 1), which holds every weight.

    Returns:
        float32, the same shape.
    """
    highest = 2 ** _checked_bits(bits) - 1
    distance = 1 / highest if step is None else step
    return (weights.float() / distance).round().clamp(0, highest) * distance


# ------------------------------------------------------------------------------ AdaLog


def adalog_codes(weights: Tensor, bits: int, q: int, scale: float = 1.0) -> Tensor:
    """Return codes by a logarithm to the base 2^(q / 37) (AdaLog, arXiv 2407.12951, section 3.2).

    k = round(-log2(weight / scale) * 37 / q). Codes from 2^bits on become 2^bits, which stands for 0: the authors' code
    sets such weights to 0 without giving up one of the 2^bits codes for that, and so does this.

    Args:
        weights: in [0, scale], any shape.
        bits: from 2 to 8.
        q: exponent of the base, in 37ths; larger ones reach further down in coarser steps.
        scale: the largest weight.

    Returns:
        int16, the same shape, 0 to 2^bits.
    """
    _checked_base(q)
    scaled = (weights.float() / scale).clamp(min=SMALLEST, max=1.0)
    codes = (-scaled.log2() * RESOLUTION / q).round()
    return codes.clamp(0, 2 ** _checked_bits(bits)).to(torch.int16)


def adalog_values(codes: Tensor, bits: int, q: int, scale: float = 1.0) -> Tensor:
    """Return what codes of `adalog_codes` stand for: a shift by whole bits, and one of 37 fractions.

    2^-floor(k q / 37) * round(2^-((k q mod 37) / 37) * L) / L with L = 2^(bits + 1) - 2, so that hardware needs two
    small tables and a shift (arXiv 2407.12951, section 3.2).

    Args:
        codes: int16.
        bits: as they were made with.
        q: as they were made with.
        scale: as they were made with.

    Returns:
        float32, the same shape.
    """
    _checked_base(q)
    product = torch.arange(2 ** _checked_bits(bits), device=codes.device) * q  # (2^bits,)
    finest = 2 ** (bits + 1) - 2
    fraction = (2.0 ** (-(product % RESOLUTION) / RESOLUTION) * finest).round() / finest
    table = 2.0 ** -(product // RESOLUTION).float() * fraction
    return F.pad(table, (0, 1))[codes.long()] * scale


def quantize_adalog(weights: Tensor, bits: int, q: int, scale: float = 1.0) -> Tensor:
    """Round weights to the levels of AdaLog, see `adalog_codes` and `adalog_values`; float32."""
    return adalog_values(adalog_codes(weights, bits, q, scale), bits, q, scale)


def search_adalog(weights: Tensor, value: Tensor, bits: int, bases: Iterable[int] = ADALOG_BASES) -> int:
    """Find the base with which weights times values lose least (arXiv 2407.12951, section 3.3).

    The authors search scales of the values along with it (their progressive search); here values keep theirs.

    Args:
        weights: after the softmax, (..., N, M).
        value: (..., M, E), as the product sees it.
        bits: from 2 to 8.
        bases: q that are tried.

    Returns:
        q of the least squared error of the product.
    """
    return _best(weights, value, bases, lambda q: quantize_adalog(weights, bits, q))


# -------------------------------------------------------------------------------- TanQ


def tanq_codes(weights: Tensor, bits: int, angle: float) -> Tensor:
    """Return codes by a tangent: levels are denser near 1, where little is lost by few levels near 0.

    round((2^bits - 1) * tan(a weight) / tan(a)) (TanQ of DopQ-ViT, arXiv 2408.03291). There is no code of the authors
    that this could be compared with; `a` is searched for the least error of the product.

    Args:
        weights: in [0, 1], any shape.
        bits: from 2 to 8.
        angle: a, between 0 and pi / 2; the nearer to pi / 2, the more of the levels are near 1.

    Returns:
        int16, the same shape, 0 to 2^bits - 1.
    """
    highest = 2 ** _checked_bits(bits) - 1
    _checked_angle(angle)
    return ((weights.float().clamp(0, 1) * angle).tan() * (highest / math.tan(angle))).round().to(torch.int16)


def tanq_values(codes: Tensor, bits: int, angle: float) -> Tensor:
    """Return what codes of `tanq_codes` stand for: atan(code * tan(a) / (2^bits - 1)) / a.

    Args:
        codes: int16.
        bits: as they were made with.
        angle: as they were made with.

    Returns:
        float32, the same shape.
    """
    highest = 2 ** _checked_bits(bits) - 1
    return (codes.float() * (math.tan(_checked_angle(angle)) / highest)).atan() / angle


def quantize_tanq(weights: Tensor, bits: int, angle: float) -> Tensor:
    """Round weights to the levels of TanQ, see `tanq_codes` and `tanq_values`; float32."""
    return tanq_values(tanq_codes(weights, bits, angle), bits, angle)


def search_tanq(weights: Tensor, value: Tensor, bits: int, angles: Iterable[float] = TANQ_ANGLES) -> float:
    """Find the angle with which weights times values lose least.

    Args:
        weights: after the softmax, (..., N, M).
        value: (..., M, E), as the product sees it.
        bits: from 2 to 8.
        angles: a that are tried.

    Returns:
        a of the least squared error of the product.
    """
    return _best(weights, value, angles, lambda angle: quantize_tanq(weights, bits, angle))


# ------------------------------------------------------------------ how hard a map is


def block_incoherence(weights: Tensor, block: int | tuple[int, int] = 64) -> Tensor:
    """Return how uneven the weights of each block are: the largest over the mean (PAROAttention, arXiv 2506.16054).

    It is what one scale for the block costs: with evenly spaced levels, most weights of a block with a large value fall
    on the lowest few.

    Args:
        weights: (..., N, M), not negative.
        block: queries and keys of a block; (1, M) is a scale for each query.

    Returns:
        (..., n, m), at least 1; 1 for blocks of zeros.
    """
    largest, total, count = _block_sums(weights, block)
    return torch.where(total > 0, largest * count / total.clamp(min=SMALLEST), 1.0)


def sparse_blocks(weights: Tensor, block: int | tuple[int, int] = 64) -> Tensor:
    """Return the share of blocks that could be left out: those of which nearly all weights are negligible.

    Args:
        weights: (..., N, M), not negative.
        block: queries and keys of a block.

    Returns:
        (...), 0 to 1.
    """
    negligible = weights < NEGLIGIBLE * weights.amax(-1, keepdim=True)  # (..., N, M)
    _, total, count = _block_sums(negligible.float(), block)
    return (total >= SPARSE_SHARE * count).float().mean((-2, -1))


def score_orders(
    maps: Sequence[Tensor], block: int | tuple[int, int] = 64, balance: float = ORDER_BALANCE
) -> tuple[int, list[float]]:
    """Choose the order of tokens whose map is easiest to compute in blocks (PAROAttention, arXiv 2506.16054).

    The score adds the share of blocks that can't be left out and the mean incoherence of the blocks, with weights
    `balance` and 1 - `balance`; the least is best. Incoherence is relative to the largest of the orders, so that both
    parts lie between 0 and 1.

    Args:
        maps: the same weights in each of the orders, (..., N, M); leading axes are averaged.
        block: queries and keys of a block.
        balance: weight of sparsity, 0 to 1.

    Returns:
        Index of the best, and the scores.

    Raises:
        ValueError: no maps, or `balance` out of its range.
    """
    if not maps or not 0 <= balance <= 1:
        raise ValueError(f"got {len(maps)} maps and balance={balance}; give at least one map, and 0 to 1")
    dense = [1 - float(sparse_blocks(one, block).mean()) for one in maps]
    uneven = [float(block_incoherence(one, block).mean()) for one in maps]
    scores = [balance * a + (1 - balance) * b / max(uneven) for a, b in zip(dense, uneven, strict=True)]
    return min(range(len(scores)), key=scores.__getitem__), scores


def _block_sums(x: Tensor, block: int | tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest number, the sum and the count of each block, (..., n, m) each; the last may be smaller."""
    rows, columns = (block, block) if isinstance(block, int) else block
    if min(rows, columns) < 1:
        raise ValueError(f"block is {block}; use sizes of at least 1")
    missing = -x.shape[-2] % rows, -x.shape[-1] % columns

    def blocks(of: Tensor) -> Tensor:
        padded = F.pad(of, (0, missing[1], 0, missing[0]))
        return padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))  # (..., n, r, m, c)

    cut = blocks(x.float())
    count = blocks(torch.ones(x.shape[-2:], device=x.device)).sum((-3, -1))  # (n, m)
    return cut.amax((-3, -1)), cut.sum((-3, -1)), count


def _best(
    weights: Tensor, value: Tensor, candidates: Iterable[Candidate], quantize: Callable[[Candidate], Tensor]
) -> Candidate:
    """Return the candidate with which quantized weights times values are nearest to the exact product."""
    exact = weights.float() @ value.float()  # (..., N, E)
    return min(candidates, key=lambda one: float((quantize(one) @ value.float() - exact).square().sum()))


def _checked_bits(bits: int) -> int:
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits!r}; use a whole number from 2 to 8")
    return bits


def _checked_base(q: int) -> None:
    if not isinstance(q, int) or q < 1:
        raise ValueError(f"q is {q!r}; use a whole number from 1 on, such as 37 for the base 2")


def _checked_angle(angle: float) -> float:
    if not 0 < angle < math.pi / 2:
        raise ValueError(f"angle is {angle!r}; use a number between 0 and pi / 2")
    return angle
