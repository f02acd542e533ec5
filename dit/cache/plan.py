"""Plan how many tokens each layer may keep at each scale, before the first scale is generated.

A budget is a fraction of the full history, that is of all tokens but the last scale's, as an average over layers. Until
the history outgrows the budget, everything is kept. Window, streaming and SnapKV give every layer the same; PyramidKV
(arXiv 2406.02069) gives deep layers less; ScaleKV (arXiv 2505.19602) lets a few layers, the drafters, keep nearly all,
and the rest, the refiners, share what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

POLICIES = ("full", "window", "streaming", "snapkv", "pyramidkv", "scalekv")
"""What can be kept; "full" keeps everything that a later scale reads, so it changes no number."""

MIN_REFINER_FRACTION = 0.3
"""Least fraction of the average budget that drafters leave to a refiner; 200 of 650 tokens in the released tables."""

PYRAMID_STEEPNESS = 20
"""PyramidKV's beta: the deepest layer keeps 1 / beta of the average."""


class Profile(Protocol):
    """Divides tokens among layers; see `dit.cache.calibration.KVProfile`."""

    def divide(self, scale: int, average: int, held: int) -> list[int]:
        """Return tokens of each layer when a scale begins, `average` on average, at most `held` each."""
        ...


@dataclass(frozen=True)
class DrafterTable:
    """Which layers of a released model are drafters, and what they keep.

    Args:
        num_layers: of the model.
        hidden_size: of the model.
        drafters: layers that keep nearly all, by the index of the scale that begins.
        kept: tokens that a drafter keeps, over the history at that scale, by the same index.
    """

    num_layers: int
    hidden_size: int
    drafters: dict[int, tuple[int, ...]]
    kept: dict[int, float]


TABLES: dict[str, DrafterTable] = {
    "Infinity-2B": DrafterTable(
        num_layers=32,
        hidden_size=2048,
        drafters={8: (0, 23), 9: (0, 23), 10: (0, 23), 11: (0, 23), 12: (0,)},
        kept={8: 920 / 921, 9: 1490 / 1497, 10: 2510 / 2521, 11: 4100 / 4121, 12: 6385 / 6425},
    ),
    "Infinity-8B": DrafterTable(
        num_layers=40,
        hidden_size=3584,
        drafters=dict.fromkeys(range(8, 13), (0, 1, 2)),
        kept={8: 909 / 921, 9: 1464 / 1497, 10: 2463 / 2521, 11: 4054 / 4121, 12: 6200 / 6425},
    ),
}
"""The tables of the authors, made for 13 scales; other schedules take the fractions of the same scale."""


@dataclass(frozen=True)
class CachePlan:
    """What a cache keeps.

    Args:
        policy: one of `POLICIES`; says which tokens are chosen.
        token_counts: tokens of each scale.
        capacities: tokens that each layer keeps when a scale begins, [scale][layer]; none at the first.
        observe: queries of the current scale that judge the history (SnapKV, PyramidKV, ScaleKV).
        sinks: first tokens that streaming always keeps.
        pool: width of the maximum that smooths the scores along the tokens; 1 is none.

    Raises:
        ValueError: capacities that don't fit the schedule, or a setting below 1.
    """

    policy: str
    token_counts: tuple[int, ...]
    capacities: tuple[tuple[int, ...], ...]
    observe: int = 16
    sinks: int = 4
    pool: int = 5

    def __post_init__(self) -> None:
        check_policy(self.policy)
        if len(self.capacities) != len(self.token_counts):
            raise ValueError(
                f"the plan holds {len(self.capacities)} scales, the schedule {len(self.token_counts)}: make the plan "
                "for the schedule that is generated"
            )
        for name in ("observe", "sinks", "pool"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.pool % 2 == 0:
            raise ValueError(f"pool is {self.pool}; it has a middle only if it is odd")

    @property
    def num_layers(self) -> int:
        """Layers that cache."""
        return len(self.capacities[0])

    @property
    def share(self) -> float:
        """Tokens kept for the last scale over those of the full history, the mean over layers."""
        history = sum(self.token_counts[:-1]) * self.num_layers
        return sum(self.capacities[-1]) / history if history else 1.0

    def max_stored(self) -> int:
        """Return the most tokens that all layers together hold, while they evict one after the other."""
        most = 0
        for before, after in zip(self.capacities, self.capacities[1:], strict=False):
            held = sum(before)
            for old, new in zip(before, after, strict=True):
                held += new - old
                most = max(most, held)
        return most

    def max_context(self) -> int:
        """Return tokens of the longest row of keys, history and current scale."""
        return max(max(held) + count for held, count in zip(self.capacities, self.token_counts, strict=True))

    def first(self, num_scales: int) -> CachePlan:
        """Return the plan of a run that ends early, after `num_scales` scales."""
        fields = {name: getattr(self, name) for name in ("policy", "observe", "sinks", "pool")}
        return CachePlan(token_counts=self.token_counts[:num_scales], capacities=self.capacities[:num_scales], **fields)


def check_policy(policy: str) -> None:
    """Raise ValueError unless a policy is known."""
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is not known; use one of {', '.join(map(repr, POLICIES))}")


def histories(token_counts: Sequence[int]) -> tuple[int, ...]:
    """Return tokens before each scale."""
    return (0, *accumulate(token_counts))[: len(token_counts)]


def plan_cache(
    policy: str,
    token_counts: Sequence[int],
    num_layers: int,
    budget: float = 0.1,
    *,
    table: DrafterTable | None = None,
    profile: Profile | None = None,
    observe: int = 16,
    sinks: int = 4,
    pool: int = 5,
) -> CachePlan:
    """Divide a budget among layers and scales.

    Args:
        policy: one of `POLICIES`.
        token_counts: tokens of each scale, coarse to fine.
        num_layers: layers L.
        budget: fraction of the full history that a layer keeps on average, in (0, 1]; "full" ignores it.
        table: drafters of a released model, for "scalekv".
        profile: of our own calibration, for "scalekv", see `dit.cache.calibration.KVProfile`; it goes before a table.
        observe: see `CachePlan`.
        sinks: see `CachePlan`.
        pool: see `CachePlan`.

    Returns:
        The plan.

    Raises:
        ValueError: an unknown policy, a budget out of range or too small for a single token, or "scalekv" with
            neither a table nor a profile.
    """
    check_policy(policy)
    counts = tuple(token_counts)
    past = histories(counts)
    if policy == "full":
        capacities = tuple((held,) * num_layers for held in past)
        return CachePlan(policy, counts, capacities, observe, sinks, pool)
    base = _average(budget, past[-1])
    if policy == "scalekv" and table is None and profile is None:
        raise ValueError(
            "ScaleKV needs to know which layers are drafters: there is a table for "
            f"{' and '.join(TABLES)}; calibrate any other model once, with `pipe.calibrate_kv` or `tessera bench kv`"
        )
    capacities = []
    for scale, held in enumerate(past):
        average = min(base, held)
        if average == held:
            row = [held] * num_layers
        elif policy == "pyramidkv":
            row = _pyramid(average, held, num_layers)
        elif policy == "scalekv" and profile is not None:
            row = profile.divide(scale, average, held)
        elif policy == "scalekv" and table is not None:
            row = _by_table(average, held, scale, num_layers, table)
        else:
            row = [average] * num_layers
        capacities.append(tuple(row))
    return CachePlan(policy, counts, tuple(capacities), observe, sinks, pool)


def find_table(num_layers: int, hidden_size: int, num_scales: int) -> DrafterTable | None:
    """Return the authors' table for a network of this shape, or None."""
    for table in TABLES.values():
        if (table.num_layers, table.hidden_size) == (num_layers, hidden_size) and num_scales <= max(table.kept) + 1:
            return table
    return None


def _average(budget: float, history: int) -> int:
    """Return tokens of an average layer."""
    if not 0 < budget <= 1:
        raise ValueError(
            f"a budget of {budget:g} is out of range: it is the fraction of the history that is kept, above 0 and up "
            "to 1, for example 0.1"
        )
    base = round(budget * history)
    if history and base < 1:
        raise ValueError(f"a budget of {budget:g} of {history} tokens keeps none; use at least {1 / history:.4f}")
    return base


def _pyramid(average: int, held: int, num_layers: int) -> list[int]:
    """Return counts that fall evenly from the first layer to the last, which keeps `average / PYRAMID_STEEPNESS`."""
    if num_layers == 1:
        return [average]
    last = average / PYRAMID_STEEPNESS
    first = min(2 * average - last, held)
    last = 2 * average - first
    wanted = [first + (last - first) * layer / (num_layers - 1) for layer in range(num_layers)]
    return _whole(wanted, average * num_layers, held)


def _by_table(average: int, held: int, scale: int, num_layers: int, table: DrafterTable) -> list[int]:
    """Give drafters their part of the history, and refiners the rest in equal parts, but at least a minimum."""
    drafters = table.drafters.get(scale, ())
    if not drafters:
        return [average] * num_layers
    refiners = num_layers - len(drafters)
    total = average * num_layers
    most = (total - refiners * MIN_REFINER_FRACTION * average) / len(drafters)
    kept = round(min(table.kept[scale] * held, most))
    rest = round((total - kept * len(drafters)) / refiners)
    return [kept if layer in drafters else rest for layer in range(num_layers)]


def _whole(wanted: Sequence[float], total: int, held: int) -> list[int]:
    """Round to whole tokens, at least 1 and at most all a layer, that sum up to `total`."""
    row = [min(max(int(each), 1), held) for each in wanted]
    order = sorted(range(len(row)), key=lambda layer: int(wanted[layer]) - wanted[layer])  # largest remainders first
    while sum(row) != total:
        step = 1 if sum(row) < total else -1
        able = [layer for layer in order if 1 <= row[layer] + step <= held]
        if not able:
            return row
        for layer in able[: abs(total - sum(row))]:
            row[layer] += step
    return row
