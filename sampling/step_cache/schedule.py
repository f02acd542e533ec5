"""Choose the steps to compute from the Gram matrix of predictions.

Exact for its model of the error: the forecast of a skipped step is wrong by what the Gram matrix says, an error counts
by the length of its step and by what later steps leave of it, and errors add up. Then, because errors of different
gaps may also cancel, steps are moved one at a time while that lowers the squared length of the summed error (with the
computed predictions taken as given).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dit.runtime.noise_levels import remaining_error

RIDGE = 1e-5
"""Added to the diagonal in least squares, as a fraction of its mean."""

SEPARATE_ERROR_WEIGHT = 1.0
"""Weight of each step's own squared error against the summed error in the local search: the cancellation of errors
seen in calibration is trusted only half."""


@dataclass(frozen=True)
class Errors:
    """Errors of forecasts from two computed steps p < a (p = a: from one alone), and from what a step itself brings.

    Args:
        gram: of the predictions, (N, N); with inputs behind them, (2 N, 2 N).
        lengths: of the steps in sigma, times what remains of an error, (N,).
        newest: weight of step a in the forecast of j, [p, a, j], (N, N, N).
        older: weight of step p, (N, N, N).
        entered: weight of the input at step j, (N, N, N).
        size: root mean square error of the forecast times the step's `lengths`, (N, N, N).
    """

    gram: np.ndarray
    lengths: np.ndarray
    newest: np.ndarray
    older: np.ndarray
    entered: np.ndarray
    size: np.ndarray

    @classmethod
    def of(cls, gram: np.ndarray, sigmas: Sequence[float], fill: str = "newton") -> Errors:
        """Compute the errors of all forecasts.

        Args:
            gram: (N, N); for "gram" also (2 N, 2 N), where the inputs of all steps follow the predictions.
            sigmas: noise levels, falling, (N,).
            fill: "reuse", "newton" (a line in sigma) or "gram" (least squares).

        Raises:
            ValueError: an unknown fill.
        """
        # weights of the two computed steps p < a (and of the input at j) in the forecast of step j
        count = len(sigmas)
        levels = np.asarray(sigmas, np.float64)
        p, a, j = np.ogrid[:count, :count, :count]
        entered = np.zeros((count, count, count))
        if fill == "reuse":
            newest, older = np.ones_like(entered), entered
        elif fill == "newton":
            way = levels[a] - levels[p]  # (N, N, 1)
            ahead = np.where(way != 0, (levels[j] - levels[a]) / np.where(way != 0, way, 1.0), 0.0)  # (N, N, N)
            newest, older = 1.0 + ahead, -ahead
        elif fill == "gram":
            newest, older, entered = _least_squares(gram, count)
        else:
            raise ValueError(f"fill {fill!r} is not known; use 'reuse', 'newton' or 'gram'")
        # squared error of every forecast: w^T G w with w = (newest, older, -1, entered)
        parts = [(a, newest), (p, older), (j, -1.0)] + ([(count + j, entered)] if len(gram) > count else [])
        square = sum(one * other * gram[at, to] for at, one in parts for to, other in parts)  # (N, N, N)
        # an error counts by the length of its step and by what later steps leave of it
        lengths = np.abs(np.diff(levels, append=0.0)) * remaining_error(sigmas)  # (N,)
        return cls(gram, lengths, newest, older, entered, np.sqrt(np.maximum(square, 0.0)) * lengths)


def _least_squares(gram: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the weights of steps a and p and of the input at j that fit j best, (N, N, N) each; p has 0 if p = a."""
    p, a, j = np.ogrid[:count, :count, :count]
    columns = [a, p] + ([count + j] if len(gram) > count else [])
    shape, size = (count, count, count), np.diag(gram)
    ridge = RIDGE * sum(size[column] for column in columns) / len(columns)
    # normal equations (G + ridge) w = g, one system for each (p, a, j)
    known = np.empty((*shape, len(columns), len(columns)))  # (N, N, N, 2 or 3, 2 or 3)
    wanted = np.empty((*shape, len(columns), 1))
    for row, one in enumerate(columns):
        wanted[..., row, 0] = gram[one, j]
        for column, other in enumerate(columns):
            known[..., row, column] = gram[one, other] + (ridge if row == column else 0.0)
    # p = a: one computed step alone, so drop its second column
    alone = np.arange(count)
    known[alone, alone, :, 1, :] = known[alone, alone, :, :, 1] = wanted[alone, alone, :, 1] = 0.0
    known[alone, alone, :, 1, 1] = 1.0
    weights = np.linalg.solve(known, wanted)[..., 0]  # (N, N, N, 2 or 3)
    return weights[..., 0], weights[..., 1], weights[..., 2] if len(columns) > 2 else np.zeros(shape)


def best_steps(errors: Errors, count: int) -> tuple[bool, ...]:
    """Choose the steps to compute; the first always is.

    Args:
        errors: of all forecasts.
        count: how many steps are computed, 1 to N.

    Returns:
        True for each computed step.
    """
    anchors = local_search(errors, shortest_path(errors, count))
    return tuple(step in anchors for step in range(len(errors.lengths)))


def shortest_path(errors: Errors, count: int) -> list[int]:
    """Find the steps with the least sum of errors, by dynamic programming over the two newest ones: O(count N^3).

    Args:
        errors: of all forecasts.
        count: how many steps are computed.
    """
    steps = len(errors.lengths)
    # gaps[p, a, b]: summed error of the skipped steps between a and b, if a and p < a are the newest computed steps
    cumulative = np.concatenate([np.zeros((steps, steps, 1)), np.cumsum(errors.size, axis=2)], axis=2)  # (N, N, N + 1)
    a = np.arange(steps)
    gaps = cumulative - cumulative[:, a, a + 1][:, :, None]  # (N, N, N + 1)
    b = np.arange(steps + 1)
    gaps = np.where(b[None, None] > a[None, :, None], gaps, np.inf)
    # dynamic programming: cost[p, a] of the best plan whose newest computed steps are p and a
    cost = np.full((steps, steps), np.inf)
    cost[0, 0] = 0.0  # step 0 alone
    previous = []
    for _ in range(count - 1):
        ways = cost[:, :, None] + gaps[:, :, :steps]  # [p, a, b], (N, N, N)
        previous.append(ways.argmin(axis=0))  # (N, N): the p before (a, b)
        cost = ways.min(axis=0)
    # best end, then backtrack
    p, a = np.unravel_index(np.argmin(cost + gaps[:, :, steps]), cost.shape)
    found = [int(a)]
    for layer in reversed(previous):
        found.append(int(p))
        p, a = layer[p, a], p
    return sorted(found)


def local_search(errors: Errors, anchors: Sequence[int]) -> list[int]:
    """Move single steps while the summed error gets smaller; the first stays.

    Args:
        errors: of all forecasts.
        anchors: the computed steps, rising.
    """
    total, best = _Total(errors), list(anchors)
    value = total(best)
    while True:
        # all plans that differ in one step
        moves = [
            sorted([*best[:i], step, *best[i + 1 :]])
            for i in range(1, len(best))
            for step in range(1, len(errors.lengths))
            if step not in best
        ]
        found = min(moves, key=total, default=best)
        if not total(found) < 0.999 * value:
            return best
        best, value = found, total(found)


class _Total:
    """Squared length of the sum of all errors, plus `SEPARATE_ERROR_WEIGHT` times the own squares; cached by gap."""

    def __init__(self, errors: Errors) -> None:
        self.errors = errors
        self._gaps: dict[tuple[int, int, int], tuple[np.ndarray, float]] = {}

    def __call__(self, anchors: Sequence[int]) -> float:
        steps = len(self.errors.lengths)
        ends = [*anchors[1:], steps]
        parts = [self._gap(anchors[max(i - 1, 0)], anchor, ends[i]) for i, anchor in enumerate(anchors)]
        error = np.sum([part[0] for part in parts], axis=0)  # (N or 2 N,): coefficients
        return float(error @ self.errors.gram @ error) + SEPARATE_ERROR_WEIGHT * math.fsum(part[1] for part in parts)

    def _gap(self, p: int, a: int, b: int) -> tuple[np.ndarray, float]:
        """Return the summed error of the steps between a and b, as coefficients, and the sum of their squares."""
        if (p, a, b) not in self._gaps:
            inside = slice(a + 1, b)
            lengths = self.errors.lengths
            row = np.zeros(len(self.errors.gram))
            # forecast minus truth of each skipped step, summed: coefficients of the predictions and inputs
            row[inside] = -lengths[inside]
            if len(row) > len(lengths):
                row[len(lengths) + a + 1 : len(lengths) + b] = lengths[inside] * self.errors.entered[p, a, inside]
            row[a] += lengths[inside] @ self.errors.newest[p, a, inside]
            row[p] += lengths[inside] @ self.errors.older[p, a, inside]
            self._gaps[p, a, b] = row, float(np.square(self.errors.size[p, a, inside]).sum())
        return self._gaps[p, a, b]
