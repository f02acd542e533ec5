"""What two techniques do together, by what a model says of them: measured for some pairs, guessed for others."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class PairFactors:
    """Ratios of what pairs of single techniques were measured to do to what was predicted of them.

    Attributes:
        techniques: key of a single -> its technique.
    """

    techniques: dict[str, str]
    _exact: dict[frozenset[str], float] = field(default_factory=dict)  # by the keys of two singles
    _found: dict[frozenset[str], list[float]] = field(default_factory=dict)  # by the names of their techniques

    def learn(self, first: str, second: str, factor: float) -> None:
        """Keep what was measured of two singles.

        Args:
            first: key of a single.
            second: key of another, of another technique.
            factor: above 0.
        """
        self._exact[frozenset((first, second))] = factor
        self._found.setdefault(self._names(first, second), []).append(factor)

    def of(self, first: str, second: str) -> float:
        """Return the factor of two singles: their own, the geometric mean of their techniques', or 1 without any.

        Args:
            first: key of a single.
            second: key of another.
        """
        exact = self._exact.get(frozenset((first, second)))
        if exact is not None:
            return exact
        found = self._found.get(self._names(first, second))
        return math.exp(sum(map(math.log, found)) / len(found)) if found else 1.0

    def _names(self, first: str, second: str) -> frozenset[str]:
        return frozenset((self.techniques[first], self.techniques[second]))
