"""A plain chart of likeness over cost, drawn with Pillow: dots for settings, a line along the best of each method."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SIZE, MARGIN, LEGEND = (1000, 620), (70, 40), 300
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str, value: str = "to_uncached_db") -> None:
    """Draw a chart.

    Args:
        rows: results with "method", "cost" and the value.
        path: PNG file to write.
        title: above the chart.
        value: what is drawn upwards, in dB.
    """
    picture = Image.new("RGB", SIZE, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    rows = [row for row in rows if row[value] < 99]
    values = [row[value] for row in rows]
    low, high = 5 * int(min(values) / 5), 5 * (int(max(values) / 5) + 1)
    left, top = MARGIN
    right, bottom = SIZE[0] - LEGEND, SIZE[1] - 60

    def place(cost: float, level: float) -> tuple[float, float]:
        x = left + (right - left) * (cost - 0.15) / 0.85
        return x, bottom - (bottom - top) * (level - low) / (high - low)

    draw.text((left, 10), title, "black", font)
    for level in range(low, high + 1, 5):
        draw.line([place(0.15, level), place(1.0, level)], "#dddddd")
        draw.text((left - 40, place(0, level)[1] - 8), str(level), "black", font)
    for tick in range(2, 11):
        x = place(tick / 10, low)[0]
        draw.line([(x, top), (x, bottom)], "#eeeeee")
        draw.text((x - 10, bottom + 8), f"{tick / 10:g}", "black", font)
    draw.text((left, bottom + 30), "cost (share of the network's operations); upwards PSNR in dB", "black", font)
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        colour = COLOURS[number % len(COLOURS)]
        points = sorted((row["cost"], row[value]) for row in rows if row["method"] == method)
        best = [point for i, point in enumerate(points) if point[1] >= max(v for _, v in points[: i + 1])]
        if len(best) > 1:
            draw.line([place(*point) for point in best], colour, 2)
        for point in points:
            x, y = place(*point)
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], colour)
        draw.ellipse([right + 20, top + 26 * number, right + 30, top + 26 * number + 10], colour)
        draw.text((right + 38, top + 26 * number - 4), method, "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)
