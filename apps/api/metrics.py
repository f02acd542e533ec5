"""`/metrics` in the text format of Prometheus, and `/ready` for who starts and replaces servers.

No label names a user, a prompt or a job: their number would grow without end, and they are nobody else's business.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apps.api.access import Admin, ServerEngine
from apps.service.accounting import Histogram
from apps.service.engine import Engine
from apps.service.job_store import StoreError

router = APIRouter()
READY = "/ready"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CLASSES = ("1xx", "2xx", "3xx", "4xx", "5xx")
CHECK_SECONDS = 5.0
"""Between two writes by which it is found out whether the store takes any: anybody may ask for `/ready`."""

Samples = Iterable[tuple[Mapping[str, str], float]]


class CountResponses:
    """Counts the responses of a server by the class of their status.

    Args:
        app: what answers.
        counts: receives them, by names such as `2xx`.
    """

    def __init__(self, app: ASGIApp, counts: Counter[str]) -> None:
        self.app, self._counts = app, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._counts[f"{message['status'] // 100}xx"] += 1
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(admin: Admin, engine: ServerEngine, request: Request) -> PlainTextResponse:
    """Tell how much is generated, waits and is taken, for Prometheus."""
    return PlainTextResponse(render(engine, request.app.state.responses), headers={"content-type": CONTENT_TYPE})


@router.get(READY)
def ready(request: Request) -> JSONResponse:
    """Say whether a request would be worked on now: 200, or 503 with the reason."""
    reason = request.app.state.readiness.reason()
    if reason:
        return JSONResponse({"status": "unavailable", "reason": reason}, 503, {"Retry-After": "5"})
    return JSONResponse({"status": "ready"})


class Readiness:
    """Whether a server can generate with its preset model and write its store.

    Args:
        engine: of the server.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._was_loaded = False
        self._checked = float("-inf")
        self._trouble = ""

    def reason(self) -> str:
        """Return why it can't, in words that strangers may read; empty if it can."""
        engine = self._engine
        if engine.is_closing:
            return "The server is shutting down."
        future = engine.loaded(engine.models[0])
        if future is not None and future.done() and future.exception() is not None:
            return "The preset model could not be loaded."
        # One that was loaded and made room for another is loaded again when it is asked for.
        self._was_loaded = self._was_loaded or (future is not None and future.done())
        if not self._was_loaded:
            return "The preset model is not loaded yet."
        trouble = self._store_trouble()
        if trouble or engine.health().problems:
            return trouble or "The workers of the server do not go on."
        return ""

    def _store_trouble(self) -> str:
        # Who asks while another one's write is under way gets the last answer: floods should not fill the threads.
        if time.monotonic() - self._checked < CHECK_SECONDS or not self._lock.acquire(blocking=False):
            return self._trouble
        try:
            self._engine.check_store()
            self._trouble = ""
        except StoreError:
            self._trouble = "The queue can't be written."
        finally:
            self._checked = time.monotonic()
            self._lock.release()
        return self._trouble


def render(engine: Engine, responses: Mapping[str, int]) -> str:
    """Return the metrics of a server.

    Args:
        engine: of the server.
        responses: class of status -> how many were sent.
    """
    health, totals, workers = engine.health(), engine.totals(), engine.device_states()
    devices = {one.device: one for one in workers}.values()  # several workers may share one
    nothing: dict[str, str] = {}
    parts = [
        _metric("tessera_jobs_waiting", "gauge", "Jobs that wait.", [(nothing, health.waiting)]),
        _metric("tessera_jobs_running", "gauge", "Jobs that run.", [(nothing, health.running)]),
        _metric("tessera_healthy", "gauge", "1 if nothing is wrong, else 0.", [(nothing, int(not health.problems))]),
        _metric("tessera_images_total", "counter", "Images and clips generated.", [(nothing, totals.images)]),
        _metric("tessera_device_seconds_total", "counter", "Device seconds used.", [(nothing, totals.seconds)]),
        _histogram("tessera_job_seconds", "Device seconds of ended jobs.", engine.meter.jobs),
        _metric(
            "tessera_device_memory_bytes",
            "gauge",
            "Memory of devices.",
            [
                ({"device": one.device, "state": state}, value)
                for one in devices
                for state, value in (("used", one.used), ("free", one.free))
            ],
        ),
        _metric(
            "tessera_models_loaded",
            "gauge",
            "Models in memory.",
            [
                (
                    {"device": one.device},
                    sum(sum(each.models.values()) for each in workers if each.device == one.device),
                )
                for one in devices
            ],
        ),
        _metric(
            "tessera_http_responses_total",
            "counter",
            "Responses by the class of their status.",
            [({"class": name}, responses.get(name, 0)) for name in CLASSES],
        ),
    ]
    return "".join(parts)


def _metric(name: str, kind: str, about: str, samples: Samples) -> str:
    return _head(name, kind, about) + "".join(_sample(name, labels, value) for labels, value in samples)


def _histogram(name: str, about: str, values: Histogram) -> str:
    counts, total = values.read()
    lines, so_far = [], 0
    for bound, count in zip((*values.bounds, float("inf")), counts, strict=True):
        so_far += count
        lines.append(_sample(f"{name}_bucket", {"le": _number(bound)}, so_far))
    lines += [_sample(f"{name}_sum", {}, total), _sample(f"{name}_count", {}, so_far)]
    return _head(name, "histogram", about) + "".join(lines)


def _head(name: str, kind: str, about: str) -> str:
    return f"# HELP {name} {about}\n# TYPE {name} {kind}\n"


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    inner = ",".join(f'{key}="{_escaped(one)}"' for key, one in labels.items())
    return f"{name}{f'{{{inner}}}' if inner else ''} {_number(value)}\n"


def _number(value: float) -> str:
    return "+Inf" if value == float("inf") else repr(float(value)) if value % 1 else str(int(value))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def prepare(app: Any, engine: Engine) -> None:
    """Give a server what its routes of this module ask for, and count its responses."""
    app.state.responses, app.state.readiness = Counter(), Readiness(engine)
    app.include_router(router)
    app.add_middleware(CountResponses, counts=app.state.responses)
