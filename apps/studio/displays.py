"""What the open pages show, as far as that is somebody's choice; everything else is the engine's to know.

A page is known by Gradio's session hash, which anybody may send: nothing here decides about jobs or files.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import gradio as gr

from apps.studio.album import Finished

MOST = 1_000
"""Pages that are remembered; beyond them those that were used least recently are forgotten."""


@dataclass(frozen=True, slots=True)
class Display:
    """What one page shows.

    Attributes:
        held: an image that was chosen by hand, which stays on the stage until the page asks for another one.
        asked: how often the page asked for images.
        jobs: that it asked for and hasn't followed yet.
    """

    held: Finished | None = None
    asked: int = 0
    jobs: tuple[str, ...] = ()


class Displays:
    """The open pages."""

    def __init__(self) -> None:
        self._displays: OrderedDict[str, Display] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, request: gr.Request) -> Display:
        """Return what a page shows."""
        with self._lock:
            return self._displays.get(str(request.session_hash), Display())

    def hold(self, request: gr.Request, held: Finished | None) -> None:
        """Keep an image on the stage of a page, whatever is generated meanwhile."""
        self._change(request, lambda display: replace(display, held=held))

    def ask(self, request: gr.Request, jobs: Sequence[str]) -> None:
        """Show what is generated again, because the page has asked for something."""
        self._change(request, lambda display: Display(None, display.asked + 1, (*display.jobs, *jobs)))

    def follow(self, request: gr.Request, job: str) -> None:
        """Remember that a page follows a job, which it need not be sent again."""
        self._change(request, lambda display: replace(display, jobs=tuple(one for one in display.jobs if one != job)))

    def _change(self, request: gr.Request, change: Callable[[Display], Display]) -> None:
        key = str(request.session_hash)
        with self._lock:
            self._displays[key] = change(self._displays.get(key, Display()))
            self._displays.move_to_end(key)
            if len(self._displays) > MOST:
                self._displays.popitem(last=False)
