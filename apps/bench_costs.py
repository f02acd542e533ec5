"""`tessera bench costs`: what matrix products, attention and elementwise work take on this machine.

The table is kept in the user's cache folder, where `dit.runtime.costs.load_costs` finds it.
"""

from typing import Any

import torch

from apps.bench_next_scale import Asked
from apps.info import available_devices
from apps.machine import describe_machine
from dit.runtime.costs import DEFAULT_SHAPES, Cost, measure_costs


def bench_costs(asked: Asked) -> dict[str, Any]:
    """Measures the costs of this machine; keeps them, unless it only rehearses."""
    device = asked.device or str(available_devices()[0])
    dtypes = (asked.dtype,) if asked.dtype else ("float32", "bfloat16")
    table = measure_costs(DEFAULT_SHAPES, dtypes, device, asked.repeats)
    if not asked.smoke:
        table.save()
    machine = {**describe_machine(torch.device(device), getattr(torch, dtypes[0])), "dtype": ", ".join(dtypes)}
    return {"machine": machine, "kept": not asked.smoke, "tables": {"costs": [_row(cost) for cost in table.costs]}}


def _row(cost: Cost) -> dict[str, Any]:
    """A measurement as people read it; giga operations are multiply-adds, or numbers of elementwise work."""
    return {
        "operation": cost.operation,
        "shape": "x".join(map(str, cost.shape)),
        "dtype": cost.dtype,
        "milliseconds": round(1e3 * cost.seconds, 4),
        "giga operations / s": round(cost.work / cost.seconds / 1e9, 2),
    }
