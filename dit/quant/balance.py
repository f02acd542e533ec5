"""Balance between channels of inputs and weights: large inputs are divided, and their weights multiplied.

x W^T = (x / s) (W s)^T for any s > 0, one number a channel. With s_c = A_c^alpha / B_c^(1 - alpha), where A_c is the
magnitude of the inputs and B_c that of the weights, alpha = 1 evens out the inputs, alpha = 0 the weights, and 0.5
leaves both as uneven (SmoothQuant, arXiv 2211.10438, eq. 4). In diffusion transformers A_c changes with the noise
level; what stands for all levels is a choice, see `AGGREGATES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.quant.statistics import LayerStatistics

AGGREGATES = ("max", "first", "ema", "spearman", "percentile")
"""How magnitudes of several noise levels become one.

max: the largest of all levels (DiTAS, arXiv 2409.07756).
first: the largest of the noisiest quarter of the levels, or of the first scales: there modulation makes the outliers
    that do not change, rotation takes those that do (ViDiT-Q's static part, arXiv 2406.02540).
ema: moving average along a run, so that early levels count most (ViDiT-Q's first version, momentum 0.95).
spearman: average in which a level counts the more, the less its large channels are large in the weights too (PTQ4DiT,
    arXiv 2405.16005, eq. 7 to 9).
percentile: the 99.9th percentile of the sampled rows, so that single tokens do not count.
"""
SMALLEST_MAGNITUDE = 1e-5
"""Stands for channels that are zero."""
RANGE = 1e-4, 1e4
"""Of the factors: beyond it bfloat16 inputs would vanish or overflow."""
COARSE = tuple(step / 10 for step in range(11))
FINE = 0.05
"""Exponents that a search tries: the coarse ones, then those around the best of them."""
MOMENTUM = 0.95
PERCENTILE = 0.999


@dataclass(frozen=True, eq=False)
class Balance:
    """How the channels of a layer's inputs are balanced.

    Attributes:
        scale: s, float32, (K,): inputs are divided by it, weights multiplied; None leaves both alone.
        alpha: exponent that it was made with; None where there is no scale.
        error: mean relative error of the layer's output with it, where it was searched.
    """

    scale: Tensor | None
    alpha: float | None
    error: float | None = None


def input_magnitude(statistics: LayerStatistics, weight_magnitude: Tensor, aggregate: str = "max") -> Tensor:
    """Return one magnitude for each channel of the inputs.

    Args:
        statistics: of the layer.
        weight_magnitude: largest magnitude of the weights by channel, (K,); "spearman" compares with it.
        aggregate: one of `AGGREGATES`.

    Returns:
        float32, (K,).

    Raises:
        ValueError: an unknown aggregate, or "percentile" without sampled rows.
    """
    amax = statistics.amax.float()  # (L, K)
    if aggregate == "max":
        return amax.amax(0)
    if aggregate == "first":
        return amax[_first_bins(statistics)].amax(0)
    if aggregate == "ema":
        return _moving_average(statistics)
    if aggregate == "spearman":
        likeness = torch.stack([spearman(one, weight_magnitude.to(amax.device)) for one in amax])  # (L,)
        return torch.softmax(-likeness, 0) @ amax
    if aggregate == "percentile":
        if not len(statistics.rows):
            raise ValueError("aggregate is 'percentile', but the statistics hold no rows; calibrate with rows=256")
        return torch.quantile(statistics.rows.float().abs(), PERCENTILE, dim=0)
    raise ValueError(f"aggregate is {aggregate!r}; use one of {', '.join(AGGREGATES)}")


def balance_scale(input_magnitude: Tensor, weight_magnitude: Tensor, alpha: float) -> Tensor:
    """Return s_c = A_c^alpha / B_c^(1 - alpha), scaled to the geometric mean 1.

    Args:
        input_magnitude: A, (K,).
        weight_magnitude: B, (K,); of several layers that read the same input the largest.
        alpha: exponent, from 0 to 1.

    Returns:
        float32, (K,), within `RANGE`.

    Raises:
        ValueError: alpha is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; use a number from 0 to 1")
    inputs = input_magnitude.double().clamp(min=SMALLEST_MAGNITUDE).log()  # (K,)
    weights = weight_magnitude.double().clamp(min=SMALLEST_MAGNITUDE).log()  # (K,)
    exponent = alpha * inputs - (1 - alpha) * weights
    return (exponent - exponent.mean()).exp().clamp(*RANGE).float()


def search_balance(
    input_magnitude: Tensor, weight_magnitude: Tensor, error: Callable[[Tensor | None], float]
) -> Balance:
    """Find the exponent with the least error of the layer's output.

    Args:
        input_magnitude: A, (K,).
        weight_magnitude: B, (K,).
        error: from s, or None for no balance, to the error of the quantized layer.

    Returns:
        The best balance; one without a scale where none at all is better.
    """

    def attempt(alpha: float) -> Balance:
        scale = balance_scale(input_magnitude, weight_magnitude, alpha)
        return Balance(scale, alpha, error(scale))

    coarse = {alpha: attempt(alpha) for alpha in COARSE}
    middle = min(coarse, key=lambda alpha: _error(coarse[alpha]))
    fine = [attempt(round(alpha, 2)) for alpha in (middle - FINE, middle + FINE) if 0 <= alpha <= 1]
    return min([Balance(None, None, error(None)), *coarse.values(), *fine], key=_error)  # the first of equal ones


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Return the rank correlation of two vectors (K,); equal values share the mean of their ranks."""
    first, second = _ranks(x), _ranks(y)
    first, second = first - first.mean(), second - second.mean()
    return (first @ second / (first.norm() * second.norm()).clamp(min=1e-12)).float()


def _error(balance: Balance) -> float:
    return math.inf if balance.error is None else balance.error


def _ranks(x: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()  # rank of the last of equal values
    return (last - (counts - 1) / 2)[inverse]


def _first_bins(statistics: LayerStatistics) -> list[int]:
    """Return the bins of the first quarter of the levels, of at least one; all bins where no level is known."""
    levels = statistics.levels()
    known = [bins for bins in levels if not math.isnan(float(statistics.sigmas[bins[0]]))] or levels
    return [number for bins in known[: max(len(known) // 4, 1)] for number in bins]


def _moving_average(statistics: LayerStatistics) -> Tensor:
    """Average the levels along a run; of a level's branches the larger counts, as they share a batch."""
    first, *others = (statistics.amax[bins].amax(0).float() for bins in statistics.levels())  # (K,) each
    for here in others:
        first = MOMENTUM * first + (1 - MOMENTUM) * here
    return first
