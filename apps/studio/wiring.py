"""What the page's parts are called, and how listeners that speak of parts by name become listeners of Gradio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Any

import gradio as gr
from fastapi.concurrency import run_in_threadpool

from apps.service.failures import is_storage_failure
from apps.studio import views
from apps.studio.controls import CONTROLS, Parts
from apps.studio.page_values import PageError
from apps.studio.problems import explain, problem
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SAVED
from apps.studio.stage import Changes
from apps.studio.strings import Strings
from apps.studio.tabs.video import SOURCES

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of every listener: the page is no API, and it draws its own progress."""
STAGE_PARTS = (
    "stage", "details", "chosen", "save", "reuse_seed", "reuse_settings", "start_from", "inpaint_it", "animate_it",
    "problem",
)  # fmt: skip
"""What the stage shows, and what acts on it."""
QUEUE = ("queue_note", "clear", "order", "waiting", "problem")
FOLLOWED = (
    *STAGE_PARTS,
    "strip",
    "visit",
    "stop",
    "skip",
    "finish",
    "queue_note",
    "clear",
    "order",
    "waiting",
    "job",
    "seen",
)
"""What following changes: few parts, because it changes them often."""
POLL_SECONDS = 0.1
"""How often a page that follows asks for news; if it fell behind, so would the Stop that it shows."""


class Wiring:
    """Turns listeners that speak of parts by name into listeners of Gradio, which speaks of components."""

    def __init__(self, parts: Parts, words: Strings, sessions: Sessions) -> None:
        self.parts = parts
        self._words = words
        self.sessions = sessions
        # Everything that a listener may read or change; those that a request is made of come first.
        self.request_parts = [
            *dict.fromkeys((*SAVED, *CONTROLS)),
            "source",
            "mask",
            *SOURCES,
            "video_frames",
            "many",
            "fitted",
        ]
        self.changing = [name for name, part in parts.items() if not isinstance(part, gr.Tab)]

    def components(self, names: Sequence[str]) -> list[Any]:
        """Return parts by their names."""
        return [self.parts[name] for name in names]

    def values(self, given: Sequence[Any]) -> dict[str, Any]:
        """Return what stands on the page by name, from what a listener was given for `request_parts`."""
        return dict(zip(self.request_parts, given, strict=True))

    def by_component(self, changes: Changes) -> dict[Any, Any]:
        """Return changes as Gradio takes them."""
        # Gradio wants a word even where nothing changes.
        return {self.parts[name]: value for name, value in changes.items()} or {self.parts["queue_note"]: gr.skip()}

    def answered(self, listener: Callable[..., Changes], *given: Any, clears: bool = True) -> dict[Any, Any]:
        """Return what a listener changes; what it refuses is said in the one place for that, which it else clears."""
        try:
            return self.by_component(({"problem": ""} if clears else {}) | listener(*given))
        except PageError as error:
            return self.by_component({"problem": views.problem(self._words(error.key))})
        except gr.Error as error:
            return self.by_component({"problem": views.problem(str(error.message))})
        except OSError as error:
            if not is_storage_failure(error):
                raise
            return self.by_component(problem(explain(error, self._words)))

    def allowed(self, listener: Callable[..., Changes]) -> Callable[..., Changes]:
        """Return a listener, with the request before what it is given, for users who may change something here."""

        def checked(request: gr.Request, *given: Any) -> Changes:
            self.sessions.submitter(request)
            return listener(*given)

        checked.__name__ = listener.__name__
        return checked

    def on(
        self,
        triggers: Sequence[Any],
        listener: Callable[..., Any],
        inputs: Sequence[str] = (),
        outputs: Sequence[str] | None = None,
        **more: Any,
    ) -> Any:
        """Connect a listener that returns or yields changes by name; to any part unless the outputs are named."""
        changing = self.changing if outputs is None else outputs
        return gr.on(triggers, listener, self.components(inputs), self.components(changing), **QUIET, **more)

    def follow(self, event: Any, listener: Callable[..., Changes], inputs: Sequence[str] = ()) -> None:
        """Connect a listener to the end of another one; it gets the request before its inputs, see `answered`."""

        def answering(request: gr.Request, *given: Any) -> dict[Any, Any]:
            # What was refused meanwhile stays said: this comes later than what the user did.
            return self.answered(listener, request, *given, clears=False)

        answering.__name__ = listener.__name__  # by which Gradio knows it
        event.then(answering, self.components(inputs), self.components(self.changing), **QUIET)

    def answer(
        self,
        trigger: Any,
        listener: Callable[..., Changes],
        inputs: Sequence[str] = (),
        outputs: Sequence[str] | None = None,
        **more: Any,
    ) -> Any:
        """Connect a listener that gets the request before its inputs and returns changes by name, see `answered`."""

        def answering(request: gr.Request, *given: Any) -> dict[Any, Any]:
            return self.answered(listener, request, *given)

        answering.__name__ = listener.__name__  # by which Gradio knows it
        return self.on([trigger], answering, inputs, outputs, **more)


async def paced(by_component: Generator[Changes | None]) -> AsyncGenerator[Changes]:
    """Pass changes on without a thread that waits for them; None makes a short pause.

    Args:
        by_component: changes, as soon as there are any.
    """
    end: Changes = {}
    while (changes := await run_in_threadpool(next, by_component, end)) is not end:
        if changes:
            yield changes
        else:
            await asyncio.sleep(POLL_SECONDS)
