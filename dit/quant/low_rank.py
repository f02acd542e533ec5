"""Low-rank branch in 16 bits beside quantized weights (SVDQuant, arXiv 2411.05007, section 4.2).

W is split into a part of rank r and a rest that is quantized: y = x (U D)^T + Q(x) Q(W - U D)^T. The rest is smaller
than W, above all where balance has moved outliers into the weights. The split is found by turns: the part is the best
approximation of what quantization of the rest has left of W, the rest is quantized anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 10
"""Turns at most."""
EXTRA = 8
"""Columns more than the rank in the iteration that finds singular vectors; they make it exact sooner."""
ITERATIONS = 4
SEED = 0
SMALLEST_WEIGHTING = 1e-3
"""Of a channel, as a fraction of the mean: what inputs hardly have still has weights that are stored."""


class LowRank(NamedTuple):
    """A low-rank branch.

    Attributes:
        down: bfloat16, (r, K).
        up: bfloat16, (N, r).
        error: of the layer with it, as the caller measures it.
    """

    down: Tensor
    up: Tensor
    error: float

    def weight(self) -> Tensor:
        """Return what the branch adds to the weight, float32, (N, K)."""
        return self.up.float() @ self.down.float()


def low_rank_branch(
    weight: Tensor,
    rank: int,
    quantize: Callable[[Tensor], Tensor],
    error: Callable[[Tensor, Tensor], float],
    *,
    weighting: Tensor | None = None,
    rotate: Callable[[Tensor], Tensor] | None = None,
    unrotate: Callable[[Tensor], Tensor] | None = None,
    rounds: int = ROUNDS,
) -> LowRank:
    """Split a weight into a low-rank part and a rest that is quantized.

    Of all rounds the branch with the least error is returned.

    Args:
        weight: float32, (N, K), balanced and rotated.
        rank: r, at most the smaller of N and K.
        quantize: from a weight to the nearest one that its format holds.
        error: from the quantized rest and the low-rank part, (N, K) each, to the error of the layer.
        weighting: root mean square of the inputs by channel, (K,), balanced but not rotated: what is approximated best
            are then outputs and not weights. None weighs all channels alike.
        rotate: what rotated the weight; needed with `weighting`, which is of the channels before that. None is no
            rotation.
        unrotate: undoes it.
        rounds: turns at most.

    Returns:
        The branch.

    Raises:
        ValueError: a rank that the weight can't have.
    """
    if not 0 < rank <= min(weight.shape):
        raise ValueError(f"rank is {rank}; a weight {tuple(weight.shape)} takes 1 to {min(weight.shape)}")
    factor = None
    if weighting is not None:
        factor = weighting / weighting.mean().clamp(min=1e-30)  # (K,)
        factor = factor.clamp(min=SMALLEST_WEIGHTING)
    best: LowRank | None = None
    start: Tensor | None = None
    rest = torch.zeros_like(weight)  # the quantized rest, (N, K)
    for _ in range(rounds):
        wanted = weight - rest  # (N, K)
        if factor is not None:
            wanted = (wanted if unrotate is None else unrotate(wanted)) * factor
        up, down = truncated_svd(wanted, rank, start)
        start = down  # turns differ little: the next one begins where this one ended
        if factor is not None:
            down = down / factor
            down = down if rotate is None else rotate(down)
        found = LowRank(*_even(down, up), error=0.0)
        part = found.weight()  # what the rounded branch really adds
        rest = quantize(weight - part)
        found = found._replace(error=error(rest, part))
        if best is None or found.error < best.error:
            best = found
    assert best is not None
    return best


def truncated_svd(matrix: Tensor, rank: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the best approximation of a rank by subspace iteration (Halko et al., arXiv 0909.4061, algorithm 4.4).

    Args:
        matrix: float32, (N, K).
        rank: r.
        start: (r, K), rows near the right singular vectors; None starts from random ones, the same ones every time.

    Returns:
        (N, r) and (r, K), whose product is the approximation.
    """
    rows, columns = matrix.shape
    size = min(rank + EXTRA, rows, columns)
    generator = torch.Generator().manual_seed(SEED)
    basis = torch.randn(columns, size, generator=generator).to(matrix.device)  # (K, q)
    if start is not None:
        basis[:, : len(start)] = torch.nn.functional.normalize(start, dim=1).mT
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis)[0]  # (N, q)
        basis = torch.linalg.qr(matrix.mT @ basis)[0]  # (K, q)
    left, values, right = torch.linalg.svd(matrix @ basis, full_matrices=False)  # (N, q), (q,), (q, q)
    up = left[:, :rank] * values[:rank]  # (N, r)
    return up, (right @ basis.mT)[:rank]  # (N, r), (r, K)


def _even(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Round both factors to bfloat16, scaled so that neither is much larger than the other."""
    sizes = (up.norm(dim=0) / down.norm(dim=1).clamp(min=1e-30)).clamp(min=1e-30).sqrt()  # (r,)
    return (down * sizes[:, None]).to(torch.bfloat16), (up / sizes).to(torch.bfloat16)
