"""Class to image: a class by its name, or by its number where a model has no names."""

from __future__ import annotations

import gradio as gr

from apps.service.metadata import PictureSettings
from apps.studio import fields
from apps.studio.page_values import PageError, Values
from apps.studio.strings import Strings
from apps.studio.tabs.base import Tab


def _build(words: Strings) -> dict[str, gr.components.Component]:
    return {"label": fields.Dropdown([], label=words("label"), allow_custom_value=True, elem_id="label")}


def _fields(values: Values) -> dict[str, object]:
    return {"label": read_label(values["label"])}


def read_label(value: object) -> int | str:
    """Read a class as the page gives it: a number, a name, or `12: a name`.

    Raises:
        PageError: none was chosen.
    """
    text = str(value if value is not None else "").strip()
    number = text.partition(":")[0].strip()
    if not text:
        raise PageError("label.missing")
    return int(number) if number.isdecimal() and len(number) < 8 else text


def show_label(settings: PictureSettings) -> str | None:
    """Return what a choice of classes holds for the settings of an image."""
    return None if settings.label is None else str(settings.label)


def _show(settings: PictureSettings) -> dict[str, object]:
    return {"label": show_label(settings)}


TAB = Tab("classes", ("class_to_image", "next_scale_class"), _build, _fields, _show, has_prompt=False)
