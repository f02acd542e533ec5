"""The routes that OpenAI's clients call, in OpenAI's shapes: models, images, edits, variations, and their streams.

What has no meaning here is accepted and named in `warnings`; what can't be done is refused, never ignored.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, TypeVar

from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile

from apps.api.access import Creator, ServerEngine, enqueue
from apps.api.messages import STATUS, error_body, picture_url
from apps.api.schema import MASKS, PICTURES, STREAMED, takes, takes_form
from apps.api.tokens import User
from apps.service import limits
from apps.service.engine import Engine
from apps.service.events import Event, EventStream, Failed, Picture, Step
from apps.service.metadata import mark_of
from apps.service.option_text import as_label
from apps.service.option_values import SchedulerName
from apps.service.options import NegativePrompt, Upscale, UpscalerName
from apps.service.provenance import Provenance, generated_by, marked_bytes
from apps.service.requests import TASKS, AnyRequest, Prompt
from apps.service.uploads import UploadError
from apps.service.validation import explain_fields
from apps.service.xmp import Kind

UPLOAD_PATHS = ("/v1/images/edits", "/v1/images/variations")
"""Paths that take images in multipart bodies of at most `MAX_FORM_BYTES`."""
MAX_FIELD_BYTES = 16 * 1024
MAX_FORM_BYTES = 2 * limits.MAX_UPLOAD_BYTES + 256 * 1024
"""Two images and the fields beside them; each image has the limit of `apps.service.uploads` besides."""
POLL_SECONDS = 0.04
VARIATION_PROMPT = "an image"
"""What a variation shows, if nobody says; a model of texts can't do without one."""
IGNORED = ("background", "quality", "style", "moderation", "user", "output_compression", "input_fidelity")
"""Fields of OpenAI's that have no meaning here."""
USUAL = (None, "", "auto", "standard", "opaque")
"""Values of ignored fields that describe what happens anyway."""
MEDIA: dict[str, Kind] = {"png": "PNG", "webp": "WEBP", "jpeg": "JPEG"}

PARAMS = {"width": "size", "height": "size", "num_images": "n", "file_format": "output_format"}
"""What fields of the engine's requests are called in OpenAI's."""

router = APIRouter()
Model = TypeVar("Model", bound=BaseModel)


class ImagesRequest(BaseModel):
    """What all requests for images share: fields of OpenAI's API, and some of ours.

    Attributes:
        model: key of a model.
        n: how many images.
        size: `WIDTHxHEIGHT`, or `auto`.
        response_format: the images in the answer, or addresses of them.
        output_format: of the images; JPEG carries no settings, and is made for the answer only.
        stream: answer with server-sent events.
        partial_images: previews to send before each image, with `stream`.
        seed: of the first image.
        negative_prompt: what to avoid.
        steps: denoising steps.
        guidance: guidance scale.
        scheduler: name of a scheduler.
        upscale: by how much the finished images are enlarged; `size` is that before.
        upscaler: key of an upscaler.
        background: not used, as the others of `IGNORED`.
        quality: not used.
        style: not used.
        moderation: not used.
        user: not used.
        output_compression: not used.
        input_fidelity: not used.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = Field(default=None, max_length=200)
    n: int | None = Field(default=None, ge=1, le=limits.MAX_PICTURES)
    size: str | None = Field(default=None, pattern=r"^(auto|\d{1,5}x\d{1,5})$")
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "webp", "jpeg"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(default=None, ge=0, le=3)
    seed: int | None = Field(default=None, ge=0, le=limits.MAX_SEED)
    negative_prompt: NegativePrompt | None = None
    steps: int | None = Field(default=None, ge=1, le=limits.MAX_STEPS)
    guidance: float | None = Field(default=None, ge=0, le=limits.MAX_GUIDANCE)
    scheduler: SchedulerName | None = None
    upscale: Upscale = None
    upscaler: UpscalerName = None
    background: Any = None
    quality: Any = None
    style: Any = None
    moderation: Any = None
    user: Any = None
    output_compression: Any = None
    input_fidelity: Any = None

    def values(self) -> dict[str, Any]:
        """Return the fields of an engine's request that are set."""
        same = ("model", "seed", "negative_prompt", "steps", "guidance", "scheduler", "upscale", "upscaler")
        width, height = (None, None) if self.size in (None, "auto") else map(int, str(self.size).split("x"))
        said = {name: getattr(self, name) for name in same} | {"num_images": self.n, "width": width, "height": height}
        said["file_format"] = "webp" if self.output_format == "webp" else None
        return {name: value for name, value in said.items() if value is not None}

    def warnings(self) -> list[str]:
        """Name the fields that were sent and have no effect."""
        sent = [name for name in IGNORED if getattr(self, name) not in USUAL]
        return [f"{name}: has no effect here and was ignored" for name in sent]


class GenerationRequest(ImagesRequest):
    """The body of `POST /v1/images/generations`.

    Attributes:
        prompt: what the images show.
    """

    prompt: Prompt


class EditRequest(ImagesRequest):
    """The fields of `POST /v1/images/edits`, beside `image` and `mask`.

    Attributes:
        prompt: what the images show.
        strength: how much is changed; 1 ignores what was there.
    """

    prompt: Prompt
    strength: float | None = Field(default=None, ge=0.05, le=1)


class VariationRequest(ImagesRequest):
    """The fields of `POST /v1/images/variations`, beside `image`.

    Attributes:
        prompt: what the images show.
        strength: how much is changed; 1 ignores what was there.
    """

    prompt: Prompt | None = None
    strength: float | None = Field(default=None, ge=0.05, le=1)

    def warnings(self) -> list[str]:
        """Name the fields that have no effect, and what was put instead of a prompt."""
        defaults_used = [] if self.prompt else [f"prompt: none was sent, {VARIATION_PROMPT!r} was used"]
        return [*super().warnings(), *defaults_used]


# ------------------------------------------------------------------------------- routes


@router.post("/v1/images/generations", responses=STREAMED, openapi_extra=takes(GenerationRequest))
async def generations(user: Creator, engine: ServerEngine, request: Request) -> Response:
    """Make images of a prompt."""
    body = _checked(GenerationRequest, await request.body())
    task = await run_in_threadpool(_first_task, engine, body.model)
    return await _answer(_Asked(body, task, _subject(task, body.prompt), "image_generation"), user, engine, request)


@router.post(
    "/v1/images/edits",
    responses=STREAMED,
    openapi_extra=takes_form(EditRequest, {"image": PICTURES, "mask": MASKS}),
)
async def edits(user: Creator, engine: ServerEngine, request: Request) -> Response:
    """Change the part of an image where a mask is transparent, or without a mask the whole image."""
    async with request.form(max_files=2, max_fields=40, max_part_size=MAX_FIELD_BYTES) as form:
        body = _checked(EditRequest, _fields(form, "image", "mask"))
        image, mask = _file(form, "image"), _file(form, "mask")
        first = await run_in_threadpool(_first_task, engine, body.model)
        own = first if first.startswith("next_scale") else "inpaint"  # which change images in the tasks that they have
        task = "image_to_image" if mask is None else own
        await run_in_threadpool(_check_task, engine, body.model, task)
        values = _subject(task, body.prompt) | await _take_in(request, engine, user, image, mask)
    return await _answer(_Asked(body, task, values, "image_edit"), user, engine, request)


@router.post(
    "/v1/images/variations", responses=STREAMED, openapi_extra=takes_form(VariationRequest, {"image": PICTURES})
)
async def variations(user: Creator, engine: ServerEngine, request: Request) -> Response:
    """Make images like an image."""
    async with request.form(max_files=1, max_fields=40, max_part_size=MAX_FIELD_BYTES) as form:
        body = _checked(VariationRequest, _fields(form, "image"))
        await run_in_threadpool(_check_task, engine, body.model, "image_to_image")
        values = await _take_in(request, engine, user, _file(form, "image"), None)
    values["prompt"] = body.prompt or VARIATION_PROMPT
    return await _answer(_Asked(body, "image_to_image", values, "image_variation"), user, engine, request)


# ----------------------------------------------------------------------------- requests


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request, and what its answer needs to know of it.

    Attributes:
        body: as it was sent.
        task: of the engine.
        values: of the engine's request, beside those of the body.
        name: what its events begin with.
    """

    body: ImagesRequest
    task: str
    values: Mapping[str, Any]
    name: str

    def request(self) -> AnyRequest:
        """Return the engine's request.

        Raises:
            HTTPException: 422; a value is out of range, or the task has no such setting.
        """
        strength = getattr(self.body, "strength", None)
        values = {**self.body.values(), **self.values, **({} if strength is None else {"strength": strength})}
        return _checked(TASKS[self.task], values)


def _checked(kind: type[Model], body: bytes | Mapping[str, Any]) -> Model:
    """Validate a body.

    Raises:
        HTTPException: 422.
    """
    try:
        return kind.model_validate_json(body) if isinstance(body, bytes) else kind.model_validate(dict(body))
    except ValidationError as error:
        text = explain_fields(error, kind)
        place = text.removeprefix("request: ").partition(" ")[0].removesuffix(":")
        param = PARAMS.get(place, None if text.startswith("request:") else place)
        raise HTTPException(422, error_body("bad_request", text, param)) from error


def _fields(form: FormData, *files: str) -> dict[str, Any]:
    """Return the fields of a form that are no files.

    Raises:
        HTTPException: 422; a field was sent twice, or is a file that isn't asked for.
    """
    found: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name.removesuffix("[]") in files:
            continue
        if name in found or isinstance(value, UploadFile):
            why = "is a file, and none is taken here" if isinstance(value, UploadFile) else "was sent more than once"
            raise HTTPException(422, error_body("bad_request", f"{name[:40]!a} {why}; leave it out.", None))
        found[name] = value
    return found


def _file(form: FormData, name: str) -> BinaryIO | None:
    """Return a file of a form, open; None if there is none.

    Raises:
        HTTPException: 422; several files, or a text in its place.
    """
    files = [*form.getlist(name), *form.getlist(f"{name}[]")]
    if len(files) > 1:
        raise HTTPException(422, error_body("bad_request", f"{name}: {len(files)} were sent; send one file.", name))
    if not files:
        return None
    if not isinstance(files[0], UploadFile):
        raise HTTPException(422, error_body("bad_request", f"{name}: send a file in a multipart body.", name))
    return files[0].file


async def _take_in(
    request: Request, engine: Engine, user: User, image: BinaryIO | None, mask: BinaryIO | None
) -> dict[str, Any]:
    """Keep the images of a request, and return what names them.

    Raises:
        HTTPException: 422.
    """
    if image is None:
        text = "image: is missing; send a file in a multipart body."
        raise HTTPException(422, error_body("bad_request", text, "image"))
    loop, decoder = asyncio.get_running_loop(), request.app.state.decoder
    param = "image"
    try:
        name, _ = await loop.run_in_executor(decoder, engine.uploads.receive, image, user.name)
        names = {"image": name}
        if mask is not None:
            param = "mask"
            taken = loop.run_in_executor(decoder, engine.uploads.receive_mask, mask, name, user.name)
            names["mask"] = await taken
    except UploadError as error:
        raise HTTPException(422, error_body("bad_picture", str(error), param)) from error
    return names


def _subject(task: str, prompt: str) -> dict[str, Any]:
    """Return the field that says what an image shows: a prompt, or for models of classes the number or name of one."""
    return {"label": as_label(prompt)} if task in ("class_to_image", "next_scale_class") else {"prompt": prompt}


def _first_task(engine: Engine, model: str | None) -> str:
    """Return what a model does first, as far as that is known; an unknown name is refused when it is submitted."""
    key = engine.models[0] if model is None else model
    tasks = engine.abilities(key).tasks if key in engine.models else ()
    return tasks[0] if tasks else "text_to_image"


def _check_task(engine: Engine, model: str | None, task: str) -> None:
    """Refuse what a model is known not to do.

    Raises:
        HTTPException: 422.
    """
    key = engine.models[0] if model is None else model
    tasks = engine.abilities(key).tasks if key in engine.models else ()
    if tasks and task not in tasks:
        able = ", ".join(one.replace("_", " ") for one in tasks)
        hint = " Send a mask to change a part of an image." if tasks[0].startswith("next_scale") else ""
        text = f"The model {key!r} can't do {task.replace('_', ' ')}; it can do {able}.{hint}"
        raise HTTPException(422, error_body("unsupported", text, "model"))


# ------------------------------------------------------------------------------ answers


async def _answer(asked: _Asked, user: User, engine: Engine, request: Request) -> Response:
    """Submit a request and answer it, at its end or with a stream of events."""
    body = asked.body
    if body.partial_images and not body.stream:
        raise HTTPException(422, error_body("bad_request", "partial_images: goes with stream=true.", "partial_images"))
    if body.response_format == "url" and (body.stream or body.output_format == "jpeg"):
        text = "response_format: url goes with neither stream=true nor output_format=jpeg; choose b64_json."
        raise HTTPException(422, error_body("bad_request", text, "response_format"))
    job_id = await run_in_threadpool(enqueue, engine, asked.request(), user)
    stream, ignored = await run_in_threadpool(engine.stream, job_id), body.warnings()
    headers = {"Warning": f'299 tessera "{"; ".join(ignored)}"'} if ignored else {}  # latin-1, so without the notes
    if body.stream:
        events = _stream_events(asked, engine, job_id, stream)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-store", **headers}
        )
    while not stream.is_closed:
        if await request.is_disconnected():
            await run_in_threadpool(engine.stop, job_id)
        await asyncio.sleep(POLL_SECONDS)
    events = [event for _, event in stream.read()]
    pictures = [event for event in events if isinstance(event, Picture)]
    error = _error(events[-1], pictures)
    if error is not None:
        raise error
    base_url = str(request.base_url).rstrip("/")
    addresses = [f"{base_url}{picture_url(job_id, picture)}" for picture in pictures]
    data = await run_in_threadpool(lambda: [_row(*one, body) for one in zip(pictures, addresses, strict=True)])
    answer = {"created": int(time.time()), "data": data, **_warned(body, *pictures)}
    return JSONResponse(answer, headers=headers)


def _warned(body: ImagesRequest, *pictures: Picture) -> dict[str, list[str]]:
    """Return the warnings of an answer: fields without effect, and what keeps the images from what was asked for."""
    notes = dict.fromkeys(note for picture in pictures for note in picture.notes)
    warnings = [*body.warnings(), *notes]
    return {"warnings": warnings} if warnings else {}


def _error(last: Event, pictures: list[Picture]) -> HTTPException | None:
    """Return the error of a job, if it has none of the images that it was asked for."""
    if isinstance(last, Failed):
        return HTTPException(STATUS.get(last.code, 500), error_body(last.code, last.message))
    if not pictures:
        return HTTPException(503, error_body("stopped", "The job was stopped before an image was done; send it again."))
    return None


def _row(picture: Picture, url: str, body: ImagesRequest) -> dict[str, Any]:
    """Describe an image as OpenAI does, with its seed."""
    content = {"url": url} if body.response_format == "url" else {"b64_json": _content(picture, body)}
    return {**content, "revised_prompt": picture.metadata.prompt, "seed": picture.seed}


def _content(picture: Picture, body: ImagesRequest) -> str:
    """Return the file of an image in base64, settings and all; a JPEG is made for the answer and has its mark alone."""
    if picture.path is None or body.output_format == "jpeg":
        return encode(picture.image, body.output_format or "png", mark_of(picture.metadata))
    return base64.b64encode(picture.path.read_bytes()).decode()


def encode(image: Image.Image, form: str, mark: Provenance, *, is_preview: bool = False) -> str:
    """Return an image as base64 of a file, `png`, `webp` or `jpeg`, that says how it came to be."""
    options: dict[str, Any] = {"jpeg": {"quality": 95}, "webp": {"lossless": True}}.get(form, {})
    content = marked_bytes(image.convert("RGB"), MEDIA[form], mark, is_preview=is_preview, **options)
    return base64.b64encode(content).decode()


# ------------------------------------------------------------------------------ streams


async def _stream_events(asked: _Asked, engine: Engine, job_id: str, stream: EventStream) -> AsyncIterator[str]:
    """Stream previews and images; who leaves stops the work."""
    partial, after = _Partial(asked.body.partial_images or 0), 0
    pictures: list[Picture] = []
    last: Event | None = None
    try:
        while True:
            was_closed = stream.is_closed
            for number, last in stream.read(after):
                after = number
                if isinstance(last, Step) and (index := partial.index(last)) is not None:
                    yield await run_in_threadpool(_partial_image, last, index, asked)
                elif isinstance(last, Picture):
                    pictures.append(last)
                    yield await run_in_threadpool(_completed, last, asked)
            if was_closed:
                break
            await asyncio.sleep(POLL_SECONDS)
        error = None if last is None else _error(last, pictures)
        if error is not None:
            detail: Any = error.detail
            yield _sent("error", detail)
    finally:
        # While the server ends, the job goes back into the queue, whose store may be closed by now.
        if not stream.is_closed and not engine.is_closing:
            engine.stop(job_id)


def _partial_image(step: Step, index: int, asked: _Asked) -> str:
    """Tell a preview."""
    preview = step.preview
    if preview is None:
        raise ValueError("the step has no preview; _Partial chooses those that have one.")
    mark = generated_by(asked.body.model or "", has_source="image" in asked.values)
    content = encode(preview, asked.body.output_format or "png", mark, is_preview=True)
    data = {**_shown(preview, asked.body), "b64_json": content, "partial_image_index": index}
    return _sent(f"{asked.name}.partial_image", data)


def _completed(picture: Picture, asked: _Asked) -> str:
    """Tell an image that is done."""
    data = {**_shown(picture.image, asked.body), "b64_json": _content(picture, asked.body), "usage": None}
    return _sent(f"{asked.name}.completed", {**data, "seed": picture.seed, **_warned(asked.body, picture)})


def _shown(image: Image.Image, body: ImagesRequest) -> dict[str, Any]:
    """Return what OpenAI's events tell of an image."""
    return {
        "created_at": int(time.time()),
        "size": f"{image.width}x{image.height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": body.output_format or "png",
    }


def _sent(name: str, data: Mapping[str, Any]) -> str:
    """Write a server-sent event."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n"


class _Partial:
    """Chooses the previews that are sent: so many an image, evenly over its steps.

    Args:
        count: for each image.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._picture = self._sent = 0

    def index(self, step: Step) -> int | None:
        """Return which preview of its image a step gives, from 0; None if it gives none."""
        if step.picture != self._picture:
            self._picture, self._sent = step.picture, 0
        due = self._sent < self._count and step.step * (self._count + 1) >= (self._sent + 1) * step.steps
        if not due or step.preview is None:
            return None
        self._sent += 1
        return self._sent - 1
