"""Which listener answers what on the page."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import closing
from typing import Any

import gradio as gr

from apps.service.engine import Engine
from apps.service.fine_tuning import FineTuning
from apps.service.own_models import OwnModels
from apps.service.tuning import Tunings
from apps.studio import clip_length, fine_tune, gallery_tab, lora_rows, models, server, speed
from apps.studio.compare_handlers import CompareHandlers
from apps.studio.controls import Parts
from apps.studio.examples import EXAMPLES
from apps.studio.fine_tune_handlers import FineTuneHandlers
from apps.studio.following import restated
from apps.studio.forms import FIXED
from apps.studio.gallery_tab import GalleryHandlers
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.model_choice import ModelChoice
from apps.studio.models_handlers import ModelsHandlers
from apps.studio.problems import PLACE
from apps.studio.prompt_listeners import connect_prompt
from apps.studio.prompt_tools import PromptTools
from apps.studio.server_handlers import ServerHandlers
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SAVED, SettingsHandlers
from apps.studio.speed_handlers import SpeedHandlers
from apps.studio.stage import Changes
from apps.studio.strings import Strings
from apps.studio.tabs import TABS, compare
from apps.studio.tabs.inpaint import SIDES
from apps.studio.tabs.video import ENDS
from apps.studio.wiring import FOLLOWED, QUEUE, QUIET, STAGE_PARTS, Wiring, paced

GO = "(...all) => { window.tessera.go('%s'); return ['%s', '']; }"
"""Open a tab; what was said about a request of another one goes away."""
LOOK_SECONDS = 1.0
"""How often an idle page asks whether there is anything to follow."""
REMEMBER = "(...all) => [Object.fromEntries(%s.map((name, i) => [name, all[i]])), '']"
"""A field that is changed also takes away what was said about the last request."""


def connect(
    page: gr.Blocks,
    engine: Engine,
    words: Strings,
    sessions: Sessions,
    parts: Parts,
    runs: FineTuning | None,
    tunings: Tunings | None,
    own: OwnModels | None,
) -> None:
    """Connect controls and listeners."""
    wiring = Wiring(parts, words, sessions)
    generation = GenerationHandlers(engine, words, sessions)
    handlers = SettingsHandlers(engine, words, sessions, generation)
    _connect_generation(wiring, generation)
    _connect_following(page, wiring, generation)
    _connect_pictures(wiring, handlers, generation)
    _connect_tabs(wiring, handlers, ModelChoice(engine, words, handlers))
    clip_length.connect(parts, engine, **QUIET)
    _connect_comparison(wiring, CompareHandlers(engine, words, sessions))
    gallery_tab.connect(wiring, GalleryHandlers(engine, sessions, generation))
    server.connect(wiring, ServerHandlers(engine, words, sessions))
    if own is not None:
        models.connect(wiring, ModelsHandlers(engine, own, words, sessions, handlers))
    if tunings is not None:
        speed.connect(wiring, SpeedHandlers(engine, tunings, words, sessions, handlers))
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
    connect_prompt(page, wiring, PromptTools(engine, words), words, handlers.choose_preset)
    # A typed seed is meant to be used.
    parts["seed"].input(lambda: FIXED, None, parts["seed_mode"], **QUIET)
    chosen = wiring.components(lora_rows.NAMES)
    gr.on([part.change for part in chosen], unfolded, chosen, wiring.components(lora_rows.ROWS[1:]), **QUIET)
    changed = [parts[name].change for name in SAVED if name != "mode"]
    names = str(list(SAVED))
    gr.on(changed, None, wiring.components(SAVED), [parts["saved"], parts["problem"]], js=REMEMBER % names, **QUIET)
    parts["mask"].change(None, None, parts["problem"], js="() => ''", **QUIET)  # the browser doesn't keep it
    grown = wiring.components([f"grow_{side}" for side in SIDES])
    gr.on([part.change for part in grown], None, grown, None, js="(...sides) => tesseraGrown(...sides)", **QUIET)


def _connect_generation(wiring: Wiring, generation: GenerationHandlers) -> None:
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


def _connect_following(page: gr.Blocks, wiring: Wiring, generation: GenerationHandlers) -> None:
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


def _connect_comparison(wiring: Wiring, handlers: CompareHandlers) -> None:
    parts, own = wiring.parts, ("compare_settings", "compare_runs")

    async def compared(request: gr.Request, *given: Any) -> AsyncGenerator[dict[Any, Any]]:
        values = wiring.values(given[: -len(own)]) | dict(zip(own, given[-len(own) :], strict=True))
        with closing(handlers.compare(values, request)) as changes:  # who leaves the page stops the work
            async for change in paced(changes):
                yield wiring.by_component(change)

    inputs = [*wiring.request_parts, *own]
    wiring.on([parts["compare_start"].click], compared, inputs, compare.RESULTS, concurrency_limit=None)
    wiring.answer(parts["compare_stop"].click, handlers.stop_comparison, (), ["queue_note", "problem"], queue=False)


def _connect_pictures(wiring: Wiring, handlers: SettingsHandlers, generation: GenerationHandlers) -> None:
    parts, answer, allowed = wiring.parts, wiring.answer, wiring.allowed

    def held(request: gr.Request, changes: Changes) -> Changes:
        if "chosen" in changes:
            generation.displays.hold(request, changes["chosen"])
        return changes

    def choose(request: gr.Request, visit: Any, event: gr.SelectData) -> dict[Any, Any]:
        return wiring.by_component(held(request, handlers.choose(visit, event)))

    wiring.on([parts["strip"].select], choose, ["visit"], [*STAGE_PARTS, "queue_note"])

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
        return handlers.adapted(handlers.load_settings(file, wiring.sessions.submitter(request), key), key)

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


def _connect_tabs(wiring: Wiring, handlers: SettingsHandlers, models: ModelChoice) -> None:
    parts = wiring.parts

    def enter(request: gr.Request, key: str, mode: str, replaced: str | None) -> Changes:
        return models.enter(key, mode, replaced, wiring.sessions.may_generate(request))

    for name in TABS:
        chosen = parts[f"tab_{name}"].select(
            None, None, [parts["mode"], parts["problem"]], js=GO % (name, name), **QUIET
        )
        wiring.follow(chosen, enter, ["model", "mode", "replaced"])
