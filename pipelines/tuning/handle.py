"""What `speed_up` returns: the acceleration on the pipeline, and the report of what it did and gained."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from pipelines.acceleration import AccelerationConfig, AccelerationHandle, AccelerationReport
from pipelines.acceleration.switch import Undo
from pipelines.tuning.profiles import Found
from pipelines.tuning.reports import SpeedUpReport
from pipelines.tuning.workload import Workload

logger = logging.getLogger(__name__)

ALL = "all"
"""Name of the whole setting among gains."""
_NOT_YET = ("why.not_called", "why.networks_not_called")
"""Reasons of parts that had nothing to do so far."""
_END_OF_CALL = "maybe_free_model_hooks"
"""What pipelines of diffusers, and ours, call when a call ends."""


@dataclass
class SpeedUpHandle:
    """An acceleration on a pipeline, with what is known of its gain; also a context manager that takes it back.

    Attributes:
        pipe: of ours or diffusers.
        config: the setting that is applied.
        found: where the setting is from; None for one that the caller gave.
        measured: part, or "all" -> how many times as fast a request was; filled by `measure`.
    """

    pipe: Any
    config: AccelerationConfig
    found: Found | None = None
    measured: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Apply the setting.

        Raises:
            AccelerationError: the pipeline can't have a part, or has it already; then nothing is applied.
        """
        self._warned: set[str] = set()
        self._apply()

    def _apply(self) -> None:
        self._handle: AccelerationHandle = self.config.apply(self.pipe)
        self._watch = Undo()
        if callable(getattr(self.pipe, _END_OF_CALL, None)):
            self._watch_calls()

    def _watch_calls(self) -> None:
        """Look at the report when a call ends, so that parts that did nothing are told of."""
        own = vars(self.pipe)
        inner, before = getattr(self.pipe, _END_OF_CALL), own.get(_END_OF_CALL)

        def end() -> Any:
            self._warn(self._handle.report())
            return inner()

        own[_END_OF_CALL] = end
        if before is None:
            self._watch.callback(own.pop, _END_OF_CALL)
        else:
            self._watch.callback(own.__setitem__, _END_OF_CALL, before)

    @property
    def is_applied(self) -> bool:
        """Whether the acceleration is still on the pipeline."""
        return self._handle.is_applied

    @property
    def call_arguments(self) -> dict[str, Any]:
        """What calls of the pipeline must be given; empty for our pipelines."""
        return self._handle.call_arguments

    def mechanism(self, part: str) -> Any:
        """Return what a part attached to the networks; None without the part, or for one that attaches nothing."""
        return self._handle.mechanism(part)

    def report(self) -> SpeedUpReport:
        """Return what each part did and gained, and why any did nothing; after `undo()` how things stood then.

        A part that was called and did nothing is also logged as a warning, once.
        """
        report = self._handle.report()
        self._warn(report)
        return SpeedUpReport.of(report, self.found, self.measured)

    def measure(self, prompt: Any, rounds: int = 3, **call: Any) -> SpeedUpReport:
        """Time requests on this machine: plain, with each part alone, and with all; they take turns.

        The acceleration is taken off meanwhile and applied again, so its counters begin anew.

        Args:
            prompt: of the requests, a text or the number of a class.
            rounds: of all; the median ratio counts.
            **call: further arguments of the requests.

        Returns:
            The report, with measured gains.

        Raises:
            ValueError: rounds is below 1, or the acceleration is undone.
        """
        if rounds < 1 or not self.is_applied:
            state = "applied" if self.is_applied else "undone"
            raise ValueError(
                f"measure got rounds={rounds} on an {state} acceleration; give rounds of at least 1 before undo()"
            )
        work = Workload(self.pipe, [prompt], call)
        parts = self.config.to_dict()
        version = parts.pop("version")
        settings = {name: {name: value, "version": version} for name, value in parts.items()}
        self._take_off()
        try:
            ratios: dict[str, list[float]] = {}
            for _ in range(rounds):
                plain = self._seconds(work, None)
                for name, values in (*settings.items(), (ALL, self.config.to_dict())):
                    ratios.setdefault(name, []).append(plain / self._seconds(work, values))
        finally:
            self._apply()
        self.measured = {name: statistics.median(found) for name, found in ratios.items()}
        work.generate(0, **self.call_arguments)
        return self.report()

    @staticmethod
    def _seconds(work: Workload, values: Mapping[str, Any] | None) -> float:
        """Return the time of one request after one that warms up, plain or with a setting."""
        if values is None:
            work.generate(0)
            return work.generate(0).times.total(work.clock)
        with AccelerationConfig.from_dict(values).apply(work.pipe) as handle:
            work.generate(0, **handle.call_arguments)
            return work.generate(0, **handle.call_arguments).times.total(work.clock)

    def undo(self) -> None:
        """Take everything back: the pipeline computes the same bits as before. A second call does nothing.

        Raises:
            AccelerationError: another acceleration was applied after this one.
        """
        if self.is_applied:
            self._warn(self._handle.report())
            self._take_off()

    def _take_off(self) -> None:
        self._handle.undo()
        self._watch.close()

    def _warn(self, report: AccelerationReport) -> None:
        """Log each part that was called and did nothing, once."""
        for one in report.inactive:
            is_idle = all(reason.key in _NOT_YET for reason in one.reasons) and one.reasons
            if not is_idle and one.part not in self._warned:
                self._warned.add(one.part)
                logger.warning("speed_up: %s", one.text())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()
