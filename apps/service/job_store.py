"""The line of jobs on disk: what was asked, what is done, what is next. It survives a kill at any moment.

A job is `queued`, then `running`, then `done`, `stopped` or `failed`. Each change is one SQLite transaction. An image
counts when its row is written, and its file, whose name follows from the job, is complete before that: a job that was
running when the process died goes back into the line, skips the images that count, and replaces by its equal the one
file that may lie there uncounted. So nothing is lost and nothing is doubled.

Users share the devices: whose job is next is decided in `apps.service.shares`, and what they have used is recorded in
the transaction that records the end of a job, or an image of it (`apps.service.accounting`).
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from apps.service import accounting, gallery_schema, shares
from apps.service.accounting import Meter
from apps.service.request_error import TranslatableError
from apps.service.shares import LINE, TURN, Shares

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs(
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, request TEXT NOT NULL,
    state TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL, ended REAL,
    code TEXT NOT NULL DEFAULT '', message TEXT NOT NULL DEFAULT '');
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs(state, number);
CREATE INDEX IF NOT EXISTS jobs_by_owner ON jobs(owner, number);
CREATE TABLE IF NOT EXISTS pictures(
    job TEXT NOT NULL REFERENCES jobs(id), place INTEGER NOT NULL, name TEXT NOT NULL, settings TEXT NOT NULL,
    seconds REAL NOT NULL, report TEXT NOT NULL DEFAULT '', notes TEXT NOT NULL DEFAULT '[]',
    reports TEXT NOT NULL DEFAULT '[]', bytes INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY(job, place)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS skipped(
    job TEXT NOT NULL REFERENCES jobs(id), place INTEGER NOT NULL, PRIMARY KEY(job, place)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS turns(job TEXT PRIMARY KEY REFERENCES jobs(id), turn INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS pictures_by_name ON pictures(name);
CREATE TABLE IF NOT EXISTS served(owner TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS uploads(
    name TEXT NOT NULL, owner TEXT NOT NULL, bytes INTEGER NOT NULL, used REAL NOT NULL,
    PRIMARY KEY(name, owner)) WITHOUT ROWID;
"""
COLUMNS = "id, owner, request, state, attempts, created, ended, code, message"


class StoreInUseError(ValueError):
    """Another process works on the same line of jobs."""


class StoreError(OSError):
    """The queue can't be read or written now, such as when the disk is full."""


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
    """An image that counts.

    Attributes:
        job: its job.
        place: which image of the job, from 0.
        name: of its file in the output folder; empty without one.
        settings: JSON of `PictureSettings`.
        seconds: time it took.
        report: what accelerators did, see `apps.service.events.Picture`.
        notes: what keeps it from being what was asked for, a JSON list of sentences.
        reports: what each accelerator did, as JSON, see `apps.service.reports`.
        bytes: of its files; 0 where that was not recorded.
    """

    job: str
    place: int
    name: str
    settings: str
    seconds: float
    report: str = ""
    notes: str = "[]"
    reports: str = "[]"
    bytes: int = 0


class JobStore:
    """The line of jobs.

    Args:
        file: of the database; None keeps the line in memory.
        clock: seconds since 1970, for shares and days.
        ticks: seconds of a clock that never goes back, by which jobs are measured.

    Raises:
        StoreInUseError: another process has it open.
    """

    def __init__(
        self,
        file: Path | None,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lock = threading.RLock()
        self._trouble = ""
        self.meter, self.clock = Meter(ticks), clock
        if file is not None:
            _create_private(file)
        self._db = sqlite3.connect(
            ":memory:" if file is None else file, isolation_level=None, check_same_thread=False, timeout=0.5
        )
        try:
            # Exclusive: two processes on one line would generate everything twice. The system frees it when one dies.
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("COMMIT")
            self._db.executescript(SCHEMA)
            self._add_column("pictures", "report", "TEXT NOT NULL DEFAULT ''")
            self._add_column("pictures", "notes", "TEXT NOT NULL DEFAULT '[]'")
            self._add_column("pictures", "reports", "TEXT NOT NULL DEFAULT '[]'")
            self._add_column("pictures", "bytes", "INTEGER NOT NULL DEFAULT 0")
            self._db.executescript(accounting.SCHEMA + shares.SCHEMA)
            gallery_schema.prepare(self._db)
        except sqlite3.Error as error:
            self._db.close()
            if "locked" in str(error):
                raise StoreInUseError(
                    "Another tessera works on this output folder; end it, or choose another --output."
                ) from error
            raise StoreError(
                f"The queue {file} can't be used ({error}). Make it writable, or move it away to begin with an empty "
                "queue; images that were finished stay where they are."
            ) from error
        self._shares = Shares(self._db, self.meter, clock)

    @property
    def trouble(self) -> str:
        """What was wrong when the queue could not be read or written; empty since it was written again."""
        return self._trouble

    def check(self) -> None:
        """Write something that means nothing, to see whether the queue can be written again.

        Raises:
            StoreError: it can't.
        """
        self._change("INSERT OR REPLACE INTO served VALUES ('', 0)")  # nobody has this name

    @contextmanager
    def using(self) -> Iterator[sqlite3.Connection]:
        """Use the database alone; its tables are those of this module and of `apps.service.gallery_schema`.

        Raises:
            StoreError: it can't be read or written.
        """
        with self._lock:
            changes = self._db.total_changes
            try:
                yield self._db
            except sqlite3.Error as error:
                self._trouble = f"the queue on disk can't be read or written: {error}"
                raise StoreError(self._trouble) from error
            if self._db.total_changes != changes:  # a full disk can be read as ever, so reading proves nothing
                self._trouble = ""

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """Use the database alone for several changes, of which all are made or none.

        Raises:
            StoreError: it can't be written.
        """
        with self.using() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._db.close()

    # ------------------------------------------------------------------ the line

    def add(self, job_id: str, owner: str, request: str, capacity: int, per_owner: int) -> StoredJob:
        """Put a job at the end of the line.

        Args:
            job_id: 16 hex digits.
            owner: who asks.
            request: JSON.
            capacity: of the queue; beyond it only those get in who have less than their part of it.
            per_owner: how many one owner may have in it.

        Raises:
            QueueFullError: the line is full, or the owner has too many in it.
            StoreError: it can't be written.
        """
        with self._changing() as db:
            rows = "SELECT owner, count(*) FROM jobs WHERE state IN ('queued', 'running') GROUP BY owner"
            counts = dict(db.execute(rows).fetchall())
            mine = counts.setdefault(owner, 0)
            if mine >= per_owner:
                message = f"{per_owner} of your requests wait already; try again when one is done."
                raise QueueFullError("queue.yours", message, most=per_owner)
            if sum(counts.values()) >= capacity and mine >= max(capacity // len(counts), 1):
                message = f"The line is full ({capacity} requests wait); try again in a moment."
                raise QueueFullError("queue.full", message, most=capacity)
            self._shares.welcome(owner)
            db.execute(
                "INSERT INTO jobs(id, owner, request, state, created) VALUES (?, ?, ?, 'queued', ?)",
                (job_id, owner, request, time.time()),
            )
            return self._one("id = ?", job_id)

    def take(self) -> StoredJob | None:
        """Mark the next job as running and return it; None when nobody waits.

        Raises:
            StoreError: it can't be written.
        """
        with self._changing() as db:
            job_id = self._shares.next()
            if job_id is None:
                return None
            query = f"UPDATE jobs SET state = 'running', attempts = attempts + 1 WHERE id = ? RETURNING {COLUMNS}"
            taken = StoredJob(*db.execute(query, (job_id,)).fetchone())
            self._shares.serve(taken.owner)
            return taken

    def put_back(self, job_id: str) -> None:
        """Put a running job back to its place in the line, as if it had not been begun; its seconds are charged."""
        with self._charging(job_id) as db:
            db.execute("UPDATE jobs SET state = 'queued', attempts = attempts - 1 WHERE id = ?", (job_id,))
        self.meter.forget(job_id, has_ended=False)

    def end(self, job_id: str, state: str, code: str = "", message: str = "") -> None:
        """Record how a job ended, done, stopped or failed, and what it used."""
        query = "UPDATE jobs SET state = ?, code = ?, message = ?, ended = ? WHERE id = ?"
        with self._charging(job_id, has_ended=True) as db:
            db.execute(query, (state, code, message, time.time(), job_id))
        self.meter.forget(job_id, has_ended=True)

    @contextmanager
    def _charging(self, job_id: str, *, images: int = 0, has_ended: bool = False) -> Iterator[sqlite3.Connection]:
        """Charge what a job has used since it was last charged to its owner, together with other changes.

        Args:
            job_id: the job.
            images: of it that are recorded now.
            has_ended: the job has.
        """
        seconds, whole = self.meter.due(job_id), self.meter.total(job_id) if has_ended else None
        with self._changing() as db:
            row = db.execute("SELECT owner FROM jobs WHERE id = ?", (job_id,)).fetchone()
            if row is not None and (seconds or images):
                accounting.add(db, row[0], self.clock(), images=images, seconds=seconds)
                self._shares.charge(row[0], seconds, whole)
            yield db
        self.meter.settle(job_id, seconds)

    def stop_waiting(self, job_id: str) -> bool:
        """Take a job out of the line; False if it doesn't wait any more."""
        query = "UPDATE jobs SET state = 'stopped', ended = ? WHERE id = ? AND state = 'queued'"
        return self._change(query, time.time(), job_id) == 1

    def recover(self, attempts: int) -> list[StoredJob]:
        """Put back what was running when the last process died; give up what was begun too often.

        Args:
            attempts: how often a job may be begun.

        Returns:
            The jobs that wait, oldest first.

        Raises:
            StoreError: it can't be written.
        """
        with self.using() as db:
            db.execute(
                "UPDATE jobs SET state = 'failed', code = 'crashed', ended = ?, message = ? "
                "WHERE state = 'running' AND attempts >= ?",
                (time.time(), f"The server died {attempts} times while it worked on this.", attempts),
            )
            db.execute("UPDATE jobs SET state = 'queued' WHERE state = 'running'")
            db.execute("DELETE FROM turns WHERE job NOT IN (SELECT id FROM jobs WHERE state = 'queued')")
            rows = db.execute(f"SELECT {COLUMNS} {LINE} WHERE state = 'queued' ORDER BY {TURN}")
            return [StoredJob(*row) for row in rows]

    def ahead(self) -> dict[str, int]:
        """Return for every waiting job how many come before it, running ones included."""
        with self.using() as db:
            running = db.execute("SELECT count(*) FROM jobs WHERE state = 'running'").fetchone()[0]
            return {job: running + place for place, job in enumerate(self._shares.order())}

    def waiting(self, owner: str) -> list[str]:
        """Return the ids of an owner's jobs that wait, in their order."""
        with self.using() as db:
            query = f"SELECT id {LINE} WHERE state = 'queued' AND owner = ? ORDER BY {TURN}"
            return [job for (job,) in db.execute(query, (owner,))]

    def unfinished(self, owner: str | None) -> list[StoredJob]:
        """Return an owner's jobs (None: all) that run, then those that wait, in their order."""
        with self.using() as db:
            query = f"SELECT {COLUMNS} {LINE} WHERE state IN ('queued', 'running') AND (? IS NULL OR owner = ?)"
            return [StoredJob(*row) for row in db.execute(f"{query} ORDER BY state DESC, {TURN}", (owner, owner))]

    def move(self, job_id: str, position: int) -> bool:
        """Move a waiting job among those of its owner, who keep their places in the line between them.

        Args:
            job_id: the job.
            position: among the owner's waiting jobs, from 0; beyond the last one is last.

        Returns:
            False if the job doesn't wait.
        """
        with self.using() as db:
            query = (
                f"SELECT id, {TURN} {LINE} WHERE state = 'queued' "
                f"AND owner = (SELECT owner FROM jobs WHERE id = ?) ORDER BY {TURN}"
            )
            rows = db.execute(query, (job_id,)).fetchall()
            others = [job for job, _ in rows if job != job_id]
            if len(others) == len(rows):
                return False
            others.insert(position, job_id)
            turns = [(job, turn) for job, (_, turn) in zip(others, rows, strict=True)]
            values = ", ".join("(?, ?)" for _ in turns)  # one statement, so that a kill leaves all or none
            db.execute(f"INSERT OR REPLACE INTO turns VALUES {values}", [v for pair in turns for v in pair])
            return True

    # ------------------------------------------------------------------ records

    def get(self, job_id: str) -> StoredJob | None:
        """Return a job, or None."""
        with self.using() as db:
            row = db.execute(f"SELECT {COLUMNS} FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return None if row is None else StoredJob(*row)

    def jobs(self, owner: str | None, limit: int, before: str | None = None) -> list[StoredJob]:
        """Return jobs, the newest first.

        Args:
            owner: whose; None for all.
            limit: how many at most.
            before: id of a job; only older ones. An unknown id gives none.
        """
        query = f"SELECT {COLUMNS} FROM jobs WHERE (? IS NULL OR owner = ?) "
        query += "AND (? IS NULL OR number < (SELECT number FROM jobs WHERE id = ?)) ORDER BY number DESC LIMIT ?"
        with self.using() as db:
            return [StoredJob(*row) for row in db.execute(query, (owner, owner, before, before, limit))]

    def add_picture(self, picture: StoredPicture) -> None:
        """Record an image, whose file is complete; from here on it counts."""
        with self._charging(picture.job, images=1) as db:
            db.execute("INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", astuple(picture))

    def add_skipped(self, job_id: str, places: Iterable[int]) -> None:
        """Record images that nobody wants any more, so that a second attempt leaves them out too."""
        with self.using() as db:
            db.executemany("INSERT OR IGNORE INTO skipped VALUES (?, ?)", [(job_id, place) for place in places])

    def skipped(self, job_id: str) -> set[int]:
        """Return the places of a job's images that were skipped."""
        with self.using() as db:
            return {place for (place,) in db.execute("SELECT place FROM skipped WHERE job = ?", (job_id,))}

    def pictures(self, job_id: str) -> list[StoredPicture]:
        """Return the images of a job that count, in their order."""
        with self.using() as db:
            rows = db.execute("SELECT * FROM pictures WHERE job = ? ORDER BY place", (job_id,))
            return [StoredPicture(*row) for row in rows]

    def owner_of_file(self, name: str) -> str | None:
        """Return whose image, or sheet, a file of the output folder is; None if it is nobody's, or was deleted."""
        query = "SELECT owner FROM gallery_items WHERE name = ? AND deleted IS NULL"
        with self.using() as db:
            row = db.execute(query, (name,)).fetchone()
        return None if row is None else row[0]

    def history(self, owner: str | None, limit: int, skip: int = 0) -> list[StoredPicture]:
        """Return images that have a file and were not deleted, the newest first.

        Args:
            owner: whose; None for all.
            limit: how many at most.
            skip: how many of the newest to leave out.
        """
        query = (
            "SELECT pictures.* FROM pictures JOIN jobs ON jobs.id = pictures.job WHERE name != '' "
            "AND NOT EXISTS (SELECT 1 FROM gallery_items AS item WHERE item.name = pictures.name AND deleted NOT NULL) "
            "AND (? IS NULL OR owner = ?) ORDER BY jobs.number DESC, place DESC LIMIT ? OFFSET ?"
        )
        with self.using() as db:
            return [StoredPicture(*row) for row in db.execute(query, (owner, owner, limit, skip))]

    # ------------------------------------------------------------------ uploads

    def use_upload(self, name: str, owner: str, size: int) -> None:
        """Record that an owner handed an image in, or used it again.

        Args:
            name: its hash.
            owner: who.
            size: of its file, bytes.
        """
        self._change("INSERT OR REPLACE INTO uploads VALUES (?, ?, ?, ?)", name, owner, size, time.time())

    def stale_uploads(self, owner: str, most: int, most_bytes: int, seconds: float) -> list[str]:
        """Return what an owner should lose: what was not used for long, and the least recently used beyond a quota.

        Args:
            owner: whose.
            most: how many images an owner may keep.
            most_bytes: how many bytes.
            seconds: how long an image is kept after its last use.

        Returns:
            Hashes; images that a waiting or running job names are not among them.
        """
        with self.using() as db:
            rows = db.execute("SELECT name, bytes, used FROM uploads WHERE owner = ? ORDER BY used DESC", (owner,))
            stale, count, total, oldest = [], 0, 0, time.time() - seconds
            for name, size, used in rows.fetchall():
                count, total = count + 1, total + size
                if count > most or total > most_bytes or used < oldest:
                    stale.append(name)
            wanted = "SELECT request FROM jobs WHERE state IN ('queued', 'running')"
            needed = "".join(text for (text,) in db.execute(wanted)) if stale else ""
        return [name for name in stale if name not in needed]

    def drop_upload(self, name: str, owner: str) -> bool:
        """Forget an owner's image; True if nobody else has it, so that its file can go."""
        with self.using() as db:
            db.execute("DELETE FROM uploads WHERE name = ? AND owner = ?", (name, owner))
            return db.execute("SELECT 1 FROM uploads WHERE name = ?", (name,)).fetchone() is None

    def _add_column(self, table: str, name: str, kind: str) -> None:
        """Give a table of an older version a column that it lacks."""
        if name not in {row[1] for row in self._db.execute(f"PRAGMA table_info({table})")}:
            self._db.execute(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")

    def _one(self, condition: str, *values: object) -> StoredJob:
        return StoredJob(*self._db.execute(f"SELECT {COLUMNS} FROM jobs WHERE {condition}", values).fetchone())

    def _change(self, query: str, *values: object) -> int:
        with self.using() as db:
            return db.execute(query, values).rowcount


def _create_private(file: Path) -> None:
    """Create a database that only its owner can read, whatever the umask; repair the mode of an older one.

    Raises:
        StoreError: it can't be created, or is no file.
    """
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600))
        if os.name == "posix" and file.stat().st_mode & 0o077:
            file.chmod(0o600)
    except OSError as error:
        raise StoreError(f"The queue {file} can't be used ({error.strerror}); make it a writable file.") from error
