"""Cost of a call: FLOPs, bytes, time.

Candidates are timed in turns (A B A B), so that other load on the machine hits all of them, and are compared by the
median ratio over the rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_flops(function: Callable[[], object]) -> int:
    """Return the floating-point operations of matrix products and convolutions in a call; a multiply-add is two.

    Args:
        function: what to call, once.
    """
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def count_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers; shared ones count once.

    Args:
        module: any.
    """
    tensors = [*module.parameters(), *module.buffers()]
    storages = {(t.device, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@dataclass(frozen=True)
class Timing:
    """Seconds that a call takes.

    Args:
        wall: of each repeat, by the clock.
        process: of each repeat, processor time of all threads of this process; steadier on a busy machine.
    """

    wall: tuple[float, ...]
    process: tuple[float, ...]

    @property
    def wall_min(self) -> float:
        """Least wall time."""
        return min(self.wall)

    @property
    def wall_median(self) -> float:
        """Median wall time."""
        return statistics.median(self.wall)

    @property
    def process_min(self) -> float:
        """Least processor time."""
        return min(self.process)

    @property
    def process_median(self) -> float:
        """Median processor time."""
        return statistics.median(self.process)


@dataclass(frozen=True)
class Comparison:
    """Times of candidates that were taken in turns.

    Args:
        timings: by name.
    """

    timings: dict[str, Timing]

    def ratio(self, name: str, baseline: str, clock: str = "wall") -> float:
        """Return how many times as long as the baseline a candidate takes: the median over rounds of their ratio.

        Args:
            name: the candidate.
            baseline: what to compare with.
            clock: "wall" or "process".
        """
        ours, theirs = getattr(self.timings[name], clock), getattr(self.timings[baseline], clock)
        return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def measure(candidates: Mapping[str, Callable[[], object]], repeats: int = 5, warmup: int = 1) -> Comparison:
    """Time candidates in turns: A B A B ...

    Args:
        candidates: what to call, by name.
        repeats: rounds that count.
        warmup: rounds before, which do not count.

    Returns:
        The times; work of accelerators is waited for.

    Raises:
        ValueError: no candidates or no repeats.
    """
    if not candidates or repeats < 1 or warmup < 0:
        raise ValueError(f"need candidates, repeats >= 1 and warmup >= 0, got {len(candidates)}, {repeats}, {warmup}")
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    process: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, function in candidates.items():
            _wait()
            begun, busy = time.perf_counter(), time.process_time()
            function()
            _wait()
            if turn >= warmup:
                process[name].append(time.process_time() - busy)
                wall[name].append(time.perf_counter() - begun)
    return Comparison({name: Timing(tuple(wall[name]), tuple(process[name])) for name in candidates})


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
