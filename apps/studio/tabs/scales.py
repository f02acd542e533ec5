"""Next-scale models: how tokens are sampled, what is kept of earlier scales, whether candidates are searched."""

from __future__ import annotations

from typing import Any

import gradio as gr

from apps.service.metadata import PictureSettings
from apps.studio import controls, fields
from apps.studio.page_values import Values
from apps.studio.strings import Strings
from apps.studio.tabs.base import Tab
from apps.studio.tabs.classes import read_label, show_label


def _build(words: Strings) -> dict[str, Any]:
    gr.HTML(f'<p class="hint">{words("scales.hint")}</p>', js_on_load=None)
    label = fields.Dropdown([], label=words("label"), allow_custom_value=True, elem_id="scale-label")
    return {"scale_label": label, **controls.lay_out("scales", words)}


def _fields(values: Values) -> dict[str, object]:
    return {"label": read_label(values["scale_label"])} if values["scale_label"] else {}  # models of texts have none


def _show(settings: PictureSettings) -> dict[str, object]:
    return {"scale_label": show_label(settings)}


TAB = Tab("scales", ("next_scale_text", "next_scale_class"), _build, _fields, _show, places=("scales",))
