"""The tab Server, which only administrators see: users, the queue with a button that stops each job, devices."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from apps.studio.answers import Answers
from apps.studio.controls import Parts
from apps.studio.strings import Strings
from apps.studio.wiring import QUIET, Wiring

if TYPE_CHECKING:
    from apps.studio.server_handlers import ServerHandlers

LOOK_SECONDS = 3.0
"""Between two looks at the server while the tab is open."""
PLACE = "server_problem"
"""Part of the tab that shows errors."""
SHOWN = ("server_users", "server_queue", "server_devices", "server_timer")
"""Parts that a look changes."""


def build_tab(words: Strings, *, is_shown: bool) -> Parts:
    """Lay the tab out and return it and its parts by name.

    Args:
        words: of the page.
        is_shown: to everybody; else a listener shows it to administrators when the page opens.
    """
    label = words("tab.server")
    with gr.Tab(label, id="server", elem_id="tab-server", render_children=True, visible=is_shown) as tab:
        return {**_build(words), "tab_server": tab}


def _build(words: Strings) -> Parts:
    gr.HTML(f'<p class="hint">{escape(words("server.hint"))}</p>', js_on_load=None)
    parts: Parts = {PLACE: gr.HTML("", elem_id="server-problem", js_on_load=None)}
    for name in ("queue", "users", "devices"):
        parts[f"server_{name}"] = gr.HTML("", elem_id=f"server-{name}", js_on_load=None)
    parts["server_stop"] = gr.Textbox("", elem_id="server-stop", elem_classes="offstage", container=False)
    parts["server_timer"] = gr.Timer(LOOK_SECONDS, active=False)
    return parts


def connect(wiring: Wiring, handlers: ServerHandlers) -> None:
    """Connect the parts of the tab."""
    parts = wiring.parts
    answers = Answers(wiring, parts, handlers.words, PLACE)

    def offer_server(request: gr.Request) -> Any:
        return handlers.offer(request)

    gr.on(None, offer_server, [], parts["tab_server"], **QUIET)  # when the page opens
    opened = parts["tab_server"].select(None, js="() => window.tessera.go('server')", **QUIET)
    answers.on(opened.then, handlers.open, (), SHOWN)
    answers.on(parts["server_timer"].tick, handlers.tick, (), SHOWN, first={}, queue=False)
    answers.on(parts["server_stop"].change, handlers.stop_job, ["server_stop"], SHOWN, queue=False)
    for name, tab in parts.items():
        if isinstance(tab, gr.Tab) and name != "tab_server":
            tab.select(_leave, None, parts["server_timer"], **QUIET)


def _leave() -> Any:
    """Look at the server no more while another tab is open."""
    return gr.update(active=False)
