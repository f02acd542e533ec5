"""Apply one acceleration to a pipeline, make the requests, take it back: what it takes and what it changes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dit.runtime.hooks import AttachError
from pipelines.acceleration import AccelerationConfig, AccelerationError, AccelerationReport
from pipelines.tuning.measurement import Measurement
from pipelines.tuning.memory import resident_bytes, weight_bytes, working_memory
from pipelines.tuning.workload import Result, Times, Workload, similarity

SLOWER = 1.1
"""A candidate that takes so many times as long as the plain run at its first prompt is not measured further."""
LONG = 3.0
"""Seconds of a request from which it isn't repeated: noise matters less."""
TIMED, SHORT = 4, 0.5
"""Prompts that are timed: plain before a candidate, with it, and plain after it; half as many where a request takes
more than so many seconds."""
FAILURES = (
    AccelerationError,
    AttachError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What is raised by an acceleration that a pipeline or this machine can't have."""


@dataclass
class Baseline:
    """Plain runs of the prompts: what errors and times are compared with.

    Attributes:
        work: the requests.
        results: of each prompt.
        memory: bytes that a request needs beside the weights.
        weights: bytes of all weights.
        rounds: more runs of the timed prompts.
    """

    work: Workload
    results: list[Result]
    memory: int
    weights: int
    rounds: list[Times] = field(default_factory=list)

    @classmethod
    def of(cls, work: Workload) -> Baseline:
        """Run all prompts plainly, the first one once before."""
        with working_memory(work.device) as used:
            work.generate(0)
        results = [work.generate(index) for index in range(len(work.prompts))]
        return cls(work, results, used.size, weight_bytes(work.pipe))

    def again(self) -> list[Times]:
        """Run the timed prompts plainly once more; what is known already is returned where requests take long."""
        if self.is_long:
            return [one.times for one in self.results[: self.timed]]
        runs = [self.work.generate(index).times for index in range(self.timed)]
        self.rounds += runs
        return runs

    @property
    def times(self) -> list[Times]:
        """Of all plain runs."""
        return [*self.rounds, *(one.times for one in self.results)]

    def seconds(self, clock: str | None = None) -> float:
        """Return the median time of a request.

        Args:
            clock: "wall" or "process"; None is the one that counts here.
        """
        return statistics.median(one.total(clock or self.work.clock) for one in self.times)

    @property
    def is_long(self) -> bool:
        """Whether requests take so long that noise hardly matters."""
        return self.results[0].times.wall >= LONG

    @property
    def timed(self) -> int:
        """How many of the prompts are timed again."""
        wanted = TIMED if self.results[0].times.wall < SHORT else TIMED // 2
        return min(wanted, len(self.results))

    @property
    def sees_network(self) -> bool:
        """Whether calls of the network are seen."""
        return any(one.calls for one in self.times)

    def network_share(self) -> float:
        """Return the share of a request's time inside the networks; 1 where their calls are not seen."""
        clock = self.work.clock
        return statistics.median(one.network(clock) / one.total(clock) if one.calls else 1.0 for one in self.times)


@dataclass
class _Runs:
    """Requests that were made with an acceleration on the pipeline.

    Attributes:
        results: of each prompt; of the first one alone, if it was given up.
        rounds: times of the timed prompts, in turns.
        first_seconds: of applying it and of the first request, by the clock.
        memory: bytes of weights and of what a request needs beside them.
        report: of the acceleration.
    """

    results: list[Result]
    rounds: list[list[Times]]
    first_seconds: float
    memory: int
    report: AccelerationReport


def measure(parts: Mapping[str, Any], baseline: Baseline, purpose: str, *, give_up: bool = True) -> Measurement:
    """Apply an acceleration, make all requests of a baseline, and take it back.

    Each timed prompt runs plainly before and after, and twice with the acceleration; the least time of each counts,
    because other load on the machine only adds.

    Args:
        parts: of an `AccelerationConfig`.
        baseline: its pipeline and prompts.
        purpose: see `Measurement`.
        give_up: stop after the first prompt where it is slower than the plain run.

    Returns:
        What was found; with an `error` where the pipeline can't have it or it was given up.
    """
    clock, given = baseline.work.clock, dict(parts)
    before = baseline.again()
    try:
        runs = _run(given, baseline, SLOWER * before[0].total(clock) if give_up else math.inf)
    except FAILURES as reason:
        text = (str(reason).splitlines() or [""])[0]
        return Measurement(given, purpose, error=f"{type(reason).__name__}: {text}")
    gave_up = len(runs.results) < len(baseline.results)
    best = _least(runs.rounds, clock)
    plain = _least([before] if gave_up else [before, baseline.again()], clock)[: len(best)]
    usual, taken = (sum(one.total(clock) for one in times) for times in (plain, best))
    network = sum(one.network(clock) for one in best) if baseline.sees_network else taken
    alike = [similarity(one.pixels, other.pixels) for one, other in zip(runs.results, baseline.results, strict=False)]
    report = runs.report.to_dict()
    return Measurement(
        parts=given,
        purpose=purpose,
        share=taken / usual,
        network_share=network / usual,
        computed_share=computed_share(report),
        psnr=tuple(one["psnr"] for one in alike),
        ssim=tuple(one["ssim"] for one in alike if not math.isnan(one["ssim"])),
        warm_up=_warm_up(runs, best, clock),
        memory=runs.memory,
        report=tuple(report),
        inactive=tuple(one.text() for one in runs.report.inactive),
        error=f"given up: {taken / usual:.2f} times the plain time at the first prompt" if gave_up else "",
    )


def _warm_up(runs: _Runs, best: Sequence[Times], clock: str) -> float:
    """Return the seconds of applying it and of the first request, and what first requests of other prompts took longer.

    Compiled code, for example, is made anew for a prompt of another length.
    """
    later = sum(
        max(one.total(clock) - usual.total(clock), 0.0) for one, usual in zip(runs.rounds[0], best, strict=True)
    )
    return max(runs.first_seconds - best[0].wall, 0.0) + later


def _least(rounds: Sequence[Sequence[Times]], clock: str) -> list[Times]:
    """Return the shortest run of each prompt."""
    return [min(runs, key=lambda one: one.total(clock)) for runs in zip(*rounds, strict=True)]


def _run(parts: Mapping[str, Any], baseline: Baseline, limit: float) -> _Runs:
    """Make the requests with an acceleration; only the first one if it takes longer than a limit in seconds."""
    work = baseline.work
    begun = time.perf_counter()
    with AccelerationConfig.from_dict(parts).apply(work.pipe) as handle:
        arguments = handle.call_arguments
        with working_memory(work.device) as used:
            work.generate(0, **arguments)
        first = time.perf_counter() - begun
        results = [work.generate(0, **arguments)]
        if results[0].times.total(work.clock) <= limit:
            results += [work.generate(index, **arguments) for index in range(1, len(work.prompts))]
        rounds = [[one.times for one in results[: baseline.timed]]]
        if not baseline.is_long:
            rounds.append([work.generate(index, **arguments).times for index in range(len(rounds[0]))])
        report = handle.report()
        weights = resident_bytes(work.pipe, baseline.weights, report.to_dict())
    return _Runs(results, rounds, first, weights + used.size, report)


def computed_share(report: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of network calls that a step cache computed; 1 without one.

    Args:
        report: of the acceleration's parts, see `AccelerationReport.to_dict`.
    """
    for one in report:
        if one["part"] == "step_cache" and one["values"]["called"]:
            return 1 - one["values"]["skipped"] / one["values"]["called"]
    return 1.0
