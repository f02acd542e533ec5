"""The listeners of the tab Server; each asks again whether who calls it is an administrator."""

from __future__ import annotations

import re
import time
from html import escape
from typing import Any

import gradio as gr

from apps.api.admin import people
from apps.service.engine import Engine
from apps.service.server_state import queue_rows
from apps.studio import server_views as drawn
from apps.studio import views
from apps.studio.page_values import PageError
from apps.studio.sessions import Sessions
from apps.studio.stage import Changes
from apps.studio.strings import Strings

JOB = re.compile(r"([0-9a-f]{16}) \d{1,16}")
"""What the page tells of a button that was pressed: the job, and when, so that two presses differ."""


class ServerHandlers:
    """The listeners of the tab.

    Args:
        engine: of the server.
        words: of the page.
        sessions: who is on the page.
    """

    def __init__(self, engine: Engine, words: Strings, sessions: Sessions) -> None:
        self._engine, self.words, self._sessions = engine, words, sessions

    def offer(self, request: gr.Request) -> Any:
        """Show the tab to administrators."""
        return gr.update(visible=self._is_admin(request))

    def open(self, request: gr.Request) -> Changes:
        """Show how the server is, and look again every few seconds.

        Raises:
            PageError: the user is no administrator.
        """
        return {**self.tick(request), "server_timer": gr.update(active=True)}

    def tick(self, request: gr.Request) -> Changes:
        """Show how the server is now.

        Raises:
            PageError: the user is no administrator.
        """
        self._check_admin(request)
        engine, words = self._engine, self.words
        local = {"local": words("server.local")} if not self._sessions.has_users else {}
        rows = [
            (local.get(name, name), role, quotas, engine.used(name))
            for name, role, quotas in people(engine, self._sessions.table)
        ]
        return {
            "server_users": drawn.users(rows, words),
            "server_queue": drawn.queue(queue_rows(engine), time.time(), words),
            "server_devices": drawn.devices(engine.device_states(), words),
        }

    def stop_job(self, request: gr.Request, told: str) -> Changes:
        """Stop somebody's job.

        Args:
            request: of the page.
            told: by the button, see `JOB`.

        Raises:
            PageError: the user is no administrator.
        """
        self._check_admin(request)
        found = JOB.fullmatch(told or "")
        try:
            job = self._engine.job(found[1]) if found else None
        except KeyError:
            job = None
        if job is None or job.state not in ("queued", "running"):
            return {**self.tick(request), "server_problem": views.problem(self.words("server.gone"))}
        self._engine.stop(job.id)
        gr.Info(escape(self.words("server.stopped")))
        return self.tick(request)

    def _is_admin(self, request: gr.Request) -> bool:
        """Whether a user may see this: everybody on a server without users, else administrators."""
        return self._sessions.may_generate(request) and self._sessions.viewer(request) is None

    def _check_admin(self, request: gr.Request) -> None:
        if not self._is_admin(request):
            raise PageError("server.rights")
