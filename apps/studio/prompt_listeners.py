"""Which listener answers what around the prompt; see `apps.studio.prompt_tools`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import gradio as gr

from apps.service.request_error import RequestError
from apps.studio.problems import explain, problem
from apps.studio.prompt_tools import PromptTools
from apps.studio.stage import Changes
from apps.studio.strings import Strings
from apps.studio.wiring import QUIET, Wiring


def connect_prompt(
    page: gr.Blocks, wiring: Wiring, tools: PromptTools, words: Strings, choose: Callable[[str, str, str], Changes]
) -> None:
    """Connect the controls around the prompt.

    Args:
        page: whose opening offers the user's own prompts and presets.
        wiring: of the page.
        tools: the listeners.
        words: of the page.
        choose: sets the controls for a preset, the model and the user.
    """
    parts, sessions = wiring.parts, wiring.sessions

    def said(change: Callable[[], Changes]) -> Changes:
        try:
            return change()
        except (RequestError, ValueError) as error:
            return problem(explain(error, words))

    def earlier_prompts(request: gr.Request) -> str:
        return json.dumps(tools.earlier(sessions.user(request)))

    def own_presets(request: gr.Request) -> Changes:
        return said(lambda: tools.offer(sessions.user(request)))

    def chosen_preset(request: gr.Request, name: str, key: str) -> Changes:
        return said(lambda: choose(name, key, sessions.user(request)))

    def save_preset(request: gr.Request, name: str, *given: Any) -> Changes:
        owner = sessions.submitter(request)
        return said(lambda: tools.save(owner, name, wiring.values(given)))

    def delete_preset(request: gr.Request, name: str) -> Changes:
        owner = sessions.submitter(request)
        return said(lambda: tools.delete(owner, name))

    def import_presets(request: gr.Request, file: str | None) -> Changes:
        owner = sessions.submitter(request)
        return said(lambda: tools.take_in(owner, file))

    def export_presets(request: gr.Request) -> str:
        return tools.export(sessions.user(request))

    gr.on([page.load, parts["pulse"].change], earlier_prompts, None, parts["earlier"], queue=False, **QUIET)
    wiring.answer(page.load, own_presets, (), ["preset", "problem"])
    wiring.answer(parts["preset"].input, chosen_preset, ["preset", "model"])
    wiring.answer(parts["preset_save"].click, save_preset, ["preset_name", *wiring.request_parts])
    wiring.answer(parts["preset_name"].submit, save_preset, ["preset_name", *wiring.request_parts])
    wiring.answer(parts["preset_delete"].click, delete_preset, ["preset"])
    wiring.answer(parts["preset_import"].upload, import_presets, ["preset_import"])
    parts["preset_export"].click(export_presets, None, parts["preset_export"], **QUIET)
