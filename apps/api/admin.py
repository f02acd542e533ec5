"""Routes about use: one's own, and for administrators who uses the server, its queue and its devices."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Request
from fastapi import Path as PathPart

from apps.api.access import Admin, ServerEngine, Viewer
from apps.api.messages import error_body
from apps.api.tokens import TokenTable, User
from apps.service.accounting import Used
from apps.service.engine import Engine
from apps.service.quotas import NO_QUOTAS, Quotas
from apps.service.server_state import QueueRow, queue_rows

router = APIRouter()
JobId = Annotated[str, PathPart(pattern=r"^[0-9a-f]{16}$")]


@router.get("/v1/usage")
def usage(user: Viewer, engine: ServerEngine) -> dict[str, Any]:
    """Tell what who asks has used today and waits for, and what the limits are (null for none)."""
    return {"user": user.name, "role": user.role, **_usage_row(engine.used(user.name), user.quotas)}


@router.get("/v1/admin/users")
def users(admin: Admin, engine: ServerEngine, request: Request) -> dict[str, Any]:
    """List the users with what each has used today; who was removed and still has jobs has no role."""
    tokens: TokenTable | None = request.app.state.tokens
    rows = [
        {"user": name, "role": role, **_usage_row(engine.used(name), quotas)}
        for name, role, quotas in people(engine, tokens)
    ]
    return {"users": rows}


@router.get("/v1/admin/queue")
def queue(admin: Admin, engine: ServerEngine) -> dict[str, Any]:
    """List the jobs that run and wait, in the order of service; what people ask for is theirs, and not told."""
    return {"jobs": [_queue_row(row) for row in queue_rows(engine)]}


@router.delete("/v1/admin/jobs/{job_id}")
def stop(job_id: JobId, admin: Admin, engine: ServerEngine) -> dict[str, Any]:
    """Stop anybody's job within one step, or take it out of the line."""
    try:
        engine.stop(job_id)
    except KeyError:
        raise HTTPException(404, error_body("not_found", "There is no such job.")) from None
    return {"id": job_id}


@router.get("/v1/admin/devices")
def devices(admin: Admin, engine: ServerEngine) -> dict[str, Any]:
    """List the devices: bytes of memory, and the models that are on each."""
    rows = [
        {
            "device": one.device,
            "name": one.name,
            "memory": {"total": one.total, "used": one.used, "free": one.free},
            "models": [{"id": key, "loaded": is_loaded} for key, is_loaded in one.models.items()],
        }
        for one in engine.device_states()
    ]
    return {"devices": rows}


def people(engine: Engine, tokens: TokenTable | None) -> list[tuple[str, str | None, Quotas]]:
    """Return name, role and quotas of everybody who uses a server; without users that is who sits at it.

    Args:
        engine: of the server.
        tokens: its users.

    Returns:
        The users in the order of the file, then those who were removed and still have jobs, without a role.
    """
    listed: list[User] = [] if tokens is None else list(tokens.users)
    found: list[tuple[str, str | None, Quotas]] = [(user.name, user.role, user.quotas) for user in listed]
    if tokens is None:
        found.append(("local", "admin", NO_QUOTAS))
    names = {name for name, _, _ in found}
    return found + [(name, None, NO_QUOTAS) for name in sorted(engine.active_owners() - names)]


def _usage_row(used: Used, quotas: Quotas) -> dict[str, Any]:
    return {
        "today": {"images": used.images, "seconds": round(used.seconds, 3)},
        "waiting": used.waiting,
        "running": used.running,
        "pending_images": used.pending,
        "storage_bytes": used.stored,
        "quotas": quotas.model_dump(),
    }


def _queue_row(row: QueueRow) -> dict[str, Any]:
    names = ("id", "owner", "model", "task", "state", "ahead", "created", "started", "done", "images")
    return {name: getattr(row, name) for name in names}
