"""The tab Models: what there is and what it needs; use one, mark it, add and remove."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from apps.studio import fields
from apps.studio import models_views as drawn
from apps.studio.answers import Answers
from apps.studio.controls import Parts
from apps.studio.strings import Strings
from apps.studio.wiring import QUIET, Wiring

if TYPE_CHECKING:
    from apps.studio.models_handlers import ModelsHandlers
    from apps.studio.stage import Changes

MOST_SOURCE = 500
LOOK_SECONDS = 1.0
"""Between two looks at a download while the tab is open."""
PLACE = "models_problem"
"""Part of the tab that shows errors."""
SHOWN = ("models_table", "models_chosen", "models_remove", "models_add", "models_cancel",
         "models_note", "models_timer", "models_seen")  # fmt: skip
"""Parts that a change of the list changes."""


def build(words: Strings) -> Parts:
    """Lay the tab out and return its parts by name."""
    gr.HTML(f'<p class="hint">{escape(words("models.hint"))}</p>', js_on_load=None)
    parts: Parts = {}
    with gr.Row(elem_id="models-choice"):
        parts["models_chosen"] = fields.Dropdown(
            [], label=words("model"), filterable=True, elem_id="models-chosen", scale=3, min_width=200
        )
        for name in ("use", "mark", "remove"):
            parts[f"models_{name}"] = gr.Button(
                words(f"models.{name}"),
                variant="primary" if name == "use" else "secondary",
                elem_id=f"models-{name}",
                interactive=name != "remove",
                min_width=90,
            )
    parts["models_problem"] = gr.HTML("", elem_id="models-problem", js_on_load=None)
    parts["models_table"] = gr.HTML("", elem_id="models-table", js_on_load=None)
    with gr.Row(elem_id="models-adding"):
        parts["models_source"] = gr.Textbox(
            "",
            label=words("models.source"),
            placeholder=words("models.source.hint"),
            max_length=MOST_SOURCE,
            elem_id="models-source",
            scale=3,
        )
        parts["models_add"] = gr.Button(words("models.add"), elem_id="models-add", min_width=90)
        parts["models_cancel"] = gr.Button(
            words("models.cancel"), elem_id="models-cancel", interactive=False, min_width=90
        )
        parts["models_refresh"] = gr.Button(words("models.refresh"), elem_id="models-refresh", min_width=90)
    parts["models_note"] = gr.HTML("", elem_id="models-note", js_on_load=None)
    parts["models_timer"] = gr.Timer(LOOK_SECONDS, active=False)
    parts["models_seen"] = gr.State(None)
    return parts


def connect(wiring: Wiring, handlers: ModelsHandlers) -> None:
    """Connect the parts of the tab."""
    parts = wiring.parts
    lists = [name for name in drawn.LISTS if name in parts]

    answers = Answers(wiring, parts, handlers.words, PLACE)

    def known(listener: Callable[..., Changes]) -> Callable[..., Changes]:
        """Return a listener without the lists of tabs that this page has not."""

        def answering(*given: Any) -> Changes:
            return {name: value for name, value in listener(*given).items() if name in parts}

        answering.__name__ = listener.__name__
        return answering

    def on(trigger: Any, listener: Callable[..., Changes], inputs: Sequence[str], **more: Any) -> None:
        answers.on(trigger, known(listener), inputs, [*SHOWN, *lists, "models_source"], **more)

    def offer() -> dict[Any, Any]:
        return wiring.by_component(known(handlers.offer)())

    # When the page opens: its lists were made when the server started.
    gr.on(None, offer, [], wiring.components(lists), **QUIET)
    opened = parts["tab_models"].select(None, js="() => window.tessera.go('models')", **QUIET)
    on(opened.then, handlers.open, ["models_chosen"])
    on(parts["models_chosen"].input, handlers.choose, ["models_chosen"])
    on(parts["models_mark"].click, handlers.mark, ["models_chosen"])
    on(parts["models_remove"].click, handlers.remove, ["models_chosen", "fitted"])
    on(parts["models_refresh"].click, handlers.refresh, ["models_chosen"])
    on(parts["models_add"].click, handlers.add, ["models_source"])
    on(parts["models_source"].submit, handlers.add, ["models_source"])
    on(parts["models_cancel"].click, handlers.cancel, ["models_chosen"], queue=False)
    on(parts["models_timer"].tick, handlers.tick, ["models_chosen", "models_seen"], first={})
    for name, tab in parts.items():
        if isinstance(tab, gr.Tab) and name != "tab_models":
            tab.select(_leave, None, parts["models_timer"], **QUIET)
    wiring.answer(parts["models_use"].click, handlers.use, ["models_chosen", "fitted"])


def _leave() -> Any:
    """Look at a download no more while another tab is open."""
    return gr.update(active=False)
