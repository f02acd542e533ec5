"""The parts of the page that are drawn as HTML: pure functions from values to markup.

Text that people typed never gets here; names from files are escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from apps.metadata import PictureSettings

LOGO = """<svg viewBox="0 0 34 34" width="34" height="34" aria-hidden="true">
<rect x="1" y="1" width="15" height="15" rx="4.5" fill="#d9603a"/>
<rect x="18" y="1" width="15" height="15" rx="7.5" fill="#e9b44c"/>
<rect x="1" y="18" width="15" height="15" rx="7.5" fill="#2f7f79"/>
<rect x="18" y="18" width="15" height="15" rx="4.5" fill="#41507f"/></svg>"""

HEADER = f"""<header class="masthead">{LOGO}<h1>tessera</h1><p>Say it, and watch it being laid.</p>
<button type="button" class="night" title="Light or dark" aria-label="Switch between light and dark">
<svg viewBox="0 0 24 24" width="20" height="20" aria-hidden="true">
<circle cx="12" cy="12" r="8" fill="none" stroke="currentColor" stroke-width="2"/>
<path d="M12 4a8 8 0 0 1 0 16z" fill="currentColor"/></svg></button></header>"""

PIXEL_SIDE = 64
"""Pictures up to this side are enlarged with crisp edges; larger ones smoothly."""


def stage(
    picture: str | None = None,
    *,
    size: tuple[int, int],
    note: str = "",
    share: float | None = None,
    is_preview: bool = False,
    is_problem: bool = False,
) -> str:
    """Draw the big frame with the picture in it and a line on how it goes.

    Args:
        picture: data URI; None draws an empty mosaic.
        size: width and height of the frame in pixels of the picture; gives its shape.
        note: line under the frame.
        share: work done, 0 to 1, drawn as a bar; None for no bar.
        is_preview: the picture is a rough view of one to come.
        is_problem: the note tells of a failure.
    """
    width, height = size
    inner = _empty_mosaic(busy=share is not None)
    if picture is not None:
        kind = "preview" if is_preview else "crisp" if max(size) <= PIXEL_SIDE else "smooth"
        inner = f'<img class="{kind}" src="{picture}" alt="{"preview" if is_preview else "the picture"}">'
    bar = "" if share is None else f'<div class="bar"><i style="width:{100 * share:.1f}%"></i></div>'
    role = 'role="alert" class="note problem"' if is_problem else 'role="status" class="note"'
    return f'<div class="frame" style="--w:{width};--h:{height}">{inner}{bar}</div><p {role}>{escape(note)}</p>'


def details(settings: PictureSettings, seconds: float) -> str:
    """Draw the facts about one picture as small tags."""
    facts = (
        f"seed {settings.seed}",
        f"{settings.width} \u00d7 {settings.height}",
        f"{settings.steps} steps",
        f"guidance {settings.guidance:g}",
        f"{seconds:.1f} s",
    )
    return '<div class="facts">' + "".join(f"<span>{escape(fact)}</span>" for fact in facts) + "</div>"


def vocabulary(words: Sequence[str], model: str) -> str:
    """Draw the words that a model knows, searchable; a click puts one into the prompt (see studio.js)."""
    if not words:
        return ""
    chips = "".join(f'<button type="button" class="word">{escape(word)}</button>' for word in words)
    return (
        f'<details class="words"><summary><b>{len(words)} things {escape(model)} can paint</b>'
        "<span>Click one to add it to the prompt.</span></summary>"
        '<input type="search" placeholder="Search, for example: cat" aria-label="Search the words">'
        f'<div class="chips">{chips}</div><p class="nothing" hidden>Nothing of that name.</p></details>'
    )


def file_uri(path: Path) -> str:
    """Return a PNG file as a data URI, byte for byte, so that saving it from the page keeps its settings."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def preview_uri(image: Image.Image) -> str:
    """Return a small preview as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _empty_mosaic(busy: bool) -> str:
    """Draw the tiles that wait for a picture; they shimmer while one is on its way."""
    tiles = "".join(f'<i class="t{(i * 3 + i // 4) % 4}" style="--n:{(i * 7) % 16}"></i>' for i in range(16))
    return f'<div class="mosaic{" busy" if busy else ""}" aria-hidden="true">{tiles}</div>'
