"""The Pareto front: results that no other result dominates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    """Return whether a result is at least as good in each measure and better in one; smaller is better.

    Args:
        first: measures of one result.
        second: the same measures of another.
    """
    pairs = list(zip(first, second, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def pareto_front(results: Sequence[T], measures: Callable[[T], Sequence[float]]) -> list[T]:
    """Return the results that no other dominates, by their first measure; of equal ones the first.

    Args:
        results: any.
        measures: what counts of a result; smaller is better.
    """
    kept: dict[tuple[float, ...], T] = {}
    for one in results:
        kept.setdefault(tuple(measures(one)), one)
    found = [key for key in kept if not any(dominates(other, key) for other in kept)]
    return [kept[key] for key in sorted(found)]
