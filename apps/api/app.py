"""The routes. Each asks for a role; nothing that a client sends names a file, a module or a repository."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi import Path as PathPart
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Match

from apps import limits
from apps.api import openai
from apps.api.access import Painter, Painting, Watcher, enqueue, model_row
from apps.api.guards import Guards
from apps.api.messages import CODES, MoveRequest, error_body, job_row, server_sent
from apps.api.tokens import TokenTable, User
from apps.engine import Engine
from apps.job_store import StoredJob
from apps.jobs import REQUEST, explain
from apps.profiles import FORMATS, attention_backends, memory_profiles
from apps.uploads import UploadError, read_upload
from apps.validation import explain_fields

POLL_SECONDS = 0.04
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
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
        app.include_router(openai.router)
        _add_rest(app)
    app.add_middleware(Guards)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    @app.exception_handler(StarletteHTTPException)
    async def told(request: Request, error: StarletteHTTPException) -> JSONResponse:
        detail: Any = error.detail
        code = CODES.get(error.status_code, "refused")
        body = detail if isinstance(detail, dict) else error_body(code, str(detail))
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    async def wrong(request: Request, error: Exception) -> JSONResponse:
        text = _explained(error) if isinstance(error, ValidationError) else "A part of the address is not of its form."
        return JSONResponse(error_body("bad_request", text), 422)

    return app


def _explained(error: ValidationError) -> str:
    """Say what is wrong with a body."""
    return explain_fields(error, MoveRequest) if error.title == MoveRequest.__name__ else explain(error)


def _add_rest(app: FastAPI) -> None:
    """Answer for all other addresses under /v1, which the web page would answer otherwise."""
    routes = list(app.router.routes)

    @app.api_route("/v1", methods=list(METHODS))
    @app.api_route("/v1/{rest:path}", methods=list(METHODS))
    def nothing(request: Request) -> None:
        others = [method for method in METHODS if method != request.method]
        scopes = [{**request.scope, "method": method} for method in others]
        fits = (any(route.matches(scope)[0] is Match.FULL for route in routes) for scope in scopes)
        allowed = [method for method, does in zip(others, fits, strict=True) if does]
        if allowed:
            text = f"{request.method} is not for this address; it takes {', '.join(allowed)}."
            raise HTTPException(405, error_body("method_not_allowed", text), {"Allow": ", ".join(allowed)})
        raise HTTPException(404, error_body("not_found", "There is no such address; README.md lists those of the API."))


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
        return {"object": "list", "data": [model_row(engine, key) for key in engine.models]}

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
        job_id = await run_in_threadpool(enqueue, engine, wanted, user)
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
