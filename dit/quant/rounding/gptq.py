"""GPTQ: weights rounded one input at a time, the rest of the row making up for each error."""

from __future__ import annotations

import torch
from torch import Tensor

from dit.quant.formats.base import Format, Scales, group_size

BLOCK = 128
DAMPING = (0.01, 0.1, 1.0, 10.0)
"""Parts of the mean diagonal that are added to the diagonal, one after the other, until a factorization succeeds."""


def round_and_compensate(
    weight: Tensor, fmt: Format, group: int, scales: Scales, gram: Tensor, block: int = BLOCK
) -> Tensor:
    """Round a weight so that the layer's output changes little (GPTQ, arXiv 2210.17323, algorithm 1).

    Scales are fixed beforehand ("static groups") and inputs are taken in their order.

    Args:
        weight: (N, K) fp32.
        fmt: format of the weights.
        group: inputs that share a scale, 0 is the whole row.
        scales: of the weight in that format.
        gram: (K, K) fp32, X^T X of the inputs X up to a factor.
        block: inputs after which errors are handed on to all later ones at once.

    Returns:
        The rounded weight, (N, K), on the grid of the scales.

    Raises:
        ValueError: `gram` is not positive semidefinite.
    """
    columns = weight.shape[1]
    size = group_size(columns, group)
    factor = _inverse_factor(gram)
    rest = weight.T.clone(memory_format=torch.contiguous_format)  # (K, N): one input's weights are neighbours
    rounded = torch.empty_like(rest)
    of_group = scales
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.empty_like(rest[start:end])  # (B, N)
        for k in range(start, end):
            if k % size == 0:
                of_group = scales.of_group(k // size)
            rounded[k] = fmt.snap(rest[k].view(-1, 1, 1), of_group).flatten()
            errors[k - start] = (rest[k] - rounded[k]) / factor[k, k]
            rest[k + 1 : end].addr_(factor[k, k + 1 : end], errors[k - start], alpha=-1)
        rest[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return rounded.T.contiguous()


def _inverse_factor(gram: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped matrix, (K, K).

    Inputs that were always 0 get a diagonal of 1: their weights are rounded to nearest.
    """
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    if not bool(mean > 0):
        raise ValueError(
            f"gram has a mean diagonal of {mean.item():.3g}; X^T X of inputs that are not all 0 is positive"
        )
    base = gram / mean
    silent = (diagonal <= 0).to(gram.dtype)
    for damping in DAMPING:
        damped = base + torch.diag(silent + damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed) and bool(torch.isfinite(upper).all()):
            return upper
    raise ValueError(
        f"gram is not positive semidefinite: no Cholesky factorization even with {DAMPING[-1]} times the mean diagonal "
        "added; pass X^T X of the layer's inputs, or use another rounding"
    )
