"""The engine: a request in, events out. No web page, no terminal, no HTTP in here.

    engine = Engine({"stickers": "stickers"}, output_dir=Path("outputs"))
    for event in engine.generate(TextToImageRequest(prompt="a red apple")):
        ...

One request runs at a time (an engine owns one device); the others wait in line and are told their place. The
pipeline runs in a worker thread, so that whoever reads the events can stop it: by setting the event it passed as
`stop`, or by closing the iterator, which is what a web server does when a browser tab goes away.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYetError
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from apps.jobs import Done, Event, Failed, ModelLoading, Picture, Queued, Step, Stopped, TextToImageRequest
from apps.limits import ServerLimits
from apps.media import Clip, contact_strip, require_video, save_mp4
from apps.metadata import PictureSettings, save_png
from apps.painter import Canvas, StopRequestedError, paint
from apps.shelf import LoadedModel, ModelShelf, Pipeline
from pipelines.memory import explain_out_of_memory, is_out_of_memory, release
from pipelines.offload import check_offload

__all__ = [
    "Done",
    "Engine",
    "Event",
    "Failed",
    "ModelLoading",
    "Picture",
    "Queued",
    "Step",
    "Stopped",
    "TextToImageRequest",
]

logger = logging.getLogger(__name__)

WATCH_SECONDS = 2.0
"""How often it is checked that a silent worker still lives."""
POLL_SECONDS = 0.1
"""How often a waiting request looks whether it has been stopped."""


class Engine:
    """Paint requests, one at a time, and tell how it goes.

    Args:
        models: key -> built-in name, folder, file or hub id; requests choose by key, the first one is the default.
        output_dir: existing folder that receives the pictures as PNG files; None hands them over in memory only.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        dtype: `auto`, `float32`, `bfloat16`, `float16`.
        offload: `none`, `model`, `group`, `sequential`: what of a model waits on the CPU, see `load_pipeline`.
        base: for models that are single files with a transformer only: where everything else comes from.
        server_limits: length of the line, time limit, models in memory.
        load: turns a source into a pipeline; for tests and special loaders.

    Raises:
        ValueError: no model, an unknown device or dtype, or an offload without an accelerator.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        output_dir: Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        offload: str = "none",
        base: str | None = None,
        *,
        server_limits: ServerLimits | None = None,
        load: Callable[[str], Pipeline] | None = None,
    ) -> None:
        self.limits = server_limits or ServerLimits()
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        check_offload(offload, torch.device(self.device))
        self.offload = offload
        self.base = base
        self.output_dir = output_dir
        self._shelf = ModelShelf(models, load or self._load_pipeline, self.limits.loaded_models)
        self._line = _Line(self.limits.queue)

    @property
    def models(self) -> tuple[str, ...]:
        """Keys of the models that requests may name, the default first."""
        return self._shelf.keys

    def model(self, key: str | None = None) -> Future[LoadedModel]:
        """Return a model as a future, and start to load it if it isn't loaded: call it early to warm up.

        Args:
            key: one of `models`; None for the default.

        Raises:
            KeyError: not in the list.
        """
        return self._shelf.get(self.models[0] if key is None else key)

    def source(self, key: str) -> str:
        """Return the built-in name, folder or hub id behind a key (for the owner's eyes only)."""
        return self._shelf.source(key)

    def generate(self, request: TextToImageRequest, stop: threading.Event | None = None) -> Generator[Event]:
        """Paint a request.

        Args:
            request: what to paint.
            stop: set it from any thread to stop within one step, also while waiting in line.

        Yields:
            Queued, ModelLoading, Step and Picture events, then one of Done, Stopped, Failed. Closing the iterator
            stops the work too, and returns when the worker has ended.
        """
        stop = stop or threading.Event()
        key = self.models[0] if request.model is None else request.model
        if key not in self.models:
            yield Failed("unknown_model", f"There is no model {key!r} here; choose among {', '.join(self.models)}.")
            return
        try:
            with self._line.place() as place:
                yield from self._wait_in_line(place, stop)
                model = yield from self._wait_for_model(key, stop)
                yield from self._work(model, request, stop)
        except StopRequestedError:
            yield Stopped()
        except Exception as error:
            yield _failure(error)

    def _wait_in_line(self, place: _Place, stop: threading.Event) -> Generator[Event]:
        told = None
        while (ahead := place.ahead()) > 0:
            if stop.is_set():
                raise StopRequestedError
            if ahead != told:
                yield Queued(ahead)
                told = ahead
            place.wait(POLL_SECONDS)

    def _wait_for_model(self, key: str, stop: threading.Event) -> Generator[Event, None, LoadedModel]:
        future = self.model(key)
        if not future.done():
            yield ModelLoading(key)
        while True:
            if stop.is_set():  # loading goes on in the background; the next request will want it
                raise StopRequestedError
            try:
                return future.result(timeout=POLL_SECONDS)
            except NotYetError:
                continue
            except Exception as error:
                raise _ModelFailedError(key) from error

    def _work(self, model: LoadedModel, request: TextToImageRequest, stop: threading.Event) -> Generator[Event]:
        """Run the pipeline in a thread and hand on its events; never leave before the thread has ended."""
        events: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
        worker = threading.Thread(
            target=self._worker, args=(model, request, stop, events.put), name="painter", daemon=True
        )
        worker.start()
        try:
            while True:
                event = _next(events, worker)
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Done):
                    return
        finally:
            stop.set()
            worker.join()

    def _worker(
        self,
        model: LoadedModel,
        request: TextToImageRequest,
        stop: threading.Event,
        tell: Callable[[Event | Exception], None],
    ) -> None:
        """Paint all pictures of a request; whatever happens becomes an event or an exception told."""
        started = time.monotonic()
        clock = _StepClock(tell, started, request.num_images)
        try:
            if model.frames is not None:
                require_video()
            for seed in request.seeds():
                begun = time.monotonic()
                canvas = fill_in(request, model, seed)
                clock.next_picture(canvas.steps)
                frames = paint(model, canvas, stop, clock.step, started + self.limits.seconds)
                tell(self._finish(model, canvas, frames, begun))
            tell(Done(time.monotonic() - started))
        except Exception as error:
            if is_out_of_memory(error):  # what was being computed must be free before the next request comes
                release(error)
            tell(error)

    def _finish(self, model: LoadedModel, canvas: Canvas, frames: list[Image.Image], begun: float) -> Picture:
        """Write a picture, or a clip and a picture of some of its frames."""
        settings = self._settings(model, canvas, *frames[0].size, len(frames))
        clip = None if model.frames is None else Clip(tuple(frames), model.fps)
        image = frames[0] if clip is None else contact_strip(frames)
        path = video = None
        if self.output_dir is not None:
            # The time sorts the folder, the seed helps a person, the random end keeps two processes apart.
            name = f"{datetime.now():%Y%m%d-%H%M%S}-{settings.seed}-{uuid.uuid4().hex[:4]}.png"
            path = save_png(image, self.output_dir / name, settings)
            video = None if clip is None else save_mp4(clip, path.with_suffix(".mp4"), settings)
        return Picture(path, settings.seed, settings, image, time.monotonic() - begun, clip, video)

    def _settings(self, model: LoadedModel, canvas: Canvas, width: int, height: int, frames: int) -> PictureSettings:
        return PictureSettings(
            prompt=canvas.prompt,
            negative_prompt=canvas.negative_prompt,
            seed=canvas.seed,
            steps=canvas.steps,
            guidance=1.0 if canvas.guidance is None else canvas.guidance,
            height=height,
            width=width,
            frames=None if model.frames is None else frames,
            fps=None if model.frames is None else model.fps,
            model=model.key,
            fingerprint=model.fingerprint,
            scheduler=_scheduler_settings(model.pipe),
            device=torch.device(self.device).type,
            dtype=str(self.dtype).removeprefix("torch."),
            versions=_versions(),
        )

    def _load_pipeline(self, source: str) -> Pipeline:
        # Here and not above: diffusers and transformers take seconds to import, and a server shall answer before.
        import diffusers
        import transformers

        from pipelines import load_pipeline

        # Loading is told by an event; the libraries' own bars would be drawn over whatever shows it.
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        base = self.base if Path(source).expanduser().is_file() else None
        return load_pipeline(source, device=self.device, dtype=self.dtype, offload=self.offload, base=base)


def fill_in(request: TextToImageRequest, model: LoadedModel, seed: int) -> Canvas:
    """Replace what a request leaves open by the model's defaults.

    Args:
        request: what was asked.
        model: gives the defaults.
        seed: of the picture to paint.

    Raises:
        ValueError: frames for a model of pictures.
    """
    if request.frames is not None and model.frames is None:
        raise ValueError(f"The model {model.key!r} paints pictures, not clips; leave out the number of frames.")
    return Canvas(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt.strip(),
        height=request.height or model.side,
        width=request.width or model.width,
        steps=request.steps or model.steps,
        guidance=model.guidance if request.guidance is None else request.guidance,
        seed=seed,
        frames=request.frames or model.frames,
    )


def resolve_device(name: str) -> str:
    """Turn `auto` into the best device here, and check any other name.

    Raises:
        ValueError: torch doesn't know it or can't reach it.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"Device {name!r} can't be used here; try 'auto' or 'cpu'.") from error
    return name


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """Turn `auto` into the number format that suits a device: bfloat16 on CUDA, else float32.

    Raises:
        ValueError: not one of auto, float32, bfloat16, float16.
    """
    table = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if name not in table:
        raise ValueError(f"dtype {name!r} is unknown; choose among auto, {', '.join(table)}.")
    return table[name]


def _next(events: queue.SimpleQueue[Event | Exception], worker: threading.Thread) -> Event | Exception:
    """Return what the worker tells next; one that died without a word, for want of memory, is not waited for."""
    while True:
        try:
            return events.get(timeout=WATCH_SECONDS)
        except queue.Empty:
            if not worker.is_alive() and events.empty():
                return MemoryError("the painting thread ended without a word")


class _LineFullError(Exception):
    """As many requests wait as the server takes."""


class _ModelFailedError(Exception):
    """A model could not be loaded; its cause is the reason."""


class _Line:
    """First come, first served: the places of the requests that wait for one device or use it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.places: list[_Place] = []
        self.moved = threading.Condition()

    def place(self) -> _Place:
        """Return a place at the end of the line; it is taken on entering it as a context manager."""
        return _Place(self)


@dataclass(eq=False, slots=True)
class _Place:
    """One request's place in the line."""

    line: _Line

    def __enter__(self) -> _Place:
        with self.line.moved:
            if len(self.line.places) >= self.line.capacity:
                raise _LineFullError
            self.line.places.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        with self.line.moved:
            self.line.places.remove(self)
            self.line.moved.notify_all()

    def ahead(self) -> int:
        """Return how many requests come before this one."""
        with self.line.moved:
            return self.line.places.index(self)

    def wait(self, seconds: float) -> None:
        """Wait until the line moves, at most some seconds."""
        with self.line.moved:
            self.line.moved.wait(seconds)


class _StepClock:
    """Turns the steps of several pictures into Step events with an estimate of the time left."""

    def __init__(self, tell: Callable[[Event], None], started: float, pictures: int) -> None:
        self._tell = tell
        self._started = started
        self._pictures = pictures
        self._picture = 0
        self._steps = 0

    def next_picture(self, steps: int) -> None:
        self._picture += 1
        self._steps = steps

    def step(self, step: int, preview: Image.Image | None) -> None:
        done = (self._picture - 1) * self._steps + step
        left = max(self._pictures * self._steps - done, 0)
        eta = (time.monotonic() - self._started) / done * left
        steps = max(self._steps, step)  # a second-order scheduler calls back more often than it was asked to step
        self._tell(Step(step, steps, self._picture, self._pictures, preview, eta))


def _failure(error: Exception) -> Failed:
    """Say what went wrong without a path or a trace; those go to the log."""
    if isinstance(error, _ModelFailedError):
        return _model_failure(error)
    if is_out_of_memory(error):
        error = explain_out_of_memory(error, "Painting")
        return Failed("out_of_memory", str(error), error)
    for kind, code, message in _FAILURES:
        if isinstance(error, kind):
            return Failed(code, message or str(error), error)
    logger.error("a request failed", exc_info=error)
    return Failed("failed", "Something went wrong; the log of the server says what.", error)


_FAILURES: tuple[tuple[type[Exception], str, str], ...] = (
    (_LineFullError, "queue_full", "The line is full; try again in a moment."),
    (TimeoutError, "too_slow", "This took longer than the server allows; ask for fewer or smaller pictures."),
    (ImportError, "missing_extra", ""),  # of an optional package, and it says which
    (ValueError, "bad_request", ""),  # a pipeline's check of its arguments, written for people
)
"""Kind of error, code, and what people are told; an empty message is that of the error."""


def _model_failure(error: _ModelFailedError) -> Failed:
    """Say that a model didn't load; why is for the owner, because messages of libraries name paths."""
    key, cause = error.args[0], error.__cause__
    if isinstance(cause, MemoryError):  # ours: sizes, no paths
        return Failed("out_of_memory", f"The model {key!r} could not be loaded. {cause}", cause)
    return Failed(
        "model_failed",
        f"The model {key!r} could not be loaded; the log of the server says why.",
        cause if isinstance(cause, Exception) else error,
    )


def _scheduler_settings(pipe: Pipeline) -> dict[str, Any]:
    """Return the scheduler's class and its plain config values; JSON has no infinities."""
    plain = {
        key: value
        for key, value in pipe.scheduler.config.items()
        if not key.startswith("_") and isinstance(value, (bool, int, float, str, type(None)))
        if not (isinstance(value, float) and not math.isfinite(value))
    }
    return {"class": type(pipe.scheduler).__name__, **plain}


@functools.cache
def _versions() -> dict[str, str]:
    """Return the versions of the packages that a picture depends on."""
    from dit import __version__  # not asked of importlib: tessera may run from a folder

    packages = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    return {"tessera": __version__, **packages}
