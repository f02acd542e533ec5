"""Measured costs of operations on this machine, kept in the user's cache folder.

`measure_costs()` times matrix products, attention and elementwise work at a few shapes and dtypes; `load_costs()` reads
what an earlier call found. Solvers that weigh one way of computing against another ask `CostTable.seconds`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.runtime.timing import measure

OPERATIONS = ("matmul", "attention", "elementwise")
"""matmul (M, K, N): (M, K) @ (K, N). attention (B, K, N, M, E): N queries and M keys in K heads of width E.
elementwise (n,): one addition of n numbers."""

DEFAULT_SHAPES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("matmul", (256, 1152, 1152)),
    ("matmul", (1024, 1152, 4608)),
    ("attention", (1, 16, 256, 256, 72)),
    ("attention", (1, 16, 1024, 1024, 72)),
    ("elementwise", (256 * 1152,)),
    ("elementwise", (4096 * 1152,)),
)


@dataclass(frozen=True)
class Cost:
    """One measured operation.

    Args:
        operation: one of `OPERATIONS`.
        shape: see there.
        dtype: e.g. "bfloat16".
        seconds: median wall time of a call.
    """

    operation: str
    shape: tuple[int, ...]
    dtype: str
    seconds: float

    @property
    def work(self) -> float:
        """Multiply-adds, or numbers for elementwise work."""
        return amount(self.operation, self.shape)


@dataclass(frozen=True)
class CostTable:
    """Measured costs of one machine.

    Args:
        machine: what was measured, see `machine_key`.
        costs: the measurements.
        device: where they were made.
    """

    machine: str
    costs: tuple[Cost, ...]
    device: str = "cpu"

    def seconds(self, operation: str, shape: tuple[int, ...], dtype: str = "float32") -> float:
        """Estimate the time of an operation: the rate of the measured one of the most similar size.

        Args:
            operation: one of `OPERATIONS`.
            shape: see there.
            dtype: e.g. "bfloat16".

        Returns:
            Seconds.

        Raises:
            KeyError: the operation was not measured in this dtype.
        """
        work = amount(operation, shape)
        known = [cost for cost in self.costs if (cost.operation, cost.dtype) == (operation, dtype)]
        if not known:
            raise KeyError(f"no measurement of {operation} in {dtype}; measure_costs(dtypes=('{dtype}',)) makes one")
        nearest = min(known, key=lambda cost: abs(math.log(cost.work / work)))
        return nearest.seconds * work / nearest.work

    def save(self, path: Path | None = None) -> Path:
        """Write the table as JSON and return where; None is the user's cache folder."""
        path = path or cache_path(self.device)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": self.machine, "costs": [asdict(cost) for cost in self.costs]}, indent=1))
        return path


def measure_costs(
    shapes: Iterable[tuple[str, tuple[int, ...]]] = DEFAULT_SHAPES,
    dtypes: Iterable[str] = ("float32", "bfloat16"),
    device: str = "cpu",
    repeats: int = 5,
) -> CostTable:
    """Time operations on this machine; seconds of work with the default shapes.

    Args:
        shapes: pairs of an operation and its shape.
        dtypes: names of torch dtypes.
        device: where.
        repeats: rounds; all operations take turns, see `dit.runtime.timing.measure`.

    Returns:
        The table; `save()` keeps it.

    Raises:
        ValueError: an operation is unknown.
    """
    cases = [(operation, tuple(shape), dtype) for operation, shape in shapes for dtype in dtypes]
    names = [f"{operation} {shape} {dtype}" for operation, shape, dtype in cases]
    timed = measure({name: _call(*case, device) for name, case in zip(names, cases, strict=True)}, repeats)
    costs = [Cost(*case, timed.timings[name].wall_median) for name, case in zip(names, cases, strict=True)]
    return CostTable(machine_key(device), tuple(costs), device)


def load_costs(path: Path | None = None, device: str = "cpu") -> CostTable | None:
    """Read the table of this machine; None if it was not measured, or was on another machine or set-up.

    Args:
        path: of the file; None is the user's cache folder.
        device: whose costs.
    """
    path = path or cache_path(device)
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    if content["machine"] != machine_key(device):
        return None
    costs = [Cost(**{**cost, "shape": tuple(cost["shape"])}) for cost in content["costs"]]
    return CostTable(content["machine"], tuple(costs), device)


def amount(operation: str, shape: tuple[int, ...]) -> float:
    """Return the multiply-adds of an operation, or the numbers of elementwise work.

    Args:
        operation: one of `OPERATIONS`.
        shape: see there.

    Raises:
        ValueError: the operation is unknown.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation {operation!r} is unknown: choose one of {', '.join(OPERATIONS)}")
    work = math.prod(shape)
    return float(2 * work if operation == "attention" else work)


def machine_key(device: str = "cpu") -> str:
    """Name what a measurement depends on: processor, device, threads and version of torch.

    Args:
        device: whose costs.
    """
    kind = torch.device(device)
    chip = torch.cuda.get_device_name(kind) if kind.type == "cuda" else _processor()
    return f"{chip}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def cache_path(device: str = "cpu") -> Path:
    """Return where this machine's table is kept: below XDG_CACHE_HOME, by default ~/.cache.

    Args:
        device: whose costs.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(machine_key(device).encode()).hexdigest()[:12]
    return base / "tessera" / f"costs-{digest}.json"


def _processor() -> str:
    """Name of the processor; Python itself knows it on some systems only."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _call(operation: str, shape: tuple[int, ...], dtype: str, device: str) -> Callable[[], Tensor]:
    """Return a call of the operation on random data."""
    amount(operation, shape)  # raises for an unknown operation
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, getattr(torch, dtype))

    if operation == "matmul":
        rows, inner, columns = shape
        a, b = draw(rows, inner), draw(inner, columns)
        return lambda: a @ b
    if operation == "attention":
        batch, heads, queries, keys, width = shape
        q, k, v = draw(batch, heads, queries, width), draw(batch, heads, keys, width), draw(batch, heads, keys, width)
        return lambda: F.scaled_dot_product_attention(q, k, v)
    x = draw(*shape)
    return lambda: x + x
