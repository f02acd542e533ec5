"""The curve of a training as SVG: the losses over the steps, in colours of the style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from apps.service.fine_tuning_run import Point
from apps.studio.strings import Strings

WIDTH, HEIGHT = 640, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 30
KINDS = ("train", "validation", "score")
"""In the order in which they are drawn; the kinds of lines of a training's log."""
LINES = 4
"""Horizontal lines with a value each."""
MOST_POINTS = 400
"""Of a line; of more every second, third, ... is drawn."""


def draw(points: Sequence[Point], steps: int, best: int | None, words: Strings) -> str:
    """Draw the curves of a training; nothing before there are any.

    Args:
        points: of all kinds.
        steps: of the whole training, where the axis ends.
        best: the step with the best adapters, which is marked.
        words: of the page.
    """
    shown = [point for point in points if math.isfinite(point.loss)]
    if not shown:
        return ""
    low, high = _range([point.loss for point in shown])

    def place(point: Point) -> tuple[float, float]:
        across = point.step / max(steps, 1)
        down = (high - point.loss) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), TOP + down * (HEIGHT - TOP - BOTTOM)

    parts = [*_axis(low, high), *_labels(steps)]
    if best is not None:
        x = LEFT + best / max(steps, 1) * (WIDTH - LEFT - RIGHT)
        parts.append(f'<line class="best" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    legend = ""
    for kind in KINDS:
        line = [place(point) for point in shown if point.kind == kind]
        if line:
            parts.append(_line(kind, line))
            legend += f'<span class="{kind}">{escape(words(f"ft.curve.{kind}"))}</span>'
    title = escape(words("ft.curve"))
    return (
        f'<figure class="curve"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        f"{''.join(parts)}</svg><figcaption>{legend}</figcaption></figure>"
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the vertical axis."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _axis(low: float, high: float) -> list[str]:
    parts = []
    for number in range(LINES):
        share = number / (LINES - 1)
        y = TOP + share * (HEIGHT - TOP - BOTTOM)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        value = high - share * (high - low)
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    return parts


def _labels(steps: int) -> list[str]:
    y = HEIGHT - 8
    return [
        f'<text x="{LEFT}" y="{y}">0</text>',
        f'<text x="{WIDTH - RIGHT}" y="{y}" text-anchor="end">{steps}</text>',
    ]


def _line(kind: str, places: Sequence[tuple[float, float]]) -> str:
    """Draw a line, and dots where there are few points, a single one among them."""
    every = -(-len(places) // MOST_POINTS)
    drawn = [*places[::every], *([places[-1]] if every > 1 else [])]
    dots = ""
    if kind == "score" or len(drawn) <= 12:
        dots = "".join(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in drawn)
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)}"/>{dots}'
