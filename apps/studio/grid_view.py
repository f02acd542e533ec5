"""A grid as it is drawn on the page: a table of images, whose labels are text of the page's size and colours."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from apps.service.grid import Axis
from apps.studio.grids import Cells, GridRecord, Place
from apps.studio.strings import Strings
from apps.studio.tabs.grid import axis_label
from apps.studio.views import file_address


def table(record: GridRecord, cells: Cells, words: Strings, busy: Place | None) -> str:
    """Draw the cells that there are, under and beside their values.

    Args:
        record: the grid.
        cells: file and seconds of each image, by place.
        words: of the page.
        busy: place of the cell that is being generated.
    """
    x, y, z = record.settings.axes
    sheets = []
    for k in range(len(z.values)):
        caption = f"<caption>{_label(z, k, words)}</caption>" if z.name else ""
        corner = "<td></td>" if y.name else ""
        head = "".join(f'<th scope="col">{_label(x, i, words)}</th>' for i in range(len(x.values))) if x.name else ""
        rows = []
        for j in range(len(y.values)):
            side = f'<th scope="row">{_label(y, j, words)}</th>' if y.name else ""
            places: Sequence[Place] = [(i, j, k) for i in range(len(x.values))]
            rows.append(
                side + "".join(_cell(record, place, cells.get(place), place == busy, words) for place in places)
            )
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        thead = f"<thead><tr>{corner}{head}</tr></thead>" if head else ""
        sheets.append(f"<table>{caption}{thead}<tbody>{body}</tbody></table>")
    return f'<div class="grid-view">{"".join(sheets)}</div>'


def stage(
    record: GridRecord,
    cells: Cells,
    words: Strings,
    *,
    note: str = "",
    share: float | None = None,
    busy: Place | None = None,
) -> str:
    """Draw a grid in the place of the big image, with a line on how it goes.

    Args:
        record: the grid.
        cells: see `table`.
        words: of the page.
        note: line under the grid.
        share: work done, 0 to 1, drawn as a bar; None for no bar.
        busy: see `table`.
    """
    bar = "" if share is None else f'<div class="grid-bar"><i style="width:{100 * share:.1f}%"></i></div>'
    return f'{table(record, cells, words, busy)}{bar}<p role="status" class="note">{escape(note)}</p>'


def details(record: GridRecord, cells: Cells, words: Strings) -> str:
    """Draw the facts about a grid as small tags: its seed, its axes, how many cells there are, the time they took."""
    axes = [axis for axis in record.settings.axes if axis.name]
    facts = [
        "" if any(axis.name == "seed" for axis in axes) else words("facts.seed", value=record.settings.request.seed),
        *(f"{axis_label(axis.name, words)}: {', '.join(axis.values)}" for axis in axes),
        words("facts.cells", count=len(cells), of=len(record.jobs)),
        words("facts.seconds", value=f"{sum(seconds for _, seconds in cells.values()):.1f}"),
    ]
    return '<div class="facts">' + "".join(f"<span>{escape(fact)}</span>" for fact in facts if fact) + "</div>"


def _label(axis: Axis, index: int, words: Strings) -> str:
    return f"<span>{escape(axis_label(axis.name, words))}</span> {escape(axis.values[index])}"


def _cell(record: GridRecord, place: Place, found: tuple[Path, float] | None, is_busy: bool, words: Strings) -> str:
    if found is None:
        return f'<td><div class="cell{" busy" if is_busy else ""}"></div></td>'
    path, seconds = found
    named = zip(record.settings.axes, place, strict=True)
    alt = ", ".join(f"{axis_label(axis.name, words)} {axis.values[index]}" for axis, index in named if axis.name)
    caption = escape(words("facts.seconds", value=f"{seconds:.1f}"))
    return f'<td><img src="{escape(file_address(path))}" alt="{escape(alt)}"><small>{caption}</small></td>'
