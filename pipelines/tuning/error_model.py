"""Predict how far combined techniques are from the plain run, from single ones and from pairs.

Errors that know nothing of each other add as squares: the mean squared error of a combination is the sum of those of
its techniques. Some know of each other (a forecast repeats the noise of quantization; guidance that is left out at
steps that are forecast changes nothing more), so pairs are measured, and the ratio to the sum is kept as a factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from pipelines.tuning.cost_model import technique
from pipelines.tuning.goals import Goal
from pipelines.tuning.measurement import Measurement
from pipelines.tuning.pair_factors import PairFactors


@dataclass
class ErrorModel:
    """Errors of techniques for one metric, by prompt.

    Attributes:
        goal: says which metric, and how its values become errors that add; its threshold means nothing here.
        singles: key of the parts -> measurement of one technique.
    """

    goal: Goal
    singles: Mapping[str, Measurement]

    def __post_init__(self) -> None:
        """Begin without factors of pairs, which multiply the sum of their errors."""
        self._factors = PairFactors({key: technique(one) for key, one in self.singles.items()})

    def predict(self, keys: Sequence[str]) -> tuple[float, ...]:
        """Return the value of the metric that is expected of each prompt.

        Args:
            keys: of singles, one a technique.
        """
        tables = [self._errors(self.singles[key]) for key in keys]
        pairs = list(combinations(range(len(keys)), 2))
        factors = [self.factor(keys[first], keys[second]) for first, second in pairs]
        found = []
        for errors in zip(*tables, strict=True):
            total = sum(errors)
            for (first, second), factor in zip(pairs, factors, strict=True):
                total += (factor - 1) * (errors[first] + errors[second])
            found.append(self.goal.value(max(total, 0.25 * max(errors))))
        return tuple(found)

    def quality(self, keys: Sequence[str]) -> float:
        """Return the mean of `predict` over prompts."""
        values = self.predict(keys)
        return sum(values) / len(values)

    def learn(self, keys: Sequence[str], measured: Measurement) -> None:
        """Learn the factor of a pair from a measurement of both together: the geometric mean over prompts.

        Args:
            keys: of the two singles.
            measured: of both.
        """
        sums = map(sum, zip(*(self._errors(self.singles[key]) for key in keys), strict=True))
        ratios = [
            max(found, 1e-12) / max(total, 1e-12) for found, total in zip(self._errors(measured), sums, strict=False)
        ]
        factor = math.exp(sum(map(math.log, ratios)) / len(ratios))
        first, second = keys
        self._factors.learn(first, second, min(max(factor, 0.1), 100.0))

    def factor(self, first: str, second: str) -> float:
        """Return the measured factor of two techniques on the sum of their errors; 1 where none was measured.

        Args:
            first: key of a single.
            second: key of another.
        """
        return self._factors.of(first, second)

    def _errors(self, one: Measurement) -> list[float]:
        return [self.goal.distortion(value) for value in one.values(self.goal.metric)]
