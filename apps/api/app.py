"""The routes. Each asks for a role; nothing that a client sends names a file, a module or a repository."""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
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

from apps.api import admin, gallery, login_page, metrics, models, openai
from apps.api.access import Creator, ServerEngine, Viewer, enqueue
from apps.api.guards import BodyLimits, Guard
from apps.api.logins import LoginTable
from apps.api.messages import CODES, MoveRequest, error_body, job_row
from apps.api.schema import PICTURES, files, takes, takes_file
from apps.api.schema import openapi as openapi_of
from apps.api.streams import JobStreams, TooManyStreamsError
from apps.api.tokens import TokenTable, User
from apps.service import limits
from apps.service.compute_profiles import FORMATS, attention_backends, memory_profiles
from apps.service.engine import Engine
from apps.service.job_store import StoredJob, StoreError
from apps.service.requests import REQUEST, explain
from apps.service.uploaded_clips import receive_clip
from apps.service.uploads import UploadError
from apps.service.validation import explain_fields

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
JobId = Annotated[str, PathPart(pattern=r"^[0-9a-f]{16}$")]
Place = Annotated[int, PathPart(ge=0, lt=limits.MAX_PICTURES)]
MEDIA_TYPES = {".png": "image/png", ".webp": "image/webp", ".mp4": "video/mp4"}
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}\.(png|webp|mp4)")
PUBLIC = ("/v1/health", metrics.READY)
"""Paths that need no token."""
CLIP_TYPES = ("video/mp4", "video/webm", "image/gif")
UPLOADS = {
    "/v1/pictures": limits.MAX_UPLOAD_BYTES,
    "/v1/clips": limits.MAX_UPLOAD_BYTES,
    **dict.fromkeys(openai.UPLOAD_PATHS, openai.MAX_FORM_BYTES),
}
"""Paths whose bodies are files, and how many bytes each takes."""


def create_app(
    engine: Engine,
    tokens: TokenTable | None = None,
    hosts: tuple[str, ...] = ("127.0.0.1",),
    api: bool = True,
    *,
    uploads: Mapping[str, int] | None = None,
    forms: tuple[str, ...] = (),
    public: tuple[str, ...] = (),
    sizes: BodyLimits | None = None,
    scratch: Path | None = None,
) -> FastAPI:
    """Build the server.

    Args:
        engine: generates; must have an output folder.
        tokens: the users; None lets everybody in, which only a loopback server may do.
        hosts: names under which the server may be called; others are turned away (DNS rebinding). `*` for any.
        api: serve the routes under `/v1`.
        uploads: further paths whose bodies are files, such as the page's, and how many bytes each takes.
        forms: paths that take what the page hands over.
        public: further paths that need no user; nothing private is in them.
        sizes: limits of bodies.
        scratch: private folder for files that arrive; None for the system's folder of temporary files.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # their pages load scripts from elsewhere
    app.state.engine, app.state.tokens = engine, tokens
    app.state.scratch = scratch
    app.state.streams = JobStreams(engine)
    app.state.decoder = ThreadPoolExecutor(1, "decoder")  # of its own: images wait for each other, and nobody else
    logins = None if tokens is None else LoginTable(tokens)
    if tokens is not None:
        engine.quotas_of = tokens.quotas_of
    if api:
        _add_read_routes(app)
        _add_write_routes(app)
        app.include_router(gallery.router, prefix="/v1")
        app.include_router(models.router)
        app.include_router(openai.router)
        app.include_router(admin.router)
        _add_rest(app)
    if logins is not None:
        login_page.add_login(app, logins)
    _add_files(app)
    public = (*PUBLIC, *public, *(login_page.PATHS if logins is not None else ()))
    guard = {"tokens": tokens, "logins": logins, "public": public, "forms": forms, "sizes": sizes}
    app.add_middleware(Guard, uploads=UPLOADS | dict(uploads or {}), **guard)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    metrics.prepare(app, engine)
    _add_errors(app)
    return app


def _add_errors(app: FastAPI) -> None:
    """Give every error the same form."""

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        detail: Any = error.detail
        code = CODES.get(error.status_code, "refused")
        body = detail if isinstance(detail, dict) else error_body(code, str(detail))
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    async def wrong(request: Request, error: Exception) -> JSONResponse:
        text = _explained(error) if isinstance(error, ValidationError) else "A part of the address is not of its form."
        return JSONResponse(error_body("bad_request", text), 422)

    @app.exception_handler(StoreError)
    async def cannot_store(request: Request, error: StoreError) -> JSONResponse:
        text = "The server can't read or write its queue now; its log says why."
        return JSONResponse(error_body("storage", text), 503, {"Retry-After": "5"})


def _explained(error: ValidationError) -> str:
    """Say what is wrong with a body."""
    bodies = {one.__name__: one for one in (MoveRequest, models.AddModelRequest)}
    return explain_fields(error, bodies[error.title]) if error.title in bodies else explain(error)


def _add_rest(app: FastAPI) -> None:
    """Answer for all other addresses under /v1, which the web page would answer otherwise."""
    routes = list(app.router.routes)

    @app.api_route("/v1", methods=list(METHODS), include_in_schema=False)
    @app.api_route("/v1/{rest:path}", methods=list(METHODS), include_in_schema=False)
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


@asynccontextmanager
async def spooled(request: Request) -> AsyncIterator[Path]:
    """Write a body to a file that is gone afterwards."""
    handle, name = tempfile.mkstemp(prefix="upload-", dir=request.app.state.scratch)
    try:
        with os.fdopen(handle, "wb") as file:
            async for part in request.stream():
                file.write(part)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


# ---------------------------------------------------------------------------- looking


def _add_read_routes(app: FastAPI) -> None:
    @app.get("/v1/health")
    async def health(request: Request) -> JSONResponse:
        """Say whether the server works; on the event loop, so that no busy thread pool delays it."""
        engine: Engine = request.app.state.engine
        found, user = engine.health(), request.state.user
        body: dict[str, Any] = {"status": "degraded" if found.problems else "ok"}
        model = engine.loaded(engine.models[0])
        body |= {"model_loaded": model is not None and model.done() and model.exception() is None}
        if user is not None:  # strangers needn't know what ails it
            body |= {"problems": list(found.problems), "waiting": found.waiting, "running": found.running}
        return JSONResponse(body, 503 if found.problems else 200)

    @app.get("/v1/loras")
    def loras(user: Viewer, engine: ServerEngine) -> dict[str, Any]:
        return {
            "object": "list",
            "data": [{"id": name, "object": "lora"} for name in engine.lora_files.names(user.name)],
        }

    @app.get("/v1/upscalers")
    def upscalers(user: Viewer, engine: ServerEngine) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "upscaler"} for name in engine.upscalers.names]}

    @app.get("/v1/profiles")
    def profiles(user: Viewer, engine: ServerEngine) -> dict[str, Any]:
        """Tell what a request may choose, and why something can't be had here (null for what can)."""
        devices = engine.devices
        return {
            "memory": {device: _reasons(memory_profiles(device)) for device in devices},
            "attention": {device: _reasons(attention_backends(device)) for device in devices},
            "dtype": list(FORMATS),
        }

    @app.get("/v1/schema")
    def schema(user: Viewer) -> dict[str, Any]:
        return REQUEST.json_schema()

    @app.get("/v1/openapi.json", include_in_schema=False)
    def openapi(user: Viewer, request: Request) -> dict[str, Any]:
        return openapi_of(request.app, PUBLIC)

    @app.get("/v1/jobs")
    def jobs(
        user: Viewer,
        engine: ServerEngine,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        before: Annotated[str | None, Query(pattern="^[0-9a-f]{16}$", description="Id of a job: older ones.")] = None,
    ) -> dict[str, Any]:
        owner = None if user.may("admin") else user.name
        rows = engine.jobs(owner, limit, before)
        return {"jobs": [job_row(job, engine.pictures(job.id), engine.ahead(job.id)) for job in rows]}

    @app.get("/v1/jobs/{job_id}")
    def job(job_id: JobId, user: Viewer, engine: ServerEngine) -> dict[str, Any]:
        return job_row(_job(engine, user, job_id), engine.pictures(job_id), engine.ahead(job_id))

    @app.get("/v1/jobs/{job_id}/events", response_class=StreamingResponse)
    async def events(job_id: JobId, user: Viewer, engine: ServerEngine, request: Request) -> StreamingResponse:
        job = await run_in_threadpool(_job, engine, user, job_id)
        last = request.headers.get("last-event-id", "0")
        after = int(last) if last.isascii() and last.isdecimal() and len(last) < 10 else 0
        streams: JobStreams = request.app.state.streams
        try:
            streams.check(user.name)
        except TooManyStreamsError as error:
            raise HTTPException(429, error_body("too_many_streams", str(error)), {"Retry-After": "5"}) from error
        events = streams.read(job, user.name, after)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.get(
        "/v1/jobs/{job_id}/pictures/{place}", response_class=FileResponse, responses=files("image/png", "image/webp")
    )
    def picture(job_id: JobId, place: Place, user: Viewer, engine: ServerEngine) -> FileResponse:
        path = _file(engine, user, job_id, place)
        return FileResponse(path, media_type=MEDIA_TYPES[path.suffix])

    @app.get("/v1/jobs/{job_id}/clips/{place}", response_class=FileResponse, responses=files("video/mp4"))
    def clip(job_id: JobId, place: Place, user: Viewer, engine: ServerEngine) -> FileResponse:
        path = _file(engine, user, job_id, place).with_suffix(".mp4")
        if not limits.inside(path, path.parent).is_file():
            raise HTTPException(404, error_body("not_found", "There is no clip of this image."))
        return FileResponse(path, media_type="video/mp4")


def _file(engine: Engine, user: User, job_id: str, place: int) -> Path:
    """Return the file of an image that a user may see.

    Raises:
        HTTPException: 404 or 410.
    """
    _job(engine, user, job_id)
    found = next((one for one in engine.pictures(job_id) if one.place == place), None)
    if found is None or engine.output_dir is None:
        raise HTTPException(404, error_body("not_found", "There is no such image."))
    path = limits.inside(engine.output_dir / found.name, engine.output_dir)
    if not path.is_file():
        raise HTTPException(410, error_body("gone", "The image's file has been removed."))
    return path


def _reasons(found: dict[str, str]) -> dict[str, str | None]:
    return {name: why or None for name, why in found.items()}


def _add_files(app: FastAPI) -> None:
    @app.get("/outputs/{name}", include_in_schema=False)
    def output(name: str, user: Viewer, engine: ServerEngine) -> FileResponse:
        """Serve an image, or the clip beside it, to its owner; no links, and nothing that is no image of a job."""
        found = FILE_NAME.fullmatch(name) is not None and engine.output_dir is not None
        known = [name] if not name.endswith(".mp4") else [name[:-4] + ".png", name[:-4] + ".webp"]
        owners = {engine.owner_of_file(one) for one in known} - {None} if found else set()
        path = None if engine.output_dir is None else engine.output_dir / name
        if path is None or not owners or not (user.may("admin") or user.name in owners):
            raise HTTPException(404, error_body("not_found", "There is no such file."))
        if path.is_symlink() or not path.is_file():
            raise HTTPException(410, error_body("gone", "The file has been removed."))
        return FileResponse(path, media_type=MEDIA_TYPES[path.suffix])


# --------------------------------------------------------------------------- generating


def _add_write_routes(app: FastAPI) -> None:
    @app.post("/v1/pictures", status_code=201, openapi_extra=takes_file(*PICTURES))
    async def hand_in(user: Creator, engine: ServerEngine, request: Request) -> dict[str, Any]:
        async with spooled(request) as file:
            try:
                loop, decoder = asyncio.get_running_loop(), request.app.state.decoder
                name, (width, height) = await loop.run_in_executor(decoder, engine.uploads.receive, file, user.name)
            except UploadError as error:
                raise HTTPException(422, error_body("bad_picture", str(error))) from error
        return {"id": name, "width": width, "height": height}

    @app.post("/v1/clips", status_code=201, openapi_extra=takes_file(*CLIP_TYPES))
    async def hand_in_clip(user: Creator, engine: ServerEngine, request: Request) -> dict[str, Any]:
        async with spooled(request) as file:
            try:
                loop, decoder = asyncio.get_running_loop(), request.app.state.decoder
                taken = loop.run_in_executor(decoder, receive_clip, engine.uploads, file, user.name)
                clip = await taken
            except UploadError as error:
                raise HTTPException(422, error_body("bad_picture", str(error))) from error
        width, height = clip.size
        return {"id": clip.name, "frames": clip.frames, "width": width, "height": height, "notes": list(clip.notes)}

    @app.post("/v1/jobs", status_code=202, openapi_extra=takes(REQUEST))
    async def submit(user: Creator, engine: ServerEngine, request: Request) -> dict[str, Any]:
        wanted = REQUEST.validate_json(await request.body())
        job_id = await run_in_threadpool(enqueue, engine, wanted, user)
        return await run_in_threadpool(lambda: job_row(engine.job(job_id), [], engine.ahead(job_id)))

    @app.delete("/v1/jobs/{job_id}")
    @app.post("/v1/jobs/{job_id}/stop")
    def stop(job_id: JobId, user: Creator, engine: ServerEngine) -> dict[str, Any]:
        _job(engine, user, job_id)
        engine.stop(job_id)
        return {"id": job_id}

    @app.post("/v1/jobs/{job_id}/finish")
    def finish(job_id: JobId, user: Creator, engine: ServerEngine) -> dict[str, Any]:
        _job(engine, user, job_id)
        if not engine.finish(job_id):
            raise HTTPException(409, error_body("cant_finish", "It doesn't run, or its model can't end early."))
        return {"id": job_id}

    @app.post("/v1/jobs/{job_id}/skip")
    def skip(job_id: JobId, user: Creator, engine: ServerEngine) -> dict[str, Any]:
        _job(engine, user, job_id)
        if not engine.skip(job_id):
            raise HTTPException(409, error_body("cant_skip", "It doesn't run."))
        return {"id": job_id}

    @app.patch("/v1/jobs/{job_id}", openapi_extra=takes(MoveRequest))
    async def move(job_id: JobId, user: Creator, engine: ServerEngine, request: Request) -> dict[str, Any]:
        await run_in_threadpool(_job, engine, user, job_id)
        wanted = MoveRequest.model_validate_json(await request.body())
        if not await run_in_threadpool(engine.move, job_id, wanted.position):
            raise HTTPException(409, error_body("cant_move", "It doesn't wait any more."))
        return {"id": job_id, "ahead": await run_in_threadpool(engine.ahead, job_id)}
