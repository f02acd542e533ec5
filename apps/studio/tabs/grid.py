"""X/Y/Z grid: some settings of text to image varied, every cell timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from apps.service.grid import AXES, Axis, read_axis
from apps.studio import fields
from apps.studio.page_values import Values
from apps.studio.strings import Strings
from apps.studio.tabs.base import Tab

STARTS = (("steps", "4, 6, 8"), ("guidance", "1, 2, 4"), ("", ""))
"""What the axes hold at first: something that works."""


def _build(words: Strings) -> dict[str, gr.components.Component]:
    gr.HTML(f'<p class="hint">{words("grid.hint")}</p>', js_on_load=None)
    choices = [(words("grid.none"), ""), *((axis_label(name, words), name) for name in AXES)]
    parts: dict[str, Any] = {}
    for axis, (name, values) in zip("xyz", STARTS, strict=True):
        with gr.Row(elem_classes="axis"):
            parts[f"grid_{axis}"] = fields.Dropdown(
                choices,
                value=name,
                label=words(f"grid.{axis}"),
                filterable=False,
                elem_id=f"grid-{axis}",
                min_width=120,
            )
            parts[f"grid_{axis}_values"] = gr.Textbox(
                values, label=words("grid.values"), max_length=400, elem_id=f"grid-{axis}-values", min_width=140
            )
    return parts


def axis_label(name: str, words: Strings) -> str:
    """Return what an axis is called on the page."""
    return words("axis.prompt" if name == "prompt" else AXES[name].label)


def axes(values: Values) -> Sequence[Axis]:
    """Read the three axes.

    Raises:
        ValueError: one isn't understood.
    """
    return [read_axis(values[f"grid_{axis}"] or "", values[f"grid_{axis}_values"] or "") for axis in "xyz"]


def show_axes(shown: Sequence[Axis]) -> dict[str, str]:
    """Return what the components of the tab hold for three axes; the reverse of `axes`."""
    named = zip("xyz", shown, strict=True)
    return {
        name: value
        for letter, axis in named
        for name, value in ((f"grid_{letter}", axis.name), (f"grid_{letter}_values", ", ".join(axis.values)))
    }


TAB = Tab("grid", ("text_to_image", "next_scale_text"), _build, lambda values: {}, lambda settings: {})
