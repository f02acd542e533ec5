"""Mixed precision: few bits where they do little harm, within a budget of bytes or of time.

Two levels, as in ViDiT-Q (arXiv 2406.02540, section 3.4). First the budget is divided among groups of layers such that
the error of the prediction is least; then, inside of each group's share, formats are chosen such that the error in the
group's own measure is least (`dit.quant.sensitivity`). Both are multiple-choice knapsacks, solved by dynamic
programming: one format for each unit, the least sum of errors whose costs stay within the budget. The authors rank
layers and raise the most sensitive ones to 8 bits until the budget is used up.

    sensitivity = measure_sensitivity(pipe, prompts, calibration, bits="w8a8,w6a8,w4a8")
    plan = plan_precision(sensitivity, "5bits")
    quantize_(pipe, "viditq_mp", "w8a8,w6a8,w4a8", calibration, plan=plan)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dit.quant.costs import LinearCosts, measure_linear_costs
from dit.quant.precision_plan import Budget, MixedPrecisionPlan, PlannedLayer
from dit.quant.sensitivity import Sensitivity
from dit.quant.sensitivity_calls import GROUPS

MOST_CELLS = 20_000
"""Cells of the dynamic program. Costs that are multiples of a larger step than this gives are counted exactly; others
are rounded up to a step, so that budgets hold."""


def plan_precision(
    sensitivity: Sensitivity,
    budget: str | float | Budget,
    *,
    decoupled: bool = True,
    costs: LinearCosts | None = None,
) -> MixedPrecisionPlan:
    """Choose a format for each unit.

    Args:
        sensitivity: what each costs.
        budget: what they may take together, see `Budget.parse`.
        decoupled: choose inside of groups by the group's own measure; False takes the error of the prediction there,
            too, which is one knapsack over all units.
        costs: for budgets of time; None measures them on this machine, which takes a few seconds.

    Raises:
        ValueError: the budget can't be read, or no choice stays within it; the message says what is possible.
    """
    limit = Budget.parse(budget)
    size = sensitivity.bytes()  # (U, C)
    seconds, plain = None, 1.0
    if limit.kind == "time":
        seconds, plain = _seconds(sensitivity, costs or measure_linear_costs())
    scale = {"bits": sensitivity.weights / 8, "bytes": 1.0, "time": plain}[limit.kind]
    spent = size if seconds is None else seconds
    least, most = float(spent.min(1).sum()), limit.value * scale
    if least > most * (1 + 1e-9):
        lowest = least / scale * (100 if limit.kind == "time" else 1)
        unit = {"bits": "bits", "bytes": "B", "time": "%time"}[limit.kind]
        raise ValueError(
            f"budget is {limit}, and {', '.join(sensitivity.candidates)} take {lowest:.6g}{unit} at least: raise the "
            "budget, or name a format of fewer bits"
        )
    chosen = two_levels(sensitivity.prediction.sum(0), sensitivity.own.sum(0), spent, sensitivity.groups, most,
                        decoupled=decoupled)  # fmt: skip
    items = np.arange(len(chosen))
    layers = tuple(
        PlannedLayer(one.name, group, sensitivity.candidates[choice], one.bytes[choice],
                     tuple(sensitivity.own[:, unit, size[unit].argmin()].tolist()))
        for unit, (members, group, choice) in enumerate(zip(sensitivity.units, sensitivity.groups, chosen, strict=True))
        for one in members
    )  # fmt: skip
    return MixedPrecisionPlan(
        sensitivity.recipe,
        sensitivity.candidates,
        str(limit),
        sensitivity.method,
        tuple(level if math.isfinite(level) else None for level in sensitivity.sigmas),
        layers,
        8 * float(size[items, chosen].sum()) / sensitivity.weights,
        float(sensitivity.prediction.sum(0)[items, chosen].sum()),
        None if seconds is None else float(seconds[items, chosen].sum()) / plain,
        *sensitivity.fingerprint,
    )


def _seconds(sensitivity: Sensitivity, costs: LinearCosts) -> tuple[np.ndarray, float]:
    """Return the time of each unit in each candidate, (U, C), and that of all in 16 bits."""
    times = np.array([[sum(costs.seconds(one.rows, one.columns, one.outputs, one.schemes[choice]) for one in unit)
                       for choice in range(len(sensitivity.candidates))] for unit in sensitivity.units])  # fmt: skip
    plain = [costs.seconds(one.rows, one.columns, one.outputs, None) for unit in sensitivity.units for one in unit]
    return times, sum(plain)


def two_levels(
    prediction: np.ndarray,
    own: np.ndarray,
    costs: np.ndarray,
    groups: Sequence[str],
    budget: float,
    *,
    decoupled: bool = True,
) -> np.ndarray:
    """Divide a budget among groups by the error of the prediction, then inside of each by the group's own measure.

    The best division among groups is that of one knapsack over all units: for any division, units inside of a group
    are chosen best.

    Args:
        prediction: errors of the prediction, (U, C).
        own: errors in the groups' measures, (U, C).
        costs: (U, C).
        groups: of the units.
        budget: of the sum of costs.
        decoupled: whether there is a second level.

    Returns:
        Choice of each unit, (U,).

    Raises:
        ValueError: no choice stays within the budget.
    """
    chosen = knapsack(prediction, costs, budget)
    if not decoupled:
        return chosen
    left = budget - float(costs[np.arange(len(costs)), chosen].sum())
    for group in GROUPS:
        members = np.flatnonzero([one == group for one in groups])
        if not len(members):
            continue
        share = float(costs[members, chosen[members]].sum()) + left  # what nobody uses goes from group to group
        chosen[members] = knapsack(own[members], costs[members], share)
        left = share - float(costs[members, chosen[members]].sum())
    return chosen


def knapsack(errors: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """Choose one option of each item: the least sum of errors whose costs stay within a budget.

    A dynamic program over what is spent above the cheapest options, in steps. Whole-numbered costs are counted in their
    greatest common divisor where that gives at most `MOST_CELLS` cells; then the result is exact. Other costs are
    rounded up, and what that leaves over is spent on the options that gain most for it.

    Args:
        errors: (items, options).
        costs: (items, options).
        budget: of the sum.

    Returns:
        Option of each item, int64, (items,).

    Raises:
        ValueError: the cheapest options exceed the budget.
    """
    extra = costs - costs.min(1, keepdims=True)  # (items, options)
    free = budget - float(costs.min(1).sum())
    if free < -1e-9 * max(abs(budget), 1.0):
        raise ValueError(f"the budget is {budget:g}, and the cheapest options take {costs.min(1).sum():g} together")
    step, cells = _steps(extra, max(free, 0.0))
    steps = np.ceil(extra / step - 1e-9).astype(np.int64)  # (items, options)
    best = np.zeros(cells + 1)  # least error by how many steps are spent at most
    picks = np.zeros((len(errors), cells + 1), np.int16)
    for item, (error, taken) in enumerate(zip(errors, steps, strict=True)):
        tried = np.full((len(error), cells + 1), np.inf)
        for option, (value, count) in enumerate(zip(error, taken, strict=True)):
            if count <= cells:
                tried[option, count:] = best[: cells + 1 - count] + value
        picks[item] = tried.argmin(0)
        best = tried.min(0)
    chosen, left = np.zeros(len(errors), np.int64), cells
    for item in range(len(errors) - 1, -1, -1):
        chosen[item] = picks[item][left]
        left -= steps[item, chosen[item]]
    return _filled(errors, costs, chosen, budget)


def _steps(extra: np.ndarray, free: float) -> tuple[float, int]:
    """Return the step in which costs are counted, and how many are free."""
    most = min(free, float(extra.max(1).sum()))
    if most <= 0:
        return max(float(extra.max(initial=0.0)), 1.0), 0
    if (extra == np.rint(extra)).all():
        step = int(np.gcd.reduce(extra.astype(np.int64).ravel()))
        if most / step <= MOST_CELLS:
            return float(step), int(most // step)
    return most / MOST_CELLS, MOST_CELLS


def _filled(errors: np.ndarray, costs: np.ndarray, chosen: np.ndarray, budget: float) -> np.ndarray:
    """Spend what is left of a budget on single items, those first that gain most for what they cost."""
    chosen, items = chosen.copy(), np.arange(len(errors))
    while True:
        left = budget - float(costs[items, chosen].sum())
        gain = errors[items, chosen][:, None] - errors  # (items, options)
        price = costs - costs[items, chosen][:, None]
        worth = np.where((gain > 0) & (price <= left), gain / np.maximum(price, 1e-300), -1.0)
        item, option = np.unravel_index(int(worth.argmax()), worth.shape)
        if worth[item, option] <= 0:
            return chosen
        chosen[item] = option
