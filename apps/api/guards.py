"""The middleware that every request passes before a route sees it, the page's and Gradio's routes included.

In this order: where it comes from (Origin, Sec-Fetch-Site), who asks (token or browser session), how large its body may
be and how long it may take to arrive. Only then is anything of the body read. On the way out: no CORS headers, a limit
on the time that a reader takes, an end for open streams whose user is gone, and a net for errors.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apps.api.logins import LoginTable
from apps.api.messages import error_body
from apps.api.tokens import TokenTable, User
from apps.service.failures import is_storage_failure

logger = logging.getLogger(__name__)

LOCAL = User(name="local", role="admin", salt="0" * 32, digest="0" * 64)
"""Who asks, on a server without tokens, which listens on this machine only."""
OWN_SITES = ("same-origin", "none")
"""Values of `Sec-Fetch-Site` that are no other page's; `none` is an address typed in."""
API = "/v1"
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    """How large bodies may be, and how long they may take.

    Attributes:
        json_bytes: of a body that is no upload.
        form_bytes: of what the page hands over when somebody presses a button; a mask is part of it.
        public_bytes: of a body on a path that needs no user.
        buffered_bytes: of all bodies that are no uploads, at one time.
        uploads_per_user: that one user may have under way at one time.
        part_seconds: until the next part of a body, or of an answer, has passed.
        body_seconds: until a whole body has arrived.
        public_seconds: until a whole body of somebody who isn't signed in has arrived.
        recheck_seconds: between two looks whether the user of an open stream may still read it.
    """

    json_bytes: int = 256 * 1024
    form_bytes: int = 4 * 1024 * 1024
    public_bytes: int = 8 * 1024
    buffered_bytes: int = 64 * 1024 * 1024
    uploads_per_user: int = 32
    part_seconds: float = 20.0
    body_seconds: float = 180.0
    public_seconds: float = 10.0
    recheck_seconds: float = 1.0


class Refusal(Exception):
    """A request is not taken.

    Args:
        status: of HTTP.
        code: for programs.
        message: for people.
    """

    def __init__(self, status: int, code: str, message: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = tuple(headers)


class Guard:
    """Check every request; see the module.

    Args:
        app: what comes behind.
        tokens: the users; None lets everybody in as `LOCAL`.
        logins: their browser sessions.
        public: paths that need no user.
        uploads: paths that take files, and how many bytes each takes.
        forms: paths that take what the page hands over.
        sizes: limits of bodies.
    """

    def __init__(
        self,
        app: ASGIApp,
        tokens: TokenTable | None = None,
        logins: LoginTable | None = None,
        public: Sequence[str] = (),
        uploads: Mapping[str, int] | None = None,
        forms: Sequence[str] = (),
        sizes: BodyLimits | None = None,
    ) -> None:
        self.app = app
        self._tokens = tokens
        self._logins = logins
        self._public = frozenset(public)
        self._uploads = dict(uploads or {})
        self._forms = frozenset(forms)
        self._sizes = sizes or BodyLimits()
        self._buffered = 0
        self._uploading: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the server has no websockets
            await send({"type": "websocket.close", "code": 1008})
            return
        answer = _Answer(send, self._sizes.part_seconds)
        try:
            headers = Headers(scope=scope)
            check_origin(scope["method"], headers)
            user = self._authenticate(scope["path"], headers)
            scope.setdefault("state", {})["user"] = user
            await self._pass_on(scope, receive, answer, headers, user)
        except Refusal as refusal:
            await answer.refuse(refusal)
        except ClientDisconnect:
            logger.debug("a client left before its body was whole")
        except ReaderTooSlowError:
            logger.info("a reader took too long; its connection is closed")
        except Exception as error:
            if is_storage_failure(error):
                logger.error("a file of a request can't be written: %s", error)
                message = "The server can't write files now: its disk is full or can't be written."
                await answer.refuse(Refusal(503, "storage", message, [(b"retry-after", b"5")]))
                return
            logger.exception("a request failed")
            await answer.refuse(Refusal(500, "failed", "Something went wrong; the log of the server says what."))

    # ----------------------------------------------------------------------------- user

    def user_of(self, headers: Headers) -> User | None:
        """Return who asks: by a token in `Authorization`, or else by the cookie of a browser session."""
        if self._tokens is None:
            return LOCAL
        if "authorization" in headers:
            kind, _, token = headers["authorization"].partition(" ")
            return self._tokens.find(token.strip()) if kind.lower() == "bearer" else None
        return None if self._logins is None else self._logins.user(headers.get("cookie", ""))

    def _authenticate(self, path: str, headers: Headers) -> User | None:
        """Return who asks; None on a public path.

        Raises:
            Refusal: 401, or 303 to the page that asks for the token.
        """
        user = self.user_of(headers)
        if user is not None or path in self._public:
            return user
        if "text/html" in headers.get("accept", "") and not path.startswith(API):
            raise Refusal(303, "unauthorized", "Sign in first.", [(b"location", b"/login")])
        message = "Send a token: Authorization: Bearer TOKEN."
        raise Refusal(401, "unauthorized", message, [(b"www-authenticate", b"Bearer")])

    # ----------------------------------------------------------------------------- body

    async def _pass_on(
        self, scope: Scope, receive: Receive, answer: _Answer, headers: Headers, user: User | None
    ) -> None:
        """Pass a request on with a body that is counted."""
        sizes, path = self._sizes, scope["path"]
        is_upload = path in self._uploads
        most = self._most_bytes(path)
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            raise _too_large(most)
        name = "" if user is None else user.name
        if is_upload and self._uploading[name] >= sizes.uploads_per_user:
            message = f"{sizes.uploads_per_user} of your uploads are under way; wait for one."
            raise Refusal(429, "too_many_uploads", message, [(b"retry-after", b"5")])
        seconds = sizes.public_seconds if user is None else sizes.body_seconds
        body = _Body(receive, most, seconds, sizes.part_seconds, None if is_upload else self._buffer)
        self._uploading[name] += is_upload

        async def send(message: Message) -> None:
            if body.refusal is not None:  # whatever the route makes of a body that broke off, this is what to say
                raise body.refusal
            await answer.send(message)

        def is_welcome() -> bool:
            return user is None or self.user_of(headers) == user

        try:
            if not await _watched(self.app(scope, body.receive, send), is_welcome, sizes.recheck_seconds):
                await answer.end()
        finally:
            self._buffered -= body.buffered
            self._uploading[name] -= is_upload
            if not self._uploading[name]:
                del self._uploading[name]

    def _most_bytes(self, path: str) -> int:
        """Return how large the body of a request may be."""
        if path in self._public:
            return self._sizes.public_bytes
        return self._uploads.get(path, self._sizes.form_bytes if path in self._forms else self._sizes.json_bytes)

    def _buffer(self, count: int) -> None:
        """Take bytes from what all bodies may hold together.

        Raises:
            Refusal: 503, no room.
        """
        if self._buffered + count > self._sizes.buffered_bytes:
            raise Refusal(503, "busy", "The server is reading too many requests; try again.", [(b"retry-after", b"2")])
        self._buffered += count


async def _watched(work: Awaitable[None], is_welcome: Callable[[], bool], seconds: float) -> bool:
    """Wait for an answer to end; cancel it and return False when its user is no longer welcome."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=seconds))[0]:
            if not is_welcome():
                return False
        task.result()
        return True
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


class _Body:
    """The body of a request, counted while it arrives."""

    def __init__(
        self, receive: Receive, most: int, seconds: float, part_seconds: float, buffer: Callable[[int], None] | None
    ) -> None:
        self.buffered = 0
        self.refusal: Refusal | None = None
        self._receive = receive
        self._most = most
        self._part_seconds = part_seconds
        self._buffer = buffer
        self._total = 0
        self._is_whole = False
        self._deadline = asyncio.get_running_loop().time() + seconds

    async def receive(self) -> Message:
        """Return the next message.

        Raises:
            Refusal: 408, too slow; 413, too large; 503, no room for it now.
        """
        if self._is_whole:  # what comes now is the news that the client has gone
            return await self._receive()
        try:
            return await self._next()
        except Refusal as refusal:
            self.refusal = refusal
            raise

    async def _next(self) -> Message:
        left = self._deadline - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(self._receive(), max(min(self._part_seconds, left), 0.0))
        except TimeoutError:
            raise Refusal(408, "too_slow", "The body of the request did not arrive in time.") from None
        count = len(message.get("body", b""))
        self._total += count
        self._is_whole = not message.get("more_body", False)
        if self._total > self._most:
            raise _too_large(self._most)
        if self._buffer is not None:
            self._buffer(count)
            self.buffered += count
        return message


def _too_large(most: int) -> Refusal:
    return Refusal(413, "too_large", f"The body has more than {most} bytes.")


# --------------------------------------------------------------------------------- origin


def check_origin(method: str, headers: Headers) -> None:
    """Refuse what a page of another origin makes a browser send; another port is another origin.

    Programs send neither header. A browser sends `Origin` with everything that may change something and with all
    that JavaScript reads, and `Sec-Fetch-Site` with everything. Following a link from elsewhere to a page is fine.

    Raises:
        Refusal: 403.
    """
    origins, site = headers.getlist("origin"), headers.get("sec-fetch-site", "none")
    is_foreign = any(not _host_of(origin) or _host_of(origin) != headers.get("host") for origin in origins)
    is_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
    is_link = is_link and headers.get("sec-fetch-dest", "document") == "document"
    if is_foreign or (site not in OWN_SITES and not (is_link and not origins)):
        raise Refusal(403, "foreign_origin", "Requests from pages of other sites are not taken.")


def _host_of(origin: str) -> str:
    """Return host and port of an origin; empty for one that no page of ours can have."""
    try:
        parts = urlsplit(origin)
    except ValueError:  # no address at all
        return ""
    return parts.netloc if parts.scheme in ("http", "https") else ""


# --------------------------------------------------------------------------------- answer


class ReaderTooSlowError(Exception):
    """A client does not read what it asked for."""


class _Answer:
    """The answer to a request, on its way out."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send = send
        self._seconds = seconds
        self._has_begun = False
        self._has_length = False

    async def send(self, message: Message) -> None:
        """Pass a message on, its headers set right.

        Raises:
            ReaderTooSlowError: the client did not take the one before in time.
        """
        if message["type"] == "http.response.start":
            self._has_begun = True
            self._has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            kept = [pair for pair in message.get("headers", ()) if not _is_replaced(pair[0])]
            message = {**message, "headers": [*kept, *SECURITY_HEADERS]}
        try:
            await asyncio.wait_for(self._send(message), self._seconds)
        except TimeoutError:
            raise ReaderTooSlowError from None

    async def end(self) -> None:
        """End an answer that has begun and goes on for as long as it likes."""
        if self._has_begun and not self._has_length:
            await self.send({"type": "http.response.body", "body": b""})

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with an error, unless an answer has begun; then the connection just ends."""
        if self._has_begun:
            return
        body = json.dumps(error_body(refusal.code, str(refusal))).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        # What is left of the body is not read, so the connection can't be used again.
        headers += [(b"connection", b"close"), *refusal.headers]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _is_replaced(name: bytes) -> bool:
    name = name.lower()
    return name.startswith(b"access-control-") or any(name == ours for ours, _ in SECURITY_HEADERS)
