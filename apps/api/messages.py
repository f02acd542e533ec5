"""What goes over the wire: answers as plain values, events as server-sent events."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from apps import limits
from apps.events import Done, Event, Failed, ModelLoading, Picture, Queued, Step, Stopped
from apps.job_store import StoredJob, StoredPicture
from apps.jobs import Prompt, TextToImageRequest
from apps.metadata import SchedulerName

STATUS = {"queue_full": 429, "unknown_model": 404, "too_slow": 504, "out_of_memory": 507, "bad_request": 422}
"""HTTP status of a failure; 500 for the others."""


class ImagesRequest(BaseModel):
    """The body of `POST /v1/images/generations`, as clients of OpenAI's API send it, and some fields of ours.

    Attributes:
        prompt: what to paint.
        model: key of a model.
        n: how many pictures.
        size: `WIDTHxHEIGHT`, or `auto`.
        response_format: the pictures in the answer, or addresses of them.
        quality: only one is offered.
        user: whom the caller asks for; not used.
        seed: of the first picture.
        negative_prompt: what to keep away from.
        steps: denoising steps.
        guidance: guidance scale.
        scheduler: name of a scheduler.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: Prompt
    model: str | None = Field(default=None, max_length=200)
    n: int = Field(default=1, ge=1, le=limits.MAX_PICTURES)
    size: str = Field(default="auto", pattern=r"^(auto|\d{1,5}x\d{1,5})$")
    response_format: str = Field(default="b64_json", pattern="^(b64_json|url)$")
    quality: str = Field(default="auto", pattern="^(auto|standard)$")
    user: str | None = Field(default=None, max_length=200)
    seed: int | None = None
    negative_prompt: str = ""
    steps: int | None = None
    guidance: float | None = None
    scheduler: SchedulerName | None = None

    def request(self) -> TextToImageRequest:
        """Return the engine's request.

        Raises:
            ValidationError: a value is out of range.
        """
        same = {
            name: getattr(self, name) for name in ("prompt", "model", "seed", "negative_prompt", "steps", "guidance")
        }
        width, height = (None, None) if self.size == "auto" else map(int, self.size.split("x"))
        return TextToImageRequest(**same, num_images=self.n, width=width, height=height, scheduler=self.scheduler)


class MoveRequest(BaseModel):
    """The body of `PATCH /v1/jobs/{id}`.

    Attributes:
        position: where the job shall wait among its owner's, from 0; beyond the last one is last.
    """

    model_config = ConfigDict(extra="forbid")

    position: int = Field(ge=0, le=10**6)


def error_body(code: str, message: str) -> dict[str, Any]:
    """Return the body of an error: what went wrong, and nothing about the machine."""
    return {"error": {"code": code, "message": message, "type": "invalid_request_error"}}


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


def picture_row(picture: StoredPicture) -> dict[str, Any]:
    """Describe a picture."""
    return _result(picture.job, picture.place, picture.seconds, json.loads(picture.settings), picture.report)


def _result(job_id: str, place: int, seconds: float, settings: dict[str, Any], report: str) -> dict[str, Any]:
    """Describe a picture; of a clip, whose picture shows some frames, with the address of the clip."""
    row = {"place": place, "url": f"/v1/jobs/{job_id}/pictures/{place}", "seconds": round(seconds, 3)}
    clip = {} if settings.get("frames") is None else {"clip": f"/v1/jobs/{job_id}/clips/{place}"}
    return {**row, **clip, "report": report, "settings": settings}


def server_sent(number: int, job_id: str, event: Event) -> str:
    """Write an event as a server-sent event."""
    name, data = _told(job_id, event)
    return f"id: {number}\nevent: {name}\ndata: {json.dumps(data)}\n\n"


def _told(job_id: str, event: Event) -> tuple[str, dict[str, Any]]:  # noqa: PLR0911  (one for each kind)
    match event:
        case Queued(ahead):
            return "queued", {"ahead": ahead}
        case ModelLoading(model):
            return "loading", {"model": model}
        case Step():
            told = {name: getattr(event, name) for name in ("step", "steps", "picture", "pictures", "strip")}
            preview = None if event.preview is None else f"data:image/png;base64,{encode_png(event.preview)}"
            return "step", {**told, "eta": round(event.eta, 3), "preview": preview}
        case Picture():
            place = int(event.path.stem.rsplit("-", 1)[1]) if event.path is not None else 0
            settings = event.metadata.model_dump(mode="json")
            return "result", _result(job_id, place, event.seconds, settings, event.report)
        case Done(seconds):
            return "done", {"seconds": round(seconds, 3)}
        case Stopped():
            return "stopped", {}
        case Failed(code, message):
            return "failed", {"code": code, "message": message}


def encode_png(image: Image.Image) -> str:
    """Return a picture as base64 of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
