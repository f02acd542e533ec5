"""`tessera bench costs`: what matrix products, attention and elementwise work take on this machine.

The table is kept in the user's cache folder, where `dit.runtime.cost_model.load_costs` finds it. On CPUs a second
one says what `dit.layers.linear` gains over torch's own linear layer, in float32 and turns.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from apps.benchmarks.next_scale import Asked
from apps.commands.info import available_devices
from apps.environment import describe_machine
from dit.layers.linear import linear
from dit.runtime.cost_model import DEFAULT_SHAPES, Cost, measure_costs
from dit.runtime.metrics import relative_error
from dit.runtime.timing import measure

LAYERS = ((32, 1024, 1024), (512, 1024, 4096), (256, 160, 480), (1024, 384, 1536), (1024, 1152, 4608))
"""Rows, width in, width out: a coarse and the finest scale of VAR-d16, a built-in model, DiT-S and DiT-XL."""


def bench_costs(asked: Asked) -> dict[str, Any]:
    """Measures the costs of this machine; keeps them, unless it only rehearses."""
    device = asked.device or str(available_devices()[0])
    dtypes = (asked.dtype,) if asked.dtype else ("float32", "bfloat16")
    table = measure_costs(DEFAULT_SHAPES, dtypes, device, asked.repeats)
    if not asked.smoke:
        table.save()
    tables: dict[str, Any] = {"costs": [_row(cost) for cost in table.costs]}
    if device == "cpu" and "float32" in dtypes:
        tables["linear layers, float32"] = [_layer_row(shape, asked.repeats) for shape in LAYERS]
    machine = {**describe_machine(torch.device(device), getattr(torch, dtypes[0])), "dtype": ", ".join(dtypes)}
    return {"machine": machine, "kept": not asked.smoke, "tables": tables}


@torch.no_grad()
def _layer_row(shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Time a linear layer (rows, width in, width out) both ways."""
    rows, inner, outer = shape
    draw = torch.Generator().manual_seed(0)
    x, bias = torch.randn(rows, inner, generator=draw), torch.randn(outer, generator=draw)
    weight = torch.randn(outer, inner, generator=draw) / inner**0.5
    ways = {"torch": F.linear, "ours": linear}
    found = measure({name: partial(way, x, weight, bias) for name, way in ways.items()}, max(repeats, 2), warmup=2)
    return {
        "shape": "x".join(map(str, shape)),
        "torch ms": round(1e3 * found.timings["torch"].wall_median, 3),
        "ours ms": round(1e3 * found.timings["ours"].wall_median, 3),
        "ours / torch": round(found.ratio("ours", "torch"), 3),
        "difference": relative_error(linear(x, weight, bias), F.linear(x, weight, bias)),
    }


def _row(cost: Cost) -> dict[str, Any]:
    """Return a measurement as people read it; giga operations are multiply-adds, or numbers of elementwise work."""
    return {
        "operation": cost.operation,
        "shape": "x".join(map(str, cost.shape)),
        "dtype": cost.dtype,
        "milliseconds": round(1e3 * cost.seconds, 4),
        "giga operations / s": round(cost.work / cost.seconds / 1e9, 2),
    }
