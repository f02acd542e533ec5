"""One prompt and seed, generated with several settings: time, memory, and how far each is from the first.

    for event in compare(engine, request, [Setting("default"), Setting("fast", {"steps": 10})]):
        ...                                  # `Progress`, then one `Comparison`

Every setting goes through the engine like any request: its queue, its models, its limits. The first run of a setting
pays for what is prepared once (weights in another format, compilation, calibration), the later ones don't.
"""

from __future__ import annotations

import ctypes
import gc
import math
import platform
import statistics
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from apps.service.comparison_settings import Setting, plan
from apps.service.engine import POLL_SECONDS, Engine
from apps.service.events import Done, Event, Failed, Picture, Queued, Stopped
from apps.service.failures import failure_of
from apps.service.job_store import QueueFullError
from apps.service.metadata import PictureSettings
from apps.service.requests import AnyRequest
from pipelines.acceleration import PartReport

MIB = 2**20
MOST_RUNS = 5
LEAST_SIDE = 11
"""Pixels of the shortest side that the window of SSIM fits into."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a comparison is.

    Attributes:
        place: of the setting, from 0.
        count: settings.
        label: of the setting.
        run: of the setting, from 1.
        runs: of each setting.
        event: what the engine tells of the run.
    """

    place: int
    count: int
    label: str
    run: int
    runs: int
    event: Event

    @property
    def share(self) -> float:
        """How much of the comparison is done, 0 to 1, each run counted alike."""
        inner = getattr(self.event, "share", 1.0 if isinstance(self.event, Picture | Done) else 0.0)
        return (self.place * self.runs + self.run - 1 + inner) / (self.count * self.runs)


@dataclass(frozen=True, slots=True)
class Result:
    """What one setting gave.

    Attributes:
        setting: what was asked for.
        frames: RGB images of one size, one for an image; empty if it failed.
        fps: frames a second of a clip; None for an image.
        settings: what reproduces it; None if it failed.
        first_seconds: of the first run, from the end of waiting to the finished file: with whatever is prepared once.
        seconds: of a later run, the median; of generating in the first one if there was no other.
        memory: the most that a later run needed beside what was held before, bytes; 0 where the system doesn't tell.
        psnr: decibels from the reference, over all frames; infinite for equal pixels, None where nothing is compared.
        ssim: structural similarity to the reference, at most 1; None where nothing is compared.
        report: what accelerators did, in English.
        reports: the same as values.
        notes: what keeps it from being what was asked for.
        problem: why it failed, in English; '' if it didn't.
        failed: the last event of the run that failed.
    """

    setting: Setting
    frames: tuple[Image.Image, ...] = ()
    fps: float | None = None
    settings: PictureSettings | None = None
    first_seconds: float = math.nan
    seconds: float = math.nan
    memory: int = 0
    psnr: float | None = None
    ssim: float | None = None
    report: str = ""
    reports: tuple[PartReport, ...] = ()
    notes: tuple[str, ...] = ()
    problem: str = ""
    failed: Failed | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The results of all settings.

    Attributes:
        request: what all of them have in common.
        results: one a setting, in order; the first is the reference, and has frames.
        runs: of each setting.
        front: places of the settings that no other one beats in both seconds and decibels.
    """

    request: AnyRequest
    results: tuple[Result, ...]
    runs: int
    front: tuple[int, ...]

    @property
    def reference(self) -> Result:
        """The result that the others are compared with."""
        return self.results[0]

    @property
    def prompt(self) -> str:
        """The text, or the class, that was generated."""
        found = getattr(self.request, "prompt", None)
        return str(getattr(self.request, "label", "")) if found is None else found

    @property
    def seed(self) -> int:
        """Of the noise, the same for all."""
        return self.request.seed or 0


class StoppedError(Exception):
    """The comparison was stopped; there is no result."""


class ReferenceFailedError(ValueError):
    """The reference could not be generated, so that there is nothing to compare with.

    Args:
        failed: the last event of its job.
    """

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.failed = failed


def compare(
    engine: Engine,
    request: AnyRequest,
    settings: Sequence[Setting],
    *,
    runs: int = 2,
    owner: str = "local",
    stop: threading.Event | None = None,
) -> Generator[Progress | Comparison]:
    """Generate a request with several settings, one after another; closing the iterator stops the work.

    Args:
        engine: generates.
        request: what is the same for all; a seed is drawn if it is open.
        settings: the first one is the reference.
        runs: of each setting, 1 to `MOST_RUNS`; from the second one on nothing is prepared any more.
        owner: who asks.
        stop: set it from any thread to stop within one step.

    Yields:
        `Progress` with each event of the engine, the last one again while nothing happens, then one `Comparison`.

    Raises:
        ValueError: `runs` is out of range, or a setting can't be had for the task.
        StoppedError: it was stopped.
        ReferenceFailedError: the reference failed; of the other settings the result says so.
    """
    if not 1 <= runs <= MOST_RUNS:
        raise ValueError(f"runs is {runs}; choose 1 to {MOST_RUNS}.")
    request = request.with_seed()
    results: list[Result] = []
    for place, (setting, asked) in enumerate(zip(settings, plan(request, settings), strict=True)):
        found = yield from _measure(engine, asked, setting, (place, len(settings), runs), owner, stop)
        results.append(found if not results else _against(results[0], found))
    results[0] = _against(results[0], results[0])
    yield Comparison(request, tuple(results), runs, front(results))


def front(results: Sequence[Result]) -> tuple[int, ...]:
    """Return the places of the results that no other one beats: nearer to the reference, or in less time."""
    from pipelines.tuning.front import pareto_front

    compared = [(place, one) for place, one in enumerate(results) if one.psnr is not None]
    kept = pareto_front(compared, lambda pair: (pair[1].seconds, -(pair[1].psnr or 0.0)))
    return tuple(sorted(place for place, _ in kept))


def _measure(
    engine: Engine,
    request: AnyRequest,
    setting: Setting,
    counts: tuple[int, int, int],
    owner: str,
    stop: threading.Event | None,
) -> Generator[Progress, None, Result]:
    """Run one setting as often as asked for.

    Args:
        engine: generates.
        request: of the setting.
        setting: is named in the progress.
        counts: place of the setting, number of settings, runs.
        owner: who asks.
        stop: see `compare`.
    """
    from pipelines.tuning.memory import working_memory

    place, count, runs = counts
    pictures: list[Picture] = []
    first, memory = math.nan, 0
    for run in range(1, runs + 1):
        _give_memory_back()
        with (
            working_memory(torch.device(engine.devices[0])) as used,
            closing(_follow(engine, request, stop, owner)) as events,
        ):
            started, last = time.monotonic(), Progress(place, count, setting.label, run, runs, Queued(ahead=0))
            for event in events:
                if event is None:  # whoever follows is called again and again, also while the job waits in line
                    yield last
                    continue
                if isinstance(event, Queued):
                    started = time.monotonic()
                elif isinstance(event, Picture):
                    pictures.append(event)
                elif isinstance(event, Stopped):
                    raise StoppedError
                elif isinstance(event, Failed):
                    if place == 0:
                        raise ReferenceFailedError(event)
                    return Result(setting, problem=event.message, failed=event)
                last = Progress(place, count, setting.label, run, runs, event)
                yield last
            if run == 1:
                first = time.monotonic() - started
        memory = used.size if run <= 2 else max(memory, used.size)  # the first run also loads and prepares
    if not pictures:  # it was skipped
        raise StoppedError
    return _result(setting, pictures, first, memory)


def _follow(engine: Engine, request: AnyRequest, stop: threading.Event | None, owner: str) -> Generator[Event | None]:
    """Submit a request and follow it like `Engine.generate`, with None where nothing happens for `POLL_SECONDS`."""
    try:
        job_id = engine.submit(request, owner, stop)
    except (QueueFullError, ValueError) as error:
        yield failure_of(error)
        return
    stream, seen = engine.stream(job_id), 0
    try:
        while True:
            was_closed, before = stream.is_closed, seen
            for number, event in stream.read(seen, POLL_SECONDS):
                seen = number
                yield event
            if was_closed:
                return
            if stop is not None and stop.is_set():
                engine.stop(job_id)
            if seen == before:
                yield None
    finally:
        if not stream.is_closed:
            engine.stop(job_id)
            stream.wait_closed()


def _give_memory_back() -> None:
    """Return what is free to the system, so that what a run needs is seen although an earlier one needed it too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _result(setting: Setting, pictures: Sequence[Picture], first: float, memory: int) -> Result:
    last = pictures[-1]
    seconds = [one.seconds for one in pictures[1:]] or [pictures[0].seconds]
    return Result(
        setting,
        (last.image.convert("RGB"),) if last.clip is None else tuple(one.convert("RGB") for one in last.clip.frames),
        None if last.clip is None else last.clip.fps,
        last.metadata,
        first,
        statistics.median(seconds),
        memory,
        report=last.report,
        reports=tuple(last.reports),
        notes=tuple(last.notes),
    )


def _against(reference: Result, result: Result) -> Result:
    """Return a result with how near it is to the reference, where both have as many frames of one size."""
    from dit.runtime.metrics import psnr, ssim

    shapes = [[frame.size for frame in one.frames] for one in (reference, result)]
    if not result.frames or shapes[0] != shapes[1]:
        return result
    first, second = _pixels(reference.frames), _pixels(result.frames)
    similarity = ssim(second, first) if min(first.shape[-2:]) >= LEAST_SIDE else None
    return replace(result, psnr=psnr(second, first), ssim=similarity)


def _pixels(frames: Sequence[Image.Image]) -> torch.Tensor:
    """Return frames as numbers in [0, 1], (T, 3, H, W)."""
    import numpy as np

    stacked: Any = np.stack([np.asarray(frame) for frame in frames])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2) / 255  # (T, 3, H, W)
