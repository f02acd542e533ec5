"""The routes of the models: what each needs, and for the owner adding and removing them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from apps.api.access import ServerEngine, Viewer, model_row, require
from apps.api.messages import error_body
from apps.api.schema import takes
from apps.api.tokens import User
from apps.service.engine import Engine
from apps.service.model_download import Download
from apps.service.model_facts import facts_of
from apps.service.own_models import MOST_NAME, OwnModels, is_hub_id
from apps.service.request_error import RequestError

router = APIRouter()
Owner = Annotated[User, require("admin")]
STATUSES = {"models.known": 409, "models.busy": 409, "models.last": 409, "models.disk": 507, "models.hub": 502}
"""HTTP status of what can't be added or removed; 422 for all else."""


class AddModelRequest(BaseModel):
    """The body of `POST /v1/models`.

    Attributes:
        source: folder or file on the server, or a hub id, `owner/name` or `owner/name@COMMIT`.
    """

    model_config = ConfigDict(extra="forbid")

    source: str = Field(min_length=1, max_length=MOST_NAME, description="Folder or file of the server, or a hub id.")


def _own(request: Request) -> OwnModels:
    """Return the server's list of models.

    Raises:
        HTTPException: 404, it has none.
    """
    own = getattr(request.app.state, "own_models", None)
    if own is None:
        raise HTTPException(404, error_body("no_models_folder", "This server has no folder of models."))
    return own


Own = Annotated[OwnModels, Depends(_own)]


@router.get("/v1/models")
def models(user: Viewer, engine: ServerEngine, request: Request) -> dict[str, Any]:
    """List the models, with what each needs; favourites are those of who asks."""
    rows = _rows(request, engine, user)
    return {"object": "list", "data": [model_row(engine, key) | rows[key] for key in rows]}


@router.get("/v1/models/{model_id:path}")
def model(model_id: str, user: Viewer, engine: ServerEngine, request: Request) -> dict[str, Any]:
    """Describe a model."""
    row = _rows(request, engine, user).get(model_id)
    if row is None:
        raise HTTPException(404, error_body("model_not_found", "There is no such model here; see /v1/models.", "model"))
    return model_row(engine, model_id) | row


@router.post("/v1/models", status_code=201, openapi_extra=takes(AddModelRequest),
             responses={202: {"description": "It is being fetched; see `/v1/model-download`."}})  # fmt: skip
async def add(user: Owner, engine: ServerEngine, own: Own, request: Request) -> JSONResponse:
    """Add a model by path, or start to fetch one from the Hub."""
    wanted = AddModelRequest.model_validate_json(await request.body())
    try:
        if is_hub_id(wanted.source):
            found = await run_in_threadpool(own.fetch, wanted.source)
            return JSONResponse(_download_row(found), 202)
        key = await run_in_threadpool(own.add, wanted.source)
    except RequestError as error:
        raise _refusal(error) from error
    return JSONResponse(await run_in_threadpool(model_row, engine, key), 201)


@router.delete("/v1/models/{model_id:path}")
def remove(model_id: str, user: Owner, engine: ServerEngine, own: Own) -> dict[str, Any]:
    """Take a model that was added off the list; the files of one that was fetched are removed."""
    if model_id not in engine.models:
        raise HTTPException(404, error_body("model_not_found", "There is no such model here; see /v1/models.", "model"))
    try:
        own.remove(model_id)
    except RequestError as error:
        raise _refusal(error) from error
    return {"id": model_id, "object": "model", "deleted": True}


@router.get("/v1/model-download")
def download(user: Owner, own: Own) -> dict[str, Any]:
    """Tell how the download goes that runs, or ran last."""
    last = own.downloads.last
    return {"download": None if last is None else _download_row(last)}


@router.delete("/v1/model-download")
def cancel(user: Owner, own: Own) -> dict[str, Any]:
    """End the download that runs; what is there of it is removed."""
    own.downloads.cancel()
    return download(user, own)


def _rows(request: Request, engine: Engine, user: User) -> dict[str, dict[str, Any]]:
    """Return what is said of each model beside its abilities, in the order of the engine."""
    own: OwnModels | None = getattr(request.app.state, "own_models", None)
    if own is None:
        device, dtype = engine.devices[0], engine.dtype
        return {key: {"facts": facts_of(engine.source(key), device, dtype).to_dict()} for key in engine.models}
    found = {
        one.key: {
            "facts": one.facts.to_dict(),
            "favourite": one.is_favourite,
            "added": one.is_added,
            "origin": one.origin or None,
        }
        for one in own.rows(user.name)
    }
    return {key: found[key] for key in engine.models if key in found}


def _download_row(one: Download) -> dict[str, Any]:
    return {
        "repository": one.repository,
        "commit": one.commit,
        "state": one.state,
        "bytes": one.nbytes,
        "fetched": one.fetched,
        "reason": one.reason or None,
        "models": list(one.keys),
    }


def _refusal(error: RequestError) -> HTTPException:
    code = error.key.replace(".", "_") or "bad_request"
    return HTTPException(STATUSES.get(error.key, 422), error_body(code, str(error), "source"))
