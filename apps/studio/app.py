"""The page: what stands where, and which listener answers what; once in each language."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from gradio.utils import get_upload_folder
from starlette.responses import RedirectResponse
from starlette.routing import Mount

from apps.api import gallery
from apps.api.tokens import TokenTable
from apps.service import limits
from apps.service.engine import Engine
from apps.service.fine_tuning import FineTuning, offer_runs
from apps.service.limits import FineTuningLimits, ServerLimits
from apps.service.lora import LoraFiles, find_loras
from apps.service.model_pool import name_models
from apps.service.own_models import OwnModels, models_folder, own_loras, own_models
from apps.service.stored_images import STATE_FOLDER
from apps.service.tuning import Tunings
from apps.studio import fine_tune, gallery_tab, models, panels, prompt_tools, pwa, server, speed, views
from apps.studio.controls import Parts
from apps.studio.fine_tune_files import add_files
from apps.studio.gate import Gate
from apps.studio.handed_in import HandedIn
from apps.studio.listeners import connect
from apps.studio.sessions import Sessions
from apps.studio.strings import Strings, languages
from apps.studio.tabs import TABS, compare
from apps.studio.theme import FILES, LANGUAGE, SCRIPT, SCRIPTS, STATIC, STYLES, theme
from pipelines import builtin_models, builtin_upscalers

STATES = {
    "visit": [], "chosen": None, "many": [], "source": None,
    "first_image": None, "last_image": None, "video": None, "video_frames": None,
    "job": None, "seen": None, "fitted": None, "replaced": None,
}  # fmt: skip
"""What the page remembers while it is open; `fitted` is the model whose defaults its controls show, and
`replaced` the one that was chosen before a tab chose another."""


def build_engine(
    models: list[str],
    output_dir: Path,
    device: str,
    dtype: str,
    offload: str = "none",
    base: str | None = None,
    lora: Path | None = None,
    upscalers: Sequence[str] | None = None,
    wildcards: Path | None = None,
    own: Path | None = None,
) -> Engine:
    """Create the engine of a server and start to load its default model.

    Raises:
        ValueError: no model at all, a folder without LoRA files, or an output folder that would show too much or is in
            use.
    """
    sources = name_models([*models, *builtin_models()])
    own = models_folder(output_dir) if own is None else own
    sources |= own_models(own, sources)
    if not sources:
        raise ValueError("No built-in model is installed; name one with --model: a pipeline folder or a hub id.")
    folder = limits.output_folder(output_dir)
    loras = LoraFiles(None if lora is None else find_loras(lora))
    loras.offer(own_loras(own))
    offer_runs(folder, loras)
    named = name_models([*builtin_upscalers(), *(upscalers or ())])
    engine = Engine(
        sources,
        folder,
        device,
        dtype,
        offload,
        base,
        loras=loras,
        upscalers=named,
        server_limits=ServerLimits(),
        wildcards=wildcards,
    )
    engine.model()  # so that it is there when the first prompt comes
    return engine


_PREFIXES = ("", *(f"/{name}" for name in languages() if name != "en"))
UPLOADS = {f"{prefix}/gradio_api/upload": limits.MAX_UPLOADS_BYTES + 256 * 1024 for prefix in _PREFIXES}
"""Paths of the pages that take files, and how many bytes each takes: files, and the form around them."""
FORMS = tuple(f"{prefix}/gradio_api/{path}" for prefix in _PREFIXES for path in ("queue/join", "run/predict"))
"""Paths of the pages that take what stands on them."""


def mount(
    app: FastAPI,
    engine: Engine,
    tokens: TokenTable | None = None,
    fine_tuning: FineTuningLimits | None = None,
    own: OwnModels | None = None,
) -> FineTuning | None:
    """Put the page onto a server, in every language: English at `/`, others at their names.

    Args:
        app: the server, from `create_app`; its own routes go first.
        engine: generates.
        tokens: the users; the guard of the server has asked for theirs.
        fine_tuning: limits of it.
        own: the list of the owner's models; None leaves its tab out.

    Returns:
        The fine-tuning of the server, which is to be closed with it; None without an output folder.
    """
    folder, sessions, handed_in = engine.output_dir, Sessions(tokens), HandedIn()
    runs = None if folder is None else FineTuning(folder, engine.uploads, engine.lora_files, fine_tuning)
    app.state.fine_tuning = runs
    app.state.tunings = tunings = Tunings()
    pwa.add_app(app, has_users=sessions.has_users)
    if runs is not None:
        add_files(app, runs, sessions.has_users)
    if folder is not None:
        app.include_router(gallery.router, prefix=gallery_tab.ADDRESS, include_in_schema=False)
        gallery_tab.record_sheets(engine)
    for language in reversed(languages()):  # the page at `/` last, because it answers for every address
        page = build_page(engine, Strings(language), sessions, runs, tunings, own)
        if language != "en":  # Gradio answers with the slash alone, and the page at `/` for all else
            app.add_api_route(f"/{language}", _with_slash(language), include_in_schema=False)
        page.queue(max_size=4 * engine.limits.queue, default_concurrency_limit=4 * engine.limits.queue, api_open=False)
        gr.mount_gradio_app(
            app,
            page,
            "/" if language == "en" else f"/{language}",
            auth_dependency=None if tokens is None else lambda request: request.state.user.name,
            show_error=False,
            enable_monitoring=False,
            run_history=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,  # see `apps.studio.pwa`
            footer_links=[],
            max_file_size=limits.MAX_UPLOAD_BYTES,
            # For the copies that Gradio makes of what the page shows; the gate serves the copies only.
            allowed_paths=[] if folder is None else [str(folder)],
            blocked_paths=[] if folder is None else [str(folder / STATE_FOLDER)],
            theme=theme(),
            css_paths=[*STYLES, STATIC / "pwa.css"],
            js=SCRIPT.read_text(encoding="utf-8"),
            head=_head(),
        )
        page.has_launched = True  # else Gradio does not check that files which requests name were uploaded
        _guard(app, page, handed_in)
    return runs


def _with_slash(language: str) -> Callable[[], RedirectResponse]:
    """Return what leads to the page of a language from its address without the slash at the end."""
    return lambda: RedirectResponse(f"/{language}/")


def _guard(app: FastAPI, page: gr.Blocks, handed_in: HandedIn) -> None:
    """Put the gate before the page that was mounted last.

    Raises:
        TypeError: this Gradio puts pages elsewhere.
    """
    mounted, queue = app.router.routes[-1], page._queue
    if not isinstance(mounted, Mount):
        raise TypeError(f"Gradio has put a {type(mounted).__name__} onto the server, not a Mount; nothing guards it.")
    mounted.app = Gate(
        mounted.app,
        Path(get_upload_folder()),
        lambda session: set(queue.pending_event_ids_session.get(session, ())),
        lambda session: session in queue.pending_messages_per_session,
        handed_in,
        lambda number: len(page.fns[number].inputs) if number in page.fns else None,
    )


def _head() -> str:
    """Return the scripts that run before the page is drawn."""
    language = f'<script data-languages="{" ".join(languages())}">{LANGUAGE.read_text(encoding="utf-8")}</script>'
    most = f'data-most="{limits.MAX_UPLOAD_BYTES}" data-together="{limits.MAX_UPLOADS_BYTES}"'
    files = f"<script {most}>{FILES.read_text(encoding='utf-8')}</script>"
    others = "".join(f"<script>{script.read_text(encoding='utf-8')}</script>" for script in SCRIPTS)
    return f"{language}{pwa.head()}{files}{others}"


def build_page(
    engine: Engine,
    words: Strings,
    sessions: Sessions,
    runs: FineTuning | None = None,
    tunings: Tunings | None = None,
    own: OwnModels | None = None,
) -> gr.Blocks:
    """Lay the page out and connect it.

    Args:
        engine: generates.
        words: of its language.
        sessions: who is on it.
        runs: the fine-tuning of the server; None leaves its tab out.
        tunings: what measures what makes models fast; None leaves its tab out.
        own: the list of the owner's models; None leaves its tab out.
    """
    other = next(name for name in languages() if name != words.language)
    with gr.Blocks(title="tessera studio", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        head = views.header(words, "/" if other == "en" else f"/{other}/", has_users=sessions.has_users)
        gr.HTML(head, elem_id="head", js_on_load=None)
        parts: Parts = {name: gr.State(value) for name, value in STATES.items()}
        parts["saved"] = gr.BrowserState(None, storage_key="tessera-settings", secret="not a secret")
        with gr.Row(elem_id="workspace"):
            with gr.Tabs(selected="text", elem_id="tabs", overflow_behavior="wrap") as tabs:
                for name, tab in TABS.items():
                    with gr.Tab(words(f"tab.{name}"), id=name, elem_id=f"tab-{name}", render_children=True) as one:
                        parts |= tab.build(words)
                    parts[f"tab_{name}"] = one
                with gr.Tab(words("tab.gallery"), id="gallery", elem_id="tab-gallery", render_children=True) as one:
                    parts |= gallery_tab.build(words)
                parts["tab_gallery"] = one
                if own is not None:
                    with gr.Tab(words("tab.models"), id="models", elem_id="tab-models", render_children=True) as one:
                        parts |= models.build(words)
                    parts["tab_models"] = one
                if tunings is not None:
                    with gr.Tab(words("tab.speed"), id="speed", elem_id="tab-speed", render_children=True) as one:
                        parts |= speed.build(engine, words)
                    parts["tab_speed"] = one
                if runs is not None:
                    label = words("tab.fine_tune")
                    with gr.Tab(label, id="fine_tune", elem_id="tab-fine-tune", render_children=True) as one:
                        parts |= fine_tune.build(engine, words)
                    parts["tab_fine_tune"] = one
                parts |= server.build_tab(words, is_shown=not sessions.has_users)
            parts["tabs"] = tabs
            parts["mode"] = gr.Textbox("text", elem_id="mode", elem_classes="offstage", container=False)
            # No gr.State: of one that is changed by a listener beside Gradio's queue the page isn't informed.
            parts["pulse"] = gr.Textbox("", elem_id="pulse", elem_classes="offstage", container=False)
            parts["refused"] = gr.Textbox("", elem_id="refused", elem_classes="offstage", container=False)
            with gr.Column(elem_id="source", elem_classes="card"):
                parts |= panels.source_panel(words)
            with gr.Column(elem_id="prompt-panel", elem_classes="card"):
                parts |= panels.prompt_panel(words)
            with gr.Column(elem_id="output-panel", elem_classes="card"):
                parts |= panels.output_panel(words)
            with gr.Column(elem_id="compare-panel", elem_classes="card"):
                parts |= compare.result_panel(words)
            with gr.Column(elem_id="settings", elem_classes="card"):
                parts |= panels.settings_panel(engine, words)
        parts["words"] = gr.HTML("", elem_id="words", js_on_load=None)
        gr.HTML(prompt_tools.help_list(parts, words), elem_id="help", js_on_load=None)
        connect(page, engine, words, sessions, parts, runs, tunings, own)
    return page
