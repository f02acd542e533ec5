"""The listeners of the tab Models."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from apps.service.engine import Engine
from apps.service.own_models import OwnModels, is_hub_id
from apps.service.quantized import model_label
from apps.studio import models_views as drawn
from apps.studio.page_values import PageError
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SettingsHandlers
from apps.studio.stage import Changes
from apps.studio.strings import Strings


class ModelsHandlers:
    """The listeners of the tab.

    Args:
        engine: of the server.
        own: the list of models.
        words: of the page.
        sessions: who is on the page.
        settings: puts a model in place.
    """

    def __init__(
        self, engine: Engine, own: OwnModels, words: Strings, sessions: Sessions, settings: SettingsHandlers
    ) -> None:
        self._engine, self._own, self.words = engine, own, words
        self._sessions, self._settings = sessions, settings

    def open(self, request: gr.Request, chosen: str | None) -> Changes:
        """Show the models as they are."""
        return self._show(request, chosen)

    def choose(self, request: gr.Request, chosen: str | None) -> Changes:
        """Offer what can be done with a model."""
        rows = {one.key: one for one in self._own.rows(self._sessions.user(request))}
        can_remove = chosen in rows and rows[chosen].is_added and self._is_owner(request)
        return {"models_remove": gr.update(interactive=can_remove)}

    def mark(self, request: gr.Request, chosen: str | None) -> Changes:
        """Mark a model as a favourite, or unmark it."""
        self._own.mark(chosen or "", self._sessions.submitter(request))
        return self._show(request, chosen)

    def add(self, request: gr.Request, source: str) -> Changes:
        """Add a model by path, or start to download a hub id; of the owner alone.

        Raises:
            PageError: the user may not.
            RequestError: there is no such model, or it can't be fetched now.
        """
        self._check_owner(request)
        if is_hub_id(source):
            self._own.fetch(source)
            return {**self._show(request, None), "models_source": ""}
        key = self._own.add(source)
        gr.Info(escape(self.words("models.added", name=key)))
        return {**self._show(request, key), "models_source": ""}

    def cancel(self, request: gr.Request, chosen: str | None) -> Changes:
        """End the download that runs.

        Raises:
            PageError: the user may not.
        """
        self._check_owner(request)
        self._own.downloads.cancel()
        return self._show(request, chosen)

    def tick(self, request: gr.Request, chosen: str | None, seen: Any) -> Changes:
        """Show how a download goes if there is news."""
        last = self._own.downloads.last
        if last is None or (last.state != "running" and seen == last.state):
            return {}
        if last.state == "running":
            return self._download(request)
        return self._show(request, last.keys[0] if last.keys else chosen)

    def offer(self) -> Changes:
        """Offer the models that there are now where one is chosen."""
        return self._lists([(model_label(key, self._engine.source(key)), key) for key in self._engine.models])

    def remove(self, request: gr.Request, chosen: str | None, fitted: str | None = None) -> Changes:
        """Take a model off the list; files stay, unless they were downloaded here.

        Raises:
            PageError: the user may not.
        """
        self._check_owner(request)
        self._own.remove(chosen or "")
        shown = self._show(request, None)
        if fitted in self._engine.models:
            return shown
        return shown | {"model": gr.update(choices=shown["model"]["choices"], value=self._engine.models[0])}

    def refresh(self, request: gr.Request, chosen: str | None) -> Changes:
        """Look into the folder again.

        Raises:
            PageError: the user may not.
        """
        self._check_owner(request)
        new = self._own.refresh()
        gr.Info(self.words("models.found", count=len(new)))
        return self._show(request, chosen)

    def use(self, request: gr.Request, chosen: str | None, fitted: str) -> Changes:
        """Choose a model in the tab that generates with it.

        Raises:
            PageError: there is no such model, or the user may only look.
        """
        self._sessions.submitter(request)
        if chosen not in self._engine.models:
            raise PageError("no_model")
        abilities = self._engine.abilities(str(chosen))
        mode = "video" if abilities.output == "frames" else "text"
        changes: Changes = {"model": chosen, "mode": mode, "tabs": gr.update(selected=mode)}
        return self._settings.adapted(changes, fitted, self._sessions.may_generate(request))

    # ------------------------------------------------------------------ helpers

    def _is_owner(self, request: gr.Request) -> bool:
        """Whether a user may change what holds for all: everybody on a server without users, else administrators."""
        return self._sessions.may_generate(request) and self._sessions.viewer(request) is None

    def _check_owner(self, request: gr.Request) -> None:
        if not self._is_owner(request):
            raise PageError("no_rights")

    def _show(self, request: gr.Request, chosen: str | None) -> Changes:
        rows = self._own.rows(self._sessions.user(request))
        is_owner = self._is_owner(request)
        keys = [one.key for one in rows]
        at = chosen if chosen in keys else keys[0]
        labels = [(model_label(key, self._engine.source(key)), key) for key in keys]
        added = {one.key for one in rows if one.is_added}
        return {
            **self._download(request),
            "models_table": drawn.table(rows, self._own.unusable() if is_owner else [], self.words),
            "models_chosen": gr.update(choices=labels, value=at),
            "models_remove": gr.update(interactive=is_owner and at in added),
            **self._lists(labels),
        }

    def _lists(self, labels: list[tuple[str, str]]) -> Changes:
        """Return the lists of models in the tabs; one update each, because Gradio takes them apart."""
        return {name: gr.update(choices=labels) for name in drawn.LISTS}

    def _download(self, request: gr.Request) -> Changes:
        """Return how the download stands; what it is of is for the owner."""
        last, is_owner = self._own.downloads.last, self._is_owner(request)
        is_running = last is not None and last.state == "running"
        return {
            "models_note": drawn.download(last if is_owner else None, self.words),
            "models_add": gr.update(interactive=is_owner and not is_running),
            "models_cancel": gr.update(interactive=is_owner and is_running),
            "models_timer": gr.update(active=is_running),
            "models_seen": None if last is None else last.state,
        }
