"""What happens on Generate, Stop, Skip and Finish, and on the queue: requests of the page's user, by their id.

Jobs belong to the user, not to the page: it may be closed, and another one goes on with them. Listeners return the
changed parts of the page by name; `apps.studio.app` turns the names into components.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import gradio as gr
from pydantic import ValidationError

from apps.service.engine import Engine
from apps.service.failures import is_storage_failure
from apps.service.job_store import QueueFullError
from apps.service.model_pool import LoadedModel
from apps.service.prompt_file import PromptFileError, PromptLine, line_error, request_fields
from apps.service.requests import AnyRequest
from apps.service.sheet import GridSettings
from apps.studio import views
from apps.studio.album import Album, Finished
from apps.studio.displays import Displays
from apps.studio.following import Following, busy
from apps.studio.forms import form_to_request, read_mask
from apps.studio.grids import Grids
from apps.studio.page_values import PageError
from apps.studio.problems import explain, problem
from apps.studio.sessions import Sessions
from apps.studio.stage import Changes, Stage
from apps.studio.strings import Strings
from apps.studio.tabs.grid import axes
from apps.studio.waiting import Waiting


class GenerationHandlers:
    """The listeners that ask for images and change the queue, over one engine.

    Args:
        engine: generates; must have an output folder.
        words: of the page.
        sessions: who is on the page.
    """

    def __init__(self, engine: Engine, words: Strings, sessions: Sessions) -> None:
        self._engine = engine
        self._words = words
        self._sessions = sessions
        self._grids = Grids(engine)
        self.album = Album(engine, self._grids)
        self.displays = Displays()
        self._stage = Stage(engine, words, self._grids)
        self._waiting = Waiting(engine, words, self._grids)
        self.following = Following(
            engine, words, sessions, self._grids, self.album, self.displays, self._stage, self._waiting
        )

    def generate(self, values: Mapping[str, Any], request: gr.Request) -> Changes:
        """Queue what the page asks for; `Following` shows how it goes."""
        try:
            owner = self._sessions.submitter(request)
            wanted = self._requests(values, owner)
            is_idle = not self._engine.unfinished(owner)
            if values["mode"] == "grid":
                jobs = self._submit_grid(wanted[0], values, owner)
            else:
                jobs = self._submit(wanted, owner)
        except (ValueError, TypeError, QueueFullError, OSError) as error:
            if isinstance(error, OSError) and not is_storage_failure(error):
                raise
            return problem(explain(error, self._words))
        self.displays.ask(request, jobs)
        changes: Changes = {"problem": "", "pulse": str(time.time_ns())}
        if not is_idle:
            return changes | self._waiting.queue(owner)
        starting = views.stage(size=self.following.frame(wanted[0]), note=self._words("starting"), share=0.0)
        return changes | {"stage": starting} | self._stage.acting_on(None) | busy(True)

    def stop(self, request: gr.Request, job: str | None) -> Changes:
        """Stop the job that the page shows within one step; of a grid all that is left of it.

        Raises:
            PageError: the user may only look.
        """
        mine = self._mine(request, job)
        if mine is not None:
            record = self._grids.of_job(mine)
            for one in (mine,) if record is None else reversed(record.jobs):  # else the next cell would begin
                self._engine.stop(one)
        return {}

    def finish(self, request: gr.Request, job: str | None) -> Changes:
        """End the job that the page shows with the image as it is now.

        Raises:
            PageError: the user may only look, or the model can't end early.
        """
        mine = self._mine(request, job)
        if mine is None or self._engine.job(mine).state != "running" or self._engine.finish(mine):
            return {}
        if self._engine.job(mine).state == "running":  # else it has ended by itself meanwhile
            raise PageError("cant_finish")
        return {}

    def skip(self, request: gr.Request, job: str | None) -> Changes:
        """Leave out the image that is being generated, and go on with the next of its job, or of its grid.

        Raises:
            PageError: the user may only look.
        """
        mine = self._mine(request, job)
        if mine is not None:
            self._engine.skip(mine)
        return {}

    def clear(self, request: gr.Request) -> Changes:
        """Take what waits out of the queue; what runs goes on.

        Raises:
            PageError: the user may only look.
        """
        owner = self._sessions.submitter(request)
        for job in reversed(self._engine.waiting(owner)):  # the last one first: the first one may begin meanwhile
            self._engine.stop(job)
        return self._waiting.queue(owner)

    def move(self, request: gr.Request, job: str | None, by: int) -> Changes:
        """Let a waiting job change places with the one before it (by -1) or behind it (by 1).

        Raises:
            PageError: the user may only look.
        """
        owner = self._sessions.submitter(request)
        waiting = self._engine.waiting(owner)
        if job is not None and job in waiting and 0 <= waiting.index(job) + by < len(waiting):
            self._engine.move(job, waiting.index(job) + by)
        return self._waiting.queue(owner, job)

    def drop(self, request: gr.Request, job: str | None) -> Changes:
        """Take one job out of the queue.

        Raises:
            PageError: the user may only look.
        """
        owner = self._sessions.submitter(request)
        if job is not None and job in self._engine.waiting(owner):
            self._engine.stop(job)
        return self._waiting.queue(owner)

    def show(self, shown: Finished) -> Changes:
        """Put something finished onto the stage."""
        return self._stage.show(shown)

    def _mine(self, request: gr.Request, job: str | None) -> str | None:
        """Return a job if it is one of the user of a page, who may change it."""
        owner = self._sessions.submitter(request)
        try:
            return job if job is not None and self._engine.job(job).owner == owner else None
        except KeyError:
            return None

    # ------------------------------------------------------------------------ asking

    def _requests(self, values: Mapping[str, Any], owner: str) -> list[AnyRequest]:
        """Make the requests of a click: one, or one for each prompt of a file."""
        values = dict(values)
        if values["mode"] == "inpaint" and values["mask"]:
            with self._engine.uploads.decoding:
                values["mask"] = self._engine.uploads.add(read_mask(values["mask"]), owner)
        model = self._loaded(values["model"])
        tasks = () if model is None else model.tasks
        if model is not None and "image_to_image" in tasks and "strength" not in model.accepts("image_to_image"):
            values["strength"] = None  # its slider isn't shown
        if values["mode"] == "grid":  # one image a cell: neither their number nor the file of prompts is shown
            values |= {"num_images": 1, "batch_size": 1, "many": []}
        lines: Sequence[PromptLine] = values.get("many") or ()
        return [self._of_line(line, values) for line in lines] or [form_to_request(values, tasks)]

    def _of_line(self, line: PromptLine, values: Mapping[str, Any]) -> AnyRequest:
        """Make the request of a line of a file, whose settings replace those of the page.

        Raises:
            PromptFileError: the task has no such setting, or doesn't take it.
        """
        model = line.values.get("model", values["model"])
        tasks = self._engine.abilities(model).tasks if model in self._engine.models else ()
        try:
            return form_to_request(values, tasks, request_fields(line))
        except PromptFileError:
            raise
        except ValidationError as error:
            raise line_error(line.number, str(error.errors()[0]["loc"][0]), error) from error
        except ValueError as error:
            raise line_error(line.number, "", error) from error

    def _submit(self, wanted: Sequence[AnyRequest], owner: str) -> list[str]:
        """Queue all requests, or none of them.

        Raises:
            QueueFullError: they don't all fit.
        """
        waiting, most = len(self._engine.unfinished(owner)), self._engine.limits.queue_per_user
        if len(wanted) > 1 and waiting + len(wanted) > most:
            raise QueueFullError(
                "queue.room",
                f"{len(wanted)} requests don't fit: {waiting} of at most {most} wait already; clear the queue.",
                count=len(wanted),
                waiting=waiting,
                most=most,
            )
        jobs: list[str] = []
        try:
            for one in wanted:
                jobs.append(self._engine.submit(one, owner))
        except (ValueError, QueueFullError):
            for job in reversed(jobs):
                self._engine.stop(job)
            raise
        return jobs

    def _submit_grid(self, wanted: AnyRequest, values: Mapping[str, Any], owner: str) -> list[str]:
        """Queue the cells of a grid, and record that they belong together."""
        x, y, z = axes(values)
        settings = GridSettings.model_construct(axes=(x, y, z), request=wanted.with_seed())
        jobs = self._submit([cell.request for cell in settings.cells()], owner)
        self._grids.add(settings, jobs)
        return jobs

    def _loaded(self, key: str) -> LoadedModel | None:
        future: Future[LoadedModel] | None = self._engine.loaded(key) if isinstance(key, str) else None
        return None if future is None or not future.done() or future.exception() else future.result()
