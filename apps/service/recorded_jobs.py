"""What is recorded of jobs: those that wait, run and have ended, and their images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from apps.service import accounting
from apps.service.accounting import Meter, Totals, Used
from apps.service.gallery import Gallery
from apps.service.job_store import JobStore, StoredJob, StoredPicture
from apps.service.quotas import NO_QUOTAS, Quotas, check_begin, check_submit
from apps.service.requests import AnyRequest


class RecordedJobs:
    """Questions that a job store answers; any thread may ask them."""

    _store: JobStore
    _gallery: Gallery | None
    quotas_of: Callable[[str], Quotas] = staticmethod(lambda owner: NO_QUOTAS)
    """What a user may use; whoever knows the users sets it."""

    @property
    def gallery(self) -> Gallery:
        """The images in the output folder.

        Raises:
            ValueError: there is no output folder.
        """
        if self._gallery is None:
            raise ValueError("The engine has no output folder, so it has no gallery; give it one: output_dir=...")
        return self._gallery

    def waiting(self, owner: str) -> list[str]:
        """Return the ids of an owner's jobs that wait, in their order."""
        return self._store.waiting(owner)

    def unfinished(self, owner: str | None) -> list[StoredJob]:
        """Return an owner's jobs (None: those of all) that run, then those that wait, in their order."""
        return self._store.unfinished(owner)

    def job(self, job_id: str) -> StoredJob:
        """Return what is recorded of a job.

        Raises:
            KeyError: no such job.
        """
        stored = self._store.get(job_id)
        if stored is None:
            raise KeyError(job_id)
        return stored

    def jobs(self, owner: str | None = None, limit: int = 100, before: str | None = None) -> list[StoredJob]:
        """Return the jobs of an owner (None: of all), the newest first; only those older than the job `before`."""
        return self._store.jobs(owner, limit, before)

    def pictures(self, job_id: str) -> list[StoredPicture]:
        """Return the images of a job that are done."""
        return self._store.pictures(job_id)

    def history(self, owner: str | None = None, limit: int = 48, skip: int = 0) -> list[StoredPicture]:
        """Return the images of an owner (None: of all) that have files and were not deleted, the newest first."""
        return self._store.history(owner, limit, skip)

    def owner_of_file(self, name: str) -> str | None:
        """Return whose image, or sheet, a file of the output folder is; None if it is nobody's, or was deleted."""
        return self._store.owner_of_file(name)

    def ahead(self, job_id: str) -> int:
        """Return how many jobs come before one that waits; 0 for others."""
        return self._store.ahead().get(job_id, 0)

    def places(self) -> dict[str, int]:
        """Return for every waiting job how many come before it."""
        return self._store.ahead()

    # ------------------------------------------------------------------ accounts

    @property
    def meter(self) -> Meter:
        """Measures the device seconds of the jobs that run."""
        return self._store.meter

    def used(self, owner: str) -> Used:
        """Return what a user has used today, running jobs included, and waits for."""
        with self._store.using() as db:
            found = accounting.used(db, owner, self._store.clock())
        return replace(found, seconds=found.seconds + self.meter.pending(owner))

    def totals(self) -> Totals:
        """Return what all users have used together, as far as it was charged."""
        with self._store.using() as db:
            return accounting.totals(db)

    def active_owners(self) -> set[str]:
        """Return who has jobs that wait or run."""
        with self._store.using() as db:
            return accounting.active(db)

    def check_store(self) -> None:
        """Write to the store, to see whether it can be written.

        Raises:
            StoreError: it can't.
        """
        self._store.check()

    def check_submit(self, request: AnyRequest, owner: str) -> None:
        """Refuse a request that a user's quotas have no room for.

        Raises:
            QuotaError: there is no room.
            StoreError: what is used can't be read.
        """
        quotas = self.quotas_of(owner)
        if quotas != NO_QUOTAS:
            images = 1 if request.pick is not None else request.num_images
            check_submit(quotas, self.used(owner), images, self._store.clock())

    def check_begin(self, owner: str) -> None:
        """Refuse to begin a job of a user who has no device seconds left, see `check_submit`."""
        quotas = self.quotas_of(owner)
        if quotas.seconds_per_day is not None:
            check_begin(quotas, self.used(owner), self._store.clock())
