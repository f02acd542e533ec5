"""What goes over the wire: answers as plain values, events as server-sent events."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from apps.service.events import ClipPart, Done, Event, Failed, ModelLoading, Picture, Queued, Step, Stopped, Upscaling
from apps.service.job_store import StoredJob, StoredPicture
from apps.service.media import clip_uri

STATUS = {
    "queue_full": 429,
    "quota": 429,
    "unknown_model": 404,
    "too_slow": 504,
    "out_of_memory": 507,
    "bad_request": 422,
}
"""HTTP status of a failure; 500 for the others."""
SERVER_CODES = (
    "failed",
    "model_failed",
    "crashed",
    "missing_extra",
    "out_of_memory",
    "too_slow",
    "queue_full",
    "stopped",
    "storage",
    "busy",
)
"""Errors that are not the caller's."""
CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "unsupported_media_type",
}
"""Codes of errors that the framework raises, by their HTTP status."""


class MoveRequest(BaseModel):
    """The body of `PATCH /v1/jobs/{id}`.

    Attributes:
        position: where the job should wait among its owner's, from 0; beyond the last one is last.
    """

    model_config = ConfigDict(extra="forbid")

    position: int = Field(ge=0, le=10**6)


def error_body(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """Return the body of an error, as OpenAI's clients read it: what went wrong, and nothing about the machine.

    Args:
        code: for programs.
        message: for people.
        param: the field that is wrong.
    """
    kind = "server_error" if code in SERVER_CODES else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def job_row(job: StoredJob, pictures: list[StoredPicture], ahead: int) -> dict[str, Any]:
    """Describe a job."""
    error = None if job.state != "failed" else {"code": job.code, "message": job.message}
    return {
        "id": job.id,
        "owner": job.owner,
        "state": job.state,
        "ahead": ahead,
        "created": job.created,
        "ended": job.ended,
        "request": json.loads(job.request),
        "error": error,
        "pictures": [picture_row(picture) for picture in pictures],
    }


def picture_url(job_id: str, picture: Picture) -> str:
    """Return the address of an image's file on this server."""
    return f"/v1/jobs/{job_id}/pictures/{_place(picture)}"


def _place(picture: Picture) -> int:
    """Return which image of its job an image is; its file's name tells."""
    return int(picture.path.stem.rsplit("-", 1)[1]) if picture.path is not None else 0


def picture_row(picture: StoredPicture) -> dict[str, Any]:
    """Describe an image."""
    row = _result(picture.job, picture.place, picture.seconds, json.loads(picture.settings), picture.report)
    return {**row, "notes": json.loads(picture.notes), "reports": json.loads(picture.reports)}


def _result(job_id: str, place: int, seconds: float, settings: dict[str, Any], report: str) -> dict[str, Any]:
    """Describe an image; of a clip, whose image shows some frames, with the address of the clip."""
    row = {"place": place, "url": f"/v1/jobs/{job_id}/pictures/{place}", "seconds": round(seconds, 3)}
    clip = {} if settings.get("frames") is None else {"clip": f"/v1/jobs/{job_id}/clips/{place}"}
    return {**row, **clip, "report": report, "settings": settings}


def server_sent(number: int, name: str, data: dict[str, Any]) -> bytes:
    """Write an event as a server-sent event."""
    return f"id: {number}\nevent: {name}\ndata: {json.dumps(data)}\n\n".encode()


def stored_picture_message(picture: StoredPicture) -> tuple[str, dict[str, Any]]:
    """Return name and data of the event of an image on record."""
    return "result", picture_row(picture)


def event_message(job_id: str, event: Event) -> tuple[str, dict[str, Any]]:  # noqa: PLR0911  (one for each kind)
    """Return name and data of an event."""
    match event:
        case Queued(ahead):
            return "queued", {"ahead": ahead}
        case ModelLoading(model):
            return "loading", {"model": model}
        case Step():
            fields = {name: getattr(event, name) for name in ("step", "steps", "picture", "pictures", "strip")}
            preview = None if event.preview is None else f"data:image/png;base64,{encode_png(event.preview)}"
            return "step", {**fields, "eta": round(event.eta, 3), "preview": preview}
        case ClipPart(start, frames):
            fields = {name: getattr(event, name) for name in ("total", "picture", "pictures")}
            return "part", {"start": start, "frames": len(frames), **fields, "clip": clip_uri(frames, event.fps)}
        case Upscaling():
            return "upscaling", {name: getattr(event, name) for name in ("done", "count", "picture", "pictures")}
        case Picture():
            settings = event.metadata.model_dump(mode="json")
            row = _result(job_id, _place(event), event.seconds, settings, event.report)
            return "result", {**row, "notes": list(event.notes), "reports": [one.to_dict() for one in event.reports]}
        case Done(seconds):
            return "done", {"seconds": round(seconds, 3)}
        case Stopped():
            return "stopped", {}
        case Failed(code, message):
            return "failed", {"code": code, "message": message}


def encode_png(image: Image.Image) -> str:
    """Return an image as base64 of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
