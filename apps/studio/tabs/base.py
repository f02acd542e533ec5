"""What a tab is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from apps.service.metadata import PictureSettings
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
        places: whose options it asks for beside those that all tabs have, see `apps.service.options.Control`.
    """

    name: str
    tasks: tuple[str, ...]
    build: Callable[[Strings], dict[str, gr.components.Component]]
    fields: Callable[[Values], dict[str, Any]]
    show: Callable[[PictureSettings], dict[str, Any]]
    has_prompt: bool = True
    has_source: bool = False
    places: tuple[str, ...] = ()
