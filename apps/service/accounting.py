"""What users have used of the devices, day by day: images and seconds; it survives a restart.

The seconds of a job are counted from when its model is there until it ends, and are charged when an image of it is
recorded, and when it ends, is stopped, fails or is put back. So a killed process loses those of one image at most.
Fine-tuning and tuning are not counted.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

SCHEMA = """
CREATE TABLE IF NOT EXISTS usage_days(
    day TEXT NOT NULL, owner TEXT NOT NULL, images INTEGER NOT NULL DEFAULT 0, seconds REAL NOT NULL DEFAULT 0,
    PRIMARY KEY(day, owner)) WITHOUT ROWID;
"""
BOUNDS = (1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
"""Upper ends of the classes that jobs are counted in by their device seconds."""


@dataclass(frozen=True, slots=True)
class Used:
    """What a user has used and waits for.

    Attributes:
        images: generated today.
        seconds: of devices today, those of a job that runs included.
        pending: images that waiting and running jobs still have to make.
        waiting: jobs that wait.
        running: jobs that run.
        stored: bytes of the user's images and clips; counted from the version that records sizes on.
    """

    images: int = 0
    seconds: float = 0.0
    pending: int = 0
    waiting: int = 0
    running: int = 0
    stored: int = 0


@dataclass(frozen=True, slots=True)
class Totals:
    """What all users have used together.

    Attributes:
        images: ever recorded here.
        seconds: of devices.
    """

    images: int
    seconds: float


def day_of(moment: float) -> str:
    """Return the day of a moment in the server's time zone, such as "2026-12-01".

    Args:
        moment: seconds since 1970.
    """
    return datetime.fromtimestamp(moment).date().isoformat()


def end_of_day(moment: float) -> float:
    """Return when the day of a moment ends in the server's time zone, seconds since 1970."""
    day = datetime.fromtimestamp(moment).replace(hour=0, minute=0, second=0, microsecond=0)
    return (day + timedelta(days=1)).timestamp()


def add(db: sqlite3.Connection, owner: str, moment: float, *, images: int = 0, seconds: float = 0.0) -> None:
    """Add to what a user has used on the day of a moment."""
    query = (
        "INSERT INTO usage_days VALUES (?, ?, ?, ?) ON CONFLICT(day, owner) "
        "DO UPDATE SET images = images + excluded.images, seconds = seconds + excluded.seconds"
    )
    db.execute(query, (day_of(moment), owner, images, seconds))


def used(db: sqlite3.Connection, owner: str, moment: float) -> Used:
    """Return what a user has used and waits for, without the seconds of jobs that run.

    Args:
        db: the database of jobs.
        owner: who.
        moment: now, seconds since 1970.
    """
    query = "SELECT images, seconds FROM usage_days WHERE day = ? AND owner = ?"
    images, seconds = db.execute(query, (day_of(moment), owner)).fetchone() or (0, 0.0)
    query = (
        "SELECT count(*) FILTER (WHERE state = 'queued'), count(*) FILTER (WHERE state = 'running'), "
        "coalesce(sum(iif(json_extract(request, '$.pick') IS NULL, "
        "coalesce(json_extract(request, '$.num_images'), 1), 1) "
        "- (SELECT count(*) FROM pictures WHERE pictures.job = jobs.id) "
        "- (SELECT count(*) FROM skipped WHERE skipped.job = jobs.id)), 0) "
        "FROM jobs WHERE state IN ('queued', 'running') AND owner = ?"
    )
    waiting, running, pending = db.execute(query, (owner,)).fetchone()
    query = (
        "SELECT coalesce(sum(pictures.bytes), 0) FROM gallery_items AS item "
        "JOIN pictures ON pictures.job = item.job AND pictures.place = item.place WHERE item.owner = ?"
    )
    (stored,) = db.execute(query, (owner,)).fetchone()
    return Used(images, seconds, max(pending, 0), waiting, running, stored)


def totals(db: sqlite3.Connection) -> Totals:
    """Return what all users have used together."""
    query = "SELECT coalesce(sum(images), 0), coalesce(sum(seconds), 0.0) FROM usage_days"
    return Totals(*db.execute(query).fetchone())


def active(db: sqlite3.Connection) -> set[str]:
    """Return who has jobs that wait or run."""
    query = "SELECT DISTINCT owner FROM jobs WHERE state IN ('queued', 'running')"
    return {owner for (owner,) in db.execute(query)}


class Histogram:
    """Counts values in classes.

    Args:
        bounds: upper ends of the classes, rising; a last class has no end.
    """

    def __init__(self, bounds: tuple[float, ...] = BOUNDS) -> None:
        self.bounds = bounds
        self._counts, self._total = [0] * (len(bounds) + 1), 0.0
        self._lock = threading.Lock()

    def add(self, value: float) -> None:
        """Count a value; one that is equal to an upper end belongs to its class."""
        with self._lock:
            self._counts[bisect_left(self.bounds, value)] += 1
            self._total += value

    def read(self) -> tuple[list[int], float]:
        """Return how many values each class has, and the sum of all values."""
        with self._lock:
            return list(self._counts), self._total


@dataclass(slots=True)
class _Clock:
    owner: str
    since: float | None  # None while it stands
    seconds: float = 0.0
    charged: float = 0.0
    begun: float = 0.0


class Meter:
    """Measures the device seconds of jobs that run in this process; any thread may ask.

    Args:
        ticks: seconds of a clock that never goes back.
    """

    def __init__(self, ticks: Callable[[], float] = time.monotonic) -> None:
        self._ticks = ticks
        self._clocks: dict[str, _Clock] = {}
        self._lock = threading.Lock()
        self.jobs = Histogram()
        """Device seconds of jobs that have ended in this process."""

    @contextmanager
    def running(self, job: str, owner: str) -> Iterator[None]:
        """Measure what is done inside as work on a job."""
        with self._lock:
            clock = self._clocks.setdefault(job, _Clock(owner, None, begun=time.time()))
            clock.since = self._ticks()
        try:
            yield
        finally:
            with self._lock:
                clock.seconds, clock.since = self._seconds(clock), None

    def _seconds(self, clock: _Clock) -> float:
        return clock.seconds + (0.0 if clock.since is None else self._ticks() - clock.since)

    def due(self, job: str) -> float:
        """Return the seconds of a job that were not charged yet."""
        with self._lock:
            clock = self._clocks.get(job)
            return 0.0 if clock is None else self._seconds(clock) - clock.charged

    def total(self, job: str) -> float | None:
        """Return all seconds of a job that this process works on, or has; None for one that was not begun."""
        with self._lock:
            clock = self._clocks.get(job)
            return None if clock is None else self._seconds(clock)

    def settle(self, job: str, seconds: float) -> None:
        """Note that seconds of a job were charged."""
        with self._lock:
            if (clock := self._clocks.get(job)) is not None:
                clock.charged += seconds

    def forget(self, job: str, *, has_ended: bool) -> None:
        """Measure a job no more; one that has ended is counted in `jobs`."""
        with self._lock:
            clock = self._clocks.pop(job, None)
            if clock is not None and has_ended:
                self.jobs.add(self._seconds(clock))

    def pending(self, owner: str) -> float:
        """Return the seconds of an owner's running jobs that were not charged yet."""
        with self._lock:
            mine = [clock for clock in self._clocks.values() if clock.owner == owner]
            return sum(self._seconds(clock) - clock.charged for clock in mine)

    def begun(self, job: str) -> float | None:
        """Return when the work on a job began, seconds since 1970; None for one that waits, also for its model."""
        with self._lock:
            clock = self._clocks.get(job)
            return None if clock is None else clock.begun
