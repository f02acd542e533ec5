"""Inpaint: a brush marks the part of an image that is generated anew, and the image may grow beyond its sides.

The brush stands beside the image to start from, see `apps.studio.panels`; its tools are those of `static/brush.js`.
Next-scale models draw what they generate here as the tab Scales says.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from apps.service.declared import declared_options
from apps.service.metadata import PictureSettings
from apps.service.requests import InpaintRequest
from apps.studio import controls, fields
from apps.studio.page_values import PageError, Values, filled
from apps.studio.strings import Strings
from apps.studio.tabs.base import Tab
from apps.studio.tabs.classes import read_label, show_label

SIDES = ("left", "top", "right", "bottom")


def _build(words: Strings) -> dict[str, gr.components.Component]:
    parts: dict[str, Any] = {
        "inpaint_label": fields.Dropdown(
            [], label=words("label"), allow_custom_value=True, visible=False, elem_id="inpaint-label"
        ),
        "repaint": controls.build("repaint", words, declared_options(InpaintRequest)["strength"]),
        **controls.lay_out("inpaint", words, min_width=190),
    }
    with gr.Column(elem_id="expand"):  # no accordion: Gradio keeps the fields of a closed one from `static/outpaint.js`
        gr.HTML(f'<p class="hint"><b>{words("expand")}.</b> {words("expand.hint")}</p>', js_on_load=None)
        with gr.Row(elem_id="sides-grown"):
            for side in SIDES:
                parts[f"grow_{side}"] = fields.Number(
                    0, label=words(f"expand.{side}"), precision=0, minimum=0, maximum=200, min_width=60,
                    elem_id=f"grow-{side}",
                )  # fmt: skip
    parts["mask"] = gr.Textbox("", elem_id="mask", elem_classes="offstage", max_length=4_000_000, container=False)
    return parts


def _fields(values: Values) -> dict[str, object]:
    expand = _expand(values)
    if not values["source"]:
        raise PageError("source.missing")
    if not values["mask"] and expand is None:
        raise PageError("brush.nothing")
    found = {
        "image": values["source"],
        "mask": values["mask"] or None,
        "expand": expand,
        "strength": filled(values["repaint"]),
    }
    return {**found, "label": read_label(values["inpaint_label"])} if values["inpaint_label"] else found


def _expand(values: Values) -> dict[str, float] | None:
    """Read how far the image grows, given in percent."""
    shares = {side: (values[f"grow_{side}"] or 0) / 100 for side in SIDES}
    return shares if any(shares.values()) else None


def _show(settings: PictureSettings) -> dict[str, object]:
    grown = {} if settings.expand is None else settings.expand.model_dump()
    return {
        **{f"grow_{side}": round(100 * grown.get(side, 0)) for side in SIDES},
        "source": settings.image,
        "mask": settings.mask,
        "repaint": settings.strength,
        "inpaint_label": show_label(settings),
    }


TAB = Tab(
    "inpaint",
    ("inpaint", "next_scale_text", "next_scale_class"),
    _build,
    _fields,
    _show,
    has_source=True,
    places=("inpaint", "scales"),
)
