"""What one attention layer under a plan computed: calls, reasons, kernels, densities, seconds."""

from __future__ import annotations

from collections import Counter
from typing import Any

from dit.attention.block_map import BlockMap
from dit.attention.map_cache import density_of

KEPT_RULES = 64
"""Most maps with a rule whose pairs a report counts."""
MOST_RULED = 2**14
"""Most tokens of which a report counts the pairs that a rule allows."""


class Statistics:
    """What a layer computed."""

    def __init__(self) -> None:
        self.sparse, self.dense, self.refreshes = 0, 0, 0
        self.reasons: Counter[str] = Counter()
        self.choices: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.seconds = {"sparse": 0.0, "dense": 0.0}
        self.density, self.weight = 0.0, 0.0
        self.whole = [0.0, 0.0]  # pairs in maps without a rule, and the weight of these maps
        self.ruled: dict[int, tuple[BlockMap, float]] = {}
        self.error, self.measured = 0.0, 0

    def add_dense(self, share: float) -> None:
        """Count that a share of a call's heads computed all pairs."""
        self.density += share
        self.weight += share

    def add_map(self, block_map: BlockMap, share: float) -> None:
        """Count a map that a share of a call's heads computed."""
        density = density_of(block_map)
        self.density += density * share
        self.weight += share
        if block_map.rule is None:
            self.whole[0] += density * share
            self.whole[1] += share
        elif len(self.ruled) < KEPT_RULES or id(block_map) in self.ruled:
            before = self.ruled.get(id(block_map), (block_map, 0.0))[1]
            self.ruled[id(block_map)] = (block_map, before + share)

    def token_density(self) -> float | None:
        """Return the mean share of pairs that the rules ask for; None where counting them would take too long."""
        total = self.whole[1] + sum(share for _, share in self.ruled.values())
        if not total or any(one.queries.grid.length > MOST_RULED for one, _ in self.ruled.values()):
            return None
        for one, _ in self.ruled.values():
            if "token_density" not in one.cache:
                one.cache["token_density"] = one.token_density()
        return (self.whole[0] + sum(one.cache["token_density"] * share for one, share in self.ruled.values())) / total

    def report(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "sparse": self.sparse,
            "dense": self.dense,
            "refreshes": self.refreshes,
            "reasons": dict(self.reasons),
            "patterns": dict(self.choices),
            "kernels": dict(self.kernels),
            "density": self.density / self.weight if self.weight else None,
            "token_density": self.token_density(),
            "seconds": dict(self.seconds),
            "error": self.error / self.measured if self.measured else None,
        }
