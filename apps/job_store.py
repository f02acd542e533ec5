"""The line of jobs on disk: what was asked, what is done, what is next. It survives a kill at any moment.

A job is `queued`, then `running`, then `done`, `stopped` or `failed`. Each change is one SQLite transaction. A picture
counts when its row is written, and its file, whose name follows from the job, is complete before that: a job that was
running when the process died goes back into the line, skips the pictures that count, and replaces by its equal the one
file that may lie there uncounted. So nothing is lost and nothing is doubled.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from apps.request_error import TranslatableError

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs(
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, request TEXT NOT NULL,
    state TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL, ended REAL,
    code TEXT NOT NULL DEFAULT '', message TEXT NOT NULL DEFAULT '');
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs(state, number);
CREATE INDEX IF NOT EXISTS jobs_by_owner ON jobs(owner, number);
CREATE TABLE IF NOT EXISTS pictures(
    job TEXT NOT NULL REFERENCES jobs(id), place INTEGER NOT NULL, name TEXT NOT NULL, settings TEXT NOT NULL,
    seconds REAL NOT NULL, PRIMARY KEY(job, place)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS skipped(
    job TEXT NOT NULL REFERENCES jobs(id), place INTEGER NOT NULL, PRIMARY KEY(job, place)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS turns(job TEXT PRIMARY KEY REFERENCES jobs(id), turn INTEGER NOT NULL) WITHOUT ROWID;
"""
LINE = "FROM jobs LEFT JOIN turns ON turns.job = jobs.id"
TURN = "coalesce(turn, number)"
"""A job's place in the line: its number, unless it was moved."""
COLUMNS = "id, owner, request, state, attempts, created, ended, code, message"


class StoreInUseError(ValueError):
    """Another process works on the same line of jobs."""


class QueueFullError(TranslatableError):
    """As many requests wait as the server, or one user, may have."""


@dataclass(frozen=True, slots=True)
class StoredJob:
    """A row of the line.

    Attributes:
        id: 16 hex digits.
        owner: who asked.
        request: JSON.
        state: queued, running, done, stopped, failed.
        attempts: how often it was begun.
        created: seconds since 1970.
        ended: seconds since 1970; None while it isn't.
        code: of a failure.
        message: of a failure, for people.
    """

    id: str
    owner: str
    request: str
    state: str
    attempts: int
    created: float
    ended: float | None
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """A picture that counts.

    Attributes:
        job: its job.
        place: which picture of the job, from 0.
        name: of its file in the output folder; empty without one.
        settings: JSON of `PictureSettings`.
        seconds: time it took.
    """

    job: str
    place: int
    name: str
    settings: str
    seconds: float


class JobStore:
    """The line of jobs.

    Args:
        file: of the database; None keeps the line in memory.

    Raises:
        StoreInUseError: another process has it open.
    """

    def __init__(self, file: Path | None) -> None:
        self._lock = threading.RLock()
        self._db = sqlite3.connect(
            ":memory:" if file is None else file, isolation_level=None, check_same_thread=False, timeout=0.5
        )
        try:
            # Exclusive: two processes on one line would paint everything twice. The system frees it when one dies.
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("COMMIT")
            self._db.executescript(SCHEMA)
        except sqlite3.OperationalError as error:
            self._db.close()
            if "locked" not in str(error):
                raise
            raise StoreInUseError(
                "Another tessera works on this output folder; end it, or choose another --output."
            ) from error

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._db.close()

    # ------------------------------------------------------------------ the line

    def add(self, job_id: str, owner: str, request: str, capacity: int, per_owner: int) -> StoredJob:
        """Put a job at the end of the line.

        Raises:
            QueueFullError: the line is full, or the owner has too many in it.
        """
        with self._lock:
            waiting = "SELECT count(*) FROM jobs WHERE state IN ('queued', 'running')"
            if self._db.execute(waiting).fetchone()[0] >= capacity:
                raise QueueFullError(
                    "queue.full", f"The line is full ({capacity} requests wait); try again in a moment.", most=capacity
                )
            if self._db.execute(f"{waiting} AND owner = ?", (owner,)).fetchone()[0] >= per_owner:
                raise QueueFullError(
                    "queue.yours",
                    f"{per_owner} of your requests wait already; try again when one is done.",
                    most=per_owner,
                )
            self._db.execute(
                "INSERT INTO jobs(id, owner, request, state, created) VALUES (?, ?, ?, 'queued', ?)",
                (job_id, owner, request, time.time()),
            )
            return self._one("id = ?", job_id)

    def take(self) -> StoredJob | None:
        """Mark the first job of the line as running and return it; None when nobody waits."""
        with self._lock:
            row = self._db.execute(
                "UPDATE jobs SET state = 'running', attempts = attempts + 1 WHERE number = "
                f"(SELECT number {LINE} WHERE state = 'queued' ORDER BY {TURN} LIMIT 1) RETURNING {COLUMNS}"
            ).fetchone()
            return None if row is None else StoredJob(*row)

    def put_back(self, job_id: str) -> None:
        """Put a running job back to its place in the line, as if it had not been begun."""
        self._change("UPDATE jobs SET state = 'queued', attempts = attempts - 1 WHERE id = ?", job_id)

    def end(self, job_id: str, state: str, code: str = "", message: str = "") -> None:
        """Record how a job ended: done, stopped or failed."""
        query = "UPDATE jobs SET state = ?, code = ?, message = ?, ended = ? WHERE id = ?"
        self._change(query, state, code, message, time.time(), job_id)

    def stop_waiting(self, job_id: str) -> bool:
        """Take a job out of the line; False if it doesn't wait any more."""
        query = "UPDATE jobs SET state = 'stopped', ended = ? WHERE id = ? AND state = 'queued'"
        return self._change(query, time.time(), job_id) == 1

    def recover(self, attempts: int) -> list[StoredJob]:
        """Put back what was running when the last process died; give up what was begun too often.

        Args:
            attempts: how often a job may be begun.

        Returns:
            The jobs that wait, in their order.
        """
        with self._lock:
            self._db.execute(
                "UPDATE jobs SET state = 'failed', code = 'crashed', ended = ?, message = ? "
                "WHERE state = 'running' AND attempts >= ?",
                (time.time(), f"The server died {attempts} times while it worked on this.", attempts),
            )
            self._db.execute("UPDATE jobs SET state = 'queued' WHERE state = 'running'")
            self._db.execute("DELETE FROM turns WHERE job NOT IN (SELECT id FROM jobs WHERE state = 'queued')")
            rows = self._db.execute(f"SELECT {COLUMNS} {LINE} WHERE state = 'queued' ORDER BY {TURN}")
            return [StoredJob(*row) for row in rows]

    def ahead(self) -> dict[str, int]:
        """Return for every waiting job how many come before it, running ones included."""
        with self._lock:
            query = f"SELECT id, state {LINE} WHERE state IN ('queued', 'running') ORDER BY state DESC, {TURN}"
            rows = self._db.execute(query).fetchall()
        return {job: place for place, (job, state) in enumerate(rows) if state == "queued"}

    def waiting(self, owner: str) -> list[str]:
        """Return the ids of an owner's jobs that wait, in their order."""
        with self._lock:
            query = f"SELECT id {LINE} WHERE state = 'queued' AND owner = ? ORDER BY {TURN}"
            return [job for (job,) in self._db.execute(query, (owner,))]

    def unfinished(self, owner: str) -> list[StoredJob]:
        """Return an owner's jobs that run, then those that wait, in their order."""
        with self._lock:
            query = f"SELECT {COLUMNS} {LINE} WHERE state IN ('queued', 'running') AND owner = ?"
            return [StoredJob(*row) for row in self._db.execute(f"{query} ORDER BY state DESC, {TURN}", (owner,))]

    def move(self, job_id: str, position: int) -> bool:
        """Move a waiting job among those of its owner, who keep their places in the line between them.

        Args:
            job_id: the job.
            position: among the owner's waiting jobs, from 0; beyond the last one is last.

        Returns:
            False if the job doesn't wait.
        """
        with self._lock:
            query = (
                f"SELECT id, {TURN} {LINE} WHERE state = 'queued' "
                f"AND owner = (SELECT owner FROM jobs WHERE id = ?) ORDER BY {TURN}"
            )
            rows = self._db.execute(query, (job_id,)).fetchall()
            others = [job for job, _ in rows if job != job_id]
            if len(others) == len(rows):
                return False
            others.insert(position, job_id)
            turns = [(job, turn) for job, (_, turn) in zip(others, rows, strict=True)]
            values = ", ".join("(?, ?)" for _ in turns)  # one statement, so that a kill leaves all or none
            self._db.execute(f"INSERT OR REPLACE INTO turns VALUES {values}", [v for pair in turns for v in pair])
            return True

    # ------------------------------------------------------------------ records

    def get(self, job_id: str) -> StoredJob | None:
        """Return a job, or None."""
        with self._lock:
            row = self._db.execute(f"SELECT {COLUMNS} FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return None if row is None else StoredJob(*row)

    def jobs(self, owner: str | None, limit: int, before: float | None = None) -> list[StoredJob]:
        """Return jobs, the newest first.

        Args:
            owner: whose; None for all.
            limit: how many at most.
            before: only jobs created before this time.
        """
        query = f"SELECT {COLUMNS} FROM jobs WHERE (? IS NULL OR owner = ?) AND (? IS NULL OR created < ?)"
        with self._lock:
            rows = self._db.execute(f"{query} ORDER BY number DESC LIMIT ?", (owner, owner, before, before, limit))
            return [StoredJob(*row) for row in rows]

    def add_picture(self, picture: StoredPicture) -> None:
        """Record a picture, whose file is complete; from here on it counts."""
        values = (picture.job, picture.place, picture.name, picture.settings, picture.seconds)
        self._change("INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?, ?)", *values)

    def add_skipped(self, job_id: str, places: Iterable[int]) -> None:
        """Record pictures that nobody wants any more, so that a second attempt leaves them out too."""
        with self._lock:
            self._db.executemany("INSERT OR IGNORE INTO skipped VALUES (?, ?)", [(job_id, place) for place in places])

    def skipped(self, job_id: str) -> set[int]:
        """Return the places of a job's pictures that were skipped."""
        with self._lock:
            return {place for (place,) in self._db.execute("SELECT place FROM skipped WHERE job = ?", (job_id,))}

    def pictures(self, job_id: str) -> list[StoredPicture]:
        """Return the pictures of a job that count, in their order."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM pictures WHERE job = ? ORDER BY place", (job_id,))
            return [StoredPicture(*row) for row in rows]

    def history(self, owner: str | None, limit: int, skip: int = 0) -> list[StoredPicture]:
        """Return pictures that have a file, the newest first.

        Args:
            owner: whose; None for all.
            limit: how many at most.
            skip: how many of the newest to leave out.
        """
        query = (
            "SELECT pictures.* FROM pictures JOIN jobs ON jobs.id = pictures.job WHERE name != '' "
            "AND (? IS NULL OR owner = ?) ORDER BY jobs.number DESC, place DESC LIMIT ? OFFSET ?"
        )
        with self._lock:
            return [StoredPicture(*row) for row in self._db.execute(query, (owner, owner, limit, skip))]

    def _one(self, condition: str, *values: object) -> StoredJob:
        return StoredJob(*self._db.execute(f"SELECT {COLUMNS} FROM jobs WHERE {condition}", values).fetchone())

    def _change(self, query: str, *values: object) -> int:
        with self._lock:
            return self._db.execute(query, values).rowcount
