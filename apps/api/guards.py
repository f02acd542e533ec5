"""What every request passes before a route sees it: size, origin, and at last a net for errors."""

from __future__ import annotations

import json
import logging
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apps import limits
from apps.api.messages import error_body
from apps.api.openai import MAX_FORM_BYTES, UPLOAD_PATHS

logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 256 * 1024
HARMLESS = ("GET", "HEAD", "OPTIONS")


class TooLargeError(Exception):
    """A body is larger than its route takes."""


class Guards:
    """Middleware for the paths of the API; the web page has its own.

    Args:
        app: what comes behind.
        prefix: of the paths concerned.
    """

    def __init__(self, app: ASGIApp, prefix: str = "/v1") -> None:
        self.app = app
        self.prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http" or not scope["path"].startswith(self.prefix):
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        if scope["method"] not in HARMLESS and _is_foreign(headers):
            # A page of another site may make a browser send things here, with the name of that site in Origin.
            await _refuse(send, 403, "foreign_origin", "Requests from pages of other sites are not taken.")
            return
        most = limits.MAX_UPLOAD_BYTES if scope["path"] == f"{self.prefix}/pictures" else MAX_JSON_BYTES
        most = MAX_FORM_BYTES if scope["path"] in UPLOAD_PATHS else most
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, _counted(receive, most), watched_send)
        except TooLargeError:
            await _refuse(send, 413, "too_large", f"The body has more than {most} bytes.")
        except Exception:
            logger.exception("a request failed")
            if not started:
                await _refuse(send, 500, "failed", "Something went wrong; the log of the server says what.")


def _counted(receive: Receive, most: int) -> Receive:
    total = 0

    async def counted() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > most:
            raise TooLargeError
        return message

    return counted


def _is_foreign(headers: dict[str, str]) -> bool:
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != headers.get("host")


async def _refuse(send: Send, status: int, code: str, message: str) -> None:
    body = json.dumps(error_body(code, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
