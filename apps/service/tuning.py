"""Tuning on a server: `tessera tune` in a process of its own, one at a time, followed by what it prints."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from apps.service.request_error import RequestError
from apps.service.tethered import CODE, command_of, environment, reason_of, tail

logger = logging.getLogger(__name__)

TECHNIQUES = ("step_cache", "guidance_cache", "attention", "next_scale", "kv_cache")
"""That are tried: those that a request can have without another copy of the model, and that can be stopped."""
MOST_MINUTES = 60.0
MOST_LINE = 4 * 2**20
"""Characters of a line of the process that are read."""
CLOSING_SECONDS = 5.0
"""That the end of the server waits for a tuning; each measurement is on disk already."""
State = Literal["running", "done", "stopped", "failed"]


class TuningError(RequestError):
    """A tuning that can't be had as it is asked for."""


@dataclass(frozen=True, slots=True)
class TuningSettings:
    """What is tuned.

    Attributes:
        model: its name in the server's list.
        source: built-in name, folder or hub id behind it.
        minutes: that it may take.
        call: steps, guidance, width and height of the calls; those that are None are the model's own.
        device: such as "cpu".
        dtype: "auto" or a data type.
    """

    model: str
    source: str
    minutes: float = 10.0
    call: Mapping[str, float | None] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check the time.

        Raises:
            TuningError: it is out of range.
        """
        if not (math.isfinite(self.minutes) and 0 < self.minutes <= MOST_MINUTES):
            raise TuningError(
                "tuning.minutes",
                f"minutes is {self.minutes}; give a number above 0, up to {MOST_MINUTES:g}.",
                value=self.minutes,
                most=f"{MOST_MINUTES:g}",
            )

    def arguments(self) -> list[str]:
        """Return the command line, without the program."""
        options = [f"--{name}={value:g}" for name, value in self.call.items() if value is not None]
        techniques = [f"--only={name}" for name in TECHNIQUES]
        fixed = [f"--minutes={self.minutes:g}", f"--device={self.device}", f"--dtype={self.dtype}", "--json-lines"]
        return ["tune", *fixed, *options, *techniques, "--", self.source]


@dataclass(frozen=True, slots=True)
class Tuning:
    """A tuning, as it stands.

    Attributes:
        settings: what is tuned.
        state: how it goes.
        news: the newest line of the process: progress, or the result; empty before the first.
        reason: why it failed, without paths of the server.
        is_stopping: it has been asked to end.
    """

    settings: TuningSettings
    state: State = "running"
    news: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    is_stopping: bool = False

    @property
    def share(self) -> float:
        """Part of the time that is spent, 0 to 1."""
        if self.state != "running":
            return 1.0
        left = self.news.get("seconds_left")
        return 0.0 if left is None else min(max(1 - float(left) / (60 * self.settings.minutes), 0.0), 1.0)

    @property
    def front(self) -> list[Mapping[str, Any]]:
        """Settings that were verified and that no other dominates."""
        return list(self.news.get("front", ()))

    @property
    def profiles(self) -> Mapping[str, Mapping[str, Any]]:
        """Settings that were found for the named goals; empty while it runs."""
        return self.news.get("profiles", {})


class Tunings:
    """The tunings of a server, one at a time; the last one is remembered until the next.

    What they find is kept where `pipelines.tuning.record.record_path` says, for requests with a `profile` and for
    `speed_up` in Python.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._last: Tuning | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="tessera-tuning-")

    @property
    def last(self) -> Tuning | None:
        """The tuning that runs, or ran last."""
        with self._lock:
            return self._last

    def start(self, settings: TuningSettings) -> Tuning:
        """Start a tuning.

        Raises:
            TuningError: one runs, or it can't be started.
        """
        folder = Path(self._folder.name)
        with self._lock:
            if self._last is not None and self._last.state == "running":
                raise TuningError("tuning.busy", "A tuning is running; stop it, or start this one when it is done.")
            try:
                with (folder / "log").open("wb") as log:
                    self._process = subprocess.Popen(
                        command_of(folder / "lock", settings.arguments()),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        cwd=CODE,
                        env=environment(),
                        start_new_session=True,
                        encoding="utf-8",
                        errors="replace",
                    )
            except OSError as error:
                logger.error("the tuning of %s can't be started: %s", settings.model, error)
                raise TuningError("tuning.start", "The tuning could not be started; the log says why.") from error
            self._last = Tuning(settings)
            self._reader = threading.Thread(target=self._follow, args=(self._process,), name="tuning", daemon=True)
            self._reader.start()
            return self._last

    def stop(self) -> None:
        """Have the tuning end; what it measured is on disk, and another one goes on from it."""
        with self._lock:
            if self._process is None or self._last is None or self._last.state != "running":
                return
            self._last = replace(self._last, is_stopping=True)
            _close(self._process)

    def wait(self, seconds: float) -> bool:
        """Wait until no tuning runs; whether that is so within so long."""
        reader = self._reader
        if reader is not None:
            reader.join(seconds)
        return reader is None or not reader.is_alive()

    def close(self) -> None:
        """Stop the tuning, at the end of the server."""
        self.stop()
        if self.wait(CLOSING_SECONDS):
            self._folder.cleanup()

    def _follow(self, process: subprocess.Popen[str]) -> None:
        """Read what a process prints until it has ended, and keep the newest."""
        assert process.stdout is not None
        began = time.monotonic()
        while line := process.stdout.readline(MOST_LINE):
            news = _read(line)
            if news is not None:
                with self._lock:
                    if self._last is not None:
                        self._last = replace(self._last, news=news)
        code = process.wait()
        _close(process)
        with self._lock:
            last = self._last
            if last is None:
                return
            self._last = self._ended(last, code)
            logger.info("the tuning of %s: %s after %.0f s", last.settings.model, self._last.state,
                        time.monotonic() - began)  # fmt: skip

    def _ended(self, last: Tuning, code: int) -> Tuning:
        """Return a tuning as it stands after its process; without a setting for the first goal it has a result, too."""
        if last.news.get("event") == "done":
            return replace(last, state="done")
        if last.is_stopping:
            return replace(last, state="stopped")
        folder = Path(self._folder.name)
        reason = reason_of(tail(folder / "log"), code, folder)
        logger.error("the tuning of %s failed: %s", last.settings.model, reason or f"exit code {code}")
        return replace(last, state="failed", reason=reason)


def _read(line: str) -> Mapping[str, Any] | None:
    """Return the object that a line of the process holds; None for lines of libraries."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and values.get("event") in ("progress", "done") else None


def _close(process: subprocess.Popen[str]) -> None:
    """Close the pipe that keeps a command running, see `apps.service.tether`."""
    if process.stdin is not None:
        with suppress(BrokenPipeError):  # it has ended by itself
            process.stdin.close()
