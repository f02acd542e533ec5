"""What a tab is."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import gradio as gr

from apps.service.metadata import PictureSettings
from apps.service.model_pool import Abilities
from apps.studio.page_values import Values
from apps.studio.strings import Strings


@dataclass(frozen=True, slots=True)
class Tab:
    """One tab.

    Attributes:
        name: of the tab; its strings begin with `tab.`.
        tasks: what it may ask for, by preference; the first one that the model can do is taken.
        build: lays its components out and returns them by name.
        fields: the fields of a request that its other components give.
        show: values of its other components for the settings of an image; the reverse of `fields`.
        has_prompt: whether the prompt is asked for.
        has_source: whether an image to start from is asked for.
        output: what the model has to make, "images" or "frames" (clips); empty for either.
        task_of: chooses among the tasks by what stands on the page; None takes the first one that the model can do.
        places: whose options it asks for beside those that all tabs have, see `apps.service.option.Control`.
    """

    name: str
    tasks: tuple[str, ...]
    build: Callable[[Strings], dict[str, gr.components.Component]]
    fields: Callable[[Values], dict[str, Any]]
    show: Callable[[PictureSettings], dict[str, Any]]
    has_prompt: bool = True
    has_source: bool = False
    output: str = ""
    task_of: Callable[[Values, Collection[str]], str] | None = None
    places: tuple[str, ...] = ()

    def can_be_done(self, abilities: Abilities) -> bool:
        """Return whether a model that is known to be able to do something can do what the tab asks for."""
        return bool(set(self.tasks) & set(abilities.tasks)) and self.output in ("", abilities.output)

    def task(self, values: Values, able: Collection[str]) -> str:
        """Return the task that the page asks for.

        Args:
            values: what stands on the page.
            able: what the chosen model can do; empty if that isn't known yet.
        """
        if self.task_of is not None:
            return self.task_of(values, able)
        return next((task for task in self.tasks if task in able), self.tasks[0])
