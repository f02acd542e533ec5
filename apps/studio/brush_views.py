"""HTML of the image to start from, of the brush over it and of its tools; see `static/brush.js`."""

from __future__ import annotations

from html import escape

from apps.studio.strings import Strings
from apps.studio.views import PIXEL_SIDE

MASK_SIDE = 2_048
"""Pixels of the longer side of the canvas at most: a mask of a larger image is as much coarser."""
TOOLS = (("draw", "erase"), ("undo", "redo"), ("clear", "invert"), ("load", "save"))
ZOOMS = (("out", "\u2212"), ("fit", ""), ("in", "+"))
MASK_TYPES = "image/png,image/webp,image/jpeg"


def source(words: Strings, picture: str | None = None, size: tuple[int, int] = (1, 1), mask: str = "") -> str:
    """Draw the image to start from, with the canvas of the brush over it and handles at its sides.

    Args:
        words: of the page.
        picture: data URI; None draws a place to drop one.
        size: of the image, pixels.
        mask: data URI of a mask to begin with.
    """
    if picture is None:
        return f'<div class="brush empty"><p>{escape(words("source.none"))}</p></div>'
    width, height = size
    crisp = "crisp" if max(size) <= PIXEL_SIDE else ""
    share = min(MASK_SIDE / max(size), 1)
    across, down = max(round(width * share), 1), max(round(height * share), 1)
    handles = "".join(
        f'<i class="handle" data-side="{side}" title="{escape(words("brush.grow"))}"></i>'
        for side in ("left", "top", "right", "bottom")
    )
    return (
        f'<div class="brush-frame" style="--w:{width};--h:{height}" data-width="{width}" data-height="{height}">'
        f'<div class="brush"><div class="zoom"><div class="view"><img class="{crisp}" src="{picture}" alt="">'
        f'<canvas width="{across}" height="{down}" data-mask="{mask}" tabindex="0" role="img"'
        f' aria-label="{escape(words("brush.canvas"))}"></canvas></div></div><i class="ring" hidden></i></div>'
        f'<span class="ghost" hidden></span>{handles}</div>'
    )


def brush_tools(words: Strings) -> str:
    """Draw the tools of the brush."""
    groups = "".join(f'<span class="group">{"".join(_tool(words, name) for name in group)}</span>' for group in TOOLS)
    zooms = "".join(
        f'<button type="button" data-zoom="{name}" aria-label="{escape(words(f"brush.zoom.{name}"))}"'
        f"{' id=brush-zoom' if name == 'fit' else ''}>{sign or '100 %'}</button>"
        for name, sign in ZOOMS
    )
    width = (
        f'<label>{escape(words("brush.size"))}<input id="brush-size" type="range" min="1" max="60" value="14"></label>'
    )
    said = (
        f'data-other-shape="{escape(words("brush.other_shape"))}" data-unreadable="{escape(words("brush.unreadable"))}"'
    )
    file = f'<input id="mask-file" type="file" accept="{MASK_TYPES}" hidden>'
    return (
        f'<div class="tools" {said}>{groups}<span class="group">{zooms}</span>{width}{file}</div>'
        f'<p class="remark" id="brush-note" role="status"></p><p class="hint">{escape(words("brush.hint"))}</p>'
    )


def _tool(words: Strings, name: str) -> str:
    pressed = {"draw": ' aria-pressed="true"', "erase": ' aria-pressed="false"'}.get(name, "")
    title, text = escape(words(f"brush.{name}.help")), escape(words(f"brush.{name}"))
    return f'<button type="button" data-tool="{name}"{pressed} title="{title}">{text}</button>'
