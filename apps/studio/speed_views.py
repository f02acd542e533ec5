"""What the tab Speed shows of a tuning: how it goes, the settings that were found, and their plot, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from apps.service.comparison_plot import Point, draw
from apps.service.tuning import Tuning
from apps.studio import views
from apps.studio.strings import Strings

PROFILES = ("balanced", "faithful", "fastest")
"""Named settings that the tab offers, in its order."""


def progress(tuning: Tuning | None, words: Strings) -> str:
    """Draw how a tuning goes; nothing where there is none, or where it failed."""
    if tuning is None or tuning.state == "failed":
        return ""
    if tuning.state != "running":
        return views.progress_note(words(f"speed.{tuning.state}", model=tuning.settings.model))
    return views.progress_note(_phase(tuning, words), tuning.share)


def _phase(tuning: Tuning, words: Strings) -> str:
    """Return what a tuning that runs is at."""
    news = tuning.news
    if tuning.is_stopping:
        return words("speed.stopping")
    if news.get("event") != "progress":  # before its first word, or after its last
        return words("speed.done" if news else "loading", model=tuning.settings.model)
    minutes, seconds = divmod(round(float(news["seconds_left"])), 60)
    return words(
        "speed.progress",
        phase=words(f"speed.phase.{news['phase']}"),
        number=int(news["done"]) + 1,
        total=max(int(news["total"]), int(news["done"]) + 1),
        left=f"{minutes}:{seconds:02d}",
    )


def failure(tuning: Tuning | None, words: Strings) -> str:
    """Draw why a tuning failed; nothing for one that didn't."""
    if tuning is None or tuning.state != "failed":
        return ""
    return views.problem(words("speed.failed", message=tuning.reason) if tuning.reason else words("speed.killed"))


def result(
    profiles: Mapping[str, Mapping[str, Any]], front: Sequence[Mapping[str, Any]], plain: float | None, words: Strings
) -> str:
    """Draw the settings for the named goals as a table, and those that no other dominates as a plot.

    Args:
        profiles: name -> setting, see `pipelines.tuning.record.Choice`.
        front: settings.
        plain: seconds of a plain request, if known.
        words: of the page.
    """
    rows = "".join(_row(name, profiles[name], words) for name in PROFILES if name in profiles)
    parts = [_table(rows, words)] if rows else []
    points = [
        Point(number, _parts(one), float(one["seconds"]), float(one["quality"]["psnr"]), True)
        for number, one in enumerate(front, 1)
        if one.get("seconds") is not None and "psnr" in one.get("quality", {})
    ]
    if plain is not None and points:
        points.insert(0, Point(0, words("profile.none"), plain, float("inf"), True))
    drawing = draw(points, words("speed.seconds"), words("speed.decibels"), words("speed.equal"))
    if drawing:
        listed = "".join(f"<li>{escape(one.label)}</li>" for one in points if one.number)
        parts.append(f'<div class="cmp">{drawing}<ol class="speed-list">{listed}</ol></div>')
    return "".join(parts)


def _table(rows: str, words: Strings) -> str:
    titles = "".join(f"<th scope='col'>{escape(words(f'speed.column.{one}'))}</th>" for one in COLUMNS)
    return f'<table class="speed-table"><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table>'


COLUMNS = ("name", "gain", "quality", "reached", "parts")


def _row(name: str, choice: Mapping[str, Any], words: Strings) -> str:
    gain, quality, reached = choice.get("gain"), choice.get("quality", {}).get("psnr"), choice.get("reached")
    cells = [
        words(f"profile.{name}"),
        "" if gain is None else f"{gain:.1f}\u00d7",
        "" if quality is None else f"{quality:.1f} dB",
        "" if reached is None else f"{reached:.0%}",
        _parts(choice),
    ]
    first, *others = map(escape, cells)
    return f"<tr><th scope='row'>{first}</th>{''.join(f'<td>{one}</td>' for one in others)}</tr>"


def _parts(choice: Mapping[str, Any]) -> str:
    """Return the parts of a setting as a line, without names of files."""
    return ", ".join(f"{name.replace('_', ' ')} {_short(value)}".strip() for name, value in choice["parts"].items())


def _short(value: Any) -> str:
    if not isinstance(value, Mapping):
        return "" if value is True else str(value)[:40]
    flat = {**value, **value.get("params", {})}
    preset = flat.get("preset")
    kept = {name: one for name, one in flat.items() if name not in ("params", "profile", "preset") and one is not None}
    named = [str(preset)] if preset is not None and preset not in kept else []
    return " ".join([*named, *(f"{name}={_number(one)}" for name, one in kept.items())])


def _number(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "-".join(map(_number, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)[:40]
