"""Listeners of a tab whose refusals are said in a place of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import gradio as gr

from apps.service.failures import is_storage_failure
from apps.service.request_error import TranslatableError
from apps.studio import views
from apps.studio.controls import Parts
from apps.studio.page_values import PageError
from apps.studio.problems import explain
from apps.studio.stage import Changes
from apps.studio.strings import Strings

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of every listener, see `apps.studio.wiring`."""


class PageWiring(Protocol):
    """What connects listeners that speak of parts by name, see `apps.studio.wiring`."""

    changing: list[str]

    def components(self, names: Sequence[str]) -> list[Any]: ...  # noqa: D102


class Answers:
    """Connects the listeners of a tab.

    Args:
        wiring: of the page.
        parts: of the page.
        words: of the page.
        place: part of the tab that shows what is refused.
    """

    def __init__(self, wiring: PageWiring, parts: Parts, words: Strings, place: str) -> None:
        self._wiring, self._parts, self._words, self._place = wiring, parts, words, place

    def on(
        self,
        trigger: Any,
        listener: Callable[..., Changes],
        inputs: Sequence[str] = (),
        outputs: Sequence[str] | None = None,
        *,
        first: Changes | None = None,
        **more: Any,
    ) -> None:
        """Connect a listener that gets the request before its inputs and returns changes by name.

        Args:
            trigger: of Gradio, an event of a part or what follows another listener.
            listener: what answers.
            inputs: names of parts.
            outputs: names of parts, beside the place of errors; None for any.
            first: what changes whatever the listener says; None takes away what was said before.
            **more: arguments of Gradio's listener that differ.
        """
        before = {self._place: ""} if first is None else first

        def answering(request: gr.Request, *given: Any) -> dict[Any, Any]:
            changes = before | self._answered(listener, request, *given)
            return {self._parts[name]: value for name, value in (changes or {self._place: gr.skip()}).items()}

        answering.__name__ = listener.__name__  # by which Gradio knows it
        named = self._wiring.changing if outputs is None else list(dict.fromkeys((*outputs, self._place)))
        trigger(answering, self._wiring.components(inputs), self._wiring.components(named), **QUIET, **more)

    def _answered(self, listener: Callable[..., Changes], *given: Any) -> Changes:
        """Return what a listener changes, or what it refuses in the place for that."""
        try:
            return listener(*given)
        except PageError as error:
            text = self._words(error.key)
        except TranslatableError as error:
            text = explain(error, self._words)
        except gr.Error as error:
            text = str(error.message)
        except OSError as error:
            if not is_storage_failure(error):
                raise
            text = explain(error, self._words)
        return {self._place: views.problem(text)}
