"""Image to image: an image to start from, and how much of it is changed."""

from __future__ import annotations

import gradio as gr

from apps.service.metadata import PictureSettings
from apps.studio import fields
from apps.studio.strings import Strings
from apps.studio.tabs.base import PageError, Tab, Values


def _build(words: Strings) -> dict[str, gr.components.Component]:
    return {"strength": fields.Slider(0.05, 1, 0.6, step=0.05, label=words("strength"), elem_id="strength")}


def _fields(values: Values) -> dict[str, object]:
    if not values["source"]:
        raise PageError("source.missing")
    return {"image": values["source"], "strength": values["strength"]}


def _show(settings: PictureSettings) -> dict[str, object]:
    return {"source": settings.image, "strength": settings.strength}


TAB = Tab("image", ("image_to_image",), _build, _fields, _show, has_source=True)
