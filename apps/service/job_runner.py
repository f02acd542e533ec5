"""The work on one job: resolve what was left open, generate batch by batch, write each image with its settings."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from apps.service.batch_inputs import batch_inputs, keep_rest
from apps.service.compute_profiles import LoadOptions, load_options_of
from apps.service.defaults import resolve_defaults
from apps.service.events import ClipPart, Event, ModelLoading, Picture, Step, Upscaling
from apps.service.inference import (
    BatchInputs,
    BatchResult,
    CancelSignals,
    SkipRequestedError,
    StopRequestedError,
    run_pipeline,
)
from apps.service.job_store import JobStore, StoredPicture
from apps.service.lora import LoraFiles, loras_applied, resolve_lora
from apps.service.media import Clip, ClipWriter, contact_strip, require_video, save_mp4
from apps.service.metadata import PictureSettings, mark_of, save_picture, save_sidecar
from apps.service.model_pool import LoadedModel
from apps.service.option_values import parse_timeline
from apps.service.prompt_texts import one_by_one, texts_of, without_weights
from apps.service.provenance import Provenance, packet
from apps.service.reports import encode_reports, report_text
from apps.service.request_error import RequestError
from apps.service.requests import AnyRequest
from apps.service.stored_images import stored_bytes
from apps.service.uploaded_clips import cut_note
from apps.service.uploads import UploadStore
from apps.service.upscaling import UpscalerPool, UpscaleStep
from apps.service.wildcards import Wildcards
from apps.service.xmp import append_to_mp4

PART_SIDE = 256
"""Pixels of the longer side of frames that are shown while later ones are generated."""


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What a job is worked on with.

    Attributes:
        device: kind of device, such as `cpu`.
        dtype: number format of the weights.
        store: records images.
        uploads: images handed in.
        output_dir: receives the files; None hands images over in memory only.
        loras: LoRA files, each for those who may choose it.
        upscalers: that requests may choose.
        wildcards: that prompts may name.
    """

    device: str
    dtype: torch.dtype
    store: JobStore
    uploads: UploadStore
    output_dir: Path | None
    loras: LoraFiles = field(default_factory=LoraFiles)
    upscalers: UpscalerPool = field(default_factory=UpscalerPool)
    wildcards: Wildcards = field(default_factory=Wildcards)


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job to be generated.

    Attributes:
        id: of the job.
        created: seconds since 1970; gives the files their names.
        request: settled, so that a second attempt generates the same.
        owner: who asked for it.
    """

    id: str
    created: float
    request: AnyRequest
    owner: str


def run_job(
    queued: QueuedJob, model: LoadedModel, context: WorkerContext, signals: CancelSignals, tell: Callable[[Event], None]
) -> None:
    """Generate all images of a job that don't count yet.

    Args:
        queued: the job.
        model: generates.
        context: where and with what.
        signals: end it.
        tell: receives Step and Picture events.

    Raises:
        Exception: whatever goes wrong, in the words of where it did.
    """
    with context.store.meter.running(queued.id, queued.owner):
        _run_job(queued, model, context, signals, tell)


def _run_job(
    queued: QueuedJob, model: LoadedModel, context: WorkerContext, signals: CancelSignals, tell: Callable[[Event], None]
) -> None:
    """Resolve what is open in a request, and generate its images on the model with its LoRA files."""
    request = resolve_defaults(queued.request, model, context.uploads)
    load_options = load_options_of(request, LoadOptions(context.dtype))
    request = request.model_copy(update={"dtype": str(load_options.dtype).removeprefix("torch.")})
    if model.frames is not None:
        require_video()
        if request.batch_size > 1:
            raise RequestError(
                "range",
                "Clips are generated one at a time; set batch_size to 1.",
                field="batch_size",
                value=request.batch_size,
                lowest=1,
                highest=1,
            )
    files = context.loras.visible(queued.owner)
    request = request.model_copy(update={"loras": tuple(resolve_lora(one, files) for one in request.loras)})
    request = request.model_copy(update={"upscaler": context.upscalers.name_for(request)})
    pipe = model.pipe_for(request.task)
    with loras_applied(pipe, request.loras, files):
        _run_batches(queued, request, model, context, signals, tell, load_options.offload)


def _run_batches(
    queued: QueuedJob,
    request: AnyRequest,
    model: LoadedModel,
    context: WorkerContext,
    signals: CancelSignals,
    tell: Callable[[Event], None],
    offload: str,
) -> None:
    """Generate the batches of a job, each unless its images count already or were skipped."""
    done = {picture.place for picture in context.store.pictures(queued.id)} | context.store.skipped(queued.id)
    request = one_by_one(request)
    wanted = 1 if request.pick is not None else request.num_images
    batches = request.batches()
    upscale = _upscale_step(request, context, signals, tell)
    clock = _StepClock(tell, len(batches), wanted)
    for number, seeds in enumerate(batches):
        first = number * request.batch_size
        if done.issuperset(range(first, min(first + len(seeds), wanted))):
            clock.skip()
            continue
        texts = texts_of(request, seeds[0], context.wildcards)
        inputs = batch_inputs(texts.request, tuple(seeds), model, context.uploads)
        plain = replace(inputs, request=without_weights(texts.request))
        begun = time.monotonic()
        clock.begin(_step_count(request, model), first, 1 if request.pick is not None else len(seeds))
        signals.skip.clear()  # one that came too late for its image should not hit the next
        try:
            growing = _growing_path(queued, first, request, model, context)
            with _GrowingClip(growing, fps_of(request, model), clock.part, mark_of(request)) as parts:
                on_part = None if model.frames is None else parts.add
                result = keep_rest(inputs, run_pipeline(model, inputs, signals, clock.step, offload, on_part))
            seconds = (time.monotonic() - begun) / len(result.pictures)
            for i, frames in enumerate(result.pictures):
                if request.pick not in (None, i):
                    continue
                settings, since = _settings(inputs, i, model, context, result, frames), time.monotonic()
                settings = settings.model_copy(update=texts.recorded)
                if upscale is not None:
                    settings = settings.model_copy(update={"upscaler_fingerprint": upscale.loaded.fingerprint})
                    frames = upscale.run(plain, i, frames, clock.upscaling(i))
                if inputs.area is not None:
                    frames = [inputs.area.put_back(frames[0])]
                place, took = first + i if request.pick is None else 0, seconds + time.monotonic() - since
                notes = (*texts.notes, *notes_on(plain.request, model, context.uploads))
                tell(_finish(queued, place, model, context, settings, frames, took, result, notes))
        except SkipRequestedError:
            context.store.add_skipped(queued.id, range(first, first + len(seeds)))
            clock.drop(time.monotonic() - begun)
            continue
        if result.ended_after is not None and signals.finish.is_set():
            return


def _upscale_step(
    request: AnyRequest, context: WorkerContext, signals: CancelSignals, tell: Callable[[Event], None]
) -> UpscaleStep | None:
    """Return what enlarges the images of a request; None if nothing does.

    It is loaded now if it isn't, so that what it can't do is found out before anything is generated.

    Raises:
        ModelFailedError: it could not be loaded.
        RequestError: it can't enlarge by so much.
    """
    if request.upscale is None or request.upscaler is None:
        return None
    if not context.upscalers.is_loaded(request.upscaler, context.device):
        tell(ModelLoading(request.upscaler))
    loaded = context.upscalers.get(request.upscaler, context.device)
    loaded.check_scale(request.upscale)
    return UpscaleStep(request.upscale, loaded, context.uploads, signals)


def _step_count(request: AnyRequest, model: LoadedModel) -> int:
    """Return how many steps a batch takes, as far as that is known beforehand."""
    steps = getattr(request, "steps", None) or len(model.grids) or 1
    strength = getattr(request, "strength", None) or 1.0
    count = max(round(steps * strength), 1)
    if model.frames is not None and model.info_for(request.task).can_stream:
        pipe: Any = model.pipe_for(request.task)
        count *= pipe.num_windows(getattr(request, "frames", None) or model.frames)
    return min(count, getattr(request, "finish_after", None) or count)


# ------------------------------------------------------------------------ finishing


def _finish(
    queued: QueuedJob,
    place: int,
    model: LoadedModel,
    context: WorkerContext,
    settings: PictureSettings,
    frames: list[Image.Image],
    seconds: float,
    result: BatchResult,
    notes: tuple[str, ...],
) -> Picture:
    """Write an image, or a clip and an image of some of its frames; then it counts."""
    clip = None if model.frames is None else Clip(tuple(frames), fps_of(queued.request, model), result.sound)
    image = frames[0] if clip is None else contact_strip(frames)
    path = video = None
    if context.output_dir is not None:
        name = _file_name(queued, place, settings.seed)
        keep = queued.request.keep_settings
        file = context.output_dir / f"{name}.{queued.request.file_format}"
        path = save_picture(image, file, settings, keep_settings=keep)
        if queued.request.sidecar:
            save_sidecar(settings, path)
        video = None if clip is None else save_mp4(clip, path.with_suffix(".mp4"), settings, keep_settings=keep)
    name = "" if path is None else path.name
    report = report_text(result.reports)
    context.store.add_picture(
        StoredPicture(
            queued.id,
            place,
            name,
            settings.model_dump_json(),
            seconds,
            report,
            json.dumps(notes),
            encode_reports(result.reports),
            0 if path is None else stored_bytes(path),
        )
    )
    return Picture(path, settings.seed, settings, image, seconds, clip, video, report, notes, result.reports)


def notes_on(request: AnyRequest, model: LoadedModel, uploads: UploadStore) -> tuple[str, ...]:
    """Say what keeps images from being what was asked for.

    Args:
        request: filled in, see `apps.service.defaults`.
        model: generates.
        uploads: the clip to complete, of which the end may be missing.

    Returns:
        A sentence each.
    """
    video = getattr(request, "video", None)
    is_cut = video is not None and uploads.is_cut(video)
    return (*_notes_on_words(request, model), *((cut_note(),) if is_cut else ()))


def _notes_on_words(request: AnyRequest, model: LoadedModel) -> tuple[str, ...]:
    """Name the words that a model was not trained on; none for one with an open vocabulary, or with a LoRA's words."""
    if request.loras or not model.info_for(request.task).knows_words:
        return ()
    from pipelines.inputs.words import describe_unknown

    texts = [getattr(request, name, None) for name in ("prompt", "negative_prompt")]
    timeline = getattr(request, "timeline", None)
    texts += [prompt for _, prompt in parse_timeline(timeline)] if timeline else []
    said = describe_unknown(model.pipe_for(request.task).unknown_words([text for text in texts if text]))
    return (said,) if said else ()


def _settings(
    inputs: BatchInputs,
    place: int,
    model: LoadedModel,
    context: WorkerContext,
    result: BatchResult,
    frames: list[Image.Image],
) -> PictureSettings:
    """Gather what reproduces one image of a batch."""
    request, batch = inputs.request, len(inputs.seeds)
    same = {
        name: getattr(request, name)
        for name in PictureSettings.model_fields
        if name in type(request).model_fields and name not in ("scheduler", "seed", "batch_size", "pick")
    }
    ended = result.ended_after
    return PictureSettings(
        **{
            **same,
            "seed": inputs.seeds[place],
            "width": frames[0].width,
            "height": frames[0].height,
            "whole": None if inputs.area is None else inputs.area.original.size,
            # A clip that was ended early has fewer frames than its pace was set for.
            "frames": None if model.frames is None else len(frames) if ended is None else inputs.field("frames"),
            "fps": None if model.frames is None else fps_of(inputs.request, model),
            "fingerprint": model.fingerprint,
            "sampler": inputs.field("scheduler"),
            "scheduler": {} if result.scheduler is None else _scheduler_settings(result.scheduler),
            "finish_after": ended if ended is not None else inputs.field("finish_after"),
            "batch_size": batch,
            "pick": place if batch > 1 else None,
            "device": torch.device(context.device).type,
            "versions": _versions(),
        }
    )


def fps_of(request: AnyRequest, model: LoadedModel) -> float:
    """Return how many frames a second a clip has: those asked for, or the model's own."""
    return getattr(request, "fps", None) or model.fps


def _scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's class and its plain config values; JSON has no infinities."""
    plain = {
        key: value
        for key, value in scheduler.config.items()
        if not key.startswith("_") and isinstance(value, (bool, int, float, str, type(None)))
        if not (isinstance(value, float) and not math.isfinite(value))
    }
    return {"class": type(scheduler).__name__, **plain}


@functools.cache
def _versions() -> dict[str, str]:
    """Return the versions of the packages that an image depends on."""
    from dit import __version__  # not asked of importlib: tessera may run from a folder

    packages = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    return {"tessera": __version__, **packages}


def _growing_path(
    queued: QueuedJob, place: int, request: AnyRequest, model: LoadedModel, context: WorkerContext
) -> Path | None:
    """Return where the finished parts of a clip are written while it is made; None for one of a single part."""
    if context.output_dir is None or model.frames is None or not model.info_for(request.task).can_stream:
        return None
    return context.output_dir / f"{_file_name(queued, place, 'partial')}.mp4"


def _file_name(queued: QueuedJob, place: int, mark: int | str) -> str:
    """Return a file's name without its suffix; it follows from the job, so a second attempt replaces the first."""
    return f"{datetime.fromtimestamp(queued.created):%Y%m%d-%H%M%S}-{mark}-{queued.id}-{place}"


class _GrowingClip:
    """Writes the finished parts of a clip to a file that players can open, and passes them on.

    The file is removed when the clip was made, or is wanted no longer. What else ends the work leaves it behind.

    Args:
        path: of the file, which is written from the first part on; None writes none.
        fps: frames a second.
        tell: receives what `add` does, with `fps` first.
        mark: is written into a file that is left behind.
    """

    def __init__(self, path: Path | None, fps: float | None, tell: Callable[..., None], mark: Provenance) -> None:
        self._path, self._fps, self._tell, self._mark = path, fps or 1.0, tell, mark
        self._open = contextlib.ExitStack()
        self._writer: ClipWriter | None = None

    def add(self, start: int, total: int, frames: list[Image.Image]) -> None:
        """Take frames of a clip of `total` frames, the first of which has the index `start`."""
        self._tell(self._fps, start, total, frames)
        if self._path is None:
            return
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._open.enter_context(ClipWriter(self._path, self._fps, fragmented=True))
        self._writer.append(frames)

    def __enter__(self) -> _GrowingClip:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._open.close()
        if self._path is not None and (kind is None or issubclass(kind, (SkipRequestedError, StopRequestedError))):
            self._path.unlink(missing_ok=True)
        elif self._writer is not None and self._path is not None:
            append_to_mp4(self._path, packet(self._mark))


class _StepClock:
    """Turns the steps of several batches into Step events with an estimate of the time left."""

    def __init__(self, tell: Callable[[Event], None], batches: int, images: int) -> None:
        self._tell = tell
        self._batches = batches
        self._images = images
        self._first = 1
        self._size = 1
        self._batch = 0
        self._skipped = 0
        self._steps = 1
        self._started = time.monotonic()

    def skip(self) -> None:
        self._batch += 1
        self._skipped += 1

    def drop(self, seconds: float) -> None:
        """Leave a begun batch, and the time it took, out of the estimate."""
        self._skipped += 1
        self._started += seconds

    def begin(self, steps: int, place: int, size: int) -> None:
        """Begin a batch of `size` images, the first of which has this place in the job, from 0."""
        self._batch += 1
        self._steps = steps
        self._first = place + 1
        self._size = size

    def upscaling(self, index: int) -> Callable[[int, int], None]:
        """Return what tells that an image of the batch is being enlarged; its index counts from 0."""
        picture, share = self._first + index, (self._first - 1 + self._size) / self._images

        def told(done: int, count: int) -> None:
            self._tell(Upscaling(done, count, min(picture, self._images), self._images, min(share, 1.0)))

        return told

    def part(self, fps: float, start: int, total: int, frames: list[Image.Image]) -> None:
        """Tell that frames of a clip are finished, by small views of them: the whole clip comes with its result."""
        small = tuple(frame.copy() for frame in frames)
        for frame in small:
            frame.thumbnail((PART_SIDE, PART_SIDE))
        self._tell(ClipPart(start, small, total, fps, self._first, self._images))

    def step(self, step: int, preview: Image.Image | None, strip: str = "") -> None:
        done = (self._batch - 1 - self._skipped) * self._steps + step
        left = max((self._batches - self._skipped) * self._steps - done, 0)
        eta = (time.monotonic() - self._started) / done * left
        steps = max(self._steps, step)  # a second-order scheduler calls back more often than it was asked to step
        self._tell(Step(step, steps, self._first, self._images, preview, eta, strip, self._size))
