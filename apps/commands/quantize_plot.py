"""Draw a plan of mixed precision: the format of each layer, its size, and how sensitive it is in each part of a run."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dit.quant.precision_plan import MixedPrecisionPlan

COLOURS = ("#1f77b4", "#2ca02c", "#ff7f0e", "#d62728", "#9467bd", "#8c564b")
"""Of the candidates, in their order."""
ROW, CELL, NAMES, BAR, MARGIN, TOP, GAP = 18, 46, 340, 180, 16, 62, 24
"""Pixels: height of a row, width of a cell, of the names and of the longest bar, and the space around them."""
DECADES = 2.0
"""Range of errors from white to the darkest cell, as powers of ten."""


def draw_plan(plan: MixedPrecisionPlan, path: Path) -> None:
    """Draw a row for each layer: its name, a bar in the colour of its format, and a cell for each part of the run.

    The longer the bar, the more bytes; the darker the cell, the larger the error of the layer's unit in the smallest
    format. Errors are compared within a group, whose measure they are in.

    Args:
        plan: what was chosen.
        path: PNG file to write.
    """
    colour = {bits: COLOURS[number % len(COLOURS)] for number, bits in enumerate(plan.candidates)}
    cells, bars = MARGIN + NAMES + BAR + GAP, MARGIN + NAMES
    size = cells + len(plan.sigmas) * CELL + MARGIN, TOP + len(plan.layers) * ROW + GAP * (len(colour) + 1)
    picture = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    draw.text((MARGIN, 10), f"{plan.average_bits:.2f} bits of a weight on average, within {plan.budget}", "black", font)
    draw.text((bars, 36), "bytes", "black", font)
    for number, level in enumerate(plan.sigmas):
        draw.text((cells + number * CELL, 36), "all" if level is None else f"{level:.3g}", "black", font)
    most_bytes = max(one.bytes for one in plan.layers)
    most_error = {one.group: 0.0 for one in plan.layers}
    for one in plan.layers:
        most_error[one.group] = max(most_error[one.group], *one.errors)
    for number, one in enumerate(plan.layers):
        y = TOP + number * ROW
        draw.text((MARGIN, y), f"{one.name[-42:]} ({one.group})", "black", font)
        draw.rectangle([bars, y + 2, bars + BAR * one.bytes / most_bytes, y + ROW - 4], colour[one.bits])
        for part, error in enumerate(one.errors):
            x = cells + part * CELL
            draw.rectangle([x, y, x + CELL - 2, y + ROW - 2], _shade(error, most_error[one.group]), "#cccccc")
    for number, (bits, count) in enumerate(plan.counts().items()):
        y = TOP + len(plan.layers) * ROW + GAP // 2 + GAP * number
        draw.rectangle([MARGIN, y, MARGIN + 12, y + 12], colour[bits])
        draw.text((MARGIN + 20, y - 2), f"{bits}: {count} layers", "black", font)
    picture.save(path, optimize=True)


def _shade(error: float, most: float) -> tuple[int, int, int]:
    """Return white for errors that are `DECADES` powers of ten below the largest, dark grey for the largest."""
    if error <= 0 or most <= 0:
        return 255, 255, 255
    share = min(max(1 + math.log10(error / most) / DECADES, 0.0), 1.0)
    level = 255 - round(205 * share)
    return level, level, level
