"""`tessera bench quantization-mixed`: mixed precision beside other ways to spend as many bytes.

All networks hold the same quantized layers, so that only the choice among their formats differs: one format for all
layers, one for each kind of layer, random choices, and what was planned by measuring.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from apps.benchmarks.next_scale import Asked
from apps.benchmarks.quantization_quality import Subject, likeness
from apps.benchmarks.step_cache import CALIBRATION_SEED
from apps.environment import describe_machine
from dit.quant.calibration import Calibration
from dit.quant.layer_plan import LayerPlan, quantized_layers
from dit.quant.mixed_precision import plan_precision
from dit.quant.recipes import recipe
from dit.quant.roles import quantizable_layers
from dit.quant.sensitivity import METHODS, Sensitivity
from dit.quant.sensitivity_measure import measure_sensitivity, replaced
from dit.quant.step_precision import is_next_scale

RECIPE, BITS = "viditq_mp", ("w8a8", "w6a8", "w4a8")
BUDGETS = (5.0, 5.5)
"""Bits of a weight on average, scales counted; 4 bits take 4.5 of the built-in models."""
MEASURED, RANDOM = 4, 8
"""Prompts that sensitivity is measured on, which are not among those that are judged; random choices."""

Choices = Mapping[str, str]
"""Format of each layer."""


def bench_mixed(asked: Asked) -> dict[str, Any]:
    """Measure one model: minutes with one thread; the likeness is the PSNR to the plain network in bfloat16."""
    with torch.no_grad():
        subject = Subject.load(asked)
        base, calibration = subject.generate(), subject.calibrate()
        rows = mixed_rows(
            subject.pipe,
            subject.learned(),
            calibration,
            lambda: likeness(subject.generate(), base),
            seed=CALIBRATION_SEED,
            budgets=BUDGETS[: 1 if asked.smoke else None],
        )
    return {
        "machine": describe_machine(torch.device(subject.pipe.device), torch.bfloat16),
        "model": asked.model or "stickers",
        "prompts": len(subject.requests),
        "tables": {"mixed precision": rows},
    }


def mixed_rows(
    pipe: Any,
    learned: Sequence[Any],
    calibration: Calibration,
    near: Callable[[], Sequence[float]],
    *,
    seed: int,
    bits: Sequence[str] = BITS,
    budgets: Sequence[float] = BUDGETS,
    **call_kwargs: Any,
) -> list[dict[str, Any]]:
    """Compare ways to choose formats at equal bytes.

    Args:
        pipe: with a plain network; it has it again afterwards.
        learned: prompts to measure sensitivity on.
        calibration: of the network.
        near: generates with the pipeline, and returns the PSNR of each image to that of the plain network, dB.
        seed: of the prompts' noise.
        bits: formats to choose among.
        budgets: bits of a weight on average, scales counted.
        **call_kwargs: of the pipeline's call, for the runs that sensitivity is measured on.
    """
    network = pipe.transformer
    methods = ("layer",) if is_next_scale(network) else METHODS  # next-scale networks can't be called again
    made = {one: _made(network, one, calibration) for one in bits}
    weights = sum(role.slot.linear.weight.numel() for role, _ in made[bits[0]].values())

    def row(name: str, choices: Choices, budget: float | None = None) -> dict[str, Any]:
        with replaced(network, [made[one][layer] for layer, one in choices.items()]):
            found = near()
        size = sum(_stored(made[one][layer][1]) for layer, one in choices.items())
        return {
            "formats": name,
            "budget, bits": budget,
            "bits": round(8 * size / weights, 3),
            "PSNR, dB": round(statistics.mean(found), 2),
            "median": round(statistics.median(found), 2),
            "least": round(min(found), 2),
        }

    rows = [row(f"all {one}", dict.fromkeys(made[one], one)) for one in bits]
    prompts = list(learned[:MEASURED])
    measured: dict[str, Sensitivity] = {}
    for method in methods:
        measured[method] = measure_sensitivity(
            pipe, prompts, calibration, bits=bits, recipe_name=RECIPE, method=method, seed=seed, **call_kwargs
        )
    for budget in budgets:
        for method, sensitivity in measured.items():
            for decoupled in (True, False) if method != "layer" else (True,):
                title = f"planned by {method}" + ("" if decoupled else ", one measure for all groups")
                plan = plan_precision(sensitivity, budget, decoupled=decoupled)
                rows.append(row(title, plan.choices, budget))
        others = [row("", one, budget) for one in _random_choices(measured[methods[0]], budget, RANDOM)]
        rows.append(_summary(f"{len(others)} random choices, mean", others, budget))
        others = [row("", one, budget) for one in _choices_by_kind(network, measured[methods[0]], budget)]
        if others:
            rows.append(_summary(f"{len(others)} choices by kind of layer, mean", others, budget))
            rows.append({**max(others, key=lambda one: one["PSNR, dB"]), "formats": "the best of these afterwards"})
    return rows


def _made(network: nn.Module, bits: str, calibration: Calibration) -> dict[str, Any]:
    """Quantize all layers in one format; the network stays as it is."""
    plan = LayerPlan(recipe(RECIPE), bits, calibration.layers)
    return {role.name: (role, layer) for role, layer, _ in quantized_layers(network, plan)}


def _stored(layer: Any) -> int:
    return sum(one.nbytes for one in layer.stored.values())


def _summary(title: str, rows: Sequence[Mapping[str, Any]], budget: float) -> dict[str, Any]:
    """Return the means of several choices."""
    numbers = ("bits", "PSNR, dB", "median", "least")
    means = {name: round(statistics.mean(row[name] for row in rows), 3 if name == "bits" else 2) for name in numbers}
    return {"formats": title, "budget, bits": budget, **means}


def _random_choices(sensitivity: Sensitivity, budget: float, count: int) -> Iterator[Choices]:
    """Draw formats within a budget: units in random order get a random larger format as long as that fits."""
    size, most = sensitivity.bytes(), budget * sensitivity.weights / 8
    smallest = size.argmin(1)
    for seed in range(count):
        drawn, chosen = random.Random(seed), smallest.copy()
        spent = float(size.min(1).sum())
        steps = [(unit, choice) for unit in range(len(size)) for choice in range(size.shape[1])]
        drawn.shuffle(steps)
        for unit, choice in steps:
            price = size[unit, choice] - size[unit, chosen[unit]]
            if 0 < price <= most - spent:
                chosen[unit], spent = choice, spent + float(price)
        yield _named(sensitivity, chosen)


def _choices_by_kind(network: nn.Module, sensitivity: Sensitivity, budget: float) -> Iterator[Choices]:
    """Give each kind of layer one format, in all ways that use at least 97 % of a budget."""
    kinds = {role.name: role.kind for role in quantizable_layers(network)}
    of_unit = [kinds[unit[0].name] for unit in sensitivity.units]
    size, most = sensitivity.bytes(), budget * sensitivity.weights / 8
    names = list(dict.fromkeys(of_unit))
    for formats in itertools.product(range(size.shape[1]), repeat=len(names)):
        chosen = [formats[names.index(kind)] for kind in of_unit]
        if 0.97 * most <= sum(size[unit, choice] for unit, choice in enumerate(chosen)) <= most:
            yield _named(sensitivity, chosen)


def _named(sensitivity: Sensitivity, chosen: Sequence[int]) -> Choices:
    """Return the format of each layer by that of its unit."""
    return {
        layer.name: sensitivity.candidates[choice]
        for unit, choice in zip(sensitivity.units, chosen, strict=True)
        for layer in unit
    }
