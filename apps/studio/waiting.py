"""The queue of a user as the page shows it: how many requests wait, which, and in which order."""

from __future__ import annotations

import gradio as gr

from apps.service.engine import Engine
from apps.service.requests import REQUEST, AnyRequest
from apps.studio import views
from apps.studio.grids import Grids
from apps.studio.stage import Changes
from apps.studio.strings import Strings


class Waiting:
    """Describes what waits in an engine, to the user whose it is.

    Args:
        engine: has the queue.
        words: of the page.
        grids: of this engine.
    """

    def __init__(self, engine: Engine, words: Strings, grids: Grids) -> None:
        self._engine = engine
        self._words = words
        self._grids = grids

    def queue(self, owner: str, chosen: str | None = None, running: str = "") -> Changes:
        """Say how many requests wait, and list them; sent only when that changes, because the list may be open.

        Args:
            owner: whose.
            chosen: which of them to select; the first one if it doesn't wait.
            running: see `line`.
        """
        waiting = self._engine.waiting(owner)
        choices = [(f"{number}. {self._title(job)}", job) for number, job in enumerate(waiting, 1)]
        value = chosen if chosen in waiting else waiting[0] if waiting else None
        return {
            "queue_note": self.line(len(waiting), running),
            "clear": gr.update(visible=bool(waiting)),
            "order": gr.update(visible=bool(waiting)),
            "waiting": gr.update(choices=choices, value=value),
        }

    def line(self, waiting: int, running: str = "") -> str:
        """Draw how many requests wait and, where the stage doesn't say it, how the running one goes."""
        notes = (running, self._words("added", count=waiting) if waiting else "")
        return views.note(" \u00b7 ".join(filter(None, notes)))

    def request_of(self, job: str) -> AnyRequest:
        """Return what a job asks for."""
        return REQUEST.validate_json(self._engine.job(job).request)

    def _title(self, job: str) -> str:
        record, request = self._grids.of_job(job), self.request_of(job)
        if record is not None:
            return f"{self._words('tab.grid')}: {record.label(job)}"[:60]
        return (getattr(request, "prompt", "") or f"{self._words('label')} {getattr(request, 'label', '')}")[:60]
