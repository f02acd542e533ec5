"""What goes on, onto the page: the queue of its user, the running job step by step, and what is finished.

The engine knows all of it. A page that opens, or is reloaded, or is the second one of its user, follows the same jobs
from where they are; closing it stops nothing.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from apps.service.defaults import open_size
from apps.service.engine import Engine
from apps.service.events import ClipPart, Done, Event, Failed, ModelLoading, Picture, Queued, Step, Stopped, Upscaling
from apps.service.requests import AnyRequest
from apps.service.uploads import UploadError
from apps.studio.album import Album, Finished
from apps.studio.displays import Display, Displays
from apps.studio.grids import Grids
from apps.studio.live import GridView, PictureView, View
from apps.studio.problems import explain_failure, problem
from apps.studio.sessions import Sessions
from apps.studio.stage import Changes, Stage
from apps.studio.strings import Strings
from apps.studio.waiting import Waiting

RESTATED = (0.2, 0.8, 2.0)
"""Seconds after which a change is repeated with those that follow it, see `restated`."""


@dataclass(slots=True)
class _Page:
    """What has been sent to one page.

    Attributes:
        owner: whose jobs it shows.
        display: what its user chose to see.
        shown: the finished image or grid on the stage; None for a preview or an empty stage.
        names: of the images in the strip; None before it was sent.
        latest: the finished image or grid to go back to.
        waiting: the queue; None before it was sent.
        progress: the line and the bar that the stage shows, or would show.
        note: how the running job goes, where the stage doesn't say it.
        unfinished: jobs that weren't done when it was sent the queue, and weren't followed.
    """

    owner: str
    display: Display
    shown: Finished | None
    names: tuple[str, ...] | None
    latest: Finished | None = None
    waiting: tuple[str, ...] | None = None
    progress: tuple[str, float | None] = ("", None)
    note: str = ""
    unfinished: set[str] = field(default_factory=set)


class Following:
    """Tells pages what goes on.

    Args:
        engine: generates.
        words: of the page.
        sessions: who is on the page.
        grids: of this engine.
        album: what is finished.
        displays: what pages hold on their stages.
        stage: puts images onto the stage.
        waiting: describes the queue.
    """

    def __init__(
        self,
        engine: Engine,
        words: Strings,
        sessions: Sessions,
        grids: Grids,
        album: Album,
        displays: Displays,
        stage: Stage,
        waiting: Waiting,
    ) -> None:
        self._engine = engine
        self._words = words
        self._sessions = sessions
        self._grids = grids
        self._album = album
        self._displays = displays
        self._stage = stage
        self._waiting = waiting

    def look(self, request: gr.Request, seen: Any) -> str:
        """Return a new pulse, which makes the page follow, if there is anything that it hasn't seen; else nothing.

        Args:
            request: of the page.
            seen: names of the images that it was sent last; None for a page that was sent nothing.
        """
        owner = self._sessions.user(request)
        with self._while_open():
            if self._engine.unfinished(owner) or seen is None or list(self._album.names(owner)) != list(seen):
                return str(time.time_ns())
        return ""

    @contextmanager
    def _while_open(self) -> Generator[None]:
        """End quietly when the engine is closed meanwhile, and its record with it."""
        try:
            yield
        except sqlite3.ProgrammingError:
            if not self._engine.is_closing:
                raise

    def follow(self, request: gr.Request, seen: Any, chosen: Finished | None) -> Generator[Changes | None]:
        """Tell a page what it hasn't seen, and follow the jobs of its user until there are none; stops nothing.

        Args:
            request: of the page.
            seen: see `look`.
            chosen: the finished image or grid on its stage.

        Yields:
            Changes; None where the page should wait a moment before it asks again.
        """
        names = None if seen is None else tuple(seen)
        page = _Page(self._sessions.user(request), self._displays.of(request), shown=chosen, names=names)
        with self._while_open():
            yield self._arrived(page)
            while (job := self._next(page, request)) is not None:
                self._displays.follow(request, job)
                yield from self._follow_job(page, job, request)
                page.unfinished.discard(job)
                if self._engine.is_closing:
                    return
            page.note = ""
            yield self._finished(page) | self._waiting.queue(page.owner)
            yield busy(False) | {"job": None}

    def _next(self, page: _Page, request: gr.Request) -> str | None:
        """Return the job to follow: one that has ended before the page could, else the first that hasn't."""
        jobs = [job.id for job in self._engine.unfinished(page.owner)]
        for job in self._displays.of(request).jobs:
            if job not in jobs and self._engine.job(job).state != "stopped":
                return job
        page.unfinished |= set(jobs)
        for job in page.unfinished.difference(jobs):  # ended while another one was followed, on another device
            page.unfinished.discard(job)
            if self._engine.job(job).state == "failed":
                return job
        return jobs[0] if jobs else None

    def _arrived(self, page: _Page) -> Changes:
        """Tell a page what was finished before; the newest is on its stage, unless it holds another one."""
        recent = self._album.recent(page.owner)
        newest = recent[0] if recent else None
        changes = self._finished(page)
        page.latest = page.shown or newest
        if changes and newest is not None and page.display.held is None:
            page.shown = page.latest = newest
            changes |= self._stage.show(newest)
        return changes

    # ------------------------------------------------------------------------ one job

    def _follow_job(self, page: _Page, job: str, request: gr.Request) -> Generator[Changes | None]:
        """Follow a job until it ends, or until it waits while another one of its user runs."""
        view, stream, seen = self._view(page, job), self._engine.stream(job), 0
        can_skip = isinstance(view, GridView) or len(self._waiting.request_of(job).batches()) > 1
        yield {"job": job} | busy(True, can_skip) | self._noticed(page, view, request)
        while True:
            was_closed = stream.is_closed
            news = stream.read(seen)
            if self._engine.is_closing:  # what it tells as stopped goes on with the next engine
                return
            seen = news[-1][0] if news else seen
            changes = self._tell(page, view, [event for _, event in news])
            changes |= self._finished(page) | self._queue(page) | self._noticed(page, view, request)
            if changes:
                yield changes
            if was_closed or self._is_overtaken(page, job):
                return
            yield None

    def _is_overtaken(self, page: _Page, job: str) -> bool:
        """Whether a job waits while another one of its user comes first, or the engine ends."""
        if self._engine.is_closing:  # its queue can't be read any more
            return True
        return self._engine.job(job).state == "queued" and self._engine.unfinished(page.owner)[0].id != job

    def _view(self, page: _Page, job: str) -> View:
        record, request = self._grids.of_job(job), self._waiting.request_of(job)
        if record is not None:
            return GridView(record, record.places()[job], self._grids, self._words)
        is_by_scales = request.task.startswith("next_scale")
        return PictureView(self.frame(request), self._words, self._stage, page.shown, is_by_scales)

    def frame(self, request: AnyRequest) -> tuple[int, int]:
        """Return the size that an image will have, as far as it is known."""
        width = getattr(request, "width", None)
        if width is not None:
            return width, getattr(request, "height")  # noqa: B009
        future = self._engine.loaded(request.model or self._engine.models[0])
        if future is None or not future.done() or future.exception():
            return 1, 1
        try:
            return open_size(request, future.result(), self._engine.uploads)
        except UploadError:  # its file has been removed; the job itself will say so
            return 1, 1

    def _tell(self, page: _Page, view: View, events: Sequence[Event]) -> Changes:
        """Take in events and show how it stands after the last one; of a page that comes later that is all it sees."""
        for event in events:
            if isinstance(event, Picture):
                page.latest = shown = self._album.take(event)
                page.names = None  # the strip may have been sent before its report was known
                view.finish(shown)
            elif isinstance(event, Step):
                view.take(event)
            elif isinstance(event, ClipPart):
                view.take_part(event)
        match events[-1] if events else None:
            case Picture():
                return self._draw(page, view, "", None)
            case (Step() | Upscaling() | ClipPart()) as step if view.is_due(step):
                return self._draw(page, view, *view.progress(step))
            case Queued(ahead):
                return self._draw(page, view, self._words("waiting", ahead=ahead), 0.0)
            case ModelLoading(model):
                return self._draw(page, view, self._words("loading", model=model), 0.0)
            case Done() | Stopped() | Failed() as last:
                return self._ended(page, view, last)
        return {}

    def _draw(self, page: _Page, view: View, note: str, share: float | None) -> Changes:
        """Put a view onto the stage, with the buttons that act on it; only beside it if the page holds an image."""
        page.progress = (note, share)
        if page.display.held is not None:
            return self._beside(page, note)
        changes: Changes = {"stage": view.draw(note, share)}
        if page.shown is not view.shown:
            page.shown = view.shown
            changes |= self._stage.acting_on(view.shown)
        return changes

    def _ended(self, page: _Page, view: View, event: Done | Stopped | Failed) -> Changes:
        """Show how a job ended: what it finished, else what was finished before."""
        changes: Changes = problem(explain_failure(event, self._words)) if isinstance(event, Failed) else {}
        seconds = event.seconds if isinstance(event, Done) else 0.0
        if isinstance(view, GridView):
            if not self._grids.is_complete(view.record):
                return changes | self._draw(page, view, "", (view.number / len(view.record.jobs)))
            page.latest, seconds = self._album.sheet(view.record) or page.latest, view.seconds
        if page.display.held is not None:
            return changes | self._beside(page, "")
        note = "" if isinstance(event, Failed) else self._words("stopped")
        if isinstance(event, Done):
            note = self._words("done", seconds=f"{seconds:.1f}")
        page.shown = page.latest
        return changes | self._stage.show(page.latest, note)

    def _beside(self, page: _Page, note: str) -> Changes:
        """Say how it goes in the line of the queue, because the stage shows another image."""
        page.note = note
        return {"queue_note": self._waiting.line(len(page.waiting or ()), note)}

    # ---------------------------------------------------------------------- the others

    def _queue(self, page: _Page) -> Changes:
        """Tell the queue if it has changed."""
        waiting = tuple(self._engine.waiting(page.owner))
        if waiting == page.waiting:
            return {}
        page.waiting = waiting
        page.unfinished |= set(waiting)
        return self._waiting.queue(page.owner, running=page.note)

    def _noticed(self, page: _Page, view: View, request: gr.Request) -> Changes:
        """Take in that the user of the page has chosen an image, or asked for new ones."""
        before, page.display = page.display, self._displays.of(request)
        if (page.display.held, page.display.asked) == (before.held, before.asked):
            return {}
        if page.display.held is not None:
            page.shown = page.display.held
            return self._stage.show(page.shown) | self._beside(page, page.progress[0])
        return {"problem": ""} | self._beside(page, "") | self._draw(page, view, *page.progress)

    def _finished(self, page: _Page) -> Changes:
        """Tell the strip if there are other images than it has."""
        names = self._album.names(page.owner)
        if names == page.names:
            return {}
        page.names = names
        return self._stage.strip(self._album.recent(page.owner)) | {"seen": list(names)}


def busy(is_busy: bool, can_skip: bool = False) -> Changes:
    """Return the buttons that end what runs."""
    can = gr.update(interactive=is_busy)
    return {"stop": can, "finish": can, "skip": gr.update(visible=can_skip)}


def restated(changes_in: Generator[Changes | None], seconds: Sequence[float] = RESTATED) -> Generator[Changes | None]:
    """Repeat what was sent a moment ago with further changes, and all of it once more at the end.

    Gradio's page turns a message into the next one in place: when a busy browser takes in two at once, what only the
    first one says (an image just before 'done') would never be seen. Each part is repeated a few times and not with
    every message, because the strip takes server and browser longer than a step. What is repeated is a copy, because
    Gradio takes the value out of an update as it sends it.

    Args:
        changes_in: changes of the page; closed with this generator.
        seconds: when each is repeated, counted from when it was sent.
    """
    recent: dict[str, tuple[float, int, Any]] = {}  # sent when, repeated how often, what
    with closing(changes_in):
        for changes in changes_in:
            if not changes:
                yield None
                continue
            now = time.monotonic()
            again: Changes = {}
            for name, (since, times, value) in recent.items():
                if times < len(seconds) and now - since >= seconds[times]:
                    again[name] = copy(value)
                    recent[name] = (since, times + 1, value)
            recent |= {name: (now, 0, value) for name, value in changes.items()}
            yield again | {name: copy(value) for name, value in changes.items()}
        now = time.monotonic()
        yield {name: copy(value) for name, (since, _, value) in recent.items() if now - since < seconds[-1]}
