"""Compare: one prompt and seed with several settings, side by side with a slider, differences, times and decibels."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from apps.service.comparison import MOST_RUNS
from apps.service.comparison_settings import MAX_TEXT, MOST, Setting, read_settings, read_variation
from apps.studio import fields
from apps.studio.page_values import Values
from apps.studio.strings import Strings
from apps.studio.tabs.base import Tab

STARTS = "default\nstep_cache=taylorseer\nquantization=w8a8\ndtype=bfloat16"
"""What the field of settings holds at first: something that works with models that remove noise."""
RUNS = 2
RESULTS = ("compare_problem", "compare_note", "compare_result", "compare_page", "compare_sheet", "compare_stop")
"""Parts that a comparison changes while it goes on and when it is done."""


def _build(words: Strings) -> dict[str, gr.components.Component]:
    gr.HTML(f'<p class="hint">{escape(words("compare.hint"))}</p>', js_on_load=None)
    parts: dict[str, Any] = {
        "compare_settings": gr.Textbox(
            STARTS,
            lines=4,
            max_lines=MOST,
            max_length=MOST * MAX_TEXT,
            label=words("compare.settings"),
            elem_id="compare-settings",
        ),
        "compare_runs": fields.Slider(1, MOST_RUNS, RUNS, step=1, label=words("compare.runs"), elem_id="compare-runs"),
    }
    with gr.Row(elem_id="compare-go"):
        parts["compare_start"] = gr.Button(
            words("compare.start"), variant="primary", elem_id="compare-start", scale=3, min_width=80
        )
        parts["compare_stop"] = gr.Button(
            words("stop"), elem_id="compare-stop", interactive=False, scale=1, min_width=80
        )
    return parts


def result_panel(words: Strings) -> dict[str, Any]:
    """Lay out the place of the results, which stands where other tabs show one image."""
    parts: dict[str, Any] = {
        "compare_problem": gr.HTML("", elem_id="compare-problem", js_on_load=None),
        "compare_note": gr.HTML(
            f'<p role="status" class="note">{escape(words("compare.empty"))}</p>',
            elem_id="compare-note",
            js_on_load=None,
        ),
        "compare_result": gr.HTML("", elem_id="compare-result", js_on_load=None),
    }
    with gr.Row(elem_id="compare-files"):
        for name in ("compare_page", "compare_sheet"):
            parts[name] = gr.DownloadButton(
                words(f"compare.save.{name.removeprefix('compare_')}"),
                size="sm",
                interactive=False,
                elem_id=name.replace("_", "-"),
                min_width=80,
            )
    return parts


VARY = "vary "
"""Begins a line that makes a grid: an option and its values."""


def settings_of(values: Values) -> list[Setting]:
    """Return the settings on the page: those of all lines, each with every combination of what lines vary.

    Raises:
        RequestError: a line isn't understood, or there are too few settings or too many.
    """
    lines = lines_of(values)
    axes = [read_variation(line.removeprefix(VARY).strip()) for line in lines if line.startswith(VARY)]
    return read_settings([line for line in lines if not line.startswith(VARY)], axes, may_read_files=False)


def lines_of(values: Values) -> list[str]:
    """Return the settings on the page, one a line; empty lines and those that begin with # are none."""
    lines = (line.strip() for line in str(values["compare_settings"] or "").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


TAB = Tab("compare", ("text_to_image", "next_scale_text"), _build, lambda values: {}, lambda settings: {})
