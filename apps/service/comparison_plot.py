"""Seconds against decibels of settings, as an SVG drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from apps.service.comparison import Comparison

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 18, 44
"""Pixels of the drawing around the plot."""
MARGIN = 0.08
"""Of the range of the numbers, beside the outermost points."""
LABEL_STEP = 14
"""Pixels between the numbers of points that lie on each other."""
NEAR = 12
"""Pixels between points that lie on each other."""


@dataclass(frozen=True, slots=True)
class Point:
    """A setting in a plot.

    Attributes:
        number: that stands beside it.
        label: says what it is when it is pointed at.
        seconds: time of a request.
        decibels: PSNR to the reference; infinite for an equal result.
        is_best: no other setting is faster and nearer.
    """

    number: int
    label: str
    seconds: float
    decibels: float
    is_best: bool


def plot(comparison: Comparison, seconds: str, decibels: str, equal: str) -> str:
    """Draw one point a setting of a comparison, see `draw`; its results that have decibels, numbered from 1."""
    points = [
        Point(place + 1, one.setting.label, one.seconds, one.psnr, place in comparison.front)
        for place, one in enumerate(comparison.results)
        if one.psnr is not None
    ]
    return draw(points, seconds, decibels, equal)


def draw(points: Sequence[Point], seconds: str, decibels: str, equal: str) -> str:
    """Draw one point a setting: left is faster, up is nearer to the reference.

    Args:
        points: of the settings.
        seconds: label of the axis to the right.
        decibels: label of the axis upwards.
        equal: label of the line of results that are equal to the reference, whose decibels are infinite.

    Returns:
        An `svg` element without fonts, colours or scripts of its own; '' for fewer than two points.
    """
    if len(points) < 2:
        return ""
    low, high = _range([one.decibels for one in points if math.isfinite(one.decibels)] or [40.0])
    slow, fast = max(one.seconds for one in points), 0.0
    slow = slow * (1 + MARGIN) or 1.0
    plane = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)

    def place_of(x: float, y: float) -> tuple[float, float]:
        share = 1.0 if math.isinf(y) else 0.92 * (y - low) / (high - low)  # the top line is for equal ones
        return LEFT + plane[0] * (x - fast) / (slow - fast), TOP + plane[1] * (1 - share)

    places = [place_of(one.seconds, one.decibels) for one in points]
    axes = f"M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"
    parts = [f'<path class="cmp-axis" d="{axes}"/>']
    for value in _ticks(0.0, slow):
        x, _ = place_of(value, low)
        parts.append(f'<text x="{x:.0f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    for value in _ticks(low, high):
        _, y = place_of(0.0, value)
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.0f}" text-anchor="end">{value:g}</text>')
    parts.append(f'<text x="{LEFT - 6}" y="{TOP + 4}" text-anchor="end">{escape(equal)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(seconds)}</text>')
    parts.append(f'<text x="{LEFT + 8}" y="{TOP + 4}">{escape(decibels)}</text>')
    front = sorted(place for one, place in zip(points, places, strict=True) if one.is_best)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in front)
    parts.append(f'<polyline class="cmp-front" points="{line}"/>')
    parts += _marks(points, places)
    names = ", ".join(f"{one.number}: {one.label}" for one in points)
    return (
        f'<svg class="cmp-plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(f"{decibels}, {seconds}; {names}")}">{"".join(parts)}</svg>'
    )


def _marks(points: Sequence[Point], places: Sequence[tuple[float, float]]) -> list[str]:
    """Draw the points and their numbers, those of points on each other side by side."""
    parts: list[str] = []
    taken: list[tuple[float, float]] = []
    for one, (x, y) in zip(points, places, strict=True):
        kind = ' class="cmp-best"' if one.is_best else ""
        parts.append(f'<circle{kind} cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(one.label)}</title></circle>')
        crowd = sum(math.dist((x, y), other) < NEAR for other in taken)
        taken.append((x, y))
        number = f'<text class="cmp-number" x="{x + 9 + crowd * LABEL_STEP:.1f}" y="{y + 14:.1f}">{one.number}</text>'
        parts.append(number)
    return parts


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return bounds around values that are never equal."""
    low, high = min(values), max(values)
    margin = max((high - low) * MARGIN, 1.0)
    return low - margin, high + margin


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about so many round numbers within bounds."""
    raw = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= raw)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]
