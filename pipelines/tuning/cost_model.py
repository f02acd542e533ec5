"""Predict the time of combined techniques from the times of single ones, and of pairs.

A request takes its time outside the networks, and inside them that of computed and of forecast calls. A step cache
computes a share of the calls and adds the time of its forecasts; every other technique multiplies the time of computed
calls. Where two were measured together, the ratio of what they took to the product is kept as the pair's factor, and
applied to all strengths of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from pipelines.tuning.measurement import Measurement
from pipelines.tuning.pair_factors import PairFactors

CACHE = "step_cache"


@dataclass
class CostModel:
    """Times of techniques, all as shares of the plain request.

    Attributes:
        network: share of the plain request inside the networks.
        singles: key of the parts -> measurement of one technique.
    """

    network: float
    singles: Mapping[str, Measurement]

    def __post_init__(self) -> None:
        """Begin without factors of pairs, which multiply the time of computed calls."""
        self._factors = PairFactors({key: technique(one) for key, one in self.singles.items()})

    def predict(self, keys: Sequence[str]) -> float:
        """Return the time of a combination as a share of the plain request's.

        Args:
            keys: of singles, one a technique.
        """
        inside, forecasts = self._inside(keys)
        factor = math.prod(self.factor(first, second) for first, second in combinations(keys, 2))
        return self._outside(keys) + inside * factor + forecasts

    def learn(self, keys: Sequence[str], measured: Measurement) -> None:
        """Learn the factor of a pair from a measurement of both together.

        Args:
            keys: of the two singles.
            measured: of both.
        """
        inside, forecasts = self._inside(keys)
        found = (measured.share - self._outside(keys) - forecasts) / inside if inside > 0 else 1.0
        first, second = keys
        self._factors.learn(first, second, min(max(found, 0.25), 4.0))

    def factor(self, first: str, second: str) -> float:
        """Return how many times as long two techniques take together as the product says; 1 where not measured.

        Args:
            first: key of a single.
            second: key of another.
        """
        return self._factors.of(first, second)

    def _inside(self, keys: Sequence[str]) -> tuple[float, float]:
        """Return the shares of computed calls, by the product, and of forecasts."""
        inside, forecasts = self.network, 0.0
        for key in keys:
            one = self.singles[key]
            if technique(one) == CACHE:
                inside *= one.computed_share
                forecasts += max(one.network_share - self.network * one.computed_share, 0.0)
            else:
                inside *= one.network_share / self.network
        return inside, forecasts

    def _outside(self, keys: Sequence[str]) -> float:
        """Return the share outside the networks: that of the plain request, and what each technique changes of it."""
        plain = 1 - self.network
        singles = (self.singles[key] for key in keys)
        return max(plain + sum((one.share - one.network_share) - plain for one in singles), 0.0)


def technique(single: Measurement) -> str:
    """Return the technique of a measurement of one."""
    (name,) = single.parts
    return name
