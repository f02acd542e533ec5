"""The tab Fine-tune: what stands where, and which listener answers what."""

from __future__ import annotations

from typing import Any

import gradio as gr

from apps.service.engine import Engine
from apps.studio import fields, lora_rows, views
from apps.studio import fine_tune_views as drawn
from apps.studio.answers import QUIET, Answers, PageWiring
from apps.studio.controls import Parts
from apps.studio.fine_tune_handlers import AWAY_SECONDS, BUTTONS, PLACE, FineTuneHandlers, trainable
from apps.studio.fine_tune_settings import MOST_TEXT, SETTINGS, TEXTS, build_settings
from apps.studio.stage import Changes
from apps.studio.strings import Strings
from apps.training.tasks.lora_config import starting_rate

FORM = (
    "ft_model", "ft_name", "ft_items", "ft_captions", "ft_layers", *(f"ft_{name}" for name in (*TEXTS, *SETTINGS)),
)  # fmt: skip
"""What a run is made of."""
CARDS = ("ft_items", "ft_captions", "ft_cards", "ft_drop", PLACE)
RUN = ("ft_run", "ft_seen", "ft_confirm", *(f"ft_{name}" for name in BUTTONS))
"""What shows a run."""
RUNS = ("ft_runs", "ft_timer", *RUN)
PICKER = (*lora_rows.NAMES, *lora_rows.ROWS)
"""The choice of LoRAs in the tabs that generate."""
WAITING = "() => [`<p class='hint ft-waiting' role='status'>%s</p>`, '']"
MOST_NAME = 40


def build(engine: Engine, words: Strings) -> Parts:
    """Lay the tab out and return its parts by name."""
    parts: Parts = {"ft_items": gr.State([]), "ft_seen": gr.State(None), "ft_open": gr.State(False)}
    with gr.Row(elem_id="ft"):
        with gr.Column(elem_id="ft-form", min_width=300):
            parts |= _form(engine, words)
        with gr.Column(elem_id="ft-runs-panel", min_width=300):
            parts |= _runs(words)
    parts["ft_timer"] = gr.Timer(AWAY_SECONDS, active=False)
    return parts


def _form(engine: Engine, words: Strings) -> Parts:
    gr.HTML(f'<p class="hint">{words("ft.hint")}</p>', js_on_load=None)
    models = trainable(engine)
    parts: Parts = {}
    with gr.Row():
        parts["ft_model"] = fields.Dropdown(
            models, value=next(iter(models), None), label=words("model"), filterable=False, elem_id="ft-model"
        )
        parts["ft_name"] = gr.Textbox(
            label=words("ft.name"), placeholder=words("ft.name.hint"), max_length=MOST_NAME, elem_id="ft-name"
        )
    with gr.Row(elem_id="ft-files"):
        parts["ft_files"] = gr.UploadButton(
            words("ft.choose"), file_count="multiple", size="sm", elem_id="ft-choose", min_width=80
        )
        parts["ft_drop"] = gr.Button(words("ft.drop"), size="sm", visible=False, elem_id="ft-drop", min_width=80)
    parts["ft_cards"] = gr.HTML(drawn.cards([], words), elem_id="ft-cards", js_on_load=None)
    parts["ft_captions"] = gr.Textbox("", elem_id="ft-captions", elem_classes="offstage", container=False)
    with gr.Row():
        for name in TEXTS:
            parts[f"ft_{name}"] = gr.Textbox(
                label=words(f"ft.{name}"),
                placeholder=words(f"ft.{name}.hint"),
                max_length=MOST_TEXT,
                elem_id=f"ft-{name}",
                min_width=140,
            )
    with gr.Accordion(words("advanced"), open=False, elem_id="ft-advanced"):
        parts |= build_settings(words, starting_rate(engine.source(models[0]) if models else ""))
    with gr.Row(elem_id="ft-go"):
        parts["ft_start"] = gr.Button(words("ft.start"), variant="primary", elem_id="ft-start", scale=2, min_width=80)
        parts["ft_check"] = gr.Button(words("ft.check"), elem_id="ft-check", scale=1, min_width=80)
    parts[PLACE] = gr.HTML("", elem_id="ft-problem", js_on_load=None)
    parts["ft_report"] = gr.HTML("", elem_id="ft-report", js_on_load=None)
    return parts


def _runs(words: Strings) -> Parts:
    parts: Parts = {"ft_run": gr.HTML(views.hint(words("ft.no_runs")), elem_id="ft-run", js_on_load=None)}
    with gr.Row(elem_id="ft-use"):
        for name in BUTTONS:
            parts[f"ft_{name}"] = gr.Button(
                words(f"ft.{name}"), size="sm", visible=False, elem_id=f"ft-{name}", min_width=80
            )
    with gr.Row(elem_id="ft-confirm", visible=False) as parts["ft_confirm"]:
        gr.HTML(f'<p class="hint">{words("ft.confirm")}</p>', js_on_load=None)
        parts["ft_sure"] = gr.Button(words("ft.sure"), size="sm", variant="stop", elem_id="ft-sure", min_width=80)
        parts["ft_keep"] = gr.Button(words("ft.keep"), size="sm", elem_id="ft-keep", min_width=80)
    parts["ft_runs"] = fields.Radio([], label=words("ft.runs"), visible=False, elem_id="ft-runs")
    return parts


# ------------------------------------------------------------------------------ listeners


def connect(page: gr.Blocks, wiring: PageWiring, parts: Parts, words: Strings, handlers: FineTuneHandlers) -> None:
    """Connect the parts of the tab."""
    answers = Answers(wiring, parts, words, PLACE)
    _connect_form(answers, parts, words, handlers)
    _connect_runs(answers, parts, handlers)
    opened = parts["tab_fine_tune"].select(None, js="() => window.tessera.go('fine_tune')", **QUIET)
    answers.on(opened.then, handlers.open, ["ft_runs"], ["ft_open", *RUNS, *PICKER])
    for name, tab in parts.items():
        if isinstance(tab, gr.Tab) and name != "tab_fine_tune":
            answers.on(tab.select, handlers.leave, (), ["ft_open", "ft_timer"], first={})
    answers.on(page.load, handlers.load, (), ["ft_timer"], first={})
    inputs = ["ft_runs", "ft_seen", "ft_open"]
    answers.on(parts["ft_timer"].tick, handlers.tick, inputs, [*RUNS, *PICKER], first={})


def _connect_form(answers: Answers, parts: Parts, words: Strings, handlers: FineTuneHandlers) -> None:
    def check(request: gr.Request, *given: Any) -> Changes:
        return handlers.check(request, dict(zip(FORM, given, strict=True)))

    def start(request: gr.Request, *given: Any) -> Changes:
        return handlers.start(request, dict(zip(FORM, given, strict=True)))

    answers.on(parts["ft_model"].input, handlers.choose_model, ["ft_model"], ["ft_learning_rate"])
    answers.on(parts["ft_files"].upload, handlers.take_files, ["ft_files", "ft_items", "ft_captions"], CARDS)
    answers.on(parts["ft_drop"].click, handlers.drop_files, (), CARDS)
    waiting = parts["ft_check"].click(
        None, None, [parts["ft_report"], parts[PLACE]], js=WAITING % words("ft.checking"), **QUIET
    )
    answers.on(waiting.then, check, FORM, ["ft_report", *RUNS], first={PLACE: "", "ft_report": ""})
    answers.on(parts["ft_start"].click, start, FORM, ["ft_report", "ft_name", *RUNS])


def _connect_runs(answers: Answers, parts: Parts, handlers: FineTuneHandlers) -> None:
    def confirm(request: gr.Request) -> Changes:
        del request
        return {"ft_confirm": gr.update(visible=True)}

    def keep(request: gr.Request) -> Changes:
        del request
        return {"ft_confirm": gr.update(visible=False)}

    answers.on(parts["ft_runs"].input, handlers.show, ["ft_runs"], RUN)
    answers.on(parts["ft_stop"].click, handlers.stop, ["ft_runs"], RUNS)
    answers.on(parts["ft_resume"].click, handlers.resume, ["ft_runs"], RUNS)
    answers.on(parts["ft_delete"].click, confirm, (), ["ft_confirm"])
    answers.on(parts["ft_keep"].click, keep, (), ["ft_confirm"])
    answers.on(parts["ft_sure"].click, handlers.delete, ["ft_runs"], [*RUNS, *PICKER])
    answers.on(parts["ft_try"].click, handlers.try_it, ["ft_runs", "fitted"])
