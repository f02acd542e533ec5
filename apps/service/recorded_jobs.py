"""What is recorded of jobs: those that wait, run and have ended, and their images."""

from __future__ import annotations

from apps.service.gallery import Gallery
from apps.service.job_store import JobStore, StoredJob, StoredPicture


class RecordedJobs:
    """Questions that a job store answers; any thread may ask them."""

    _store: JobStore
    _gallery: Gallery | None

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

    def unfinished(self, owner: str) -> list[StoredJob]:
        """Return an owner's jobs that run, then those that wait, in their order."""
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
