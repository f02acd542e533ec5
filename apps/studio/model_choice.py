"""Which model a tab is opened with: the chosen one, or one at hand that can do what the tab asks for."""

from __future__ import annotations

from html import escape

import gradio as gr

from apps.service.engine import Engine
from apps.studio.settings_handlers import SettingsHandlers
from apps.studio.stage import Changes
from apps.studio.strings import Strings
from apps.studio.tabs import TABS
from pipelines import builtin_models


class ModelChoice:
    """Fits the page to the tab that is opened.

    Args:
        engine: of the server.
        words: of the page.
        settings: fits the controls to a model.
    """

    def __init__(self, engine: Engine, words: Strings, settings: SettingsHandlers) -> None:
        self._engine, self._words, self._settings = engine, words, settings

    def enter(self, key: str, mode: str, replaced: str | None, may_load: bool = True) -> Changes:
        """Choose another model for a tab whose work the chosen one can't do, if one is at hand; else offer one.

        Args:
            key: of the chosen model.
            mode: the tab that is opened.
            replaced: the model that was chosen before the page chose another, which goes first.
            may_load: whether the user of the page may have a model loaded.
        """
        if mode not in TABS or key not in self._engine.models or self._can(key, mode):
            return {"need": "", "switch": gr.update(visible=False)}
        able = [one for one in (replaced, *self._engine.models) if one in self._engine.models and self._can(one, mode)]
        other = next((one for one in able if one is not None and self._is_at_hand(one)), None)
        if other is None or not may_load:
            return self._settings.check_support(key, mode)
        gr.Info(escape(self._words("model.changed", model=other)))
        return {"replaced": key, "model": other, **self._settings.load_model_controls(other, mode, may_load)}

    def _can(self, key: str, mode: str) -> bool:
        """Whether a model can do what a tab asks for; one of which nothing is known is taken to."""
        abilities = self._engine.abilities(key)
        return not abilities.tasks or TABS[mode].can_be_done(abilities)

    def _is_at_hand(self, key: str) -> bool:
        """Whether a model is in memory, or small enough to be read in a moment."""
        loading = self._engine.loaded(key)
        is_loaded = loading is not None and loading.done() and loading.exception() is None
        return is_loaded or self._engine.source(key) in builtin_models()
