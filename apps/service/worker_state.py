"""Whether the workers of an engine live and go on; read by health checks, which touch no disk and wait for nobody."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from apps.service.limits import ServerLimits


@dataclass(eq=False, slots=True)
class Worker:
    """What a thread that works on the jobs of a device is at.

    Attributes:
        device: name of its device.
        thread: set right after it is made.
        job: id of the job it is at; None while it waits.
        is_loading: the job waits for its model.
        last_sign: `time.monotonic()` of the last event of the job.
        longest_step: seconds between two events of the job, at most.
    """

    device: str
    thread: threading.Thread | None = None
    job: str | None = None
    is_loading: bool = False
    last_sign: float = 0.0
    longest_step: float = 0.0

    def begin(self, job: str) -> None:
        """Note that a job begins, with its model."""
        self.job, self.is_loading, self.last_sign, self.longest_step = job, True, time.monotonic(), 0.0

    def sign(self) -> None:
        """Note that the job goes on."""
        now = time.monotonic()
        self.longest_step = max(self.longest_step, now - self.last_sign)
        self.last_sign = now


@dataclass(frozen=True, slots=True)
class Health:
    """How an engine is.

    Attributes:
        problems: what is wrong, for the owner of the machine; empty if nothing is.
        waiting: jobs that wait.
        running: jobs that run.
    """

    problems: tuple[str, ...]
    waiting: int
    running: int


def problems(workers: list[Worker], limits: ServerLimits, is_closing: bool) -> list[str]:
    """Say what is wrong with workers.

    Args:
        workers: of an engine.
        limits: how long a worker may be without a sign.
        is_closing: workers may end.
    """
    found = []
    for worker in workers:
        silent = time.monotonic() - worker.last_sign
        if worker.thread is not None and not worker.thread.is_alive() and not is_closing:
            found.append(f"the worker of {worker.device} has ended")
        elif worker.job is not None and silent > _patience(worker, limits):
            found.append(f"the worker of {worker.device} has made no step for {silent:.0f} s")
    return found


def _patience(worker: Worker, limits: ServerLimits) -> float:
    """Return after how many seconds without a sign a worker is said to hang."""
    if worker.is_loading:
        return max(limits.seconds, limits.hang_seconds)
    return max(limits.hang_seconds, 3 * worker.longest_step)
