"""A job that waits or runs in this process, as opposed to its record on disk."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from dataclasses import dataclass, field

from apps.service.events import EventStream
from apps.service.job_runner import QueuedJob
from apps.service.job_store import JobStore, StoredJob
from apps.service.requests import REQUEST

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class LiveJob:
    """A job that waits or runs.

    Attributes:
        queued: the job.
        stop: set to stop it.
        finish: set to end it with the image as it is.
        skip: set to go on with its next image.
        stream: its events.
        reported_ahead: how many jobs were before it when its readers last heard of that.
    """

    queued: QueuedJob
    stop: threading.Event
    finish: threading.Event = field(default_factory=threading.Event)
    skip: threading.Event = field(default_factory=threading.Event)
    stream: EventStream = field(default_factory=EventStream)
    reported_ahead: int = 0


def restore_job(stored: StoredJob, store: JobStore, models: Collection[str]) -> LiveJob | None:
    """Return a job of an earlier process, which is put back into the queue.

    Args:
        stored: its record.
        store: records that it failed, if it can't be done any more.
        models: keys of the models that there are.

    Returns:
        The job; None if its request can't be read by this version, or its model is gone.
    """
    try:
        request = REQUEST.validate_json(stored.request)
    except ValueError:  # of another version
        logger.error("the job %s can't be read any more", stored.id)  # without the error: it quotes the prompt
        store.end(stored.id, "failed", "bad_request", "This was asked of another version of tessera.")
        return None
    if request.model not in models:
        store.end(stored.id, "failed", "unknown_model", f"The model {request.model!r} isn't here any more.")
        return None
    return LiveJob(QueuedJob(stored.id, stored.created, request, stored.owner), threading.Event())
