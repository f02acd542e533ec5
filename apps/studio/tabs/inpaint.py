"""Inpaint: a brush marks the part of a picture that is painted anew; its tools are those of `static/brush.js`."""

from __future__ import annotations

import gradio as gr

from apps.metadata import PictureSettings
from apps.studio import views
from apps.studio.strings import Strings
from apps.studio.tabs.base import PageError, Tab, Values


def _build(words: Strings) -> dict[str, gr.components.Component]:
    gr.HTML(views.brush_tools(words), elem_id="brush-tools", js_on_load=None)
    return {
        "repaint": gr.Slider(0.05, 1, 1.0, step=0.05, label=words("strength"), elem_id="repaint"),
        "mask": gr.Textbox("", elem_id="mask", elem_classes="offstage", max_length=4_000_000, container=False),
    }


def _fields(values: Values) -> dict[str, object]:
    if not values["source"]:
        raise PageError("source.missing")
    if not values["mask"]:
        raise PageError("brush.nothing")
    return {"image": values["source"], "mask": values["mask"], "strength": float(values["repaint"])}


def _show(settings: PictureSettings) -> dict[str, object]:
    return {"source": settings.image, "mask": settings.mask, "repaint": settings.strength}


TAB = Tab("inpaint", ("inpaint",), _build, _fields, _show, has_source=True)
