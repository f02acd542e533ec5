"""End a server without cutting its connections: open event streams are informed that it ends, and finish their answers.

Uvicorn waits for open requests and then cancels them, which every layer of an application reports as an error. An
event stream, such as the one that each open page holds, never ends by itself.
"""

from __future__ import annotations

import asyncio
import json
import socket

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

DISCONNECTED = {"type": "http.disconnect"}


class EndingApp:
    """An application that can be asked to end its streams; the outermost layer of a server.

    Args:
        app: what comes behind.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.ending = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; while the server ends, its stream ends too."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = _Request(receive, send, self.ending)
        try:
            await self.app(scope, request.receive, request.send)
        except asyncio.CancelledError:  # by uvicorn, which waits no longer
            if not self.ending.is_set():
                raise
        finally:
            request.close()
        if self.ending.is_set():
            await request.complete()


class _Request:
    """One request and how far its answer is."""

    def __init__(self, receive: Receive, send: Send, ending: asyncio.Event) -> None:
        self._receive, self._send, self._ending = receive, send, ending
        self._is_read = self._is_started = self._is_complete = False
        self._news: asyncio.Future[Message] | None = None

    async def receive(self) -> Message:
        """Return the next message; to a stream, that its client has left, as soon as the server ends."""
        if not self._is_read:
            message = await self._receive()
            self._is_read = not message.get("more_body", False)
            return message
        # Kept between calls: who only looks whether there is news, as Starlette does, cancels the call at once.
        news = self._news = self._news or asyncio.ensure_future(self._receive())
        if not news.done():
            over = asyncio.ensure_future(self._ending.wait())
            try:
                await asyncio.wait((news, over), return_when=asyncio.FIRST_COMPLETED)
                if self._is_started and not news.done():
                    return DISCONNECTED
                await asyncio.shield(news)
            finally:
                over.cancel()
        return news.result()  # that the client has left, which stays so

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        self._is_started = self._is_started or message["type"] == "http.response.start"
        await self._send(message)
        self._is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)

    def close(self) -> None:
        """Stop listening to the client."""
        if self._news is not None:
            self._news.cancel()

    async def complete(self) -> None:
        """Finish the answer, if the application didn't."""
        if self._is_complete:
            return
        body = b""
        if not self._is_started:
            message = "The server ends; try again later."
            error = {"message": message, "type": "server_error", "param": None, "code": "shutting_down"}
            body = json.dumps({"error": error}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await self._send({"type": "http.response.start", "status": 503, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


class EndingServer(uvicorn.Server):
    """A server that tells its application when it ends.

    Args:
        config: of uvicorn; its application is `app`.
        app: informed when the server ends.
    """

    def __init__(self, config: uvicorn.Config, app: EndingApp) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the open streams, then everything else."""
        self._app.ending.set()
        await super().shutdown(sockets)
