"""What the tab Models shows: a table of the models with what they need, and what can't be used, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from apps.service.model_download import Download
from apps.service.model_folder import FoundModel
from apps.service.own_models import OfferedModel
from apps.studio import views
from apps.studio.strings import Strings
from pipelines.loading.memory import gib

SHORT = 12
"""Digits of a commit that are shown."""
LISTS = ("model", "speed_model")
"""Parts that a model is chosen with; the second is there where models can be tuned."""
COLUMNS = ("name", "kind", "size", "parameters", "memory", "licence")


def table(rows: Sequence[OfferedModel], unusable: Sequence[FoundModel], words: Strings) -> str:
    """Draw the models; what can't be used stands below with the reason."""
    titles = "".join(f'<th scope="col">{escape(words(f"models.column.{one}"))}</th>' for one in COLUMNS)
    body = "".join(_row(one, words) for one in rows)
    found = f'<table class="models-table"><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>'
    if unusable:
        items = "".join(f"<li><b>{escape(one.name)}</b>: {escape(one.problem)}</li>" for one in unusable)
        found += f'<p class="hint">{escape(words("models.unusable"))}</p><ul class="models-unusable">{items}</ul>'
    return found


def download(last: Download | None, words: Strings) -> str:
    """Draw how a download goes, or how the last one ended; nothing where there was none."""
    if last is None:
        return ""
    if last.state == "failed":
        return views.problem(words("models.failed", name=last.repository, message=last.reason))
    if last.state != "running":
        ended = "models.fetched" if last.state == "done" else "models.stopped"
        return views.progress_note(words(ended, name=last.repository, commit=last.commit[:SHORT]))
    if last.is_cancelled:
        return views.progress_note(words("models.cancelling", name=last.repository))
    said = words("models.fetching", name=last.repository, done=gib(last.fetched), total=gib(last.nbytes))
    return views.progress_note(said, last.share)


def _row(one: OfferedModel, words: Strings) -> str:
    facts = one.facts
    star = "\u2605 " if one.is_favourite else ""
    commit = words("models.pinned", commit=one.origin.rpartition("@")[2][:SHORT]) if one.origin else ""
    marks = ", ".join(filter(None, [words("models.loaded") if one.is_loaded else "", commit]))
    cells = [
        words(f"models.kind.{facts.kind}"),
        gib(facts.nbytes) if facts.nbytes else "",
        _count(facts.parameters),
        facts.problem or _memory(one, words),
        facts.licence,
    ]
    mark = f' <span class="models-mark">{escape(marks)}</span>' if marks else ""
    name = f'<th scope="row">{escape(star + one.key)}{mark}</th>'
    return f'<tr data-verdict="{facts.verdict}">{name}{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'


def _memory(one: OfferedModel, words: Strings) -> str:
    """Say what the weights take in memory, and whether that is there."""
    facts = one.facts
    if facts.verdict == "unknown":
        return words("models.verdict.unknown")
    return words(f"models.verdict.{facts.verdict}", need=gib(facts.memory), free=gib(facts.free))


def _count(parameters: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return str(parameters) if parameters else ""
