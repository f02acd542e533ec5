"""The tools: what a program may ask the engine for, each with a description that a language model reads.

Every argument that is an option of a request is checked like one (`apps.service.requests`), and the errors are the
same. No argument names a file of the machine or an address: images are named as this server has named them, and only
their owner may.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import gradio as gr
from fastapi import HTTPException
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from apps.api.access import enqueue, model_row
from apps.api.app import FILE_NAME
from apps.api.tokens import Role, User
from apps.mcp.answers import Answer, Shown, said
from apps.service import limits
from apps.service.engine import Engine
from apps.service.events import Queued, Step
from apps.service.job_store import StoredJob, StoreError
from apps.service.metadata import PictureSettings, parse, read_picture, request_from_settings
from apps.service.model_pool import LoadedModel
from apps.service.option_text import as_label
from apps.service.requests import TASKS, AnyRequest, explain
from apps.service.usage import UsageError

logger = logging.getLogger(__name__)

WAIT_SECONDS = 50.0
"""How long a tool waits for a job where nothing is said: many clients give a tool a minute."""
MAX_WAIT_SECONDS = 300.0
POLL_SECONDS = 0.05
SAY_SECONDS = 1.0
"""Between two reports of progress."""
JOB = re.compile(r"[0-9a-f]{16}")
TEXT_TASKS = ("text_to_image", "next_scale_text", "class_to_image", "next_scale_class")
"""Tasks that begin with a text, or with a class, in the order in which they are preferred."""
Result = TypeVar("Result")
Report = Callable[[float, str], Awaitable[None]]


class ToolError(Exception):
    """What a tool was asked for can't be done; the message is for the one who asked."""


def told(tool: Callable[..., Awaitable[Answer]]) -> Callable[..., Awaitable[Answer]]:
    """Have a tool say in its own words what is wrong with a request, and of all other errors nothing."""

    @functools.wraps(tool)
    async def call(self: Tools, *args: Any, **kwargs: Any) -> Answer:
        try:
            return await tool(self, *args, **kwargs)
        except ToolError:
            raise
        except HTTPException as error:
            detail: Any = error.detail
            raise ToolError(detail["error"]["message"]) from error
        except ValidationError as error:
            raise ToolError(explain(error)) from error
        except StoreError as error:
            raise ToolError("The server can't read or write its queue now; its log says why.") from error
        except UsageError as error:  # written for people
            raise ToolError(str(error)) from error
        except Exception as error:
            if self.is_closing:  # the queue is closed before the last connection
                raise ToolError("The server ends; try again later.") from error
            logger.exception("a tool failed")
            raise ToolError("Something went wrong; the log of the server says what.") from error

    return call


async def no_report(share: float, text: str) -> None:
    """Report nothing."""


class Tools:
    """The tools over an engine; each public method but `report` is one.

    Args:
        engine: generates; has an output folder.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: Counter[str] = Counter()
        self.report: Report = no_report
        """Told how far a job is, 0 to 1, while a tool waits for it."""

    def all(self) -> tuple[Callable[..., Awaitable[Answer]], ...]:
        """Return the tools."""
        return (
            self.list_models,
            self.generate_image,
            self.generate_video,
            self.upscale_image,
            self.describe_image,
            self.job_status,
            self.stop_job,
        )

    @property
    def is_closing(self) -> bool:
        """Whether the server ends."""
        return self._engine.is_closing

    # ------------------------------------------------------------------------ asking

    @told
    async def list_models(self, request: gr.Request) -> Answer:
        """List the models of this server with their tasks, sizes and steps; the first one is the default.

        Args:
            request: who asks.
        """
        _user(request, "view")
        rows = await run_in_threadpool(lambda: [self._model_row(key) for key in self._engine.models])
        return Answer({"models": rows})

    @told
    async def generate_image(
        self,
        request: gr.Request,
        prompt: str,
        model: str | None = None,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        seed: int | None = None,
        negative_prompt: str = "",
        profile: str | None = None,
        wait_seconds: float = WAIT_SECONDS,
    ) -> Answer:
        """Generate an image from a text, and return it with its name and all settings that repeat it.

        If it isn't done in time, the answer is the id of the job; ask job_status for it.

        Args:
            request: who asks.
            prompt: What the image shows. For a model of classes the name or number of one.
            model: Name of a model from list_models; the default if absent.
            width: Width in pixels; goes with height. The model's own size if both are absent.
            height: Height in pixels; goes with width.
            steps: Denoising steps; the model's own number if absent.
            seed: The same seed and settings give the same image; drawn if absent.
            negative_prompt: What the image should not show.
            profile: Named setting of speed, for models that were tuned.
            wait_seconds: How long to wait for the image before the id of the job is returned.
        """
        user = _user(request, "generate")
        given = {"model": model, "width": width, "height": height, "steps": steps, "seed": seed, "profile": profile}
        task = await run_in_threadpool(self._task, model)
        values = _subject(task, prompt) | {name: value for name, value in given.items() if value is not None}
        values |= {"negative_prompt": negative_prompt} if negative_prompt else {}
        return await self._generate(TASKS[task].model_validate(values), user, request, wait_seconds)

    @told
    async def generate_video(
        self,
        request: gr.Request,
        prompt: str,
        seconds: float | None = None,
        fps: float | None = None,
        seed: int | None = None,
        model: str | None = None,
        wait_seconds: float = WAIT_SECONDS,
    ) -> Answer:
        """Generate a video from a text; the answer has its address, its settings, and an image of some of its frames.

        If it isn't done in time, the answer is the id of the job; ask job_status for it.

        Args:
            request: who asks.
            prompt: What the video shows.
            seconds: Length; the nearest that the model can make is taken, and its usual one if absent.
            fps: Frames a second; the model's own if absent.
            seed: The same seed and settings give the same video; drawn if absent.
            model: Name of a model of videos from list_models; the first of them if absent.
            wait_seconds: How long to wait for the video before the id of the job is returned.
        """
        user, deadline = _user(request, "generate"), time.monotonic() + _checked_wait(wait_seconds)
        key = await run_in_threadpool(self._clips_model, model)
        values: dict[str, Any] = {"prompt": prompt, "model": key}
        values |= {name: value for name, value in (("fps", fps), ("seed", seed)) if value is not None}
        if seconds is not None:
            values["frames"] = await self._frames(key, seconds, fps, deadline)
        wanted = TASKS["text_to_image"].model_validate(values)
        return await self._generate(wanted, user, request, max(deadline - time.monotonic(), 0.0))

    @told
    async def upscale_image(
        self, request: gr.Request, name: str, upscale: int, wait_seconds: float = WAIT_SECONDS
    ) -> Answer:
        """Make a larger version of an image, or video, of this server: it is generated again and enlarged.

        Args:
            request: who asks.
            name: Name of the image, as generate_image or job_status has returned it.
            upscale: By how much each side becomes longer.
            wait_seconds: How long to wait for the image before the id of the job is returned.
        """
        user = _user(request, "generate")
        settings = await run_in_threadpool(self._settings, name, user)
        wanted = request_from_settings(settings, upscale=upscale)
        return await self._generate(wanted, user, request, wait_seconds)

    @told
    async def describe_image(self, request: gr.Request, name: str) -> Answer:
        """Tell the settings that an image, or video, of this server was generated with.

        Args:
            request: who asks.
            name: Name of the image, as generate_image or job_status has returned it.
        """
        settings = await run_in_threadpool(self._settings, name, _user(request, "view"))
        return Answer({"name": name, "settings": said(settings)})

    # -------------------------------------------------------------------------- jobs

    @told
    async def job_status(self, request: gr.Request, job_id: str, wait_seconds: float = 0.0) -> Answer:
        """Tell how a job is, and return its images when they are done.

        Args:
            request: who asks.
            job_id: Id of the job, 16 hex digits.
            wait_seconds: How long to wait for its end.
        """
        user = _user(request, "view")
        await run_in_threadpool(self._job, job_id, user)
        await self._wait(job_id, user, _checked_wait(wait_seconds))
        return await run_in_threadpool(self._answer, job_id, user, request)

    @told
    async def stop_job(self, request: gr.Request, job_id: str) -> Answer:
        """Stop a job that waits or runs; images of it that are done stay.

        Args:
            request: who asks.
            job_id: Id of the job, 16 hex digits.
        """
        user = _user(request, "generate")
        await run_in_threadpool(self._job, job_id, user)
        await run_in_threadpool(self._engine.stop, job_id)
        await self._wait(job_id, user, 2.0)  # it ends within a step
        return await run_in_threadpool(self._answer, job_id, user, request)

    # ----------------------------------------------------------------------- helpers

    async def _generate(self, wanted: AnyRequest, user: User, request: gr.Request, seconds: float) -> Answer:
        """Submit a request, wait for it for so long, and say how it is then."""
        _checked_wait(seconds)
        job_id = await run_in_threadpool(enqueue, self._engine, wanted, user)
        await self._wait(job_id, user, seconds)
        return await run_in_threadpool(self._answer, job_id, user, request)

    async def _wait(self, job_id: str, user: User, seconds: float) -> None:
        """Wait until a job has ended, or the time is over, or the server ends; reports progress meanwhile.

        Raises:
            ToolError: its user waits for as many jobs as one may, or the server ends.
        """
        stream, most = self._engine.live_stream(job_id), self._engine.limits.streams_per_user
        if stream is None or seconds <= 0:
            return
        if self._waiting[user.name] >= most:
            raise ToolError(f"You wait for {most} jobs already. This one is {job_id}; ask job_status for it later.")
        deadline, last, share, seen = time.monotonic() + seconds, 0.0, -1.0, 0
        self._waiting[user.name] += 1
        try:
            while not stream.is_closed and not self.is_closing and time.monotonic() < deadline:
                await asyncio.sleep(POLL_SECONDS)
                news = stream.read(seen)
                seen = news[-1][0] if news else seen
                line = _progress(news[-1][1]) if news and time.monotonic() > last + SAY_SECONDS else None
                if line is not None and line[0] > share:  # the protocol has progress grow
                    last, share = time.monotonic(), line[0]
                    await self.report(*line)
        finally:
            self._waiting[user.name] -= 1
            if not self._waiting[user.name]:
                del self._waiting[user.name]
        if self.is_closing:
            raise ToolError(f"The server ends. The job {job_id} goes on when it starts again; ask job_status then.")

    def _job(self, job_id: str, user: User) -> StoredJob:
        """Return a job of a user; another's looks as if it weren't there.

        Raises:
            ToolError: there is none.
        """
        try:
            job = self._engine.job(job_id) if JOB.fullmatch(job_id) else None
        except KeyError:
            job = None
        if job is None or not (job.owner == user.name or user.may("admin")):
            raise ToolError("There is no such job; give the id that generate_image or generate_video has returned.")
        return job

    def _answer(self, job_id: str, user: User, request: gr.Request) -> Answer:
        """Say how a job is, with its images.

        Raises:
            ToolError: it has failed.
        """
        job, stream = self._job(job_id, user), self._engine.live_stream(job_id)
        if job.state == "failed":
            raise ToolError(job.message)
        values: dict[str, Any] = {"job_id": job_id, "state": job.state}
        if job.state == "queued":
            values["ahead"] = self._engine.ahead(job_id)
        news = [] if stream is None else [line for _, event in stream.read() if (line := _progress(event)) is not None]
        if job.state == "running" and news:
            values["progress"] = round(news[-1][0], 3)
        if job.state in ("queued", "running"):
            values["next"] = "It isn't done yet; ask job_status for this job_id."
        rows, images = [], []
        for picture in self._engine.pictures(job_id):
            path = None if self._engine.output_dir is None else self._engine.output_dir / picture.name
            if path is None or not picture.name or path.is_symlink() or not path.is_file():
                continue  # somebody has removed it
            settings = parse(picture.settings)
            row = {"name": picture.name, "address": _address(request, picture.name)}
            if settings.frames is not None:
                row["video"] = _address(request, path.with_suffix(".mp4").name)
            rows.append({**row, "seconds": round(picture.seconds, 1), "settings": said(settings)})
            images.append(Shown(path, settings))
        return Answer({**values, "images": rows} if rows else values, images)

    def _settings(self, name: str, user: User) -> PictureSettings:
        """Return the settings of an image of a user; another's looks as if it weren't there.

        Raises:
            ToolError: there is none.
            MetadataError: nothing was written into it.
        """
        folder = self._engine.output_dir
        owner = self._engine.owner_of_file(name) if FILE_NAME.fullmatch(name) and not name.endswith(".mp4") else None
        if folder is None or owner is None or not (owner == user.name or user.may("admin")):
            raise ToolError("There is no such image; give a name that generate_image or job_status has returned.")
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise ToolError("The file of this image has been removed.")
        return read_picture(path)

    def _task(self, model: str | None) -> str:
        """Return what a model does with a text; an unknown model is refused when the request is submitted."""
        key = self._engine.models[0] if model is None else model
        tasks = self._engine.abilities(key).tasks if key in self._engine.models else ()
        return next((task for task in TEXT_TASKS if task in tasks), "text_to_image")

    def _clips_model(self, asked: str | None) -> str:
        """Return the model that was asked for, or the first one of clips; of some nothing is known until they load.

        Raises:
            ToolError: it generates images, or there is none.
        """
        makes = {key: self._engine.abilities(key).output for key in self._engine.models}
        able = [key for key, output in makes.items() if output == "frames"]
        if asked is None and not able:
            raise ToolError("No model of this server generates videos; its owner can add one.")
        if asked is not None and makes.get(asked) == "images":
            others = f"choose among {', '.join(able)}" if able else "no model of this server generates videos"
            raise ToolError(f"The model {asked!r} generates images, not videos; {others}.")
        return able[0] if asked is None else asked

    async def _frames(self, key: str, seconds: float, fps: float | None, deadline: float) -> int:
        """Return how many frames a clip of so many seconds has, of those that the model can make.

        Raises:
            ToolError: the model isn't in memory in time, or generates images.
        """
        if key not in self._engine.models:  # the request says so, with the names of those that there are
            return 1
        loading = asyncio.wrap_future(self._engine.model(key))
        done, _ = await asyncio.wait({loading}, timeout=max(deadline - time.monotonic(), 0.0))
        if not done:
            raise ToolError(f"The model {key!r} is still being loaded; call again, or leave out seconds.")
        try:
            model: LoadedModel = loading.result()
        except Exception as error:
            raise ToolError(f"The model {key!r} could not be loaded; the log of the server says why.") from error
        if model.frames is None:
            return 1  # the job says that the model generates images, as it does without this tool
        rate = fps or model.fps
        most = limits.MAX_FRAMES / rate
        if not 0 < seconds <= most:
            raise ToolError(f"seconds: choose a number above 0, at most {most:g} ({limits.MAX_FRAMES} frames).")
        return min(model.nearest_frames(seconds * rate), limits.MAX_FRAMES)

    def _model_row(self, key: str) -> dict[str, Any]:
        """Describe a model."""
        row = {name: value for name, value in model_row(self._engine, key).items() if name not in FOREIGN}
        makes = self._engine.abilities(key).output or "unknown until it is loaded"
        return {"name": key, "default": key == self._engine.models[0], "makes": makes, **row}


FOREIGN = ("id", "object", "created", "owned_by")
"""What OpenAI's clients read of a model, and nobody else."""


def _user(request: gr.Request, role: Role) -> User:
    """Return who asks; the guard has asked for the token.

    Raises:
        ToolError: the role isn't enough.
    """
    user: User = request.state.user  # type: ignore[attr-defined]  # Gradio hands over the request of Starlette
    if not user.may(role):
        raise ToolError(f"This needs the role {role!r}; yours is {user.role!r}.")
    return user


def _subject(task: str, prompt: str) -> dict[str, Any]:
    """Return the field that says what an image shows."""
    return {"label": as_label(prompt)} if task in ("class_to_image", "next_scale_class") else {"prompt": prompt}


def _checked_wait(seconds: float) -> float:
    """Return how long to wait.

    Raises:
        ToolError: longer than may be, or below 0.
    """
    if not 0 <= seconds <= MAX_WAIT_SECONDS:
        raise ToolError(f"wait_seconds: choose 0 to {MAX_WAIT_SECONDS:g}")
    return seconds


def _progress(event: object) -> tuple[float, str] | None:
    """Return how far a job is by an event, and a line on it; None if the event doesn't tell."""
    if isinstance(event, Queued):
        return 0.0, f"{event.ahead} jobs are ahead"
    if isinstance(event, Step):
        return event.share, f"step {event.step} of {event.steps}"
    return None


def _address(request: gr.Request, name: str) -> str:
    """Return where a file of the output folder is served."""
    url: Any = request.url  # of Starlette; what the client itself called this server
    return f"{url.scheme}://{url.netloc}/outputs/{name}"
