"""X/Y/Z grids: the same request with some settings varied, every cell timed, laid out on one sheet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from apps.service.request_error import RequestError
from apps.service.requests import OPTIONS, REQUEST, AnyRequest

AXES = {name: one for name, one in OPTIONS.items() if one.option.is_axis}
"""What may be varied. Of `prompt` the first value is what the others replace."""
OFF = "off"
"""The value that leaves an option out, such as a scheduler or a step cache; numbers have none."""
NUMBERS = (int, float)
MAX_VALUES, MAX_CELLS = 8, 64
GAP, LINE, SIDE, LETTERS = 8, 28, 176, 20
"""Pixels: between cells, of a line of text, of the widest column with labels of rows, of letters.

A sheet of some cells is shown at half its size on a phone, where letters of 20 pixels are still read.
"""


@dataclass(frozen=True, slots=True)
class Axis:
    """One setting and its values.

    Attributes:
        name: a key of `AXES`; empty for an axis that isn't used.
        values: as typed.
    """

    name: str = ""
    values: tuple[str, ...] = ("",)


@dataclass(frozen=True, slots=True)
class Cell:
    """One image of a grid.

    Attributes:
        place: index along x, y and z.
        request: what to generate.
    """

    place: tuple[int, int, int]
    request: AnyRequest


@dataclass(frozen=True, slots=True)
class Filled:
    """A generated cell.

    Attributes:
        image: what came out.
        seconds: time it took.
        report: what accelerators did.
    """

    image: Image.Image
    seconds: float
    report: str = ""


def read_axis(name: str, text: str) -> Axis:
    """Read an axis as people type it.

    Args:
        name: a key of `AXES`, or nothing.
        text: values with commas between them.

    Raises:
        ValueError: an unknown setting, no value, too many, or one of a wrong kind.
    """
    if not name:
        return Axis()
    if name not in AXES:
        raise RequestError("grid.axis", f"A grid can vary {', '.join(AXES)}.", choices=", ".join(AXES))
    values = tuple(part.strip() for part in text.split(",") if part.strip())
    if not 1 <= len(values) <= MAX_VALUES:
        raise RequestError(
            "grid.values",
            f"{name}: give 1 to {MAX_VALUES} values with commas between them.",
            field=name,
            value=len(values),
            most=MAX_VALUES,
        )
    for value in values:
        try:
            if AXES[name].type in NUMBERS:
                AXES[name].from_text(value)
        except ValueError as error:
            raise RequestError(
                "grid.number", f"{name}: {value[:40]!r} is no number.", field=name, value=value[:40]
            ) from error
    return Axis(name, values)


def plan(request: AnyRequest, axes: Sequence[Axis]) -> list[Cell]:
    """Vary a request along three axes.

    Args:
        request: with a seed, so that only the axes differ.
        axes: x, y and z.

    Returns:
        The cells, row by row.

    Raises:
        ValueError: too many cells, one axis twice, or a value that the request doesn't take.
    """
    used = [axis.name for axis in axes if axis.name]
    if len(set(used)) < len(used):
        raise RequestError("grid.twice", "Each axis of a grid varies something else.")
    sizes = [range(len(axis.values)) for axis in axes]
    places = list(itertools.product(*reversed(sizes)))
    if len(places) > MAX_CELLS:
        raise RequestError(
            "grid.cells",
            f"The grid has {len(places)} cells; at most {MAX_CELLS} are generated.",
            value=len(places),
            most=MAX_CELLS,
        )
    cells = []
    for z, y, x in places:
        changed = request
        for axis, index in zip(axes, (x, y, z), strict=True):
            changed = _vary(changed, axis, index)
        cells.append(Cell((x, y, z), changed))
    return cells


def _vary(request: AnyRequest, axis: Axis, index: int) -> AnyRequest:
    """Set one setting of a request to a value of an axis."""
    if not axis.name:
        return request
    if axis.name not in type(request).model_fields:
        raise RequestError("setting", f"{request.task.replace('_', ' ')} has no {axis.name} to vary.", field=axis.name)
    return REQUEST.validate_python({**request.model_dump(), axis.name: _value(request, axis, index)})


def _value(request: AnyRequest, axis: Axis, index: int) -> Any:
    text = axis.values[index]
    if axis.name == "prompt":
        said, searched = request.model_dump()["prompt"], axis.values[0]
        if searched not in said:
            raise RequestError(
                "grid.prompt",
                f"prompt: the first value must occur in the prompt, and {searched[:40]!r} doesn't.",
                value=searched[:40],
            )
        return said.replace(searched, text)
    if text == OFF and AXES[axis.name].type not in NUMBERS:
        return None
    return AXES[axis.name].from_text(text)


def compose(axes: Sequence[Axis], cells: dict[tuple[int, int, int], Filled], side: int = 192) -> Image.Image:
    """Lay the cells that are generated so far out on one sheet.

    Args:
        axes: x, y and z.
        cells: what is generated, by place.
        side: longest side of a cell, pixels.

    Returns:
        RGB; cells to come are gray.
    """
    x, y, z = axes
    first = next(iter(cells.values())).image if cells else Image.new("RGB", (side, side))
    scale = side / max(first.size)
    width, height = (round(length * scale) for length in first.size)
    font = ImageFont.load_default(size=LETTERS)
    column, row = width + GAP, height + LINE + GAP
    left = GAP if not y.name else min(_widest(font, [y.name, *y.values]), SIDE) + 2 * GAP
    sheet_height = row * len(y.values) + LINE + (LINE if z.name else 0) + GAP
    sheet = Image.new("RGB", (left + column * len(x.values), sheet_height * len(z.values)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, depth in enumerate(z.values):
        top = k * sheet_height + GAP
        if z.name:
            draw.text((left, top), _fitted(f"{z.name} {depth}", font, sheet.width - left), "black", font)
            top += LINE
        for i, value in enumerate(x.values):
            draw.text((left + i * column, top), _fitted(f"{x.name} {value}", font, width), "black", font)
        top += LINE
        for j, value in enumerate(y.values):
            lines = [_fitted(text, font, left - 2 * GAP) for text in (y.name, value)]
            draw.multiline_text((GAP, top + j * row), "\n".join(lines), "black", font)
            for i in range(len(x.values)):
                corner = (left + i * column, top + j * row)
                _draw_cell(sheet, draw, font, corner, (width, height), cells.get((i, j, k)))
    return sheet


def mosaic(axes: Sequence[Axis], cells: Mapping[tuple[int, int, int], Image.Image], side: int = 320) -> Image.Image:
    """Lay the cells of a grid out without texts and without a ground, for a thumbnail that fits any page.

    Args:
        axes: x, y and z; what belongs to further values of z stands below.
        cells: what is generated, by place.
        side: longest side of the mosaic, pixels.

    Returns:
        RGBA; gaps and cells to come are transparent.
    """
    x, y, z = (len(axis.values) for axis in axes)
    first = next(iter(cells.values())).size if cells else (1, 1)
    gap = max(side // (20 * max(x, y * z)), 1)
    scale = min((side - gap * (x - 1)) / (first[0] * x), (side - gap * (y * z - 1)) / (first[1] * y * z))
    width, height = (max(math.floor(length * scale), 1) for length in first)
    laid = Image.new("RGBA", (x * (width + gap) - gap, y * z * (height + gap) - gap))
    for (i, j, k), image in cells.items():
        small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        laid.paste(small, (i * (width + gap), (k * y + j) * (height + gap)))
    return laid


def _widest(font: Any, texts: Sequence[str]) -> int:
    return max(math.ceil(font.getlength(text)) for text in texts)


def _fitted(text: str, font: Any, width: int) -> str:
    """Return a text, its end left out if it is wider than there is room for."""
    if font.getlength(text) <= width:
        return text
    shorter = (text[:length].rstrip() + "..." for length in range(len(text) - 1, 0, -1))
    return next((one for one in shorter if font.getlength(one) <= width), text[:1])


def _draw_cell(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    font: Any,
    corner: tuple[int, int],
    size: tuple[int, int],
    cell: Filled | None,
) -> None:
    """Draw one cell: its image and how long it took, or gray."""
    if cell is None:
        draw.rectangle((*corner, corner[0] + size[0] - 1, corner[1] + size[1] - 1), "#eeeae4")
        return
    sheet.paste(cell.image.resize(size, Image.Resampling.LANCZOS), corner)
    caption = f"{cell.seconds:.2f} s" + (f", {cell.report}" if cell.report else "")
    draw.text((corner[0], corner[1] + size[1] + 2), _fitted(caption, font, size[0]), "#5f574c", font)
