"""The listeners of the tab Speed: start and stop a tuning, follow it, and use a setting that was found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from apps.service.engine import Engine
from apps.service.requests import DECIDED_BY_PROFILE
from apps.service.speed_profiles import known_profiles
from apps.service.tuning import Tuning, TuningError, Tunings, TuningSettings
from apps.studio import speed_views as drawn
from apps.studio.controls import CONTROLS
from apps.studio.page_values import PageError
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SettingsHandlers
from apps.studio.speed_views import PROFILES
from apps.studio.stage import Changes
from apps.studio.strings import Strings


class SpeedHandlers:
    """The listeners of the tab.

    Args:
        engine: of the server.
        tunings: of the server.
        words: of the page.
        sessions: who is on the page.
        settings: puts a model and a profile in place.
    """

    def __init__(
        self, engine: Engine, tunings: Tunings, words: Strings, sessions: Sessions, settings: SettingsHandlers
    ) -> None:
        self._engine, self._tunings, self.words = engine, tunings, words
        self._sessions, self._settings = sessions, settings

    def open(self, request: gr.Request, model: str) -> Changes:
        """Show how the tuning of a model goes, or what is known of it."""
        return self._show(request, model)

    def start(self, request: gr.Request, model: str, minutes: float) -> Changes:
        """Start a tuning of a model.

        Raises:
            PageError: the user may not, or there is no such model.
            TuningError: one runs, or the time is out of range.
        """
        self._check_owner(request)
        if model not in self._engine.models:
            raise PageError("no_model")
        if self._engine.base is not None and self._engine.source(model).endswith((".safetensors", ".gguf")):
            raise TuningError("tuning.single_file", "A single file that needs --base can't be tuned here.")
        device = self._engine.devices[0]
        source, dtype = self._engine.source(model), self._engine.dtype
        self._tunings.start(TuningSettings(model, source, _number(minutes), {}, device, dtype))
        return self._show(request, model)

    def stop(self, request: gr.Request, model: str) -> Changes:
        """Stop the tuning that runs.

        Raises:
            PageError: the user may not.
        """
        self._check_owner(request)
        self._tunings.stop()
        return self._show(request, model)

    def tick(self, request: gr.Request, model: str, seen: Any) -> Changes:
        """Show how a tuning goes if there is news."""
        last = self._tunings.last
        return {} if _signature(last) == (seen if seen is None else tuple(seen)) else self._show(request, model)

    def use(self, request: gr.Request, name: str, model: str, fitted: str) -> Changes:
        """Choose a profile, and its model, in the tab that generates.

        Args:
            request: of the page.
            name: of the profile.
            model: that was tuned.
            fitted: model that the page is fitted to.
        """
        self._sessions.submitter(request)
        if name not in PROFILES or model not in self._engine.models:
            raise PageError("no_model")
        mode = "video" if self._engine.abilities(model).output == "frames" else "text"
        changes: Changes = {"model": model, "mode": mode, "tabs": gr.update(selected=mode)}
        adapted = self._settings.adapted(changes, fitted, self._sessions.may_generate(request))
        gr.Info(self.words("speed.used", name=self.words(f"profile.{name}")))
        return {**adapted, **_nothing_else(), "profile": name}

    # ------------------------------------------------------------------ helpers

    def _check_owner(self, request: gr.Request) -> None:
        """Refuse users who may not change what holds for all.

        Raises:
            PageError: the user may not.
        """
        self._sessions.submitter(request)
        if self._sessions.viewer(request) is not None:  # a name, of everybody but administrators
            raise PageError("no_rights")

    def _show(self, request: gr.Request, model: str) -> Changes:
        """Return how the tab stands."""
        last = self._tunings.last
        is_running = last is not None and last.state == "running"
        profiles, front, plain = self._found(model, last)
        changes: Changes = {
            "speed_problem": drawn.failure(last, self.words),
            "speed_note": drawn.progress(last, self.words),
            "speed_result": drawn.result(profiles, front, plain, self.words),
            "speed_start": gr.update(interactive=not is_running and self._sessions.viewer(request) is None),
            "speed_stop": gr.update(interactive=is_running),
            "speed_timer": gr.update(active=is_running),
            "speed_seen": _signature(last),
        }
        for name in PROFILES:
            known = profiles.get(name)
            gain = None if known is None else known.get("gain")
            label = self.words(f"profile.{name}")
            said = label if gain is None else f"{label} ({gain:.1f}\u00d7)"
            use = self.words("speed.use", name=said)
            changes[f"speed_use_{name}"] = gr.update(visible=known is not None, value=use)
        return changes

    def _found(
        self, model: str, last: Tuning | None
    ) -> tuple[Mapping[str, Mapping[str, Any]], list[Mapping[str, Any]], float | None]:
        """Return the profiles of a model, its front, and the seconds of a plain request, as far as they are known."""
        if last is not None and last.settings.model == model and (last.front or last.profiles):
            baseline = last.news.get("baseline", {})
            plain = baseline.get(baseline.get("clock", "wall"))
            return last.profiles, last.front, plain
        loading = self._engine.loaded(model) if model in self._engine.models else None
        if loading is None or not loading.done() or loading.exception() is not None:
            return {}, [], None
        return known_profiles(loading.result().pipe, PROFILES), [], None


def _signature(tuning: Tuning | None) -> tuple[Any, ...] | None:
    """Return what differs when there is news of a tuning."""
    if tuning is None:
        return None
    news = tuning.news
    return (tuning.state, tuning.is_stopping, news.get("phase"), news.get("done"), round(100 * tuning.share))


def _nothing_else() -> Changes:
    """Return the controls of what a profile decides as they are where nothing is asked for."""
    found: Changes = {"step_cache": ""}
    for name in DECIDED_BY_PROFILE:
        control = CONTROLS[name].option.control if name in CONTROLS else None
        if control is not None and control.off is not ...:
            found[name] = control.off
    return found


def _number(value: object) -> float:
    """Read the minutes; what is no number is refused by `TuningSettings`."""
    return float(value) if isinstance(value, int | float) else float("nan")
