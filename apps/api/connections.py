"""Connections of the server: how many there may be, and how long one may keep silent.

uvicorn closes connections that are idle between two requests, but waits for ever for the first request, or for the
rest of one whose headers have begun. A few thousand such connections cost nothing to open and take all that the
process may have.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 512
"""Open at one time; beyond them one is closed, see `_closed_first`."""
HEADER_SECONDS = 10.0
"""From the opening of a connection, or the first byte of a request, until its headers are complete."""


class LimitedProtocol(H11Protocol):
    """HTTP/1.1 with a limit on connections and on the time that headers take."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, at the cost of another one if there are too many."""
        super().connection_made(transport)
        self._await_headers()
        # An aborted connection leaves the set a moment later, so it is not counted.
        live = [one for one in self.connections if isinstance(one, LimitedProtocol) and not one.transport.is_closing()]
        if len(live) > MAX_CONNECTIONS:
            _closed_first(live).transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take bytes; the clock runs while a request is incomplete."""
        if self.is_silent and self._header_timer is None:
            self._await_headers()
        super().data_received(data)
        if not self.is_silent:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._stop_timer()
        super().connection_lost(exc)

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: anybody can ask for a websocket, and gets an answer over HTTP."""

    @property
    def is_silent(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def user(self) -> str | None:
        """Whose request is being answered; None while nobody has been recognised."""
        user = None if self.is_silent else self.scope.get("state", {}).get("user")
        return None if user is None else user.name

    @property
    def since(self) -> float:
        """When the connection was opened, or the first byte of its latest request came; seconds of the event loop."""
        return self._since

    def _await_headers(self) -> None:
        self._since = self.loop.time()
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._close_if_silent)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _close_if_silent(self) -> None:
        self._header_timer = None
        if self.is_silent:
            self.transport.abort()


def _closed_first(live: Sequence[LimitedProtocol]) -> LimitedProtocol:
    """Choose the connection to close when there are too many.

    The oldest one of the user who has most, so that nobody can take all of them. Those that answer no user count as
    one user's together: silent ones, and requests of strangers.
    """
    counts = Counter(one.user for one in live)
    busiest = max(counts, key=lambda user: (counts[user], user is None))
    return min((one for one in live if one.user == busiest), key=lambda one: one.since)
