"""What happens on Compare and on its Stop: a comparison goes through the engine, and the page follows it."""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import gradio as gr

from apps.service.comparison import Comparison, Progress, ReferenceFailedError, Result, StoppedError, compare
from apps.service.comparison_page import document, fragment
from apps.service.comparison_settings import SettingError, plan
from apps.service.comparison_sheet import save_contact_sheet
from apps.service.compute_profiles import check_request
from apps.service.engine import Engine
from apps.service.events import ModelLoading, Queued, Step
from apps.service.failures import is_storage_failure
from apps.service.job_store import QueueFullError
from apps.service.requests import AnyRequest
from apps.studio import views
from apps.studio.forms import form_to_request
from apps.studio.problems import explain, explain_failure
from apps.studio.sessions import Sessions
from apps.studio.stage import Changes
from apps.studio.strings import Strings
from apps.studio.tabs.compare import settings_of

PLACE = "compare_problem"
NEWS_SECONDS = 0.2
"""Between two changes of the progress on the page."""


class CompareHandlers:
    """The listeners of the tab Compare, over one engine.

    Args:
        engine: generates; must have an output folder, which receives page and sheet of a comparison.
        words: of the page.
        sessions: who is on the page.
    """

    def __init__(self, engine: Engine, words: Strings, sessions: Sessions) -> None:
        self._engine = engine
        self._words = words
        self._sessions = sessions
        self._stops: dict[tuple[str, str | None], threading.Event] = {}

    def compare(self, values: Mapping[str, Any], request: gr.Request) -> Generator[Changes | None]:
        """Compare the settings on the page; closing the iterator stops the work.

        Args:
            values: what stands on the page, settings and runs of the tab among it.
            request: of whom.

        Yields:
            Changes of the page by name; None where nothing has changed.
        """
        stop, key = threading.Event(), None
        try:
            owner = self._sessions.submitter(request)
            key = (owner, request.session_hash)
            if key in self._stops:  # a second click: one comparison at a time
                return
            self._stops[key] = stop
            yield {PLACE: "", "compare_note": self._note(self._words("starting"), 0.0), **_busy(True)}
            yield from self._run(values, owner, stop)
        except StoppedError:
            yield {"compare_note": self._note(self._words("stopped")), **_busy(False)}
        except (ValueError, TypeError, QueueFullError, OSError) as error:
            if isinstance(error, OSError) and not is_storage_failure(error):
                raise
            yield {PLACE: views.problem(self._explain(error)), "compare_note": "", **_busy(False)}
        finally:
            if key is not None and self._stops.get(key) is stop:
                del self._stops[key]

    def stop_comparison(self, request: gr.Request) -> Changes:
        """Stop the comparison of a page within one step.

        Raises:
            PageError: the user may only look.
        """
        found = self._stops.get((self._sessions.submitter(request), request.session_hash))
        if found is not None:
            found.set()
        return {}

    def _run(self, values: Mapping[str, Any], owner: str, stop: threading.Event) -> Generator[Changes | None]:
        settings = settings_of(values)
        wanted = self._request(values)
        for one in plan(wanted, settings):
            check_request(one, self._engine.devices)
        told = 0.0
        events = compare(self._engine, wanted, settings, runs=_runs(values["compare_runs"]), owner=owner, stop=stop)
        with closing(events):
            for event in events:
                if isinstance(event, Comparison):
                    yield self._show(event)
                elif time.monotonic() - told > NEWS_SECONDS:
                    told = time.monotonic()
                    yield {"compare_note": self._note(self._describe(event), event.share)}

    def _request(self, values: Mapping[str, Any]) -> AnyRequest:
        """Return what all settings have in common: what the page asks for, one image of it, as it is generated."""
        model = values["model"]
        tasks = self._engine.abilities(model).tasks if model in self._engine.models else ()
        one = {**values, "num_images": 1, "batch_size": 1, "many": []}
        return form_to_request(one, tasks, {"upscale": None, "upscaler": None})

    def _show(self, found: Comparison) -> Changes:
        """Write page and sheet, and put the result onto the page."""
        found = replace(found, results=tuple(map(self._translated, found.results)))
        page, sheet = self._save(found)
        say = self._say
        return {
            "compare_note": self._note(self._words("compare.done", count=len(found.results), runs=found.runs)),
            "compare_result": fragment(found, say),
            "compare_page": gr.update(value=str(page), interactive=True),
            "compare_sheet": gr.update(value=str(sheet), interactive=True),
            **_busy(False),
        }

    def _translated(self, one: Result) -> Result:
        """Return a result whose report, or failure, is in the page's language."""
        report = self._words.report(one.reports) or one.report
        return replace(
            one, report=report, problem="" if one.failed is None else explain_failure(one.failed, self._words)
        )

    def _save(self, found: Comparison) -> tuple[Path, Path]:
        folder = self._engine.output_dir
        if folder is None:
            raise ValueError("The studio's engine has no output folder; give it one.")
        name = f"{datetime.now():%Y%m%d-%H%M%S}-compare-{secrets.token_hex(8)}"
        page, partial = folder / f"{name}.html", folder / f".{name}.part"
        try:
            partial.write_text(document(found, self._say, self._words.language), encoding="utf-8")
            partial.replace(page)
        finally:
            partial.unlink(missing_ok=True)
        return page, save_contact_sheet(found, folder / f"{name}.png")  # in English: its letters are Latin

    def _say(self, key: str, **values: object) -> str:
        return self._words(f"compare.{key}", **values)

    def _note(self, text: str, share: float | None = None) -> str:
        return views.progress_note(text, share)

    def _describe(self, progress: Progress) -> str:
        event = progress.event
        which = self._words(
            "compare.progress",
            place=progress.place + 1,
            count=progress.count,
            label=progress.label,
            run=progress.run,
            runs=progress.runs,
        )
        if isinstance(event, Step):
            return f"{which} {self._words('compare.step', step=event.step, steps=event.steps)}"
        if isinstance(event, ModelLoading):
            return f"{which} {self._words('loading', model=event.model)}"
        return f"{which} {self._words('waiting', ahead=event.ahead)}" if isinstance(event, Queued) else which

    def _explain(self, error: Exception) -> str:
        if isinstance(error, SettingError):
            return f"{error.setting.label}: {explain(error.error, self._words)}"
        if isinstance(error, ReferenceFailedError):
            return explain_failure(error.failed, self._words)
        return explain(error, self._words)


def _runs(value: object) -> int:
    """Read the number of runs; what isn't one is refused by `compare`."""
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return int(value) if is_number else 0  # type: ignore[call-overload]


def _busy(is_busy: bool) -> Changes:
    return {"compare_stop": gr.update(interactive=is_busy)}
