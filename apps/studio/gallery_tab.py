"""The tab Gallery: drawn by its script from what the server lists; a chosen image goes onto the stage."""

from __future__ import annotations

import json
from html import escape
from typing import Any

import gradio as gr

from apps.service.engine import Engine
from apps.service.gallery_store import MAX_NUMBER, Person
from apps.service.metadata import PictureSettings
from apps.service.requests import OPTIONS
from apps.studio.album import Album
from apps.studio.controls import Parts
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.grids import Grids
from apps.studio.page_values import PageError
from apps.studio.sessions import Sessions
from apps.studio.stage import Changes
from apps.studio.strings import Strings
from apps.studio.wiring import QUIET, Wiring

AREA = "gallery."
ADDRESS = "/gallery"
"""Where the script finds the routes of `apps.api.gallery`, also on a server that has no API."""
OPEN = "() => { window.tessera.go('gallery'); window.tesseraGallery?.open(); }"
ACTIONS = ("use", "reuse_settings", "start_from")
"""What may be done with a chosen image beside looking at it; the rest is done by the script."""


def build(words: Strings) -> Parts:
    """Lay the tab out: a place for the script, and the field by which it tells what was chosen."""
    said = {key.removeprefix(AREA): words(key) for key in sorted(words.keys()) if key.startswith(AREA)}
    said = _setting_labels(words) | {key: text for key, text in said.items() if not key.startswith("foreign")}
    place = f'<div class="gallery-app" data-words="{escape(json.dumps(said))}"></div>'
    gr.HTML(place, elem_id="gallery", js_on_load=None)
    return {"gallery_pick": gr.Textbox("", elem_id="gallery-pick", elem_classes="offstage", container=False)}


def _setting_labels(words: Strings) -> dict[str, str]:
    """Return what the settings of an image are called on the page, by `label.` and their names."""
    named = {
        name: OPTIONS[name].option.label or name if name in OPTIONS else name for name in PictureSettings.model_fields
    }
    known = words.keys()
    return {f"label.{name}": words(key) for name, key in named.items() if key in known}


def record_sheets(engine: Engine) -> None:
    """Put the sheets of grids on record that an older version has written."""
    Grids(engine).record_sheets()


class GalleryHandlers:
    """Puts images of the gallery onto the stage.

    Args:
        engine: of the server.
        sessions: who is on the page.
        generation: has the album and the stage.
    """

    def __init__(self, engine: Engine, sessions: Sessions, generation: GenerationHandlers) -> None:
        self._engine, self._sessions, self._generation = engine, sessions, generation

    def pick(self, request: gr.Request, told: str) -> Changes:
        """Show the image that the script tells, as `number` and what comes next.

        Raises:
            PageError: there is no such image for this user.
        """
        number, _, _ = str(told).partition(" ")
        if not number.isdecimal() or int(number) > MAX_NUMBER:
            return {}
        who = Person(self._sessions.user(request), self._sessions.viewer(request) is None)
        found = self._engine.gallery.items(who, [int(number)])
        album: Album = self._generation.album
        shown = album.of_item(found[0]) if found else None
        if shown is None:
            raise PageError("gallery.gone")
        changes = self._generation.show(shown)
        self._generation.displays.hold(request, changes["chosen"])
        return {**changes, "mode": "text", "tabs": gr.update(selected="text")}


def connect(wiring: Wiring, handlers: GalleryHandlers) -> None:
    """Connect the tab; what comes next after a choice is a click on the button that is there for it."""
    parts = wiring.parts
    parts["tab_gallery"].select(None, js=OPEN, **QUIET)

    def pick(request: gr.Request, told: str) -> dict[Any, Any]:
        return wiring.answered(handlers.pick, request, told)

    picked = wiring.on([parts["gallery_pick"].change], pick, ["gallery_pick"])
    picked.then(None, parts["gallery_pick"], js="(told) => window.tesseraGallery?.next(told)", **QUIET)
