"""Image to image: an image to start from, and how much of it is changed."""

from __future__ import annotations

import gradio as gr

from apps.service.metadata import PictureSettings
from apps.studio import controls
from apps.studio.page_values import PageError, Values
from apps.studio.strings import Strings
from apps.studio.tabs.base import Tab


def _build(words: Strings) -> dict[str, gr.components.Component]:
    return controls.lay_out("image", words)


def _fields(values: Values) -> dict[str, object]:
    if not values["source"]:
        raise PageError("source.missing")
    return {"image": values["source"], "strength": values["strength"]}  # None for models that have none


def _show(settings: PictureSettings) -> dict[str, object]:
    return {"source": settings.image}


TAB = Tab("image", ("image_to_image",), _build, _fields, _show, has_source=True, output="images", places=("image",))
