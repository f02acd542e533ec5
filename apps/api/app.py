"""The routes. Each asks for a role; nothing that a client sends names a file, a module or a repository."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi import Path as PathPart
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.middleware.trustedhost import TrustedHostMiddleware

from apps import limits
from apps.api.guards import Guards
from apps.api.messages import STATUS, ImagesRequest, MoveRequest, error_body, job_row, picture_row, server_sent
from apps.api.tokens import Role, TokenTable, User
from apps.engine import Engine, Failed, UnknownModelError
from apps.job_store import QueueFullError, StoredJob
from apps.jobs import REQUEST, AnyRequest, explain
from apps.lora import LoraError
from apps.profiles import FORMATS, UnavailableError, attention_backends, memory_profiles
from apps.uploads import UploadError, read_upload

LOCAL = User(name="local", role="admin", salt="0" * 32, digest="0" * 64)
"""Who asks, on a server without tokens, which listens on this machine only."""
POLL_SECONDS = 0.04
KEEP_ALIVE_SECONDS = 15.0
JobId = Annotated[str, PathPart(pattern=r"^[0-9a-f]{16}$")]
Place = Annotated[int, PathPart(ge=0, lt=limits.MAX_PICTURES)]
MEDIA_TYPES = {".png": "image/png", ".webp": "image/webp"}


def create_app(
    engine: Engine, tokens: TokenTable | None = None, hosts: tuple[str, ...] = ("127.0.0.1",), api: bool = True
) -> FastAPI:
    """Build the server.

    Args:
        engine: paints; must have an output folder.
        tokens: the users; None lets everybody in, which only a loopback server may do.
        hosts: names under which the server may be called; others are turned away (DNS rebinding). `*` for any.
        api: serve the routes under `/v1`.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # their pages load scripts from elsewhere
    app.state.engine, app.state.tokens = engine, tokens
    if api:
        _add_looking(app)
        _add_painting(app)
    app.add_middleware(Guards)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    @app.exception_handler(HTTPException)
    async def told(request: Request, error: HTTPException) -> JSONResponse:
        body = error.detail if isinstance(error.detail, dict) else error_body("refused", str(error.detail))
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    async def wrong(request: Request, error: Exception) -> JSONResponse:
        text = explain(error) if isinstance(error, ValidationError) else "A part of the address is not of its form."
        return JSONResponse(error_body("bad_request", text), 422)

    return app


# ------------------------------------------------------------------------------ roles


def _user(request: Request) -> User:
    """Return who asks.

    Raises:
        HTTPException: 401 without a token, or with one that is nobody's.
    """
    tokens: TokenTable | None = request.app.state.tokens
    if tokens is None:
        return LOCAL
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    user = tokens.find(token.strip()) if kind.lower() == "bearer" else None
    if user is None:
        body = error_body("unauthorized", "Send a token: Authorization: Bearer TOKEN.")
        raise HTTPException(401, body, {"WWW-Authenticate": "Bearer"})
    return user


def _require(role: Role) -> Any:
    """Return a dependency that lets in only users with a role."""

    def check(user: Annotated[User, Depends(_user)]) -> User:
        if not user.may(role):
            raise HTTPException(403, error_body("forbidden", f"This needs the role {role!r}; yours is {user.role!r}."))
        return user

    return Depends(check)


Watcher = Annotated[User, _require("watch")]
Painter = Annotated[User, _require("paint")]


def _engine(request: Request) -> Engine:
    return request.app.state.engine


Painting = Annotated[Engine, Depends(_engine)]


def _job(engine: Engine, user: User, job_id: str) -> StoredJob:
    """Return a job that a user may see; another's looks as if it weren't there.

    Raises:
        HTTPException: 404.
    """
    try:
        job = engine.job(job_id)
    except KeyError:
        job = None
    if job is None or not (job.owner == user.name or user.may("admin")):
        raise HTTPException(404, error_body("not_found", "There is no such job."))
    return job


# ---------------------------------------------------------------------------- looking


def _add_looking(app: FastAPI) -> None:
    @app.get("/v1/health")
    def health(engine: Painting) -> dict[str, Any]:
        return {"status": "ok", "model_loaded": engine.model().done()}

    @app.get("/v1/models")
    def models(user: Watcher, engine: Painting) -> dict[str, Any]:
        return {"object": "list", "data": [_model_row(engine, key) for key in engine.models]}

    @app.get("/v1/loras")
    def loras(user: Watcher, engine: Painting) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "lora"} for name in engine.loras]}

    @app.get("/v1/profiles")
    def profiles(user: Watcher, engine: Painting) -> dict[str, Any]:
        """Tell what a request may choose, and why something can't be had here (null for what can)."""
        devices = engine.devices
        return {
            "memory": {device: _reasons(memory_profiles(device)) for device in devices},
            "attention": {device: _reasons(attention_backends(device)) for device in devices},
            "dtype": list(FORMATS),
        }

    @app.get("/v1/schema")
    def schema(user: Watcher) -> dict[str, Any]:
        return REQUEST.json_schema()

    @app.get("/v1/jobs")
    def jobs(
        user: Watcher,
        engine: Painting,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        before: Annotated[float | None, Query(allow_inf_nan=False)] = None,
    ) -> dict[str, Any]:
        owner = None if user.may("admin") else user.name
        rows = engine.jobs(owner, limit, before)
        return {"jobs": [job_row(job, engine.pictures(job.id), engine.ahead(job.id)) for job in rows]}

    @app.get("/v1/jobs/{job_id}")
    def job(job_id: JobId, user: Watcher, engine: Painting) -> dict[str, Any]:
        return job_row(_job(engine, user, job_id), engine.pictures(job_id), engine.ahead(job_id))

    @app.get("/v1/jobs/{job_id}/events")
    async def events(job_id: JobId, user: Watcher, engine: Painting, request: Request) -> StreamingResponse:
        _job(engine, user, job_id)
        last = request.headers.get("last-event-id", "0")
        after = int(last) if last.isdecimal() and len(last) < 10 else 0
        told = _tell(engine, job_id, after, request)
        return StreamingResponse(told, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.get("/v1/jobs/{job_id}/pictures/{place}")
    def picture(job_id: JobId, place: Place, user: Watcher, engine: Painting) -> FileResponse:
        path = _file(engine, user, job_id, place)
        return FileResponse(path, media_type=MEDIA_TYPES[path.suffix])

    @app.get("/v1/jobs/{job_id}/clips/{place}")
    def clip(job_id: JobId, place: Place, user: Watcher, engine: Painting) -> FileResponse:
        path = _file(engine, user, job_id, place).with_suffix(".mp4")
        if not limits.inside(path, path.parent).is_file():
            raise HTTPException(404, error_body("not_found", "There is no clip of this picture."))
        return FileResponse(path, media_type="video/mp4")


def _file(engine: Engine, user: User, job_id: str, place: int) -> Path:
    """Return the file of a picture that a user may see.

    Raises:
        HTTPException: 404 or 410.
    """
    _job(engine, user, job_id)
    found = next((one for one in engine.pictures(job_id) if one.place == place), None)
    if found is None or engine.output_dir is None:
        raise HTTPException(404, error_body("not_found", "There is no such picture."))
    path = limits.inside(engine.output_dir / found.name, engine.output_dir)
    if not path.is_file():
        raise HTTPException(410, error_body("gone", "The picture's file has been removed."))
    return path


def _model_row(engine: Engine, key: str) -> dict[str, Any]:
    """Describe a model; of one that isn't loaded only the name, and what its folder tells, is known."""
    row: dict[str, Any] = {"id": key, "object": "model", "created": 0, "owned_by": "local"}
    row["tasks"] = list(engine.tasks(key))
    future = engine.model(key) if key == engine.models[0] else engine.loaded(key)
    if future is None or not future.done() or future.exception() is not None:
        return row
    model = future.result()
    size = {"width": model.width, "height": model.side, "multiple": model.multiple}
    return row | {"schedulers": list(model.schedulers), **size, "steps": model.steps}


def _reasons(found: dict[str, str]) -> dict[str, str | None]:
    return {name: why or None for name, why in found.items()}


async def _tell(engine: Engine, job_id: str, after: int, request: Request) -> AsyncIterator[str]:
    """Stream the events of a job until its last one, or until nobody listens any more."""
    stream, quiet = await run_in_threadpool(engine.stream, job_id), time.monotonic()
    while True:
        was_closed = stream.is_closed
        for number, event in stream.read(after):
            after, quiet = number, time.monotonic()
            yield server_sent(number, job_id, event)
        if was_closed or await request.is_disconnected():
            return
        if time.monotonic() - quiet > KEEP_ALIVE_SECONDS:
            quiet = time.monotonic()
            yield ": waiting\n\n"
        await asyncio.sleep(POLL_SECONDS)


# --------------------------------------------------------------------------- painting


def _add_painting(app: FastAPI) -> None:
    @app.post("/v1/pictures", status_code=201)
    async def hand_in(user: Painter, engine: Painting, request: Request) -> dict[str, Any]:
        data = await request.body()
        try:
            image = await run_in_threadpool(read_upload, data)
        except UploadError as error:
            raise HTTPException(422, error_body("bad_picture", str(error))) from error
        name = await run_in_threadpool(engine.uploads.add, image)
        return {"id": name, "width": image.width, "height": image.height}

    @app.post("/v1/jobs", status_code=202)
    async def submit(user: Painter, engine: Painting, request: Request) -> dict[str, Any]:
        wanted = REQUEST.validate_json(await request.body())
        job_id = await run_in_threadpool(_submit, engine, wanted, user)
        return await run_in_threadpool(lambda: job_row(engine.job(job_id), [], engine.ahead(job_id)))

    @app.delete("/v1/jobs/{job_id}")
    @app.post("/v1/jobs/{job_id}/stop")
    def stop(job_id: JobId, user: Painter, engine: Painting) -> dict[str, Any]:
        _job(engine, user, job_id)
        engine.stop(job_id)
        return {"id": job_id}

    @app.post("/v1/jobs/{job_id}/finish")
    def finish(job_id: JobId, user: Painter, engine: Painting) -> dict[str, Any]:
        _job(engine, user, job_id)
        if not engine.finish(job_id):
            raise HTTPException(409, error_body("cant_finish", "It doesn't run, or its model can't end early."))
        return {"id": job_id}

    @app.post("/v1/jobs/{job_id}/skip")
    def skip(job_id: JobId, user: Painter, engine: Painting) -> dict[str, Any]:
        _job(engine, user, job_id)
        if not engine.skip(job_id):
            raise HTTPException(409, error_body("cant_skip", "It doesn't run."))
        return {"id": job_id}

    @app.patch("/v1/jobs/{job_id}")
    async def move(job_id: JobId, user: Painter, engine: Painting, request: Request) -> dict[str, Any]:
        await run_in_threadpool(_job, engine, user, job_id)
        wanted = MoveRequest.model_validate_json(await request.body())
        if not await run_in_threadpool(engine.move, job_id, wanted.position):
            raise HTTPException(409, error_body("cant_move", "It doesn't wait any more."))
        return {"id": job_id, "ahead": await run_in_threadpool(engine.ahead, job_id)}

    @app.post("/v1/images/generations")
    async def images(user: Painter, engine: Painting, request: Request) -> dict[str, Any]:
        body = ImagesRequest.model_validate_json(await request.body())
        job_id = await run_in_threadpool(_submit, engine, body.request(), user)
        stream = engine.stream(job_id)
        while not stream.is_closed:
            if await request.is_disconnected():
                await run_in_threadpool(engine.stop, job_id)
            await asyncio.sleep(POLL_SECONDS)
        last = stream.read()[-1][1]
        if isinstance(last, Failed):
            raise HTTPException(STATUS.get(last.code, 500), error_body(last.code, last.message))
        data = await run_in_threadpool(_images, engine, job_id, body.response_format, str(request.base_url))
        return {"created": int(time.time()), "data": data}


def _submit(engine: Engine, wanted: AnyRequest, user: User) -> str:
    """Submit a request for a user.

    Raises:
        HTTPException: 404, 422 or 429.
    """
    try:
        return engine.submit(wanted, user.name)
    except UnknownModelError as error:
        raise HTTPException(404, error_body("unknown_model", str(error))) from error
    except LoraError as error:
        raise HTTPException(404, error_body("unknown_lora", str(error))) from error
    except UploadError as error:
        raise HTTPException(422, error_body("unknown_picture", str(error))) from error
    except UnavailableError as error:
        raise HTTPException(422, error_body("unavailable", str(error))) from error
    except QueueFullError as error:
        raise HTTPException(429, error_body("queue_full", str(error)), {"Retry-After": "5"}) from error


def _images(engine: Engine, job_id: str, form: str, base_url: str) -> list[dict[str, Any]]:
    """Return the pictures of a job as OpenAI's clients expect them, each with its seed."""
    rows = []
    for picture in engine.pictures(job_id):
        row = picture_row(picture)
        said = {"revised_prompt": row["settings"]["prompt"], "seed": row["settings"]["seed"], "report": row["report"]}
        if form == "url":
            rows.append({"url": base_url.rstrip("/") + row["url"], **said})
        elif engine.output_dir is not None:
            content = (engine.output_dir / picture.name).read_bytes()
            rows.append({"b64_json": base64.b64encode(content).decode(), **said})
    return rows
