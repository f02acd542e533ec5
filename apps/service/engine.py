"""The engine: a request in, events out. No web page, no terminal, no HTTP in here.

    engine = Engine({"stickers": "stickers"}, output_dir=Path("outputs"))
    for event in engine.generate(TextToImageRequest(prompt="a red apple")):
        ...

Requests wait in one queue, fair by device seconds (`apps.service.shares`), within the quotas of their users
(`apps.service.quotas`); one worker a device takes the next one. The queue is on disk (`apps.service.job_store`), so it
goes on where it stood after a restart, a crash or a kill. Any thread may submit, follow, stop, finish or move a job.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import TimeoutError as NotYetError
from functools import partial
from pathlib import Path

import torch

from apps.service import user_presets
from apps.service import wildcards as wildcard_files
from apps.service.compute_profiles import LoadOptions, check_request, load_options_of
from apps.service.defaults import with_preset
from apps.service.devices import resolve_device, resolve_dtype
from apps.service.events import Done, Event, EventStream, Failed, ModelLoading, Queued, Stopped
from apps.service.failures import ModelFailedError, UnknownModelError, failure_of
from apps.service.gallery import Gallery
from apps.service.inference import CancelSignals, StopRequestedError
from apps.service.job_runner import QueuedJob, WorkerContext, run_job
from apps.service.job_store import JobStore, QueueFullError, StoredJob, StoreError
from apps.service.limits import ServerLimits
from apps.service.live_job import LiveJob, restore_job
from apps.service.logs import no_loading_bars
from apps.service.lora import LoraFiles, resolve_lora
from apps.service.model_pool import LoadedModel, ModelPool, Pipeline
from apps.service.named_settings import load_presets
from apps.service.offered_models import EngineDevice, OfferedModels
from apps.service.option_values import IMAGE_FIELDS, Lora
from apps.service.prompt_texts import check_texts
from apps.service.quantized import check_not_quantized
from apps.service.recorded_jobs import RecordedJobs
from apps.service.requests import AnyRequest
from apps.service.stored_images import last_event, measure_stored, state_folder, stored_picture_event
from apps.service.uploads import UploadStore
from apps.service.upscaling import UpscalerPool
from apps.service.user_presets import UserPresets
from apps.service.worker_state import Health, Worker, problems
from pipelines.acceleration.quantization import QuantizationPart
from pipelines.loading.memory import is_out_of_memory, release
from pipelines.loading.offload import check_offload

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
"""How often it is looked whether a waiting job has been stopped."""
RETRY_SECONDS = 1.0
"""Until a queue that could not be read or written is tried again."""
FAILURES_KEPT = 64
"""Failed jobs whose cause can be given in another language after they have ended."""


class Engine(RecordedJobs, OfferedModels):
    """Generate requests and tell how it goes.

    Args:
        models: key -> built-in name, folder, file or hub id; requests choose by key, the first one is the default.
        output_dir: existing folder that receives the images and keeps the line of jobs; None keeps both in memory.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`; several with commas between them work side by side.
        dtype: `auto`, `float32`, `bfloat16`, `float16`.
        offload: `none`, `model`, `group`, `sequential`: what of a model waits on the CPU, see `load_pipeline`.
        base: for models that are single files with a transformer only: where everything else comes from.
        loras: name -> LoRA file (safetensors); requests choose by name.
        upscalers: name -> built-in name, folder or hub id, the first one is the default; None for the built-in ones.
        server_limits: length of the line, time limit, models in memory.
        load: turns a source into a pipeline whatever the setup; for tests and special loaders.
        quantization: how the weights are quantized where a request says nothing, see `load_pipeline`; None not at all.
        wildcards: folder of lists that prompts may name; None for `wildcards` in the output folder.

    Raises:
        ValueError: no model, an unknown device, dtype or quantization, an offload without an accelerator, or an output
            folder that another process works on.
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
        loras: Mapping[str, Path] | None = None,
        upscalers: Mapping[str, str] | None = None,
        server_limits: ServerLimits | None = None,
        load: Callable[[str], Pipeline] | None = None,
        quantization: str | None = None,
        wildcards: Path | None = None,
    ) -> None:
        self.limits = server_limits or ServerLimits()
        names = [resolve_device(name) for name in device.split(",")]
        part = None if quantization is None else QuantizationPart.model_validate(quantization)
        setups = [LoadOptions(resolve_dtype(dtype, name), offload, part) for name in names]
        for name in names:
            check_offload(offload, torch.device(name))
        self.base, self.devices, self.output_dir = base, tuple(names), output_dir
        self.lora_files = loras if isinstance(loras, LoraFiles) else LoraFiles(loras)
        self.upscalers = UpscalerPool(upscalers)
        beside = None if output_dir is None else output_dir / wildcard_files.FOLDER
        self.wildcards = wildcard_files.Wildcards(beside if wildcards is None else wildcards)
        pools = [
            ModelPool(models, partial(self._load, load, name), self.limits.loaded_models, one)
            for name, one in zip(names, setups, strict=True)
        ]
        state = state_folder(output_dir)
        self.presets = UserPresets(None if state is None else state / user_presets.FOLDER)
        self._store = JobStore(None if state is None else state / "jobs.sqlite")
        if output_dir is not None:
            with self._store.using() as db:
                measure_stored(db, output_dir)
        self._gallery = None if state is None or output_dir is None else Gallery(self._store, output_dir, state)
        self.uploads = UploadStore(None if state is None else state / "uploads", self._store)
        shared = (self._store, self.uploads, output_dir, self.lora_files, self.upscalers, self.wildcards)
        self._devices = [
            EngineDevice(WorkerContext(name, one.dtype, *shared), pool)
            for name, one, pool in zip(names, setups, pools, strict=True)
        ]
        self._live: dict[str, LiveJob] = {}
        self._failed: dict[str, Failed] = {}  # the newest, with their causes, which the record doesn't keep
        self._moved = threading.Condition()  # guards _live; notified when there is work
        self._closing = False
        for stored in self._store.recover(self.limits.attempts):
            self._restore(stored)
        self._workers = [Worker(one.context.device) for one in self._devices]
        for worker, one in zip(self._workers, self._devices, strict=True):
            worker.thread = threading.Thread(target=self._serve, args=(worker, one), name="worker", daemon=True)
            worker.thread.start()

    @property
    def loras(self) -> tuple[str, ...]:
        """Names of the LoRA files that everybody's requests may choose; users have trained others, see `lora_files`."""
        return self.lora_files.names()

    def check_lora(self, lora: Lora, owner: str) -> Lora:
        """Return a choice of a LoRA file, of those that a user may choose, with the hash of its content.

        Args:
            lora: what was asked for.
            owner: who asks; errors name no LoRAs of others.

        Raises:
            LoraError: there is no such file, or it is another one than was asked for.
        """
        return resolve_lora(lora, self.lora_files.visible(owner))

    # ---------------------------------------------------------------------- jobs

    def submit(self, request: AnyRequest, owner: str = "local", stop: threading.Event | None = None) -> str:
        """Put a request at the end of the line.

        Args:
            request: what to generate.
            owner: who asks; others don't see the job.
            stop: set it from any thread to stop the job within one step.

        Returns:
            The job's id, 16 hex digits.

        Raises:
            UnknownModelError: it names a model that is not offered.
            UploadError: it names an image that was not handed in.
            UnavailableError: this machine hasn't the memory profile or the attention backend that it asks for.
            LoraError: it names a LoRA file that is not offered, or was another one.
            UnknownUpscalerError: it names an upscaler that is not offered.
            QuotaError: it needs more than is left of what its user may use.
            QueueFullError: as many wait as may.
            StoreError: the queue can't be written.
        """
        key = self.models[0] if request.model is None else request.model
        if key not in self.models:
            raise UnknownModelError(key, self.models)
        if request.preset is not None and request.preset not in load_presets():  # checked like what they say themselves
            own = with_preset(request, self.presets.of(owner))
            request = type(request).model_validate_json(own.model_dump_json())
        check_request(request, self.devices)
        check_not_quantized(request, key, self.source(key))
        self.upscalers.check(request)
        for name in (getattr(request, field, None) for field in IMAGE_FIELDS):
            if name is not None:
                self.uploads.check(name, owner)
        if request.loras:  # with their hashes, so that no other file slips in while it waits
            loras = tuple(self.check_lora(one, owner) for one in request.loras)
            request = request.model_copy(update={"loras": loras})
        seeded = request.with_seed().model_copy(update={"model": key})
        check_texts(seeded, self.wildcards)
        job_id = secrets.token_hex(8)
        with self._moved:
            if self._closing:
                raise QueueFullError("queue.closing", "The server is shutting down; try again later.")
            self.check_submit(seeded, owner)
            stored = self._store.add(
                job_id, owner, seeded.model_dump_json(), self.limits.queue, self.limits.queue_per_user
            )
            self._live[job_id] = LiveJob(QueuedJob(job_id, stored.created, seeded, owner), stop or threading.Event())
            self._notify_positions()
            self._moved.notify_all()
        return job_id

    def live_stream(self, job_id: str) -> EventStream | None:
        """Return the events of a job that waits or runs; None for any other."""
        with self._moved:
            job = self._live.get(job_id)
        return None if job is None else job.stream

    def stream(self, job_id: str) -> EventStream:
        """Return the events of a job, live; of an ended one its images that have files, and its last event.

        Raises:
            KeyError: no such job.
        """
        with self._moved:
            job = self._live.get(job_id)
            if job is not None:
                return job.stream
            stored = self._store.get(job_id)
        if stored is None:
            raise KeyError(job_id)
        stream = EventStream()
        for picture in self._store.pictures(job_id):
            if self.output_dir is not None and (self.output_dir / picture.name).is_file():
                stream.tell(stored_picture_event(picture, self.output_dir))
        stream.tell(self._failed.get(job_id) or last_event(stored))
        return stream

    def stop(self, job_id: str) -> None:
        """Stop a job within one step, or take it out of the line; nothing happens to one that has ended.

        Raises:
            KeyError: no such job.
        """
        with self._moved:
            job = self._live.get(job_id)
            if job is None:
                if self._store.get(job_id) is None:
                    raise KeyError(job_id)
                return
            job.stop.set()
            try:
                was_waiting = self._store.stop_waiting(job_id)
            except StoreError as error:  # it is stopped when its turn comes
                logger.warning("a waiting job stays in the queue until it can be written: %s", error)
                return
            if was_waiting:
                self._forget(job, Stopped())

    def finish(self, job_id: str) -> bool:
        """End a running job with the image as it is now.

        Returns:
            False if it doesn't run, or if its model can't end early; then nothing changes.

        Raises:
            KeyError: no such job.
        """
        job = self._running(job_id)
        if job is None:
            return False
        model = self.loaded(job.queued.request.model or self.models[0])
        if model is None or not model.done() or not model.result().can_finish:
            return False
        job.finish.set()
        return True

    def _running(self, job_id: str) -> LiveJob | None:
        """Return the live job of this name if it is being generated."""
        stored = self.job(job_id)
        with self._moved:
            return self._live.get(job_id) if stored.state == "running" else None

    def skip(self, job_id: str) -> bool:
        """End the image that a running job is at, and those generated at once with it; the job goes on with the next.

        Returns:
            False if it doesn't run; then nothing changes.

        Raises:
            KeyError: no such job.
        """
        job = self._running(job_id)
        if job is None:
            return False
        job.skip.set()
        return True

    def move(self, job_id: str, position: int) -> bool:
        """Move a waiting job among those of its owner; the jobs of others keep their places.

        Args:
            job_id: the job.
            position: among the owner's waiting jobs, from 0; beyond the last one is last.

        Returns:
            False if it doesn't wait; then nothing changes.

        Raises:
            KeyError: no such job.
            ValueError: the position is below 0.
        """
        self.job(job_id)
        if position < 0:
            raise ValueError(f"position is {position}; choose 0 for the first place or a number above.")
        with self._moved:
            moved = self._store.move(job_id, position)
            if moved:
                self._notify_positions()
        return moved

    def health(self) -> Health:
        """Say how the engine is: whether its workers live and go on, and whether its queue can be written.

        Touches no disk and waits for nobody.
        """
        trouble = [self._store.trouble] if self._store.trouble else []
        found = [*trouble, *problems(self._workers, self.limits, self._closing)]
        running = sum(worker.job is not None for worker in self._workers)
        return Health(tuple(found), max(len(self._live) - running, 0), running)

    # ------------------------------------------------------------------ following

    def generate(
        self, request: AnyRequest, stop: threading.Event | None = None, owner: str = "local"
    ) -> Generator[Event]:
        """Submit a request and follow it; closing the iterator stops the job.

        Args:
            request: what to generate.
            stop: set it from any thread to stop within one step, also while waiting in line.
            owner: who asks.

        Yields:
            Queued, ModelLoading, Step and Picture events, then one of Done, Stopped, Failed. Closing the iterator
            stops the work too, and returns when the worker has left it.
        """
        try:
            job_id = self.submit(request, owner, stop)
        except (QueueFullError, ValueError) as error:
            yield failure_of(error)
            return
        yield from self.follow(job_id, stop)

    def follow(self, job_id: str, stop: threading.Event | None = None) -> Generator[Event]:
        """Follow a job; closing the iterator stops it. See `generate`.

        Raises:
            KeyError: no such job.
        """
        stream, seen = self.stream(job_id), 0
        try:
            while True:
                was_closed = stream.is_closed
                for number, event in stream.read(seen, POLL_SECONDS):
                    seen = number
                    yield event
                if was_closed:
                    return
                if stop is not None and stop.is_set():
                    self.stop(job_id)
        finally:
            if not stream.is_closed:
                self.stop(job_id)
                stream.wait_closed()

    @property
    def is_closing(self) -> bool:
        """Whether the engine stops, or has; what isn't done is reported as stopped, and goes on with the next."""
        return self._closing

    def close(self, timeout: float = 30.0) -> None:
        """Stop working; what runs goes back into the line, so that the next engine on the folder goes on with it.

        Args:
            timeout: seconds to wait for the running step.
        """
        with self._moved:
            self._closing = True
            for job in self._live.values():
                job.stop.set()
            self._moved.notify_all()
        for worker in self._workers:
            if worker.thread is not None:
                worker.thread.join(timeout)
        for job in self._live.values():  # those that wait: whoever follows them should not wait too
            job.stream.tell(Stopped())
        self._store.close()

    # -------------------------------------------------------------------- working

    def _serve(self, worker: Worker, device: EngineDevice) -> None:
        """Work on one job after another, for as long as the engine lives, whatever happens to one of them."""
        while (job := self._next()) is not None:
            worker.begin(job.queued.id)
            try:
                last = self._run(job, worker, device)
            except BaseException as error:  # also what ends threads, such as SystemExit from a library
                logger.exception("a job ended its worker's loop; the worker goes on")
                last = failure_of(error if isinstance(error, Exception) else RuntimeError(type(error).__name__))
            self._end(job, last)
            worker.job = None

    def _next(self) -> LiveJob | None:
        """Wait for a job and take it; None when the engine closes."""
        said = ""
        with self._moved:
            while not self._closing:
                try:
                    if self._store.trouble:
                        self._store.check()
                    stored = self._store.take()
                except StoreError as error:  # such as a full disk: somebody may make room
                    if said != str(error):  # once: a log that grows fills the disk
                        said = str(error)
                        logger.error("no job can be taken until this is mended: %s", said)
                    self._moved.wait(RETRY_SECONDS)
                    continue
                said = ""
                if stored is None:
                    self._moved.wait(RETRY_SECONDS)  # not for ever: a submission may have found the disk full
                    continue
                if stored.id not in self._live:
                    self._restore(stored)
                if (job := self._live.get(stored.id)) is not None:
                    self._notify_positions()
                    return job
        return None

    def _run(self, job: LiveJob, worker: Worker, device: EngineDevice) -> Event:
        """Work on a job; whatever happens becomes its last event."""
        started = time.monotonic()

        def tell(event: Event) -> None:
            worker.sign()
            job.stream.tell(event)

        try:
            model = self._wait_for_model(job, device)
            worker.is_loading = False
            worker.sign()
            signals = CancelSignals(job.stop, job.finish, job.skip, time.monotonic() + self.limits.seconds)
            if job.stop.is_set():
                return Stopped()
            self.check_begin(job.queued.owner)
            run_job(job.queued, model, device.context, signals, tell)
        except StopRequestedError:
            return Stopped()
        except Exception as error:
            if is_out_of_memory(error):  # what was being computed must be free before the next request comes
                release(error)
            return failure_of(error)
        return Done(time.monotonic() - started)

    def _wait_for_model(self, job: LiveJob, device: EngineDevice) -> LoadedModel:
        key = job.queued.request.model or self.models[0]
        future = device.pool.get(key, load_options_of(job.queued.request, device.pool.default_options))
        if not future.done():
            job.stream.tell(ModelLoading(key))
        while True:
            if job.stop.is_set():  # loading goes on in the background; the next request will want it
                raise StopRequestedError
            try:
                return future.result(timeout=POLL_SECONDS)
            except NotYetError:
                continue
            except Exception as error:
                raise ModelFailedError(key) from error

    def _end(self, job: LiveJob, last: Event) -> None:
        """Record how a job ended and tell it; on closing, put it back instead. Tries again until it is on disk."""
        said = ""
        while True:
            try:
                with self._moved:
                    self._record(job.queued.id, last)
                    self._forget(job, last)
                return
            except StoreError as error:
                if said != str(error):
                    said = str(error)
                    logger.error("the end of a job can't be recorded until this is mended: %s", said)
                job.stream.tell(last)  # who waits for the job should not wait for the disk
            with self._moved:
                if self._closing:  # the next engine on the folder finds it running and does what is left of it
                    self._live.pop(job.queued.id, None)
                    return
                self._moved.wait(RETRY_SECONDS)

    def _record(self, job_id: str, last: Event) -> None:
        """Record how a job ended; the lock is held."""
        if self._closing and isinstance(last, Stopped):
            self._store.put_back(job_id)
        elif isinstance(last, Failed):
            self._store.end(job_id, "failed", last.code, last.message)
        else:
            self._store.end(job_id, "done" if isinstance(last, Done) else "stopped")

    def _forget(self, job: LiveJob, last: Event) -> None:
        """Tell the last event of a job and its new place to those behind; the lock is held."""
        self._live.pop(job.queued.id, None)
        if isinstance(last, Failed):
            self._failed = dict([*self._failed.items(), (job.queued.id, last)][-FAILURES_KEPT:])
        job.stream.tell(last)
        if not self._closing:
            self._notify_positions()

    def _notify_positions(self) -> None:
        """Tell each waiting job its place where that has changed; the lock is held."""
        try:
            places = self._store.ahead()
        except StoreError as error:
            logger.warning("the places of waiting jobs are unknown: %s", error)
            return
        for job_id, ahead in places.items():
            job = self._live.get(job_id)
            if job is None:
                continue
            # The worker is about to take one that has nobody before it, which then needs no word about waiting.
            if ahead != job.reported_ahead and ahead >= len(self._devices):
                job.stream.tell(Queued(ahead))
            job.reported_ahead = ahead

    def _restore(self, stored: StoredJob) -> None:
        """Put a job of an earlier process back into the queue."""
        job = restore_job(stored, self._store, self.models)
        if job is not None:
            self._live[stored.id] = job

    def _load(self, load: Callable[[str], Pipeline] | None, device: str, source: str, options: LoadOptions) -> Pipeline:
        return self._load_pipeline(source, device, options) if load is None else load(source)

    def _load_pipeline(self, source: str, device: str, load_options: LoadOptions) -> Pipeline:
        # Here and not above: diffusers and transformers take seconds to import, and a server should answer before.
        from pipelines import load_pipeline

        base = self.base if Path(source).expanduser().is_file() else None
        with no_loading_bars():  # an event says that it loads
            return load_pipeline(source, device=device, base=base, **load_options.arguments)
