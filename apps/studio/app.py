"""The page: what stands where, and which listener answers what; once in each language."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from gradio.utils import get_upload_folder
from starlette.routing import Mount

from apps.api.tokens import TokenTable
from apps.service import limits
from apps.service.engine import Engine
from apps.service.failures import is_storage_failure
from apps.service.fine_tuning import FineTuning, offer_runs
from apps.service.limits import FineTuningLimits, ServerLimits
from apps.service.lora import LoraFiles, find_loras
from apps.service.model_pool import name_models
from apps.service.stored_images import STATE_FOLDER
from apps.studio import fine_tune, lora_rows, panels, views
from apps.studio.compare_handlers import CompareHandlers
from apps.studio.controls import CONTROLS, Parts
from apps.studio.examples import EXAMPLES
from apps.studio.fine_tune_files import add_files
from apps.studio.fine_tune_handlers import FineTuneHandlers
from apps.studio.following import restated
from apps.studio.forms import FIXED
from apps.studio.gate import Gate
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.handed_in import HandedIn
from apps.studio.page_values import PageError
from apps.studio.problems import PLACE, explain, problem
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SAVED, SettingsHandlers
from apps.studio.stage import Changes
from apps.studio.strings import Strings, languages
from apps.studio.tabs import TABS, compare
from apps.studio.tabs.video import ENDS, SOURCES
from apps.studio.theme import BRUSH, CAPTIONS, COMPARE, COMPARE_CSS, CSS, FILES, LANGUAGE, SCRIPT, theme
from pipelines import builtin_models, builtin_upscalers

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of every listener: the page is no API, and it draws its own progress."""
GO = "(...all) => { window.tessera.go('%s'); return ['%s', '']; }"
"""Open a tab; what was said about a request of another one goes away."""
STATES = {
    "visit": [], "chosen": None, "many": [], "gallery_items": [], "source": None, "page": 0,
    "first_image": None, "last_image": None, "video": None, "video_frames": None,
    "job": None, "seen": None, "fitted": None,
}  # fmt: skip
"""What the page remembers while it is open; `fitted` is the model whose defaults its controls show."""
STAGE_PARTS = (
    "stage", "details", "chosen", "save", "reuse_seed", "reuse_settings", "start_from", "inpaint_it", "animate_it",
    "problem",
)  # fmt: skip
"""What the stage shows, and what acts on it."""
QUEUE = ("queue_note", "clear", "order", "waiting", "problem")
FOLLOWED = (
    *STAGE_PARTS,
    "strip",
    "visit",
    "stop",
    "skip",
    "finish",
    "queue_note",
    "clear",
    "order",
    "waiting",
    "job",
    "seen",
)
"""What following changes: few parts, because it changes them often."""
LOOK_SECONDS = 1.0
"""How often an idle page asks whether there is anything to follow."""
POLL_SECONDS = 0.1
"""How often a page that follows asks for news; if it fell behind, so would the Stop that it shows."""
REMEMBER = "(...all) => [Object.fromEntries(%s.map((name, i) => [name, all[i]])), '']"
"""A field that is changed also takes away what was said about the last request."""


def build_engine(
    models: list[str],
    output_dir: Path,
    device: str,
    dtype: str,
    offload: str = "none",
    base: str | None = None,
    lora: Path | None = None,
    upscalers: Sequence[str] | None = None,
) -> Engine:
    """Create the engine of a server and start to load its default model.

    Raises:
        ValueError: no model at all, a folder without LoRA files, or an output folder that would show too much or is in
            use.
    """
    sources = name_models([*models, *builtin_models()])
    if not sources:
        raise ValueError("No built-in model is installed; name one with --model: a pipeline folder or a hub id.")
    folder = limits.output_folder(output_dir)
    loras = LoraFiles(None if lora is None else find_loras(lora))
    offer_runs(folder, loras)
    named = name_models([*builtin_upscalers(), *(upscalers or ())])
    engine = Engine(
        sources, folder, device, dtype, offload, base, loras=loras, upscalers=named, server_limits=ServerLimits()
    )
    engine.model()  # so that it is there when the first prompt comes
    return engine


_PREFIXES = ("", *(f"/{name}" for name in languages() if name != "en"))
UPLOADS = {f"{prefix}/gradio_api/upload": limits.MAX_UPLOADS_BYTES + 256 * 1024 for prefix in _PREFIXES}
"""Paths of the pages that take files, and how many bytes each takes: files, and the form around them."""
FORMS = tuple(f"{prefix}/gradio_api/{path}" for prefix in _PREFIXES for path in ("queue/join", "run/predict"))
"""Paths of the pages that take what stands on them."""


def mount(
    app: FastAPI, engine: Engine, tokens: TokenTable | None = None, fine_tuning: FineTuningLimits | None = None
) -> FineTuning | None:
    """Put the page onto a server, in every language: English at `/`, others at their names.

    Args:
        app: the server, from `create_app`; its own routes go first.
        engine: generates.
        tokens: the users; the guard of the server has asked for theirs.
        fine_tuning: limits of it.

    Returns:
        The fine-tuning of the server, which is to be closed with it; None without an output folder.
    """
    folder, sessions, handed_in = engine.output_dir, Sessions(tokens), HandedIn()
    runs = None if folder is None else FineTuning(folder, engine.uploads, engine.lora_files, fine_tuning)
    app.state.fine_tuning = runs
    if runs is not None:
        add_files(app, runs, sessions.has_users)
    for language in reversed(languages()):  # the page at `/` last, because it answers for every address
        page = build_page(engine, Strings(language), sessions, runs)
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
            pwa=False,
            footer_links=[],
            max_file_size=limits.MAX_UPLOAD_BYTES,
            # For the copies that Gradio makes of what the page shows; the gate serves the copies only.
            allowed_paths=[] if folder is None else [str(folder)],
            blocked_paths=[] if folder is None else [str(folder / STATE_FOLDER)],
            theme=theme(),
            css_paths=[COMPARE_CSS, CSS],
            js=SCRIPT.read_text(encoding="utf-8"),
            head=_head(),
        )
        page.has_launched = True  # else Gradio does not check that files which requests name were uploaded
        _guard(app, page, handed_in)
    return runs


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
    others = "".join(f"<script>{script.read_text(encoding='utf-8')}</script>" for script in (BRUSH, CAPTIONS, COMPARE))
    return f"{language}{files}{others}"


def build_page(engine: Engine, words: Strings, sessions: Sessions, runs: FineTuning | None = None) -> gr.Blocks:
    """Lay the page out and connect it.

    Args:
        engine: generates.
        words: of its language.
        sessions: who is on it.
        runs: the fine-tuning of the server; None leaves its tab out.
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
                    parts |= panels.gallery_panel(words)
                parts["tab_gallery"] = one
                if runs is not None:
                    label = words("tab.fine_tune")
                    with gr.Tab(label, id="fine_tune", elem_id="tab-fine-tune", render_children=True) as one:
                        parts |= fine_tune.build(engine, words)
                    parts["tab_fine_tune"] = one
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
        _connect(page, engine, words, sessions, parts, runs)
    return page


# ------------------------------------------------------------------------------ listeners


class _Wiring:
    """Turns listeners that speak of parts by name into listeners of Gradio, which speaks of components."""

    def __init__(self, parts: Parts, words: Strings, sessions: Sessions) -> None:
        self.parts = parts
        self._words = words
        self.sessions = sessions
        # Everything that a listener may read or change; those that a request is made of come first.
        self.request_parts = [
            *dict.fromkeys((*SAVED, *CONTROLS)),
            "source",
            "mask",
            *SOURCES,
            "video_frames",
            "many",
            "fitted",
        ]
        self.changing = [name for name, part in parts.items() if not isinstance(part, gr.Tab)]

    def components(self, names: Sequence[str]) -> list[Any]:
        return [self.parts[name] for name in names]

    def values(self, given: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.request_parts, given, strict=True))

    def by_component(self, changes: Changes) -> dict[Any, Any]:
        # Gradio wants a word even where nothing changes.
        return {self.parts[name]: value for name, value in changes.items()} or {self.parts["queue_note"]: gr.skip()}

    def answered(self, listener: Callable[..., Changes], *given: Any) -> dict[Any, Any]:
        """Return what a listener changes; what it refuses is said in the one place for that, which it else clears."""
        try:
            return self.by_component({"problem": ""} | listener(*given))
        except PageError as error:
            return self.by_component({"problem": views.problem(self._words(error.key))})
        except gr.Error as error:
            return self.by_component({"problem": views.problem(str(error.message))})
        except OSError as error:
            if not is_storage_failure(error):
                raise
            return self.by_component(problem(explain(error, self._words)))

    def allowed(self, listener: Callable[..., Changes]) -> Callable[..., Changes]:
        """Return a listener, with the request before what it is given, for users who may change something here."""

        def checked(request: gr.Request, *given: Any) -> Changes:
            self.sessions.submitter(request)
            return listener(*given)

        checked.__name__ = listener.__name__
        return checked

    def on(
        self,
        triggers: Sequence[Any],
        listener: Callable[..., Any],
        inputs: Sequence[str] = (),
        outputs: Sequence[str] | None = None,
        **more: Any,
    ) -> Any:
        """Connect a listener that returns or yields changes by name; to any part unless the outputs are named."""
        changing = self.changing if outputs is None else outputs
        return gr.on(triggers, listener, self.components(inputs), self.components(changing), **QUIET, **more)

    def answer(
        self,
        trigger: Any,
        listener: Callable[..., Changes],
        inputs: Sequence[str] = (),
        outputs: Sequence[str] | None = None,
        **more: Any,
    ) -> Any:
        """Connect a listener that gets the request before its inputs and returns changes by name, see `answered`."""

        def answering(request: gr.Request, *given: Any) -> dict[Any, Any]:
            return self.answered(listener, request, *given)

        answering.__name__ = listener.__name__  # by which Gradio knows it
        return self.on([trigger], answering, inputs, outputs, **more)


def _connect(
    page: gr.Blocks, engine: Engine, words: Strings, sessions: Sessions, parts: Parts, runs: FineTuning | None
) -> None:
    """Connect controls and listeners."""
    wiring = _Wiring(parts, words, sessions)
    generation = GenerationHandlers(engine, words, sessions)
    handlers = SettingsHandlers(engine, words, sessions, generation)
    _connect_generation(wiring, generation)
    _connect_following(page, wiring, generation)
    _connect_pictures(wiring, handlers, generation)
    _connect_tabs(wiring, handlers)
    _connect_comparison(wiring, CompareHandlers(engine, words, sessions))
    if runs is not None:
        fine_tune.connect(page, wiring, parts, words, FineTuneHandlers(engine, runs, words, sessions, handlers))

    def opened(request: gr.Request, saved: object, *given: Any) -> Changes:
        return handlers.open(saved, wiring.values(given), sessions.may_generate(request), sessions.user(request))

    def settled(request: gr.Request, key: str, mode: str) -> Changes:
        return handlers.load_model_controls(key, mode, sessions.may_generate(request))

    def switched(request: gr.Request, mode: str) -> Changes:
        return handlers.switch(mode, sessions.may_generate(request))

    def unfolded(*chosen: str) -> dict[Any, Any]:
        return wiring.by_component(lora_rows.unfold(*chosen))

    wiring.answer(page.load, opened, ["saved", *wiring.request_parts])
    wiring.answer(parts["model"].input, settled, ["model", "mode"])
    wiring.answer(parts["switch"].click, switched, ["mode"])
    parts["preset"].input(
        lambda name, key: wiring.by_component(handlers.choose_preset(name, key)),
        wiring.components(["preset", "model"]),
        wiring.components(wiring.changing),
        **QUIET,
    )
    # A typed seed is meant to be used.
    parts["seed"].input(lambda: FIXED, None, parts["seed_mode"], **QUIET)
    chosen = wiring.components(lora_rows.NAMES)
    gr.on([part.change for part in chosen], unfolded, chosen, wiring.components(lora_rows.ROWS[1:]), **QUIET)
    changed = [parts[name].change for name in SAVED if name != "mode"]
    names = str(list(SAVED))
    gr.on(changed, None, wiring.components(SAVED), [parts["saved"], parts["problem"]], js=REMEMBER % names, **QUIET)
    parts["mask"].change(None, None, parts["problem"], js="() => ''", **QUIET)  # the browser doesn't keep it


def _connect_generation(wiring: _Wiring, generation: GenerationHandlers) -> None:
    parts = wiring.parts

    def generate(request: gr.Request, *given: Any) -> dict[Any, Any]:
        return wiring.by_component(generation.generate(wiring.values(given), request))

    start = [parts["generate"].click, parts["prompt"].submit]
    # "multiple": a click while one is being generated queues another.
    asked = [*STAGE_PARTS, *QUEUE[:-1], "stop", "skip", "finish", "pulse"]
    wiring.on(start, generate, wiring.request_parts, asked, trigger_mode="multiple", queue=False)
    for name, change in (("stop", generation.stop), ("finish", generation.finish), ("skip", generation.skip)):
        wiring.answer(parts[name].click, change, ["job"], ["queue_note", "problem"], queue=False)
    wiring.answer(parts["clear"].click, generation.clear, (), QUEUE, queue=False)
    wiring.answer(parts["drop"].click, generation.drop, ["waiting"], QUEUE, queue=False)

    def sooner(request: gr.Request, job: str | None) -> Changes:
        return generation.move(request, job, -1)

    def later(request: gr.Request, job: str | None) -> Changes:
        return generation.move(request, job, 1)

    wiring.answer(parts["sooner"].click, sooner, ["waiting"], QUEUE, queue=False)
    wiring.answer(parts["later"].click, later, ["waiting"], QUEUE, queue=False)
    for i in range(EXAMPLES):
        filled = parts[f"chip_{i}"].click(None, parts[f"chip_{i}"], parts["prompt"], js="(text) => text", **QUIET)
        filled.then(None, js="() => document.querySelector('#generate').click()", **QUIET)


def _connect_following(page: gr.Blocks, wiring: _Wiring, generation: GenerationHandlers) -> None:
    """Have the page follow what goes on: when it opens, after it asked for something, and when it is found idle."""
    parts, following = wiring.parts, generation.following

    async def follow(request: gr.Request, seen: Any, chosen: Any) -> AsyncGenerator[dict[Any, Any]]:
        async for changes in paced(restated(following.follow(request, seen, chosen))):
            yield wiring.by_component(changes)

    def look(request: gr.Request, seen: Any) -> dict[Any, Any]:
        return {parts["pulse"]: following.look(request, seen) or gr.skip()}

    # "once": while the page follows, nothing that happens makes it follow a second time.
    wiring.on([page.load, parts["pulse"].change], follow, ["seen", "chosen"], FOLLOWED, concurrency_limit=None)
    timer = gr.Timer(LOOK_SECONDS)
    wiring.on([timer.tick], look, ["seen"], ["pulse"], queue=False)


def _connect_comparison(wiring: _Wiring, handlers: CompareHandlers) -> None:
    parts, own = wiring.parts, ("compare_settings", "compare_runs")

    async def compared(request: gr.Request, *given: Any) -> AsyncGenerator[dict[Any, Any]]:
        values = wiring.values(given[: -len(own)]) | dict(zip(own, given[-len(own) :], strict=True))
        with closing(handlers.compare(values, request)) as changes:  # who leaves the page stops the work
            async for change in paced(changes):
                yield wiring.by_component(change)

    inputs = [*wiring.request_parts, *own]
    wiring.on([parts["compare_start"].click], compared, inputs, compare.RESULTS, concurrency_limit=None)
    wiring.answer(parts["compare_stop"].click, handlers.stop_comparison, (), ["queue_note", "problem"], queue=False)


async def paced(by_component: Generator[Changes | None]) -> AsyncGenerator[Changes]:
    """Pass changes on without a thread that waits for them; None makes a short pause.

    Args:
        by_component: changes, as soon as there are any.
    """
    end: Changes = {}
    while (changes := await run_in_threadpool(next, by_component, end)) is not end:
        if changes:
            yield changes
        else:
            await asyncio.sleep(POLL_SECONDS)


def _connect_pictures(wiring: _Wiring, handlers: SettingsHandlers, generation: GenerationHandlers) -> None:
    parts, answer, allowed = wiring.parts, wiring.answer, wiring.allowed

    def held(request: gr.Request, changes: Changes) -> Changes:
        if "chosen" in changes:
            generation.displays.hold(request, changes["chosen"])
        return changes

    def choose(request: gr.Request, visit: Any, event: gr.SelectData) -> dict[Any, Any]:
        return wiring.by_component(held(request, handlers.choose(visit, event)))

    def look(request: gr.Request, gallery_items: Any, event: gr.SelectData) -> dict[Any, Any]:
        return wiring.by_component(held(request, handlers.look(gallery_items, event)))

    wiring.on([parts["strip"].select], choose, ["visit"], [*STAGE_PARTS, "queue_note"])
    wiring.on([parts["gallery"].select], look, ["gallery_items"])

    def start_from(request: gr.Request, chosen: Any) -> Changes:
        return handlers.send(chosen, "image", wiring.sessions.submitter(request))

    def inpaint_it(request: gr.Request, chosen: Any) -> Changes:
        return handlers.send(chosen, "inpaint", wiring.sessions.submitter(request))

    def animate_it(request: gr.Request, chosen: Any) -> Changes:
        return handlers.send(chosen, "video", wiring.sessions.submitter(request))

    def end_taken(end: str) -> Callable[..., Changes]:
        def take_end(request: gr.Request, file: str | None) -> Changes:
            return handlers.take_end(end, file, wiring.sessions.submitter(request))

        take_end.__name__ = f"take_{end}"  # by which Gradio knows it
        return take_end

    def end_dropped(end: str) -> Callable[..., Changes]:
        def drop_end(request: gr.Request) -> Changes:
            return handlers.drop_end(end)

        return drop_end

    def take_clip(request: gr.Request, file: str | None) -> Changes:
        return handlers.take_clip(file, wiring.sessions.submitter(request))

    def drop_clip(request: gr.Request) -> Changes:
        return handlers.drop_clip()

    def take_source(request: gr.Request, file: str | None) -> Changes:
        return handlers.take_source(file, wiring.sessions.submitter(request))

    def reuse_seed(request: gr.Request, chosen: Any) -> Changes:
        return handlers.reuse_seed(chosen)

    def reuse_settings(request: gr.Request, chosen: Any, key: str) -> Changes:
        return handlers.adapted(
            handlers.reuse_settings(chosen, wiring.sessions.user(request)), key, wiring.sessions.may_generate(request)
        )

    def load_settings(request: gr.Request, file: str | None, key: str) -> Changes:
        return handlers.adapted(handlers.load_settings(file, wiring.sessions.submitter(request)), key)

    def refuse(request: gr.Request, by_component: str) -> Changes:
        return handlers.refuse_file(by_component)

    def drop_prompts(request: gr.Request) -> Changes:
        return handlers.drop_prompts()

    answer(parts["reuse_seed"].click, reuse_seed, ["chosen"])
    answer(parts["reuse_settings"].click, reuse_settings, ["chosen", "model"])
    answer(parts["start_from"].click, start_from, ["chosen"])
    answer(parts["inpaint_it"].click, inpaint_it, ["chosen"])
    answer(parts["settings_file"].upload, load_settings, ["settings_file", "model"])
    answer(parts["source_file"].upload, take_source, ["source_file"])
    answer(parts["animate_it"].click, animate_it, ["chosen"])
    for end in ENDS:
        answer(parts[f"{end}_file"].upload, end_taken(end), [f"{end}_file"])
        answer(parts[f"{end}_drop"].click, end_dropped(end))
    answer(parts["video_file"].upload, take_clip, ["video_file"])
    answer(parts["video_drop"].click, drop_clip)
    answer(parts["many_file"].upload, allowed(handlers.take_prompts), ["many_file"])
    answer(parts["many_drop"].click, drop_prompts)
    answer(parts["refused"].change, refuse, ["refused"], [PLACE], queue=False)


def _connect_tabs(wiring: _Wiring, handlers: SettingsHandlers) -> None:
    parts = wiring.parts

    def turned(by: int) -> Callable[..., Any]:
        def listener(page: int, request: gr.Request) -> dict[Any, Any]:
            return wiring.by_component(handlers.turn_page(page, by, request))

        return listener

    for name in TABS:
        chosen = parts[f"tab_{name}"].select(
            None, None, [parts["mode"], parts["problem"]], js=GO % (name, name), **QUIET
        )
        chosen.then(
            lambda key, mode: wiring.by_component(handlers.check_support(key, mode)),
            wiring.components(["model", "mode"]),
            wiring.components(wiring.changing),
            **QUIET,
        )
    gallery_items = parts["tab_gallery"].select(None, js="() => window.tessera.go('gallery')", **QUIET)
    gallery_items.then(turned(0), parts["page"], wiring.components(wiring.changing), **QUIET)
    wiring.on([parts["newer"].click], turned(-1), ["page"])
    wiring.on([parts["older"].click], turned(1), ["page"])
