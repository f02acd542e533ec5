"""Whose turn it is: the user with the least recent device seconds, so that thirty jobs let another's three pass.

Each user has a level: the device seconds of the user's jobs, of which half is forgotten every `HALF_LIFE` seconds (an
exponentially decaying window), and those of jobs that run. The next job is the first one of the waiting user with the
lowest level; of equal ones, of the one who was served longest ago. A user who was never seen begins at the lowest level
among those who wait, so that a new name gains nothing.
"""

from __future__ import annotations

import heapq
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass

from apps.service.accounting import Meter

HALF_LIFE = 600.0
"""Seconds after which half of what a user has used is forgotten."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS shares(
    owner TEXT PRIMARY KEY, level REAL NOT NULL, at REAL NOT NULL, job_seconds REAL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS jobs_waiting ON jobs(owner, number) WHERE state = 'queued';
"""
LINE = "FROM jobs LEFT JOIN turns ON turns.job = jobs.id"
TURN = "coalesce(turn, number)"
"""A job's place in the line: its number, unless it was moved."""
WAITING = """
    WITH RECURSIVE waiting(owner) AS (
        SELECT min(owner) FROM jobs INDEXED BY jobs_waiting WHERE state = 'queued' UNION ALL
        SELECT (SELECT min(owner) FROM jobs INDEXED BY jobs_waiting WHERE state = 'queued' AND owner > waiting.owner)
        FROM waiting WHERE waiting.owner IS NOT NULL)
    SELECT waiting.owner, coalesce(level, 0.0), coalesce(at, 0.0), job_seconds, coalesce(served.number, 0) FROM waiting
    LEFT JOIN shares ON shares.owner = waiting.owner LEFT JOIN served ON served.owner = waiting.owner
    WHERE waiting.owner IS NOT NULL
"""
"""A row for each user who waits; the index of waiting jobs is read once for each, however many jobs wait."""
NEW_SHARE = 0.3
"""Weight of the newest job in the mean of a user's seconds a job, which forecasts the order."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    owner: str
    level: float
    job_seconds: float | None
    served: int


class Shares:
    """The order of the line; all methods need the database alone, see `JobStore.using`.

    Args:
        db: the database of jobs.
        meter: measures jobs that run.
        clock: seconds since 1970.
    """

    def __init__(self, db: sqlite3.Connection, meter: Meter, clock: Callable[[], float] = time.time) -> None:
        self._db, self._meter, self._clock = db, meter, clock

    def next(self) -> str | None:
        """Return the id of the next job; None when nobody waits."""
        waiting = self._waiting()
        if not waiting:
            return None
        best = min((one.level, one.served) for one in waiting)
        tied = [one.owner for one in waiting if (one.level, one.served) == best]
        return min(self._first(owner) for owner in tied)[1]

    def order(self) -> list[str]:
        """Return the ids of all waiting jobs as they will probably be served, each user's in their order.

        What jobs will take is forecast by the mean of their user's last ones; of new users, by the mean of the others.
        """
        rows = self._db.execute(f"SELECT owner, {TURN}, id {LINE} WHERE state = 'queued' ORDER BY 2 DESC").fetchall()
        queues: dict[str, list[tuple[int, str]]] = {}
        for owner, turn, job in rows:
            queues.setdefault(owner, []).append((turn, job))
        waiting = self._waiting()
        known = [one.job_seconds for one in waiting if one.job_seconds is not None]
        usual = sum(known) / len(known) if known else 1.0
        latest, order = max((one.served for one in waiting), default=0), []
        heap = [(one.level, one.served, queues[one.owner][-1][0], one.owner) for one in waiting]
        costs = {one.owner: usual if one.job_seconds is None else one.job_seconds for one in waiting}
        heapq.heapify(heap)
        while heap:
            level, _, _, owner = heapq.heappop(heap)
            order.append(queues[owner].pop()[1])
            latest += 1
            if queues[owner]:
                heapq.heappush(heap, (level + costs[owner], latest, queues[owner][-1][0], owner))
        return order

    def serve(self, owner: str) -> None:
        """Note that a user is served now."""
        number = "(SELECT coalesce(max(number), 0) + 1 FROM served)"
        self._db.execute(f"INSERT OR REPLACE INTO served VALUES (?, {number})", (owner,))

    def welcome(self, owner: str) -> None:
        """Have a user who was never seen begin at the lowest level of those who wait; before the job is in the line."""
        known = self._db.execute("SELECT 1 FROM shares WHERE owner = ?", (owner,)).fetchone()
        if known is None:
            level = min((one.level for one in self._waiting()), default=0.0)
            self._db.execute("INSERT INTO shares VALUES (?, ?, ?, NULL)", (owner, level, self._clock()))

    def charge(self, owner: str, seconds: float, job_seconds: float | None = None) -> None:
        """Add device seconds to what a user has used.

        Args:
            owner: who.
            seconds: that were not charged before.
            job_seconds: of a whole job that has ended; None while it goes on.
        """
        row = self._db.execute("SELECT level, at, job_seconds FROM shares WHERE owner = ?", (owner,)).fetchone()
        level, at, mean = row or (0.0, 0.0, None)
        if job_seconds is not None:
            mean = job_seconds if mean is None else mean + NEW_SHARE * (job_seconds - mean)
        values = (owner, self._decayed(level, at) + seconds, self._clock(), mean)
        self._db.execute("INSERT OR REPLACE INTO shares VALUES (?, ?, ?, ?)", values)

    def _decayed(self, level: float, at: float) -> float:
        """Return what is left of a level by now; a clock that was set back forgets nothing."""
        return level * 0.5 ** (max(self._clock() - at, 0.0) / HALF_LIFE)

    def _waiting(self) -> list[_Waiting]:
        return [
            _Waiting(owner, self._decayed(level, at) + self._meter.pending(owner), job_seconds, served)
            for owner, level, at, job_seconds, served in self._db.execute(WAITING).fetchall()
        ]

    def _first(self, owner: str) -> tuple[int, str]:
        query = f"SELECT {TURN}, id {LINE} WHERE state = 'queued' AND owner = ? ORDER BY 1 LIMIT 1"
        return self._db.execute(query, (owner,)).fetchone()
