"""From verified measurements to settings that users get: choices, and the Pareto front of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.tuning.cost_model import CostModel, technique
from pipelines.tuning.front import pareto_front
from pipelines.tuning.goals import Goal
from pipelines.tuning.measurement import Measurement
from pipelines.tuning.measuring import Baseline
from pipelines.tuning.record import Choice


@dataclass(frozen=True)
class Measured:
    """A combination that was run on prompts that no table saw.

    Attributes:
        measurement: what was found.
        predicted_share: of the plain time.
        predicted_quality: of the goal's metric.
        keys: of its single techniques.
    """

    measurement: Measurement
    predicted_share: float
    predicted_quality: float
    keys: tuple[str, ...]


def choice_of(found: Measured, goal: Goal, baseline: Baseline, cost: CostModel) -> Choice:
    """Return a verified combination as a setting.

    Args:
        found: the combination.
        goal: that it is chosen for.
        baseline: plain runs of the same prompts.
        cost: knows the single techniques.
    """
    one = found.measurement
    values = one.values(goal.metric)
    seconds = baseline.seconds()
    pays = one.requests_until_gain(seconds)
    reached = None if goal.threshold is None else sum(value >= goal.threshold for value in values) / len(values)
    quality = {name: one.quality(name) for name in ("psnr", "ssim")}
    return Choice(
        parts=one.parts,
        gain=1 / one.share,
        quality={name: value for name, value in quality.items() if math.isfinite(value)},
        predicted_gain=1 / found.predicted_share,
        predicted_quality=found.predicted_quality,
        reached=reached,
        seconds=one.share * seconds,
        memory=one.memory,
        warm_up=one.warm_up,
        pays_after=pays if math.isfinite(pays) else None,
        part_gains=_part_gains(found, cost),
        goal=goal.text(),
        metric=goal.metric,
    )


def front_of(found: Sequence[Measured], goal: Goal, baseline: Baseline, cost: CostModel) -> list[Choice]:
    """Return the settings that no other dominates in time, likeness and memory.

    Args:
        found: verified combinations.
        goal: says the metric.
        baseline: plain runs of the same prompts.
        cost: knows the single techniques.
    """
    plain = baseline.memory + baseline.weights
    useful = [
        one
        for one in found
        if one.measurement.is_useful and (one.measurement.share < 1 or one.measurement.memory < plain)
    ]
    kept = pareto_front(
        useful,
        lambda one: (one.measurement.share, -one.measurement.quality(goal.metric), float(one.measurement.memory)),
    )
    return [choice_of(one, Goal(goal.metric), baseline, cost) for one in kept]


def _part_gains(found: Measured, cost: CostModel) -> dict[str, dict[str, float]]:
    """Return the gain of each part: alone as measured, and in the combination as predicted without it and with it."""
    gains = {}
    for key in found.keys:
        single = cost.singles[key]
        others = tuple(other for other in found.keys if other != key)
        without = cost.predict(others) if others else 1.0
        gains[technique(single)] = {"measured": 1 / single.share, "predicted": without / cost.predict(found.keys)}
    return gains
