"""An engine that is killed again and again in the midst of its work; `python -m tests.studio.killed FOLDER`."""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path

from apps.service.engine import Engine
from apps.service.limits import ServerLimits
from apps.service.requests import TextToImageRequest
from tests.studio.fakes import FakePipeline

JOBS, PICTURES, STEPS = 4, 3, 3
KILLS = 6


def start(folder: Path, pipe: FakePipeline) -> Engine:
    return Engine(
        {"fake": "x"},
        folder,
        device="cpu",
        load=lambda source: pipe,
        server_limits=ServerLimits(attempts=100),
    )


def work_until_killed(folder: Path, kill: int | None = None) -> None:
    """In the child: go on with the line; ends by itself when everything is done.

    Args:
        folder: of the engine.
        kill: number of the kill, None for none: it comes in the step of that number, or, from the third on, some
            milliseconds after that step began, in whatever is done then.
    """
    pipe, steps = FakePipeline(0.02), itertools.count()

    def die(step: int) -> None:
        if next(steps) == kill:
            threading.Timer(0.01 * max(kill - 2, 0), os.kill, (os.getpid(), signal.SIGKILL)).start()
            if kill <= 2:
                time.sleep(60)

    pipe.at_step = die
    engine = start(folder, pipe)
    while any(job.state in ("queued", "running") for job in engine.jobs()):
        time.sleep(0.01)
    engine.close()


def submit(folder: Path) -> None:
    """In the child: fill the line, and die before anything is done."""
    engine = start(folder, FakePipeline(0.5))
    for number in range(JOBS):
        engine.submit(TextToImageRequest(prompt=f"picture {number}", num_images=PICTURES, steps=STEPS))
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(function, *arguments) -> bool:
    """Run in a forked process; whether it ended by itself."""
    child = os.fork()
    if child == 0:
        function(*arguments)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    importlib.import_module("pipelines.previews")  # once, before the forks: what each child would import anew
    for name in ("AutoPipelineForImage2Image", "AutoPipelineForInpainting", "DiffusionPipeline"):
        getattr(importlib.import_module("diffusers"), name)
    target = Path(sys.argv[1])
    assert not in_child(submit, target)
    for kill in range(KILLS):
        ended = in_child(work_until_killed, target, kill)
        assert not ended or kill > 2
    assert in_child(work_until_killed, target)
