"""What happens on Paint, Stop and Finish: requests into the engine's line, its events onto the page.

Listeners yield the changed parts of the page by name; `apps.studio.app` turns the names into components.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from copy import copy
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import gradio as gr
from pydantic import ValidationError

from apps.engine import Engine
from apps.events import Done, Event, Failed, ModelLoading, Picture, Queued, Step, Stopped
from apps.grid import Cell, Filled, compose, plan
from apps.job_store import QueueFullError
from apps.jobs import REQUEST, AnyRequest
from apps.media import clip_of
from apps.metadata import PictureSettings, save_picture
from apps.prompt_file import PromptFileError, PromptLine, line_error, request_fields
from apps.shelf import LoadedModel
from apps.studio import views
from apps.studio.problems import explain, explain_failure, problem
from apps.studio.sessions import Session, Sessions
from apps.studio.strings import Strings
from apps.studio.tabs.grid import axes
from apps.studio.wishes import make_request, read_mask
from apps.worker import open_size

REDRAW_SECONDS = 0.1
"""Steps redraw the page no faster than this; if the page fell behind, so would the Stop that it shows."""
STRIP = 24
"""Pictures that the strip of a visit keeps; older ones are in the gallery."""
RESTATE_SECONDS = 2.0
"""How long a change is repeated with those that follow it, see `restated`."""

Changes = dict[str, Any]
"""Part of the page -> its new value, or a `gr.update`."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture on the page.

    Attributes:
        path: its file.
        settings: what reproduces it.
        seconds: time it took.
        report: what accelerators did.
    """

    path: Path
    settings: PictureSettings
    seconds: float
    report: str = ""

    @property
    def clip(self) -> Path | None:
        """The clip of which the picture shows some frames."""
        return clip_of(self.path, self.settings)


class Painting:
    """The listeners that paint, over one engine.

    Args:
        engine: paints; must have an output folder.
        words: of the page.
        sessions: who is on the page.
    """

    def __init__(self, engine: Engine, words: Strings, sessions: Sessions) -> None:
        self._engine = engine
        self._words = words
        self._sessions = sessions

    def paint(self, visit: Sequence[Shown], values: Mapping[str, Any], request: gr.Request) -> Generator[Changes]:
        """Queue what the page asks for; if nothing of this page runs yet, show all of its line as it goes."""
        session = self._sessions.of(request)
        try:
            owner = self._sessions.painter(request)
            wanted = self._requests(values)
            if values["mode"] == "grid":
                yield from self._paint_grid(session, plan(wanted[0].settled(), axes(values)), values, owner)
                return
            follows = self._queue(session, wanted, owner)
        except (ValueError, TypeError, QueueFullError) as error:
            yield problem(explain(error, self._words))
            return
        yield self._line(session) | self._order(session)
        if not follows:
            return
        is_left = True
        try:
            yield from self._follow_line(session, list(visit))
            is_left = False  # from here on the line may be another click's
        finally:  # also when the browser tab is closed
            if is_left:
                with session.lock:
                    left, session.line, session.is_followed = session.line, [], False
                for job in left:
                    self._engine.stop(job)

    def stop(self, request: gr.Request) -> None:
        """Stop what is being painted for this page, within one step."""
        session = self._sessions.of(request)
        session.stop.set()
        with session.lock:
            running = session.line[:1]
        for job in running:
            self._engine.stop(job)

    def finish(self, request: gr.Request) -> Changes:
        """End what is being painted for this page with the picture as it is now."""
        with self._sessions.of(request).lock:
            running = self._sessions.of(request).line[:1]
        if running and self._engine.job(running[0]).state == "running" and not self._engine.finish(running[0]):
            gr.Info(self._words("cant_finish"))
        return {}

    def skip(self, request: gr.Request) -> None:
        """Leave out the picture that is being painted for this page, and go on with the next of its job."""
        session = self._sessions.of(request)
        with session.lock:
            running = session.line[:1]
        for job in running:
            self._engine.skip(job)

    def clear(self, request: gr.Request) -> Changes:
        """Take what waits for this page out of the line; what is being painted goes on."""
        session = self._sessions.of(request)
        self._drop_waiting(session)
        return self._line(session) | self._order(session)

    def move(self, request: gr.Request, job: str | None, by: int) -> Changes:
        """Let a job of this page change places with the one before it (by -1) or behind it (by 1)."""
        session = self._sessions.of(request)
        with session.lock:
            place = session.line.index(job) if job in session.line[1:] else 0
            if job is not None and place and 1 <= place + by < len(session.line):
                other = session.line[place + by]
                order = self._engine.waiting(self._engine.job(job).owner)
                if other in order and self._engine.move(job, order.index(other)):
                    session.line[place], session.line[place + by] = other, job
        return self._order(session, job)

    def drop(self, request: gr.Request, job: str | None) -> Changes:
        """Take one job of this page out of the line."""
        session = self._sessions.of(request)
        with session.lock:
            waits = job in session.line[1:]
            if job is not None and waits:
                session.line.remove(job)
        if job is not None and waits:
            self._engine.stop(job)
        return self._line(session) | self._order(session)

    def _drop_waiting(self, session: Session) -> None:
        with session.lock:
            waiting, session.line = session.line[1:], session.line[:1]
        for job in waiting:
            self._engine.stop(job)

    # ------------------------------------------------------------------------ asking

    def _requests(self, values: Mapping[str, Any]) -> list[AnyRequest]:
        """Make the requests of a click: one, or one for each prompt of a file."""
        values = dict(values)
        if values["mode"] == "inpaint" and values["mask"]:
            values["mask"] = self._engine.uploads.add(read_mask(values["mask"]))
        model = self._loaded(values["model"])
        tasks = () if model is None else model.tasks
        if model is not None and "image_to_image" in tasks and "strength" not in model.accepts("image_to_image"):
            values["strength"] = None  # its slider isn't shown
        lines: Sequence[PromptLine] = values.get("many") or ()
        return [self._of_line(line, values) for line in lines] or [make_request(values, tasks)]

    def _of_line(self, line: PromptLine, values: Mapping[str, Any]) -> AnyRequest:
        """Make the request of a line of a file, whose settings replace those of the page.

        Raises:
            PromptFileError: the task has no such setting, or doesn't take it.
        """
        model = line.values.get("model", values["model"])
        tasks = self._engine.tasks(model) if model in self._engine.models else ()
        try:
            return make_request(values, tasks, request_fields(line))
        except PromptFileError:
            raise
        except ValidationError as error:
            raise line_error(line.number, str(error.errors()[0]["loc"][0]), error) from error
        except ValueError as error:
            raise line_error(line.number, "", error) from error

    def _queue(self, session: Session, wanted: Sequence[AnyRequest], owner: str) -> bool:
        """Put requests into the line; whether this listener shall follow it."""
        submitted: list[str] = []
        most = self._engine.limits.queue_per_user
        active = sum(job.state in ("queued", "running") for job in self._engine.jobs(owner))
        if active + len(wanted) > most:  # before the first one begins
            raise QueueFullError("queue.yours", f"At most {most} of your requests may wait at once.", most=most)
        with session.lock:
            try:
                submitted.extend(self._engine.submit(one, owner) for one in wanted)
            except (QueueFullError, ValueError):
                for job in submitted:  # all or nothing: no part of a file of prompts is left out in silence
                    self._engine.stop(job)
                raise
            session.line.extend(submitted)
            follows, session.is_followed = not session.is_followed, True
        return follows

    def _loaded(self, key: str) -> LoadedModel | None:
        future: Future[LoadedModel] | None = self._engine.loaded(key)
        return None if future is None or not future.done() or future.exception() else future.result()

    def _frame(self, request: AnyRequest) -> tuple[int, int]:
        """Return the size that a picture will have, as far as it is known."""
        width, model = getattr(request, "width", None), self._loaded(request.model or self._engine.models[0])
        if width is not None:
            return width, getattr(request, "height")  # noqa: B009
        return (1, 1) if model is None else open_size(request, model, self._engine.uploads)

    def _line(self, session: Session) -> Changes:
        """Say how many jobs of a page wait."""
        waiting = max(len(session.line) - 1, 0)
        note = self._words("added", count=waiting) if waiting else ""
        return {"line": views.note(note), "clear": gr.update(visible=waiting > 0)}

    def _order(self, session: Session, chosen: str | None = None) -> Changes:
        """List what waits for a page; told only when it changes, because the list may be open."""
        with session.lock:
            waiting = session.line[1:]
        choices = [(f"{number}. {self._title(job)}", job) for number, job in enumerate(waiting, 1)]
        value = chosen if chosen in waiting else waiting[0] if waiting else None
        return {"order": gr.update(visible=bool(waiting)), "waiting": gr.update(choices=choices, value=value)}

    def _title(self, job: str) -> str:
        request = self._request_of(job)
        return (getattr(request, "prompt", "") or f"{self._words('label')} {getattr(request, 'label', '')}")[:60]

    # ----------------------------------------------------------------------- following

    def _follow_line(self, session: Session, visit: list[Shown]) -> Generator[Changes]:
        """Follow the jobs of a page until its line is empty."""
        while True:
            with session.lock:
                if not session.line:
                    session.is_followed = False
                    return
                job = session.line[0]
            with closing(self._follow(job, visit)) as told:
                try:
                    for changes in told:
                        yield {**changes, **(self._line(session) if "stage" in changes else {})}
                except GeneratorExit:  # what waits goes first, or it would begin when the running one is stopped
                    self._drop_waiting(session)
                    raise
            with session.lock:
                if session.line[:1] == [job]:
                    session.line.pop(0)
            yield self._line(session) | self._order(session)

    def _follow(self, job: str, visit: list[Shown]) -> Generator[Changes]:
        """Turn the events of a job into changes; closing it stops the job."""
        request, last, clip = self._request_of(job), None, None
        size, view = self._frame(request), _View(is_by_scales=request.task.startswith("next_scale"))
        busy = self._busy(True, can_skip=len(request.batches()) > 1)
        yield busy | {"stage": views.stage(size=size, note=self._words("starting"), share=0.0)}
        with closing(self._engine.follow(job)) as events:
            for event in events:
                if isinstance(event, Picture):
                    shown = Shown(_path(event), event.metadata, event.seconds, event.report)
                    visit[:] = [shown, *visit][:STRIP]
                    last, clip = views.file_uri(shown.path), _address(shown)
                    view = replace(view, picture=last, clip=clip, is_rough=False)
                    yield {**self.show(shown), **strip(visit)}
                elif isinstance(event, Done | Stopped | Failed):
                    if isinstance(event, Done) and last is not None:  # not the view of one that was skipped
                        view = replace(view, picture=last, clip=clip, is_rough=False)
                    yield self._busy(False) | self._ended(event, view, size)
                elif (changes := self._progress(event, view, size)) is not None:
                    yield changes

    def _request_of(self, job: str) -> AnyRequest:
        return REQUEST.validate_json(self._engine.job(job).request)

    def _progress(self, event: Event, view: _View, size: tuple[int, int]) -> Changes | None:
        """Show that a job waits, loads or steps; None while it is too early to redraw."""
        match event:
            case Queued(ahead):
                note, share = self._words("waiting", ahead=ahead), 0.0
            case ModelLoading(model):
                note, share = self._words("loading", model=model), 0.0
            case Step():
                if not view.take(event):
                    return None
                note, share = progress_line(event, self._words)
            case _:
                return None
        return {"stage": view.draw(size, note, share)}

    def _ended(self, event: Event, view: _View, size: tuple[int, int]) -> Changes:
        match event:
            case Done(seconds):
                return {"stage": view.draw(size, self._words("done", seconds=f"{seconds:.1f}"))}
            case Failed():
                return problem(explain_failure(event, self._words), size)
            case _:
                return {"stage": view.draw(size, self._words("stopped"))}

    def _busy(self, is_busy: bool, can_skip: bool = False) -> Changes:
        can = gr.update(interactive=is_busy)
        return {"stop": can, "finish": can, "skip": gr.update(visible=can_skip)}

    def show(self, shown: Shown) -> Changes:
        """Put a picture onto the stage."""
        size = (shown.settings.width, shown.settings.height)
        can, is_picture = gr.update(interactive=True), gr.update(interactive=shown.clip is None)
        return {
            "stage": views.stage(views.file_uri(shown.path), size=size, clip=_address(shown)),
            "details": views.details(shown.settings, shown.seconds, self._words, shown.report),
            "chosen": shown,
            "save": gr.update(value=str(shown.clip or shown.path), interactive=True),
            "reuse_seed": can,
            "reuse_settings": can,
            "start_from": is_picture,
            "inpaint_it": is_picture,
        }

    # ---------------------------------------------------------------------------- grid

    def _paint_grid(
        self, session: Session, cells: Sequence[Cell], values: Mapping[str, Any], owner: str
    ) -> Generator[Changes]:
        """Paint the cells of a grid one after another, and the sheet as it fills."""
        with session.lock:
            if session.is_followed:
                raise QueueFullError("queue.busy", "The page's queue is not empty; wait, or clear it.")
            session.is_followed = True
        session.stop.clear()
        layout, filled = axes(values), {}
        yield self._busy(True)
        try:
            for number, cell in enumerate(cells, 1):
                for event in self._engine.generate(cell.request, session.stop, owner):
                    sheet = compose(layout, filled)
                    if isinstance(event, Step):
                        told = {"number": number, "count": len(cells), "step": event.step, "steps": event.steps}
                        share = (number - 1 + event.step / event.steps) / len(cells)
                        if event.step == 1:
                            uri = views.preview_uri(sheet)
                            note = self._words("cell", **told)
                            yield {"stage": views.stage(uri, size=sheet.size, note=note, share=share)}
                    elif isinstance(event, Picture):
                        filled[cell.place] = Filled(event.image, event.seconds, event.report)
                    elif isinstance(event, Failed):
                        yield problem(explain_failure(event, self._words))
                        return
                    elif isinstance(event, Stopped):
                        note = self._words("stopped")
                        yield {"stage": views.stage(views.preview_uri(sheet), size=sheet.size, note=note)}
                        return
            yield self._finished_grid(compose(layout, filled), sum(one.seconds for one in filled.values()))
        finally:
            session.stop.set()
            with session.lock:
                session.is_followed = False
            yield self._busy(False)

    def _finished_grid(self, sheet: Any, seconds: float) -> Changes:
        folder = self._engine.output_dir
        note = self._words("done", seconds=f"{seconds:.1f}")
        changes: Changes = {"stage": views.stage(views.preview_uri(sheet), size=sheet.size, note=note), "details": ""}
        if folder is not None:
            path = save_picture(sheet, folder / f"{datetime.now():%Y%m%d-%H%M%S}-grid-{time.time_ns():x}.png", None)
            changes["save"] = gr.update(value=str(path), interactive=True)
        return changes


def restated(told: Generator[Changes], seconds: float = RESTATE_SECONDS) -> Generator[Changes]:
    """Repeat what was told a moment ago with every further change, the last word on each part.

    Gradio's page turns a message into the next one in place: when a busy browser takes in two at once, what only the
    first one says (a picture just before 'done') would never be seen. What is repeated is a copy, because Gradio takes
    the value out of an update as it sends it.

    Args:
        told: changes of the page; closed with this generator.
        seconds: how long each is repeated.
    """
    recent: dict[str, tuple[float, Any]] = {}
    with closing(told):
        for changes in told:
            now = time.monotonic()
            recent = {name: one for name, one in recent.items() if now - one[0] < seconds}
            recent |= {name: (now, value) for name, value in changes.items()}
            yield {name: copy(value) for name, (_, value) in recent.items()}


@dataclass(slots=True)
class _View:
    """What the stage shows while a job goes on: the last preview or picture stays until there is something newer."""

    picture: str | None = None
    clip: str | None = None
    is_rough: bool = True
    is_by_scales: bool = False
    strip: str = ""
    scales: tuple[str, ...] = ()
    next_redraw: float = 0.0

    def take(self, step: Step) -> bool:
        """Take in a step; whether it's time to redraw."""
        self.strip = step.strip
        if step.preview is not None:
            self.picture, self.clip, self.is_rough = views.preview_uri(step.preview), None, True
            if self.is_by_scales:
                self.scales = (() if step.step == 1 else self.scales) + (self.picture,)
        if time.monotonic() < self.next_redraw:
            return False
        self.next_redraw = time.monotonic() + REDRAW_SECONDS
        return True

    def draw(self, size: tuple[int, int], note: str, share: float | None = None) -> str:
        rough = self.is_rough and self.picture is not None
        return views.stage(
            self.picture,
            size=size,
            note=note,
            share=share,
            is_preview=rough,
            strip=self.strip,
            scales=self.scales,
            clip=self.clip,
        )


def _address(shown: Shown) -> str | None:
    return None if shown.clip is None else views.clip_address(shown.clip)


def strip(visit: Sequence[Shown]) -> Changes:
    """Show a visit's pictures as files (so that they stay as they are, settings and all) with their seeds."""
    items = [(str(shown.path), str(shown.settings.seed)) for shown in visit]
    return {"strip": gr.update(value=items), "visit": list(visit)}


def progress_line(step: Step, words: Strings) -> tuple[str, float]:
    """Return the line under the stage and the share of the work that is done."""
    done = ((step.picture - 1) * step.steps + step.step) / (step.pictures * step.steps)
    told = {"step": step.step, "steps": step.steps, "eta": f"{step.eta:.1f}"}
    if step.pictures > 1:
        return words("step.many", picture=step.picture, pictures=step.pictures, **told), done
    return words("step", **told), done


def _path(picture: Picture) -> Path:
    if picture.path is None:
        raise ValueError("The studio's engine has no output folder; give it one.")
    return picture.path
