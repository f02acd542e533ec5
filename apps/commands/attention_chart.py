"""Draw what a search for an attention plan found: the choice of each head, and the error over the density."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dit.attention.search import PlanPoint, Survey

COLOURS = ("#dddddd", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf", "#d62728")
"""Of patterns, by their order among the candidates; dense attention is grey."""
CELL, GAP, MARGIN, CURVE = 18, 24, 60, 360


def draw_search(survey: Survey, table: Tensor, path: Path) -> None:
    """Draw the chosen candidates by noise level, layer and head, and error over density with the point that was chosen.

    A head's colour is its pattern; the fewer pairs it computes, the stronger the colour.

    Args:
        survey: what was measured.
        table: (bins, layers, heads), numbers of candidates.
        path: PNG file to write.
    """
    bins, layers, heads = table.shape
    patterns = list(dict.fromkeys(one.pattern for one in survey.candidates))
    width = max(2 * MARGIN + bins * (heads * CELL + GAP), 2 * MARGIN + CURVE, 560)
    top = MARGIN + layers * CELL + 40 + 20 * len(patterns)
    picture = Image.new("RGB", (width, top + CURVE + MARGIN), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    # 1. a cell for each head
    draw.text((MARGIN, 8), "heads (across) of layers (down), from much noise to little", "black", font)
    for index in range(bins):
        left = MARGIN + index * (heads * CELL + GAP)
        draw.text((left, 28), _range_of(survey.sigma_bins, index), "black", font)
        for layer in range(layers):
            for head in range(heads):
                number = int(table[index, layer, head])
                computed = float(survey.density[index, layer, number, head])
                colour = COLOURS[patterns.index(survey.candidates[number].pattern) % len(COLOURS)]
                x, y = left + head * CELL, MARGIN + layer * CELL
                draw.rectangle([x, y, x + CELL - 2, y + CELL - 2], _faded(colour, 1 - computed), "#cccccc")
    for number, name in enumerate(patterns):
        y = MARGIN + layers * CELL + 14 + 20 * number
        draw.rectangle([MARGIN, y, MARGIN + 12, y + 12], COLOURS[number % len(COLOURS)])
        draw.text((MARGIN + 20, y - 2), name, "black", font)
    # 2. the best plans
    _draw_curve(draw, font, survey.curve(), survey.point(table), (MARGIN, top, MARGIN + CURVE, top + CURVE))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)


def _draw_curve(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    curve: Sequence[PlanPoint],
    chosen: PlanPoint,
    box: tuple[int, int, int, int],
) -> None:
    """Draw error upwards over density, with the chosen point."""
    left, top, right, bottom = box
    most = max([point.error for point in (*curve, chosen)] + [0.01])

    def place(point: PlanPoint) -> tuple[float, float]:
        return left + (right - left) * point.density, bottom - (bottom - top) * point.error / most

    draw.rectangle(box, outline="#999999")
    for tick in range(0, 11, 2):
        draw.text((left + (right - left) * tick / 10 - 8, bottom + 6), f"{tick / 10:g}", "black", font)
        draw.text((left - 44, bottom - (bottom - top) * tick / 10 - 8), f"{most * tick / 10:.2f}", "black", font)
    draw.text((left, bottom + 26), "share of the pairs that is computed; upwards the error of attention", "black", font)
    points = [place(point) for point in curve]
    if len(points) > 1:
        draw.line(points, "#1f77b4", 2)
    for x, y in points:
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], "#1f77b4")
    x, y = place(chosen)
    draw.ellipse([x - 6, y - 6, x + 6, y + 6], outline="#d62728", width=2)


def _range_of(levels: Sequence[float], index: int) -> str:
    """Name a range of noise levels."""
    if not levels:
        return "all noise levels"
    if index == 0:
        return f">= {levels[0]:.2f}"
    return f"< {levels[index - 1]:.2f}"


def _faded(colour: str, share: float) -> tuple[int, int, int]:
    """Return a colour mixed with white: a share of 1 leaves it."""
    share = 0.25 + 0.75 * min(max(share, 0.0), 1.0)
    red, green, blue = (round(255 - share * (255 - int(colour[at : at + 2], 16))) for at in (1, 3, 5))
    return red, green, blue
