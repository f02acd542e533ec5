"""How long linear layers take on this machine by their formats, for plans within a budget of time.

Products of integers and floats are timed once for each kind; the time of a layer follows from its size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from dit.quant.layer import quantize_linear
from dit.quant.linear import QuantLinear
from dit.quant.scheme import LEVELS, Scheme
from dit.runtime.timing import measure

PLAIN = "plain"
"""Kind of layers that aren't quantized, in bfloat16."""
ROWS, COLUMNS, OUTPUTS = 512, 768, 1536
"""Tokens, inputs and outputs of the layers that are timed."""
TIMED = {
    "integers": Scheme("int8"),
    "packed integers": Scheme("int4"),
    "dequantized": Scheme("int8", activations="none"),
}
"""Kinds of quantized layers, each with a scheme that stands for it."""


@dataclass(frozen=True)
class LinearCosts:
    """Times of linear layers on one machine.

    Attributes:
        seconds_per_product: of one multiply-add, by kind, see `kind_of`.
    """

    seconds_per_product: Mapping[str, float]

    def seconds(self, rows: int, columns: int, outputs: int, scheme: Scheme | None) -> float:
        """Return the time of a call of a layer.

        Args:
            rows: tokens M.
            columns: inputs K.
            outputs: N.
            scheme: how it is quantized, resolved; None is in 16 bits.
        """
        products = self.seconds_per_product[kind_of(scheme)] * rows * columns * outputs
        if scheme is None:
            return products
        beside = scheme.rotate * columns + scheme.rank * (columns + outputs)  # rotation and low-rank branch, in floats
        return products + self.seconds_per_product[PLAIN] * rows * beside


def kind_of(scheme: Scheme | None) -> str:
    """Return what decides the time of a layer: products of integers, from plain or packed codes, or of floats.

    Args:
        scheme: how it is quantized; None is in 16 bits.
    """
    if scheme is None:
        return PLAIN
    if scheme.activations not in LEVELS or scheme.weights not in ("int8", "int6", "int4"):
        return "dequantized"
    return "integers" if scheme.weights == "int8" else "packed integers"


@lru_cache(maxsize=4)
def measure_linear_costs(device: str = "cpu", repeats: int = 5) -> LinearCosts:
    """Time layers in turns, which takes a few seconds; kept for this process.

    Args:
        device: "cpu" is timed with one thread, by process time; others by the clock.
        repeats: rounds; the least of them counts.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # nobody's random numbers change
            plain = nn.Linear(COLUMNS, OUTPUTS, bias=False)
            layers: dict[str, nn.Module] = {PLAIN: nn.Linear(COLUMNS, OUTPUTS, bias=False).bfloat16()}
            for kind, scheme in TIMED.items():
                found = quantize_linear(plain, scheme)
                layers[kind] = QuantLinear.from_tensors(found.scheme, found.tensors, COLUMNS, OUTPUTS, None)
            x = torch.randn(ROWS, COLUMNS).to(device, torch.bfloat16)  # (M, K)
            calls = {kind: _called(layer.to(device), x) for kind, layer in layers.items()}
            timed = measure(calls, repeats).timings
    finally:
        torch.set_num_threads(threads)
    best = {kind: one.process_min if device == "cpu" else one.wall_min for kind, one in timed.items()}
    return LinearCosts({kind: seconds / (ROWS * COLUMNS * OUTPUTS) for kind, seconds in best.items()})


def _called(layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return lambda: layer(x)
