"""Predict the time of combined techniques from the times of single ones, and of pairs.

A request takes its time outside the networks, and inside them that of computed and of forecast calls. A step cache
computes a share of the calls and adds the time of its forecasts; every other technique multiplies the time of computed
calls. Where two were measured together, the ratio of what they took to the product is kept as the pair's factor, and
applied to all strengths of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from pipelines.tuning.measurement import Measurement

CACHE = "step_cache"


@dataclass
class CostModel:
    """Times of techniques, all as shares of the plain request.

    Attributes:
        network: share of the plain request inside the networks.
        singles: key of the parts -> measurement of one technique.
        pairs: names of two techniques -> factors on the time of computed calls that were measured.
        exact: keys of two singles -> the factor of that very pair.
    """

    network: float
    singles: Mapping[str, Measurement]
    pairs: dict[frozenset[str], list[float]] = field(default_factory=dict)
    exact: dict[frozenset[str], float] = field(default_factory=dict)

    def predict(self, keys: Sequence[str]) -> float:
        """Return the time of a combination as a share of the plain request's.

        Args:
            keys: of singles, one a technique.
        """
        inside, forecasts = self._inside(keys)
        outside = (1 - self.network) + sum(self._outside_change(self.singles[key]) for key in keys)
        factor = math.prod(self.factor(first, second) for first, second in combinations(keys, 2))
        return max(outside, 0.0) + inside * factor + forecasts

    def learn(self, keys: Sequence[str], measured: Measurement) -> None:
        """Learn the factor of a pair from a measurement of both together.

        Args:
            keys: of the two singles.
            measured: of both.
        """
        inside, forecasts = self._inside(keys)
        names = frozenset(technique(self.singles[key]) for key in keys)
        outside = max((1 - self.network) + sum(self._outside_change(self.singles[key]) for key in keys), 0.0)
        found = (measured.share - outside - forecasts) / inside if inside > 0 else 1.0
        found = min(max(found, 0.25), 4.0)
        self.pairs.setdefault(names, []).append(found)
        self.exact[frozenset(keys)] = found

    def factor(self, first: str, second: str) -> float:
        """Return how many times as long two techniques take together as the product says; 1 where not measured.

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

    def _outside_change(self, one: Measurement) -> float:
        """Return by how much a technique changes the time outside the networks."""
        return (one.share - one.network_share) - (1 - self.network)


def technique(single: Measurement) -> str:
    """Return the technique of a measurement of one."""
    (name,) = single.parts
    return name
