"""What a tab is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from apps.service.metadata import PictureSettings
from apps.studio.strings import Strings

Values = Mapping[str, Any]
"""Everything that stands on the page, by the names of the components."""


class PageError(ValueError):
    """Something is missing on the page.

    Args:
        key: of the string that says so.
    """

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def filled(value: object) -> object:
    """Return what a control holds; an empty one holds a text, which the checks of the request refuse.

    None stands for the default in a request, so it must not come from a number that somebody has deleted.
    """
    return "" if value is None else value


@dataclass(frozen=True, slots=True)
class Tab:
    """One tab.

    Attributes:
        name: of the tab; its strings begin with `tab.`.
        tasks: what it may ask for, by preference; the first one that the model can do is taken.
        build: lays its components out and returns them by name.
        fields: the fields of a request that its components give.
        show: values of its components for the settings of an image; the reverse of `fields`.
        has_prompt: whether the prompt is asked for.
        has_source: whether an image to start from is asked for.
    """

    name: str
    tasks: tuple[str, ...]
    build: Callable[[Strings], dict[str, gr.components.Component]]
    fields: Callable[[Values], dict[str, Any]]
    show: Callable[[PictureSettings], dict[str, Any]]
    has_prompt: bool = True
    has_source: bool = False
