"""The search: tables of single techniques, factors of pairs, predictions, and real runs of the best."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import torch

from dit import __version__
from pipelines.tuning.breakdown import breakdown, other_dtype
from pipelines.tuning.cache_profile import cache_profiles
from pipelines.tuning.candidates import Offer, key_of, offer
from pipelines.tuning.choosing import Measured, choice_of, front_of
from pipelines.tuning.conditions import Conditions
from pipelines.tuning.cost_model import CostModel, technique
from pipelines.tuning.error_model import ErrorModel
from pipelines.tuning.front import pareto_front
from pipelines.tuning.goals import Goal
from pipelines.tuning.measurement import Measurement
from pipelines.tuning.measuring import Baseline, measure
from pipelines.tuning.progress import Budget, Listener, Progress
from pipelines.tuning.record import TuningRecord
from pipelines.tuning.solvers import try_solvers
from pipelines.tuning.tokens import tokens_of
from pipelines.tuning.workload import Workload

logger = logging.getLogger(__name__)

SINGLES, PAIRS, VERIFIED = 0.5, 0.7, 0.95
"""Shares of the time after which singles, pairs and verifications end."""
MOST_VERIFIED = 8
"""Verifications of one goal."""
STRENGTHS = 2
"""Of each technique, that are paired."""
SPARE = 4.0
"""A technique whose error is so many times less than the strictest goal's leaves room for every other."""
MEMORY_SAVERS = {"decoder_tiling", "offload", "kv_cache", "quantization"}
"""Techniques that are measured to the end where memory counts, also if they take time."""
WORTH = 0.99
"""A technique has to take at most so much of the plain time to be combined."""


@dataclass
class Tuner:
    """Tunes one pipeline for goals.

    Attributes:
        pipe: of ours or diffusers; nothing is attached to it afterwards.
        learned: prompts of the tables.
        held_out: prompts that verify.
        call: arguments of every call, such as the number of steps.
        path: file that keeps the measurements; read first, if it fits.
        minutes: that it may take.
        listener: is told of the progress.
        only: techniques to try; None is all.
        calibrate: make profiles of the step cache beside the model's own; their files are named by the settings.
    """

    pipe: Any
    learned: Sequence[Any]
    held_out: Sequence[Any]
    path: Path
    call: Mapping[str, Any] = field(default_factory=dict)
    minutes: float = 10.0
    listener: Listener | None = None
    only: frozenset[str] | None = None
    calibrate: bool = True

    def __post_init__(self) -> None:
        """Read what is known, or begin anew.

        Raises:
            ValueError: the pipeline can't be called with a prompt, or the time is out of range.
            AttachError: it has no network that denoises.
        """
        if not (math.isfinite(self.minutes) and self.minutes > 0):
            raise ValueError(f"minutes is {self.minutes!r}; give a time above 0, such as 10")
        self.work = Workload(self.pipe, self.learned, self.call)
        self.conditions = Conditions.of(self.work)
        self.record = self._known() or TuningRecord(
            self.conditions, list(self.learned), list(self.held_out), self.work.seed, _versions()
        )
        self.budget = Budget(60 * self.minutes)
        self._verified: list[Measured] = []

    def _known(self) -> TuningRecord | None:
        """Return the record of an earlier run, unless it is of something else; then it is replaced."""
        if not self.path.is_file():
            return None
        record = TuningRecord.load(self.path)
        differences = record.conditions.differences(self.conditions)
        if record.learned != list(self.learned):
            differences.append("the prompts of the tables are others")
        if differences:
            logger.warning("%s is replaced: %s", self.path, "; ".join(differences))
            return None
        if record.held_out != list(self.held_out):  # the tables stay, verifications don't
            kept = [one for one in record.measurements if one.purpose != "verified"]
            return replace(record, held_out=list(self.held_out), measurements=kept, front=[], profiles={})
        return record

    # ------------------------------------------------------------------------------ phases

    def run(self, goals: Mapping[str, Goal]) -> TuningRecord:
        """Measure, predict, verify; the file is written after each measurement.

        Args:
            goals: name -> goal; the first is served first. All must have the same metric.

        Returns:
            The record, with a setting in `profiles` for each goal that some setting reaches.

        Raises:
            ValueError: no goals, or of several metrics.
        """
        if len({goal.metric for goal in goals.values()}) != 1:
            raise ValueError(f"goals are {list(goals)}; give at least one, all with one metric, psnr or ssim")
        self._saves_memory = any(goal.saves_memory for goal in goals.values())
        self.budget = Budget(60 * self.minutes)
        self._tell("plain", 0, 1, "plain runs")
        baseline = self._plain()
        singles = self._singles(baseline, self._offer(), goals)
        cost = CostModel(baseline.network_share(), singles)
        error = ErrorModel(next(iter(goals.values())), singles)
        self._pairs(baseline, cost, error, goals)
        self._tell("verify", 0, len(goals), "plain runs of other prompts")
        unseen = Baseline.of(Workload(self.pipe, self.held_out, self.call, self.work.seed + len(self.learned)))
        for goal in goals.values():
            self._reach(goal, unseen, cost, error)
            self._save()
        for name, goal in goals.items():  # now, because a setting that one goal verified may serve another better
            best = self._best(goal, unseen)
            self.record.profiles.pop(name, None)
            if best is not None:
                self.record.profiles[name] = choice_of(best, goal, unseen, cost)
        self._solvers(baseline)
        self._save()
        return self.record

    def _plain(self) -> Baseline:
        """Run the prompts of the tables plainly."""
        baseline = Baseline.of(self.work)
        baseline.again()
        parts = breakdown(self.work)
        other = self.record.baseline.get("other_dtype") or other_dtype(self.work)
        self.record.baseline = {
            "wall": baseline.seconds("wall"),
            "process": baseline.seconds("process"),
            "clock": self.work.clock,
            "network_share": baseline.network_share(),
            "memory": baseline.weights + baseline.memory,
            "breakdown": parts,
            "other_dtype": other,
        }
        self._save()
        return baseline

    def _offer(self) -> Offer:
        """Return what is tried on this pipeline."""
        tokens = tokens_of(self.work)
        has_caches = self.only is None or "step_cache" in self.only
        profiles = cache_profiles(self.work, self.conditions, self.path, self.calibrate) if has_caches else []
        found = offer(self.pipe, self.conditions, self._saves_memory, profiles, tokens)
        self.record.left_out = dict(found.left_out)
        if self.only is None:
            return found
        return Offer(tuple(one for one in found.candidates if one.technique in self.only), found.left_out)

    def _singles(self, baseline: Baseline, offered: Offer, goals: Mapping[str, Goal]) -> dict[str, Measurement]:
        """Measure each technique alone; return those that are worth combining, by key.

        A ladder ends where all goals could be reached: what follows on it is slower.
        """
        ended: set[str] = set()
        for number, one in enumerate(offered.candidates):
            if one.ladder in ended:
                continue
            if number and not self.budget.allows(SINGLES):
                self.record.left_out["time"] = f"{len(offered.candidates) - number} single techniques were not measured"
                break
            self._tell("single", number, len(offered.candidates), f"{one.technique} {one.parts[one.technique]}")
            found = self._measure(one.parts, baseline, "single")
            if _is_end(found, goals):
                ended.add(one.ladder)
        keys = {one.key for one in offered.candidates}
        found = [one for one in self.record.measurements if one.purpose == "single" and one.key in keys]
        return {one.key: one for one in self._worthwhile(found, self._saves_memory)}

    @staticmethod
    def _worthwhile(found: Sequence[Measurement], saves_memory: bool) -> Iterator[Measurement]:
        """Yield the measurements of each technique that no other of it dominates."""
        useful = [
            one
            for one in found
            if one.is_useful and (one.share < WORTH or (saves_memory and set(one.parts) & MEMORY_SAVERS))
        ]
        for name in dict.fromkeys(technique(one) for one in useful):
            own = [one for one in useful if technique(one) == name]
            yield from pareto_front(
                own, lambda one: (one.share, -one.quality("psnr"), float(one.memory if saves_memory else 0))
            )

    def _pairs(self, baseline: Baseline, cost: CostModel, error: ErrorModel, goals: Mapping[str, Goal]) -> None:
        """Measure how techniques act together: those of the best combinations, and one pair of each two techniques."""
        wanted = list(dict.fromkeys(self._wanted_pairs(cost, error, goals)))
        for number, keys in enumerate(wanted):
            if not self.budget.allows(PAIRS):
                self.record.left_out["pairs"] = f"{len(wanted) - number} pairs were not measured"
                return
            parts = _together(cost.singles, keys)
            self._tell("pair", number, len(wanted), " + ".join(parts))
            found = self._measure(parts, baseline, "pair")
            if found.is_useful and len(found.psnr) == len(baseline.results):
                cost.learn(keys, found)
                error.learn(keys, found)

    def _wanted_pairs(self, cost: CostModel, error: ErrorModel, goals: Mapping[str, Goal]) -> Iterator[tuple[str, str]]:
        """Yield pairs of keys: for each goal the strongest of each two techniques that could reach it together."""
        for goal in goals.values():
            ranked = [keys for _, keys in _ranked(cost, error, goal) if len(keys) == 2]
            seen: dict[frozenset[str], int] = {}
            for keys in ranked:
                names = frozenset(technique(cost.singles[key]) for key in keys)
                seen[names] = seen.get(names, 0) + 1
                if seen[names] <= STRENGTHS:
                    first, second = sorted(keys)
                    yield first, second

    def _reach(self, goal: Goal, unseen: Baseline, cost: CostModel, error: ErrorModel) -> None:
        """Verify combinations in the order of the predicted time, until none could be faster than one that holds."""
        offset, tried = 0.0, 0
        most = 1 if goal.least_memory else MOST_VERIFIED
        while tried < most and (self.budget.allows(VERIFIED) or not (tried or self._verified)):
            known = {one.measurement.key for one in self._verified}
            best = self._best(goal, unseen)
            limit = math.inf if best is None or goal.least_memory else WORTH * best.measurement.share
            ranked = _ranked(cost, error, goal, offset, self.record.baseline, unseen.seconds())
            open_ones = [(share, keys) for share, keys in ranked if share < limit]
            self._reuse(open_ones, known, cost, error, unseen)
            fresh = next((one for one in open_ones if key_of(_together(cost.singles, one[1])) not in known), None)
            if fresh is None:
                break
            share, keys = fresh
            parts = _together(cost.singles, keys)
            self._tell("verify", tried, most, f"{goal.text()}: " + " + ".join(parts))
            predicted = error.quality(keys)
            measured = self._measure(parts, unseen, "verified")
            tried += 1
            self._verified.append(Measured(measured, share, predicted, keys))
            if measured.is_useful and measured.values(goal.metric):
                surprise = measured.quality(goal.metric) - predicted
                offset = surprise if offset == 0 else (offset + surprise) / 2
            self.record.front = front_of(self._verified, goal, unseen, cost)

    def _reuse(
        self,
        ranked: Sequence[tuple[float, tuple[str, ...]]],
        known: set[str],
        cost: CostModel,
        error: ErrorModel,
        unseen: Baseline,
    ) -> None:
        """Take verifications of an earlier run, and add their keys to those that are known."""
        earlier = {one.key: one for one in self.record.measurements
                   if one.purpose == "verified" and len(one.psnr) == len(unseen.results)}  # fmt: skip
        if earlier.keys() <= known:  # as it mostly is; there may be thousands of combinations
            return
        for share, keys in ranked:
            key = key_of(_together(cost.singles, keys))
            if key in earlier and key not in known:
                known.add(key)
                self._verified.append(Measured(earlier[key], share, error.quality(keys), keys))

    def _best(self, goal: Goal, unseen: Baseline) -> Measured | None:
        """Return the verified setting that serves a goal best."""
        seconds = unseen.seconds()
        held = [
            one
            for one in self._verified
            if one.measurement.is_useful
            and (goal.saves_memory or one.measurement.share < WORTH)
            and goal.is_met(
                one.measurement.quality(goal.metric), one.measurement.share * seconds, one.measurement.memory
            )
        ]
        if goal.is_of_time_alone:
            return max(held, key=lambda one: one.measurement.quality(goal.metric), default=None)
        if goal.least_memory:
            return min(held, key=lambda one: (one.measurement.memory, one.measurement.share), default=None)
        return min(held, key=lambda one: one.measurement.share, default=None)

    def _solvers(self, baseline: Baseline) -> None:
        """Run fewer steps of other solvers, if there is time."""
        argument = self.work.info.arguments.get("steps")
        if self.record.solvers or argument is None or not self.conditions.steps or self.conditions.steps < 3:
            return
        if self.budget.left < 20 * baseline.seconds("wall"):
            self.record.left_out["solvers"] = "no time was left for fewer steps of other solvers"
            return
        self._tell("solvers", 0, 1, "fewer steps of other solvers")
        self.record.solvers = try_solvers(baseline, self.conditions.steps, argument)

    # ----------------------------------------------------------------------------- helpers

    def _measure(self, parts: Mapping[str, Any], baseline: Baseline, purpose: str) -> Measurement:
        """Measure, unless an earlier run did; the file is written."""
        known = self.record.found(key_of(parts), purpose)
        if known is not None and (known.error or len(known.psnr) == len(baseline.results)):
            return known
        give_up = purpose == "single" and not (self._saves_memory and set(parts) & MEMORY_SAVERS)
        found = measure(parts, baseline, purpose, give_up=give_up)
        self.record.measurements.append(found)
        self._save()
        return found

    def _save(self) -> None:
        self.record.save(self.path)

    def _tell(self, phase: str, done: int, total: int, text: str) -> None:
        if self.listener is not None:
            self.listener(Progress(phase, done, total, self.budget.left, text, tuple(self.record.front)))


def combinations_of(candidates: Mapping[str, Measurement]) -> Iterator[tuple[str, ...]]:
    """Yield all combinations of singles by key, at most one of each technique, at least one in all."""
    names = list(dict.fromkeys(technique(one) for one in candidates.values()))
    choices = [[None, *(key for key, one in candidates.items() if technique(one) == name)] for name in names]
    for chosen in product(*choices):
        keys = tuple(key for key in chosen if key is not None)
        if keys:
            yield keys


def _ranked(
    cost: CostModel,
    error: ErrorModel,
    goal: Goal,
    offset: float = 0.0,
    baseline: Mapping[str, Any] | None = None,
    seconds: float | None = None,
) -> list[tuple[float, tuple[str, ...]]]:
    """Return combinations that are predicted to reach a goal, with their predicted share of the time, fastest first.

    Args:
        cost: predicts times.
        error: predicts the metric.
        goal: what has to hold; where it names time alone, the nearest to the plain run goes first.
        offset: added to the predicted metric, by what verifications taught.
        baseline: of the plain run, for its memory.
        seconds: of the plain request; None ignores goals of time and memory.
    """
    found = []
    for keys in combinations_of(cost.singles):
        quality, share = error.quality(keys) + offset, cost.predict(keys)
        is_slow = seconds is not None and goal.latency is not None and share * seconds > goal.latency
        is_large = seconds is not None and goal.memory is not None and _memory(cost, keys, baseline) > goal.memory
        if (goal.threshold is None or quality >= goal.threshold) and not is_slow and not is_large:
            first = _memory(cost, keys, baseline) if goal.least_memory else -quality if goal.is_of_time_alone else share
            found.append((first, share, keys))
    return [(share, keys) for _, share, keys in sorted(found)]


def _memory(cost: CostModel, keys: Sequence[str], baseline: Mapping[str, Any] | None) -> float:
    """Predict memory: each technique saves what it saves alone."""
    plain = float((baseline or {}).get("memory", 0))
    return plain + sum(cost.singles[key].memory - plain for key in keys)


def _is_end(found: Measurement, goals: Mapping[str, Goal]) -> bool:
    """Return whether a ladder ends at a measurement: it is slower than the plain run, or near enough for all goals."""
    if found.error:
        return found.share > 0
    thresholds = [goal.threshold for goal in goals.values()]
    goal = next(iter(goals.values()))
    known = [value for value in thresholds if value is not None]
    if len(known) < len(thresholds):
        return False
    return goal.distortion(found.quality(goal.metric)) < goal.distortion(max(known)) / SPARE


def _together(singles: Mapping[str, Measurement], keys: Sequence[str]) -> dict[str, Any]:
    """Return the parts of several singles as one setting."""
    return {name: value for key in sorted(keys) for name, value in singles[key].parts.items()}


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "diffusers": diffusers.__version__, "tessera": __version__}
