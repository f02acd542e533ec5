"""What stands before Gradio's routes: only those that the page uses, and only for whom they belong to.

Gradio trusts whoever knows the name of an open page (its session hash), takes paths of files from requests, and has
dozens of routes that this page has no use for. Behind this gate a session hash belongs to the user who used it first, a
file that a request names must have been uploaded by the same user, and files are served from the private folder of
uploads and copies only.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.datastructures import QueryParams
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apps.api.guards import Refusal
from apps.api.tokens import User
from apps.studio.handed_in import HandedIn

API = "/gradio_api"
READABLE = re.compile(
    r"/|/config/?|/theme\.css|/robots\.txt|/favicon\.ico|/manifest\.json|/(assets|static|svelte)/[^\0]+"
    rf"|{API}/(info/?|app_id/?|startup-events|theme\.css|queue/data|upload_progress|heartbeat/[^/]+)"
)
"""Paths that may be read, apart from files."""
FILE = f"{API}/file="
JOIN, CANCEL, UPLOAD, RESET = f"{API}/queue/join", f"{API}/cancel", f"{API}/upload", f"{API}/reset"
RUN = f"{API}/run/predict"
"""Where the browser calls the listeners that don't wait in Gradio's queue, such as Generate and Stop."""
SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")
MOST = 10_000
"""Sessions whose users are remembered; beyond them the least recently used are forgotten."""
NO_SUCH_STREAM = json.dumps(
    {"msg": "unexpected_error", "message": "404: Not Found", "session_not_found": True, "success": False}
)
"""What Gradio's page understands as the end of a session."""


class _Owners:
    """Who something belongs to; the oldest entries are forgotten, and then belong to nobody."""

    def __init__(self) -> None:
        self._owners: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def claim(self, key: str, user: str) -> bool:
        """Give something without an owner to a user; whether it is the user's."""
        with self._lock:
            owner = self._owners.setdefault(key, user)
            self._owners.move_to_end(key)
            while len(self._owners) > MOST:
                self._owners.popitem(last=False)
            return owner == user


class Gate:
    """Let through what the page needs; see the module.

    Args:
        app: Gradio's application of one page.
        folder: that Gradio keeps uploads and copies in; private, and of this server only.
        events_of: session hash -> ids of its events that are under way.
        has_news: whether there is anything to be sent to a session hash, now or later.
        handed_in: files that users have uploaded; shared by the pages of a server.
        inputs_of: number of a listener -> how many values it takes; None for a listener that there isn't.
    """

    def __init__(
        self,
        app: ASGIApp,
        folder: Path,
        events_of: Callable[[str], set[str]],
        has_news: Callable[[str], bool],
        handed_in: HandedIn,
        inputs_of: Callable[[int], int | None],
    ) -> None:
        self.app = app
        self._folder = folder.resolve()
        self._events_of = events_of
        self._sessions = _Owners()
        self._has_news = has_news
        self._uploads = handed_in
        self._inputs_of = inputs_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on.

        Raises:
            Refusal: it isn't one of the page's, or not this user's.
        """
        user: User | None = scope.get("state", {}).get("user")
        if scope["type"] != "http" or user is None:
            raise Refusal(404, "not_found", "There is nothing here.")
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if scope["method"] in ("GET", "HEAD"):
            if self._check_reading(path, scope, user):
                await self.app(scope, receive, send)
            else:  # Gradio would begin an answer and fail in the middle of it
                answer = Response(f"data: {NO_SUCH_STREAM}\n\n", media_type="text/event-stream")
                await answer(scope, receive, send)
        elif scope["method"] != "POST" or path not in (JOIN, RUN, CANCEL, UPLOAD, RESET):
            raise Refusal(404, "not_found", "There is nothing here.")
        elif path == UPLOAD:
            if not user.may("generate"):
                raise Refusal(403, "forbidden", f"Uploads need the role 'generate'; yours is {user.role!r}.")
            await self.app(scope, receive, _Listening(send, lambda paths: self._own(paths, user)))
        else:
            body = await _read_json(receive)
            session = body.get("session_hash")
            self._check_session(session if isinstance(session, str) else "", user)
            if path == CANCEL and body.get("event_id") not in list(self._events_of(str(session))):
                raise Refusal(404, "not_found", "There is no such event.")
            self._check_files(
                body.get("data"), lambda name: self._is_file(name) and self._uploads.owns(name, user.name)
            )
            self._check_files(body.get("event_data"), self._is_inside)  # it quotes what the page shows
            if path in (JOIN, RUN):
                self._check_call(body)
            await self.app(scope, _replay(json.dumps(body).encode(), scope), send)

    def _check_reading(self, path: str, scope: Scope, user: User) -> bool:
        """Check what is read; False for the news of a session that has none.

        Raises:
            Refusal: 403 or 404.
        """
        if path.startswith(FILE):
            self._check_file(path.removeprefix(FILE))
        elif not READABLE.fullmatch(path):
            raise Refusal(404, "not_found", "There is nothing here.")
        elif path == f"{API}/queue/data":
            sessions = QueryParams(scope.get("query_string", b"")).getlist("session_hash")
            session = sessions[0] if len(sessions) == 1 else ""  # of several Gradio would take another one
            self._check_session(session, user)
            return self._has_news(session)
        elif path.startswith(f"{API}/heartbeat/"):
            self._check_session(path.rsplit("/", 1)[1], user)
        return True

    def _check_file(self, name: str) -> None:
        """Let a file of the private folder be read, links excluded.

        Raises:
            Refusal: 403.
        """
        if not self._is_file(name):
            raise Refusal(403, "forbidden", "This file is not served.")

    def _is_inside(self, name: str) -> bool:
        """Whether a name is that of a place in the private folder, and leads through no link."""
        try:
            path = Path(name)
            return path.is_relative_to(self._folder) and path.resolve() == path
        except (OSError, ValueError):  # names too long, with null bytes and the like
            return False

    def _is_file(self, name: str) -> bool:
        return self._is_inside(name) and Path(name).is_file()

    def _check_session(self, session: str, user: User) -> None:
        if not SESSION.fullmatch(session) or not self._sessions.claim(session, user.name):
            raise Refusal(404, "not_found", "There is no such session.")

    def _own(self, paths: Any, user: User) -> None:
        for path in paths if isinstance(paths, list) else ():
            self._uploads.add(str(path), user.name)

    def _check_call(self, body: dict[str, Any]) -> None:
        """Refuse calls that Gradio would fail on with a trace that holds their values, prompts among them.

        Raises:
            Refusal: 422.
        """
        number, data = body.get("fn_index"), body.get("data")
        count = self._inputs_of(number) if isinstance(number, int) and not isinstance(number, bool) else None
        if count is None:
            raise Refusal(422, "bad_request", "fn_index names no listener of this page; reload it.")
        if not isinstance(data, list) or len(data) != count:
            raise Refusal(422, "bad_request", f"data must be the list of {count} values that this listener takes.")

    def _check_files(self, data: Any, is_allowed: Callable[[str], bool]) -> None:
        """Look through what a request hands over for files.

        Args:
            data: of JSON.
            is_allowed: whether a file may be named.

        Raises:
            Refusal: 403.
        """
        left = [data]
        while left:
            value = left.pop()
            if isinstance(value, list):
                left.extend(value)
            elif isinstance(value, dict):
                left.extend(value.values())
                if "path" in value or "meta" in value:
                    name = value.get("path")
                    if not isinstance(name, str) or not is_allowed(name):
                        raise Refusal(403, "forbidden", "A request may name only files that its user has uploaded.")


class _Listening:
    """Passes an answer on and hands its JSON to a listener."""

    def __init__(self, send: Send, listener: Callable[[Any], None]) -> None:
        self._send = send
        self._listener = listener
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                try:
                    self._listener(json.loads(self._body))
                except ValueError:  # an error of Gradio's, which names no file
                    self._listener([])
        await self._send(message)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number here.")


async def _read_json(receive: Receive) -> dict[str, Any]:
    """Read a body that is a JSON object.

    Raises:
        Refusal: 422.
    """
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "bad_request", "The request broke off.")
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    try:
        body = json.loads(b"".join(parts), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Refusal(422, "bad_request", "The body is no JSON object.")
    return body


def _replay(body: bytes, scope: Scope) -> Receive:
    """Return a `receive` that gives a body that was read already; the length in the headers is set right."""
    headers = [
        (name, value) for name, value in scope["headers"] if name.lower() not in (b"content-length", b"content-type")
    ]
    scope["headers"] = [*headers, (b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
    is_told = False

    async def receive() -> Message:
        nonlocal is_told
        if is_told:
            return {"type": "http.disconnect"}
        is_told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive
