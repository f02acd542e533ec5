"""Predict how far combined techniques are from the plain run, from single ones and from pairs.

Errors that know nothing of each other add as squares: the mean squared error of a combination is the sum of those of
its techniques. Some know of each other (a forecast repeats the noise of quantization; guidance that is left out at
steps that are forecast changes nothing more), so pairs are measured, and the ratio to the sum is kept as a factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from pipelines.tuning.cost_model import technique
from pipelines.tuning.goals import Goal
from pipelines.tuning.measurement import Measurement


@dataclass
class ErrorModel:
    """Errors of techniques for one metric, by prompt.

    Attributes:
        goal: says which metric, and how its values become errors that add.
        singles: key of the parts -> measurement of one technique.
        pairs: names of two techniques -> factors on the sum of their errors that were measured.
        exact: keys of two singles -> the factor of that very pair.
    """

    goal: Goal
    singles: Mapping[str, Measurement]
    pairs: dict[frozenset[str], list[float]] = field(default_factory=dict)
    exact: dict[frozenset[str], float] = field(default_factory=dict)

    def predict(self, keys: Sequence[str]) -> tuple[float, ...]:
        """Return the value of the metric that is expected of each prompt.

        Args:
            keys: of singles, one a technique.
        """
        tables = [self._errors(self.singles[key]) for key in keys]
        found = []
        for errors in zip(*tables, strict=True):
            total = sum(errors)
            for (first, one), (second, other) in combinations(zip(keys, errors, strict=True), 2):
                total += (self.factor(first, second) - 1) * (one + other)
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
        factor = min(max(factor, 0.1), 100.0)
        names = frozenset(technique(self.singles[key]) for key in keys)
        self.pairs.setdefault(names, []).append(factor)
        self.exact[frozenset(keys)] = factor

    def factor(self, first: str, second: str) -> float:
        """Return the measured factor of two techniques on the sum of their errors; 1 where none was measured.

        Args:
            first: key of a single.
            second: key of another.
        """
        exact = self.exact.get(frozenset((first, second)))
        if exact is not None:
            return exact
        names = frozenset((technique(self.singles[first]), technique(self.singles[second])))
        known = self.pairs.get(names)
        return math.exp(sum(map(math.log, known)) / len(known)) if known else 1.0

    def _errors(self, one: Measurement) -> list[float]:
        return [self.goal.distortion(value) for value in one.values(self.goal.metric)]
