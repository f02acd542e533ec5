"""Fine-tuning on a server: the runs of its users, one training at a time, and the LoRA files that come of it.

A run is a folder, see `apps.service.fine_tuning_run`; a training is a process, see `apps.service.fine_tuning_process`.
All that is known of a run is read from its files, so it survives the server.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from apps.service import limits
from apps.service.fine_tuning_plan import Example, Plan, check_plan
from apps.service.fine_tuning_process import (
    INTERRUPTED,
    CheckReport,
    FineTuningError,
    TrainingProcess,
    failure_of,
    run_check,
)
from apps.service.fine_tuning_run import CACHE, NAME, Record, RunFolder, to_toml
from apps.service.lora import LoraFiles
from apps.service.media import Clip, save_mp4
from apps.service.metadata import save_picture
from apps.service.tether import is_free
from apps.service.tethered import tail
from apps.service.uploaded_clips import split_frames
from apps.service.uploads import UploadStore, read_upload

logger = logging.getLogger(__name__)

FOLDER = "fine-tuning"
"""Of an output folder: the runs; never served."""
MOST_RUNS = 40
"""That a user may keep."""
MOST_SIDE = 1_536
"""Of an image to train on, pixels; larger ones are made smaller when they are handed in, so that 200 of them are within
the quota of a user."""
CLIP_RATE = 8.0
"""Frames a second of the clips that are written; only their order counts in training."""
PART, OLD = ".part", ".old"
"""Endings of folders that are no runs: not whole yet, and to be removed."""
CLOSING_SECONDS = 5.0
"""That the end of the server waits for a training to save; it goes on saving without the server."""


class FineTuning:
    """The fine-tuning runs of a server.

    Args:
        output_dir: of the server; runs lie in a folder below it.
        uploads: the images handed in.
        loras: receives what the runs make.
        most: limits of the server.
    """

    def __init__(
        self, output_dir: Path, uploads: UploadStore, loras: LoraFiles, most: limits.FineTuningLimits | None = None
    ) -> None:
        self.root = output_dir.resolve() / FOLDER
        self._most = most or limits.FineTuningLimits()
        self._uploads, self._loras = uploads, loras
        self._active: tuple[str, TrainingProcess] | None = None
        self._checking = threading.Lock()
        self._lock = threading.RLock()  # guards the process, the records and the names
        self._held: set[str] = set()
        self._known: dict[str, RunFolder] = {}
        self._is_closing = False
        for path in self.root.glob(".*"):
            if path.name.endswith((PART, OLD)):  # of a server that was killed while it wrote or deleted
                _remove(path)
        for folder, record in self._records():
            if record.state == "running":  # its process ended with the server that had started it
                folder.change(state="stopped", reason="ft.server", message="")
        offer_runs(output_dir, loras)

    # ----------------------------------------------------------------- looking

    def runs(self, owner: str | None = None) -> list[Record]:
        """Return the runs of a user, or of all for None, the newest first."""
        with self._lock:  # the end of a training changes its record and what runs
            found = [self._as_it_is(record) for _, record in self._records()]
        seen = [record for record in found if owner is None or record.owner == owner]
        return sorted(seen, key=lambda record: record.created, reverse=True)

    def _records(self) -> list[tuple[RunFolder, Record]]:
        """Return all runs as they are on record."""
        names = [path.name for path in self.root.glob("*") if NAME.fullmatch(path.name) and not path.is_symlink()]
        found = [(folder, folder.record()) for folder in map(self._folder, names)]
        return [(folder, record) for folder, record in found if record is not None]

    def _as_it_is(self, record: Record) -> Record:
        """Return a record that says what is true where its file doesn't: its end could not be written."""
        if record.state != "running" or self.running == record.name:
            return record
        return replace(record, state="stopped", reason="ft.lost", message="")

    def record(self, name: str, owner: str | None = None) -> Record:
        """Return a run that a user may see; None sees all.

        Raises:
            FineTuningError: there is none of that name, or it is somebody else's.
        """
        shown = name[:40] if isinstance(name, str) else ""
        with self._lock:
            record = self._folder(name).record() if shown and NAME.fullmatch(name) else None
            record = None if record is None else self._as_it_is(record)
        if record is None or owner not in (None, record.owner):
            raise FineTuningError("ft.none", f"There is no fine-tuning run {shown!r} here.", value=shown)
        return record

    def folder(self, name: str, owner: str | None = None) -> RunFolder:
        """Return the folder of a run; see `record`."""
        return self._folder(self.record(name, owner).name)

    @property
    def running(self) -> str | None:
        """Name of the run that is trained now."""
        with self._lock:
            return None if self._active is None else self._active[0]

    def _folder(self, name: str) -> RunFolder:
        known = self._known.get(name)
        if known is None:
            known = RunFolder(limits.inside(self.root / name, self.root))
            if known.is_run:  # else any name that somebody tries would be kept
                self._known[name] = known
        return known

    # ------------------------------------------------------------------ writing

    def write(self, plan: Plan, owner: str) -> Record:
        """Write the files of a run that has not been started; one that has learnt nothing is replaced.

        All of them are written into a folder beside it, which takes its place when it is whole.

        Args:
            plan: what is to be trained.
            owner: who asks for it.

        Raises:
            FineTuningError: the name, the number of files or a text can't be used, somebody writes to a run of this
                name at this moment, or the user has too many runs or too large ones.
            UploadError: a file is not here any more.
        """
        check_plan(plan, self._most)
        with self._hold(plan.name):
            return self._write(plan, owner)

    def _write(self, plan: Plan, owner: str) -> Record:
        """Write a run whose name is held."""
        with self._lock:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = self._folder(plan.name)
            self._check_free(folder, owner)
        partial = RunFolder(self.root / f".{plan.name}{PART}")
        _remove(partial.path)  # of a server that was killed while it wrote
        try:
            partial.data.mkdir(mode=0o700, parents=True)
            partial.config.write_text(to_toml(_document(plan, folder)), encoding="utf-8")
            room = self._room(owner)
            for number, example in enumerate(plan.examples, 1):
                room -= self._write_example(partial.data / f"{number:04d}", example, owner)
                self._check_room(room)
            texts = plan.document.get("data", {})
            record = partial.write(Record(
                plan.name, owner, plan.model, int(plan.document["run"]["steps"]), len(plan.examples),
                str(texts.get("trigger") or ""), time.time(),
            ))  # fmt: skip
            with self._lock:
                self._check_free(folder, owner)  # the user may have written other runs meanwhile
                before = self._set_aside(folder)
                if before is not None and (before / CACHE).is_dir():  # what a check of the same images has encoded
                    (before / CACHE).replace(partial.path / CACHE)
                partial.path.replace(folder.path)
        finally:
            _remove(partial.path)
        _remove(before)
        return record

    def _check_free(self, folder: RunFolder, owner: str) -> None:
        """Check that a user may write a run: a new one, over one of their own that has learnt nothing, or over no run.

        Raises:
            FineTuningError: the name is taken, a process still works in the folder, or there are too many runs.
        """
        name, record = folder.name, folder.record()
        taken = FineTuningError("ft.taken", f"The name {name!r} is taken; choose another one.", value=name)
        if folder.is_run:
            if record is None or record.owner != owner or record.state in ("running", "finished") or folder.has_learnt:
                raise taken
            self._check_unused(folder)
            return
        self._check_unused(folder)
        if name in self._loras:
            raise taken
        if len(self.runs(owner)) >= MOST_RUNS:
            raise FineTuningError("ft.many", f"You have {MOST_RUNS} runs; delete one.", most=MOST_RUNS)

    @contextmanager
    def _hold(self, name: str) -> Iterator[None]:
        """Keep everybody else from writing to a run, checking or deleting it; without waiting.

        Raises:
            FineTuningError: somebody does so.
        """
        with self._lock:
            self._check_not_held(name)
            self._held.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._held.discard(name)

    def _check_not_held(self, name: str) -> None:
        if name in self._held:
            raise FineTuningError(
                "ft.held", f"{name!r} is being written, checked or deleted; try again when that is done.", value=name
            )

    def _check_unused(self, folder: RunFolder) -> None:
        """Check that no process works in a folder, such as one of a server that was killed.

        Raises:
            FineTuningError: one does; it ends within `tether.GRACE_SECONDS`.
        """
        for lock in (folder.lock, folder.check_lock):
            if lock.exists() and not is_free(lock):
                raise FineTuningError(
                    "ft.saving", f"{folder.name!r} is still being saved; try again in two minutes.", value=folder.name
                )

    def _set_aside(self, folder: RunFolder) -> Path | None:
        """Free the name of a folder, if there is one, and return where it lies now, to be removed without the lock."""
        self._known.pop(folder.name, None)
        if not folder.path.exists():
            return None
        aside = self.root / f".{folder.name}.{secrets.token_hex(4)}{OLD}"
        folder.path.replace(aside)
        return aside

    def _write_example(self, place: Path, example: Example, owner: str) -> int:
        """Write an image or a clip, and its caption; return the bytes of the former."""
        self._uploads.check(example.upload, owner)
        picture = self._uploads.get(example.upload)
        file = _as(place, "mp4" if example.frames > 1 else "png")
        if example.frames > 1:
            save_mp4(Clip(tuple(map(_even, split_frames(picture, example.frames))), CLIP_RATE), file, None)
        else:
            save_picture(picture, file, None, is_fast=True)
        if example.caption:
            _as(place, "txt").write_text(example.caption, encoding="utf-8")
        return file.stat().st_size

    def _room(self, owner: str) -> int:
        """Return how many bytes the runs of a user may still take."""
        sizes = [(record.owner, folder.size()) for folder, record in self._records()]
        own = sum(size for whose, size in sizes if whose == owner)
        return min(self._most.user_bytes - own, self._most.all_bytes - sum(size for _, size in sizes))

    def _check_room(self, room: int) -> None:
        """Check that there is room for more.

        Raises:
            FineTuningError: there is none.
        """
        if room <= 0:
            most, total = (f"{bound / limits.GB:g}" for bound in (self._most.user_bytes, self._most.all_bytes))
            raise FineTuningError(
                "ft.room",
                f"There is no room for more: your runs may take {most} GB, and those of all users {total} GB; delete "
                "one.",
                most=most,
                total=total,
            )

    # ----------------------------------------------------------------- training

    def check(self, name: str, owner: str) -> CheckReport:
        """Return what a training would do, without training; takes as long as to load the model and encode the files.

        Raises:
            FineTuningError: another check runs, or the settings can't be used.
        """
        folder = self.folder(name, owner)
        with self._hold(folder.name):
            if not self._checking.acquire(blocking=False):
                raise FineTuningError("ft.checking", "Another check is running; try again when it is done.")
            try:
                return run_check(folder.config, folder.check_lock)
            finally:
                self._checking.release()

    def train(self, plan: Plan, owner: str) -> Record:
        """Write a run and start its training; see `write` and `start`."""
        self._check_idle()  # before anything is written
        self.write(plan, owner)
        return self.start(plan.name, owner)

    def start(self, name: str, owner: str | None) -> Record:
        """Start the training of a run, or let it go on from its latest checkpoint.

        Raises:
            FineTuningError: there is no such run, another training runs, or this one has finished.
        """
        with self._lock:
            folder, record = self.folder(name, owner), self.record(name, owner)
            self._check_idle()
            self._check_not_held(folder.name)
            self._check_unused(folder)
            if record.state == "finished":
                raise FineTuningError("ft.finished", f"{name!r} has finished; start a new run.", value=name)
            self._check_room(self._room(record.owner))
            first = folder.progress(record.steps).step if folder.has_checkpoint else 0
            changed = folder.change(state="running", first=first, reason="", message="") or record
            try:
                process = TrainingProcess(
                    folder.config, folder.lock, folder.log, folder.has_checkpoint, self._end, self._look
                )
            except OSError as error:
                logger.error("the training of %s can't be started: %s", name, error)
                folder.change(state="failed", reason="ft.start", message="")
                raise FineTuningError("ft.start", "The training could not be started; the log says why.") from error
            self._active = name, process
            return changed

    def _check_idle(self) -> None:
        """Refuse a second training: two would take the memory and the time of both.

        Raises:
            FineTuningError: one runs.
        """
        if self.running is not None:
            raise FineTuningError("ft.busy", "Another fine-tuning is running; start this one when it is done.")

    def stop(self, name: str, owner: str | None) -> None:
        """Have a training save a checkpoint and end; nothing happens to one that doesn't run."""
        with self._lock:
            record = self.record(name, owner)
            if self._active is not None and self._active[0] == record.name:
                self._active[1].stop()

    def is_stopping(self, name: str) -> bool:
        """Whether a training saves its last checkpoint."""
        with self._lock:
            return self._active is not None and self._active[0] == name and self._active[1].is_stopping

    def delete(self, name: str, owner: str | None) -> None:
        """Delete a run with its files: images, checkpoints and LoRAs.

        Raises:
            FineTuningError: there is no such run, it runs, or somebody writes to it.
        """
        with self._lock:
            folder = self.folder(name, owner)
            if self.running == folder.name:
                raise FineTuningError("ft.runs", f"{name!r} is being trained; stop it first.", value=name)
            self._check_not_held(folder.name)
            self._check_unused(folder)
            aside = self._set_aside(folder)
            self._loras.put(folder.name, {}, "")
        _remove(aside)

    def wait(self, seconds: float) -> bool:
        """Wait until no training runs; whether that is so within so long."""
        with self._lock:
            active = self._active
        return active is None or active[1].wait(seconds)

    def close(self) -> None:
        """Stop the training; what it has learnt is in its checkpoint."""
        with self._lock:
            active, self._is_closing = self._active, True
        if active is not None:
            active[1].stop()
            active[1].wait(CLOSING_SECONDS)

    def _look(self, process: TrainingProcess) -> None:
        """Stop a training that has come to a limit of the server."""
        with self._lock:
            if self._active is None or self._active[1] is not process or process.is_stopping:
                return
            record = self._folder(self._active[0]).record()
        over_time = process.seconds >= 60 * self._most.minutes
        if record is not None and (over_time or self._room(record.owner) <= 0):
            self._folder(record.name).change(reason="ft.time" if over_time else "ft.room_ended")
            process.stop()

    def _end(self, process: TrainingProcess, code: int) -> None:
        """Put on record how a training has ended, and offer what it has made."""
        with self._lock:
            if self._active is None:
                return
            name, _ = self._active
            folder, self._active = self._folder(name), None
            try:
                record = self._record_end(folder, process.is_stopping, code)
            except OSError as error:  # such as a full disk; see `_as_it_is`
                logger.error("the end of the training of %s can't be put on record: %s", name, error)
                record = folder.record()
            if record is not None:
                self._loras.put(folder.name, folder.loras(), record.owner)

    def _record_end(self, folder: RunFolder, was_stopped: bool, code: int) -> Record | None:
        if code == 0:
            return folder.change(state="finished", reason="")
        if was_stopped or code == INTERRUPTED:
            return folder.change(state="stopped", **({"reason": "ft.server"} if self._is_closing else {}))
        error = failure_of(tail(folder.log), code, folder.path)
        logger.error("the training of %s failed: %s", folder.name, error)
        return folder.change(state="failed", reason=error.key, message=str(error.values.get("message", "")))


def receive_image(uploads: UploadStore, file: Path, owner: str) -> tuple[str, Image.Image]:
    """Decode an image of unknown origin, and keep it no larger than training needs it.

    Args:
        uploads: where it is kept.
        file: PNG, JPEG or WebP.
        owner: who hands it in.

    Returns:
        Its name there, and the image.

    Raises:
        UploadError: too large, or no image.
    """
    with uploads.decoding:
        image = read_upload(file)
        image.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
        return uploads.add(image, owner), image


def offer_runs(output_dir: Path, loras: LoraFiles) -> None:
    """Offer what the runs of an output folder have made; before its queue goes on, whose jobs may ask for it."""
    paths = (output_dir.resolve() / FOLDER).glob("*")
    folders = [RunFolder(path) for path in paths if NAME.fullmatch(path.name) and not path.is_symlink()]
    found = [(record, folder) for folder in folders if (record := folder.record()) is not None]
    for record, folder in sorted(found, key=lambda pair: pair[0].created):
        loras.put(folder.name, folder.loras(), record.owner)


def _document(plan: Plan, folder: RunFolder) -> dict[str, dict[str, Any]]:
    """Return the settings with the places of the files: a cache of its own too, so that deleting leaves nothing."""
    document = {section: dict(values) for section, values in plan.document.items()}
    document["run"] = {"name": plan.name, "output": str(folder.path), **document["run"]}
    document["data"] = {"folder": str(folder.data), **document.get("data", {})}
    return document


def _remove(path: Path | None) -> None:
    """Remove a folder that nobody can name; one that can't be removed is logged, and tried again at the next start."""
    if path is None or not path.exists():
        return
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s can't be removed: %s", path, error)


def _as(place: Path, ending: str) -> Path:
    return place.with_name(f"{place.name}.{ending}")


def _even(frame: Image.Image) -> Image.Image:
    """Return a frame whose sides are even, as H.264 wants them, without its last row or column where they aren't."""
    return frame.crop((0, 0, frame.width - frame.width % 2, frame.height - frame.height % 2))
