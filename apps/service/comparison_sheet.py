"""A comparison as one image: every setting with its numbers, and how it differs from the reference."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageDraw, ImageFont

from apps.service.comparison import Comparison, Result
from apps.service.comparison_page import english, numbers
from apps.service.media import contact_strip
from apps.service.metadata import mark_of
from apps.service.provenance import finish_file, packet
from apps.service.xmp import pillow_options

CELL, GAP, LINE, LETTERS = 256, 12, 22, 16
"""Pixels: longest side of an image, between cells, of a line of text, of letters."""
GAIN = 8
"""By which differences are amplified."""
COLUMNS = 4
INK, SOFT = "#26221d", "#6d6459"


def contact_sheet(comparison: Comparison, say: Callable[..., str] = english) -> Image.Image:
    """Lay the images of all settings out in rows, those of differences below each; of clips some frames side by side.

    Args:
        comparison: what was found.
        say: returns the text of a key of `apps.service.comparison_page.TEXTS`.

    Returns:
        RGB, on white.
    """
    results = comparison.results
    first = _view(comparison.reference)
    scale = CELL / max(first.size) if len(comparison.reference.frames) == 1 else 2 * CELL / max(first.size)
    width, height = (max(round(side * scale), 1) for side in first.size)
    columns = min(len(results), COLUMNS if width <= CELL else COLUMNS // 2)
    font = ImageFont.load_default(size=LETTERS)
    cell_height = 2 * height + 3 * LINE + 2 * GAP
    rows = -(-len(results) // columns)
    head = 2 * LINE + GAP
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, head + rows * cell_height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    title = fitted(" ".join(comparison.prompt.split()), font, sheet.width - 2 * GAP)
    draw.text((GAP, GAP), title, INK, font)
    facts = f"{say('difference')} {say('gain')} x{GAIN}"
    draw.text((GAP, GAP + LINE), fitted(facts, font, sheet.width - 2 * GAP), SOFT, font)
    for place, one in enumerate(results):
        row, column = divmod(place, columns)
        corner = (GAP + column * (width + GAP), head + GAP + row * cell_height)
        _draw_cell(sheet, draw, font, corner, (width, height), (comparison, place, one), say)
    return sheet


def save_contact_sheet(comparison: Comparison, path: Path, say: Callable[..., str] = english) -> Path:
    """Write the contact sheet as a PNG file with the mark of its origin; it appears complete or not at all.

    Args:
        comparison: what was found.
        path: the file; an existing one is replaced.
        say: see `contact_sheet`.

    Returns:
        `path`.

    Raises:
        OSError: it can't be written.
    """
    mark = mark_of(comparison.request)
    partial = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with partial.open("xb") as file:
            contact_sheet(comparison, say).save(file, "PNG", **pillow_options("PNG", packet(mark)))
        finish_file(partial, "PNG", mark)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def fitted(text: str, font: Any, width: int) -> str:
    """Return a text, its end left out if it is wider than there is room for."""
    if font.getlength(text) <= width:
        return text
    shorter = (text[:length].rstrip() + "..." for length in range(len(text) - 1, 0, -1))
    return next((one for one in shorter if font.getlength(one) <= width), text[:1])


def _view(result: Result) -> Image.Image:
    return _strip(result.frames)


def _strip(frames: Sequence[Image.Image]) -> Image.Image:
    return frames[0] if len(frames) == 1 else contact_strip(frames)


def _draw_cell(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    font: Any,
    corner: tuple[int, int],
    size: tuple[int, int],
    drawn: tuple[Comparison, int, Result],
    say: Callable[..., str],
) -> None:
    """Draw one setting: its image, what it is called, its numbers, and the difference from the reference."""
    comparison, place, result = drawn
    x, y = corner
    width, height = size
    label = fitted(f"{place + 1}. {result.setting.label}", font, width)
    if result.problem:
        draw.rectangle((x, y, x + width - 1, y + height - 1), "#eeeae4")
        draw.text((x, y + height + 2), label, INK, font)
        reason = fitted(say("failed", reason=result.problem), font, width)
        draw.text((x, y + height + 2 + LINE), reason, SOFT, font)
        return
    way = Image.Resampling.NEAREST if max(result.frames[0].size) * 2 <= CELL else Image.Resampling.LANCZOS
    sheet.paste(_view(result).resize(size, way), corner)
    draw.text((x, y + height + 2), label, INK, font)
    _, later, gain, _, psnr, ssim = numbers(comparison, result, say)
    lines = [f"{later} s, x{gain}", say("reference") if place == 0 else f"{say('psnr')} {psnr}, SSIM {ssim}"]
    for i, line in enumerate(lines):
        draw.text((x, y + height + 2 + LINE * (i + 1)), fitted(line, font, width), SOFT, font)
    if place and result.psnr is not None:
        pairs = zip(comparison.reference.frames, result.frames, strict=True)
        difference = _strip([_amplified(ImageChops.difference(a, b)) for a, b in pairs])
        sheet.paste(difference.resize(size, way), (x, y + height + 3 * LINE + GAP))


def _amplified(difference: Image.Image) -> Image.Image:
    return difference.point([min(value * GAIN, 255) for value in range(256)] * 3)
