"""An engine that is killed again and again in the midst of its work; `python -m tests.studio.killed FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from apps.engine import Engine, TextToImageRequest
from apps.limits import ServerLimits
from tests.studio.fakes import FakePipeline

JOBS, PICTURES, STEPS = 4, 3, 3
KILLS = 6


def start(folder: Path, step_seconds: float) -> Engine:
    return Engine(
        {"fake": "x"},
        folder,
        device="cpu",
        load=lambda source: FakePipeline(step_seconds),
        server_limits=ServerLimits(attempts=100),
    )


def work_until_killed(folder: Path) -> None:
    """In the child: go on with the line; ends by itself when everything is done."""
    engine = start(folder, 0.02)
    while any(job.state in ("queued", "running") for job in engine.jobs()):
        time.sleep(0.01)
    engine.close()


def submit(folder: Path) -> None:
    """In the child: fill the line, and die before anything is done."""
    engine = start(folder, 0.5)
    for number in range(JOBS):
        engine.submit(TextToImageRequest(prompt=f"picture {number}", num_images=PICTURES, steps=STEPS))
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(function, *arguments, seconds=None) -> bool:
    """Run in a forked process, killed after some seconds; whether it ended by itself."""
    child = os.fork()
    if child == 0:
        function(*arguments)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    target = Path(sys.argv[1])
    assert not in_child(submit, target)
    for kill in range(KILLS):
        in_child(work_until_killed, target, seconds=0.05 + 0.06 * kill)
    assert in_child(work_until_killed, target)
