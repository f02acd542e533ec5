"""What people read when a job fails: no path and no trace; those go to the log."""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence

from apps.service.events import Failed
from apps.service.job_store import QueueFullError, StoreError
from apps.service.quotas import QuotaError
from apps.service.request_error import RequestError
from pipelines.loading.memory import explain_out_of_memory, is_out_of_memory

logger = logging.getLogger(__name__)


class UnknownModelError(RequestError):
    """A request names a model that is not offered.

    Args:
        key: the name.
        models: those that are.
    """

    def __init__(self, key: str, models: Sequence[str]) -> None:
        names = ", ".join(models)
        message = f"There is no such model here; choose among {names}."
        super().__init__("choice", message, field="model", value=key, choices=names)


class ModelFailedError(Exception):
    """A model could not be loaded; its cause is the reason."""


def failure_of(error: Exception) -> Failed:
    """Say what went wrong without a path or a trace; those go to the log."""
    if isinstance(error, ModelFailedError):
        return _model_failure(error)
    if is_out_of_memory(error):
        error = explain_out_of_memory(error, "Painting")
        return Failed("out_of_memory", str(error), error)
    if is_storage_failure(error):
        logger.error("a job could not be written: %s", error)
        return Failed("storage", "The server can't write the image: its disk is full or can't be written.", error)
    for kind, code, message in _FAILURES:
        if isinstance(error, kind):
            return Failed(code, message or str(error), error)
    logger.error("a request failed", exc_info=error)
    return Failed("failed", "Something went wrong; the log of the server says what.", error)


def is_storage_failure(error: Exception) -> bool:
    """Whether the queue, or a file, could not be written because its disk is full or takes nothing."""
    return isinstance(error, StoreError) or (isinstance(error, OSError) and error.errno in _NO_ROOM)


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_FAILURES: tuple[tuple[type[Exception], str, str], ...] = (
    (QuotaError, "quota", ""),
    (QueueFullError, "queue_full", ""),
    (UnknownModelError, "unknown_model", ""),
    (TimeoutError, "too_slow", "This took longer than the server allows; ask for fewer or smaller images."),
    (ImportError, "missing_extra", ""),  # of an optional package, and it says which
    (ValueError, "bad_request", ""),  # a pipeline's check of its arguments, written for people
)
"""Kind of error, code, and the message for people; an empty message is that of the error."""


def _model_failure(error: ModelFailedError) -> Failed:
    """Say that a model didn't load; why is for the owner, because messages of libraries name paths."""
    key, cause = error.args[0], error.__cause__
    if isinstance(cause, MemoryError):  # ours: sizes, no paths
        return Failed("out_of_memory", f"The model {key!r} could not be loaded. {cause}", cause)
    return Failed(
        "model_failed",
        f"The model {key!r} could not be loaded; the log of the server says why.",
        cause if isinstance(cause, Exception) else error,
    )
