"""The tab Speed: tune a model for this machine, and use what was found."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from apps.service.engine import Engine
from apps.service.tuning import MOST_MINUTES
from apps.studio import fields
from apps.studio.answers import Answers
from apps.studio.controls import Parts
from apps.studio.speed_views import PROFILES
from apps.studio.strings import Strings
from apps.studio.wiring import QUIET, Wiring

if TYPE_CHECKING:
    from apps.studio.speed_handlers import SpeedHandlers
    from apps.studio.stage import Changes

MINUTES = 5.0
"""That the tab offers at first."""
LOOK_SECONDS = 1.0
"""Between two looks at a tuning while the tab is open."""
PLACE = "speed_problem"
"""Part of the tab that shows errors."""
SHOWN = ("speed_note", PLACE, "speed_result", "speed_start", "speed_stop", "speed_timer", "speed_seen",
         *(f"speed_use_{name}" for name in PROFILES))  # fmt: skip
"""Parts that a tuning changes."""


def build(engine: Engine, words: Strings) -> Parts:
    """Lay the tab out and return its parts by name."""
    parts: Parts = {"speed_seen": gr.State(None)}
    gr.HTML(f'<p class="hint">{escape(words("speed.hint"))}</p>', js_on_load=None)
    with gr.Row(elem_id="speed-form"):
        parts["speed_model"] = fields.Dropdown(
            list(engine.models), value=engine.models[0], label=words("model"), filterable=False, elem_id="speed-model"
        )
        parts["speed_minutes"] = fields.Slider(
            min(0.5, MINUTES), MOST_MINUTES, MINUTES, step=0.5, label=words("speed.minutes"), elem_id="speed-minutes"
        )
    with gr.Row(elem_id="speed-go"):
        parts["speed_start"] = gr.Button(words("speed.start"), variant="primary", elem_id="speed-start", scale=3)
        parts["speed_stop"] = gr.Button(words("stop"), elem_id="speed-stop", interactive=False, scale=1, min_width=80)
    parts["speed_problem"] = gr.HTML("", elem_id="speed-problem", js_on_load=None)
    parts["speed_note"] = gr.HTML("", elem_id="speed-note", js_on_load=None)
    with gr.Row(elem_id="speed-use"):
        for name in PROFILES:
            parts[f"speed_use_{name}"] = gr.Button(
                words(f"profile.{name}"), visible=False, size="sm", elem_id=f"speed-use-{name}", min_width=120
            )
    parts["speed_result"] = gr.HTML("", elem_id="speed-result", js_on_load=None)
    parts["speed_timer"] = gr.Timer(LOOK_SECONDS, active=False)
    return parts


def connect(wiring: Wiring, handlers: SpeedHandlers) -> None:
    """Connect the parts of the tab."""
    parts = wiring.parts

    answers = Answers(wiring, parts, handlers.words, PLACE)
    model = ["speed_model"]
    opened = parts["tab_speed"].select(None, js="() => window.tessera.go('speed')", **QUIET)
    answers.on(opened.then, handlers.open, model, SHOWN)
    answers.on(parts["speed_model"].input, handlers.open, model, SHOWN)
    answers.on(parts["speed_start"].click, handlers.start, ["speed_model", "speed_minutes"], SHOWN, queue=False)
    answers.on(parts["speed_stop"].click, handlers.stop, model, SHOWN, queue=False)
    answers.on(parts["speed_timer"].tick, handlers.tick, ["speed_model", "speed_seen"], SHOWN, first={})
    for name, tab in parts.items():
        if isinstance(tab, gr.Tab) and name != "tab_speed":
            tab.select(_leave, None, parts["speed_timer"], **QUIET)
    for name in PROFILES:
        wiring.answer(parts[f"speed_use_{name}"].click, _using(handlers, name), ["speed_model", "fitted"])


def _leave() -> Any:
    """Look at a tuning no more while another tab is open."""
    return gr.update(active=False)


def _using(handlers: SpeedHandlers, name: str) -> Any:
    def use(request: gr.Request, model: str, fitted: str) -> Changes:
        return handlers.use(request, name, model, fitted)

    use.__name__ = f"use_{name}"  # by which Gradio knows it
    return use
