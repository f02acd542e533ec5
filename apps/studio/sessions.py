"""Who is on the page, and what each of them has in line."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import gradio as gr

from apps.api.tokens import TokenTable
from apps.studio.tabs.base import PageError

MOST = 1_000
"""Pages that are remembered; beyond them idle ones are forgotten."""
LOCAL = "local"
"""Who owns jobs on a server without tokens."""


@dataclass(eq=False, slots=True)
class Session:
    """One open page.

    Attributes:
        line: ids of its jobs that aren't done, the running one first.
        is_followed: a listener shows them as they go.
        stop: ends what has no job, such as a grid.
    """

    line: list[str] = field(default_factory=list)
    is_followed: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Sessions:
    """The open pages, and the users behind them.

    Args:
        tokens: the users; None for a server that asks nobody.
    """

    def __init__(self, tokens: TokenTable | None) -> None:
        self._tokens = tokens
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def of(self, request: gr.Request) -> Session:
        """Return the session of a page."""
        with self._lock:
            if len(self._sessions) > MOST:  # those that wait for nothing have nothing to lose
                busy = {key: one for key, one in self._sessions.items() if one.line or one.is_followed}
                self._sessions = busy
            return self._sessions.setdefault(str(request.session_hash), Session())

    def watcher(self, request: gr.Request) -> str | None:
        """Return whose pictures a page may see: a name, or None for everybody's."""
        if self._tokens is None:
            return None
        user = self._tokens.named(request.username)
        return "" if user is None else None if user.may("admin") else user.name

    def painter(self, request: gr.Request) -> str:
        """Return in whose name a page paints.

        Raises:
            PageError: the user may only look.
        """
        if self._tokens is None:
            return LOCAL
        user = self._tokens.named(request.username)
        if user is None or not user.may("paint"):
            raise PageError("no_rights")
        return user.name
