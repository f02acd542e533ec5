"""The page: what stands where, and which listener answers what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from apps import limits
from apps.api.tokens import TokenTable
from apps.engine import STATE_FOLDER, Engine
from apps.limits import ServerLimits
from apps.shelf import FALLBACK_SIDE, name_models
from apps.studio import views
from apps.studio.examples import example_prompts
from apps.studio.handlers import EXAMPLES, FIXED, RANDOM, Handlers, shapes
from apps.studio.theme import CSS, SCRIPT, theme
from pipelines import builtin_models

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of every listener: the page is no API, and it draws its own progress."""
BUILTIN_SIDE = 128
"""Side that the controls show until the model is loaded, for built-in models; pixels."""


@dataclass(frozen=True, slots=True)
class Controls:
    """The controls of the page that belong to a request, in the order in which the painting listener takes them."""

    prompt: gr.Textbox
    negative_prompt: gr.Textbox
    model: gr.Dropdown
    shape: gr.Radio
    width: gr.Slider
    height: gr.Slider
    steps: gr.Slider
    guidance: gr.Slider
    seed_mode: gr.Radio
    seed: gr.Number
    count: gr.Slider
    chips: list[gr.Button]
    paint: gr.Button
    stop: gr.Button

    def request(self) -> list[gr.components.Component]:
        """Return the controls that a request is made of."""
        return [
            self.prompt,
            self.negative_prompt,
            self.model,
            self.shape,
            self.width,
            self.height,
            self.steps,
            self.guidance,
            self.seed_mode,
            self.seed,
            self.count,
        ]


@dataclass(frozen=True, slots=True)
class Easel:
    """The part of the page that shows pictures."""

    stage: gr.HTML
    details: gr.HTML
    reuse_seed: gr.Button
    reuse_settings: gr.Button
    download: gr.DownloadButton
    strip: gr.Gallery


def build_engine(
    models: list[str], output_dir: Path, device: str, dtype: str, offload: str = "none", base: str | None = None
) -> Engine:
    """Create the engine of a studio and start to load its default model.

    Raises:
        ValueError: no model at all, or an output folder that would show too much.
    """
    sources = name_models([*models, *builtin_models()])
    if not sources:
        raise ValueError("No built-in model is installed; name one with --model: a pipeline folder or a hub id.")
    folder = limits.output_folder(output_dir)
    engine = Engine(sources, folder, device, dtype, offload, base, server_limits=ServerLimits())
    engine.model()  # so that it is there when the first prompt comes
    return engine


def mount(app: FastAPI, engine: Engine, tokens: TokenTable | None = None) -> None:
    """Put the page onto a server.

    Args:
        app: the server; its own routes go first.
        engine: paints; its output folder is the only one that is served.
        tokens: the users, whose tokens are their passwords; None asks nobody.
    """
    page = build_page(engine)
    page.queue(max_size=2 * engine.limits.queue, default_concurrency_limit=2 * engine.limits.queue)
    folder = engine.output_dir
    gr.mount_gradio_app(
        app,
        page,
        "/",
        auth=None if tokens is None else lambda name, token: tokens.find(token, name) is not None,
        show_error=False,
        enable_monitoring=False,
        run_history=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        footer_links=[],
        max_file_size=limits.MAX_UPLOAD_BYTES,
        allowed_paths=[] if folder is None else [str(folder)],
        blocked_paths=[] if folder is None else [str(folder / STATE_FOLDER)],
        theme=theme(),
        css_paths=CSS,
        js=SCRIPT.read_text(encoding="utf-8"),
    )


def build_page(engine: Engine) -> gr.Blocks:
    """Lay the page out and connect it.

    Args:
        engine: paints.
    """
    with gr.Blocks(title="tessera studio", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(views.HEADER, elem_id="head", js_on_load=None)
        visit, chosen = gr.State([]), gr.State(None)
        with gr.Row(elem_id="desk"):
            with gr.Column(elem_id="ask", elem_classes="card"):
                prompt, paint, stop, chips = _ask()
            with gr.Column(elem_id="easel", elem_classes="card"):
                easel = _easel()
            with gr.Column(elem_id="settings", elem_classes="card"):
                controls = _settings(engine, prompt, paint, stop, chips)
        words = gr.HTML("", elem_id="words", js_on_load=None)
        _connect(page, Handlers(engine), controls, easel, words, visit, chosen)
    return page


def _ask() -> tuple[gr.Textbox, gr.Button, gr.Button, list[gr.Button]]:
    prompts = example_prompts([], EXAMPLES)
    prompt = gr.Textbox(
        label="What shall I paint?",
        placeholder="a penguin left of a rocket on an orange background",
        lines=1,  # one line: then Enter submits, and the field still grows with the text
        max_lines=4,
        max_length=limits.MAX_PROMPT_CHARS,
        autofocus=True,
        elem_id="prompt",
    )
    with gr.Row(elem_id="go"):
        paint = gr.Button("Paint", variant="primary", elem_id="paint", scale=3)
        stop = gr.Button("Stop", elem_id="stop", interactive=False, scale=1, min_width=90)
    with gr.Row(elem_id="examples"):
        chips = [
            gr.Button(prompts[i] if i < len(prompts) else "", size="sm", visible=False, elem_classes="chip")
            for i in range(EXAMPLES)
        ]
    return prompt, paint, stop, chips


def _easel() -> Easel:
    size = (BUILTIN_SIDE, BUILTIN_SIDE)
    stage = gr.HTML(views.stage(size=size, note="Your picture appears here."), elem_id="stage", js_on_load=None)
    details = gr.HTML("", elem_id="details", js_on_load=None)
    with gr.Row(elem_id="use"):
        reuse_seed = gr.Button("Keep this seed", size="sm", interactive=False, elem_id="reuse-seed", min_width=90)
        reuse_settings = gr.Button(
            "Use its settings", size="sm", interactive=False, elem_id="reuse-settings", min_width=90
        )
        download = gr.DownloadButton("Save PNG", size="sm", interactive=False, elem_id="download", min_width=90)
    strip = gr.Gallery(
        visible=False,
        show_label=False,
        columns=6,
        height="auto",
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id="strip",
    )
    return Easel(stage, details, reuse_seed, reuse_settings, download, strip)


def _settings(
    engine: Engine, prompt: gr.Textbox, paint: gr.Button, stop: gr.Button, chips: list[gr.Button]
) -> Controls:
    side = BUILTIN_SIDE if engine.models[0] in builtin_models() else FALLBACK_SIDE
    choices = shapes(side, 16)
    model = gr.Dropdown(list(engine.models), value=engine.models[0], label="Model", filterable=False, elem_id="model")
    shape = gr.Radio(choices, value=choices[0][1], label="Size", elem_id="shape")
    with gr.Row(elem_id="sides"):  # shown by the style sheet when the size is custom
        width = gr.Slider(limits.MIN_SIDE, side * 4, side, step=16, label="Width", elem_id="width")
        height = gr.Slider(limits.MIN_SIDE, side * 4, side, step=16, label="Height", elem_id="height")
    with gr.Row():
        steps = gr.Slider(1, 100, 28, step=1, label="Steps", elem_id="steps")
        guidance = gr.Slider(1, 12, 4, step=0.1, label="Guidance", elem_id="guidance")
    with gr.Row(elem_id="seeds"):
        seed_mode = gr.Radio([RANDOM, FIXED], value=RANDOM, label="Seed", elem_id="seed-mode")
        seed = gr.Number(
            0, precision=0, minimum=0, maximum=limits.MAX_SEED, label="Fixed seed", elem_id="seed", min_width=100
        )
    count = gr.Slider(1, limits.MAX_PICTURES, 1, step=1, label="Pictures", elem_id="count")
    negative = gr.Textbox(
        label="Keep away from",
        placeholder="optional, for example: blue background",
        max_length=limits.MAX_PROMPT_CHARS,
        elem_id="negative",
    )
    return Controls(
        prompt=prompt,
        negative_prompt=negative,
        model=model,
        shape=shape,
        width=width,
        height=height,
        steps=steps,
        guidance=guidance,
        seed_mode=seed_mode,
        seed=seed,
        count=count,
        chips=chips,
        paint=paint,
        stop=stop,
    )


def _connect(
    page: gr.Blocks,
    handlers: Handlers,
    controls: Controls,
    easel: Easel,
    words: gr.HTML,
    visit: gr.State,
    chosen: gr.State,
) -> None:
    """Connect controls and listeners."""
    shown = [
        easel.stage,
        easel.details,
        easel.strip,
        visit,
        chosen,
        easel.download,
        controls.paint,
        controls.stop,
        easel.reuse_seed,
        easel.reuse_settings,
    ]
    start = [controls.paint.click, controls.prompt.submit]
    gr.on(start, handlers.paint, [visit, *controls.request()], shown, **QUIET)
    controls.stop.click(handlers.stop, queue=False, **QUIET)
    for chip in controls.chips:
        filled = chip.click(None, chip, controls.prompt, js="(text) => text", **QUIET)
        filled.then(None, js="() => document.querySelector('#paint').click()", **QUIET)

    easel.strip.select(handlers.choose, visit, shown, **QUIET)
    easel.reuse_seed.click(handlers.reuse_seed, chosen, [controls.seed_mode, controls.seed], **QUIET)
    repeated = [c for c in controls.request() if c is not controls.model]
    easel.reuse_settings.click(handlers.reuse_settings, chosen, repeated, **QUIET)

    fitted = [controls.shape, controls.width, controls.height, controls.steps, controls.guidance, words]
    gr.on([page.load, controls.model.change], handlers.settle, controls.model, [*fitted, *controls.chips], **QUIET)
    # A typed seed is meant to be used.
    controls.seed.input(lambda: FIXED, None, controls.seed_mode, **QUIET)
