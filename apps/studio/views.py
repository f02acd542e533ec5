"""The parts of the page that are drawn as HTML: pure functions from values to markup.

Text that people typed and names from files are escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from apps.service.metadata import PictureSettings
from apps.studio.strings import Strings

LOGO = """<svg viewBox="0 0 34 34" width="34" height="34" aria-hidden="true">
<rect x="1" y="1" width="15" height="15" rx="4.5" fill="#d9603a"/>
<rect x="18" y="1" width="15" height="15" rx="7.5" fill="#e9b44c"/>
<rect x="1" y="18" width="15" height="15" rx="7.5" fill="#2f7f79"/>
<rect x="18" y="18" width="15" height="15" rx="4.5" fill="#41507f"/></svg>"""


def header(words: Strings, other: str, *, has_users: bool = False) -> str:
    """Draw the head of the page.

    Args:
        words: of the page.
        other: address of the page in the other language.
        has_users: whether people have signed in, and may sign out.
    """
    leave = f'<a class="leave" href="/logout">{escape(words("sign_out"))}</a>' if has_users else ""
    return f"""<header class="masthead">{LOGO}<h1>tessera</h1><p>{escape(words("slogan"))}</p>
<a class="language" href="{other}">{escape(words("other_language"))}</a>{leave}
<button type="button" class="night" title="{escape(words("night"))}" aria-label="{escape(words("night"))}">
<svg viewBox="0 0 24 24" width="20" height="20" aria-hidden="true">
<circle cx="12" cy="12" r="8" fill="none" stroke="currentColor" stroke-width="2"/>
<path d="M12 4a8 8 0 0 1 0 16z" fill="currentColor"/></svg></button></header>"""


PIXEL_SIDE = 64
"""Images up to this side are enlarged with crisp edges; larger ones smoothly."""


def stage(
    picture: str | None = None,
    *,
    size: tuple[int, int],
    note: str = "",
    share: float | None = None,
    is_preview: bool = False,
    strip: str = "",
    scales: Sequence[str] = (),
    clip: str | None = None,
    alt: str = "",
) -> str:
    """Draw the big frame with the image in it and a line on how it goes.

    Args:
        picture: address, or data URI of a preview; None draws an empty mosaic.
        size: width and height of the frame in pixels of the image; gives its shape.
        note: line under the frame.
        share: work done, 0 to 1, drawn as a bar; None for no bar.
        is_preview: the image is a rough view of one to come.
        strip: what a step cache did, a letter a step, see `apps.service.events.Step`.
        scales: data URIs of the scales so far.
        clip: address of a clip, which is played; then `picture` shows some of its frames until it is there.
        alt: says what the image shows; a preview needs none, because the line tells how it goes.
    """
    width, height = size
    inner, film = _empty_mosaic(busy=share is not None), ""
    if picture is not None:
        kind = "preview" if is_preview else "crisp" if max(size) <= PIXEL_SIDE else "smooth"
        inner = f'<img class="{kind}" src="{picture}" alt="{escape(alt)}">'
    if picture is not None and clip is not None:
        inner = (
            f'<video src="{escape(clip)}" poster="{picture}" controls loop muted autoplay playsinline>'
            f'<img class="strip" src="{picture}" alt="{escape(alt)}"></video>'
        )
        film = f'<div class="film" data-clip="{escape(clip)}"></div>'  # filled by studio.js
    bar = "" if share is None else f'<div class="bar"><i style="width:{100 * share:.1f}%"></i></div>'
    steps = "".join(f'<i class="{"computed" if letter == "C" else "forecast"}"></i>' for letter in strip)
    steps = f'<div class="steps" aria-label="{strip}">{steps}</div>' if steps else ""
    seen = "".join(f'<img src="{uri}" alt="{i + 1}">' for i, uri in enumerate(scales))
    seen = f'<div class="scales">{seen}</div>' if seen else ""
    frame = f'<div class="frame" style="--w:{width};--h:{height}">{inner}{bar}</div>'
    return f'{frame}{film}{steps}{seen}<p role="status" class="note">{escape(note)}</p>'


def problem(text: str) -> str:
    """Draw what went wrong; nothing for no text."""
    return f'<p role="alert" class="problem">{escape(text)}</p>' if text else ""


def details(settings: PictureSettings, seconds: float, words: Strings, report: str = "") -> str:
    """Draw the facts about one image as small tags."""
    facts = [
        words("facts.seed", value=settings.seed),
        " \u00d7 ".join(map(str, settings.shown_size)),
        words("facts.upscaled", value=settings.upscale) if settings.upscale else "",
        words("facts.frames", value=settings.frames, fps=f"{settings.fps:g}")
        if settings.frames and settings.fps
        else "",
        _steps(settings, words),
        words("facts.guidance", value=f"{settings.guidance:g}") if settings.guidance is not None else "",
        settings.sampler or "",
        *(f"{lora.name} {lora.scale:g}" for lora in settings.loras),
        words("facts.seconds", value=f"{seconds:.1f}"),
        report,
    ]
    return '<div class="facts">' + "".join(f"<span>{escape(fact)}</span>" for fact in facts if fact) + "</div>"


def _steps(settings: PictureSettings, words: Strings) -> str:
    """Say how many steps were taken, and of how many if the run was ended early."""
    if settings.steps is None:
        return ""
    if settings.finish_after is not None and settings.finish_after < settings.steps:
        return words("facts.steps_of", value=settings.finish_after, of=settings.steps)
    return words("facts.steps", value=settings.steps)


def vocabulary(names: Sequence[str], model: str, words: Strings) -> str:
    """Draw the words that a model knows, searchable; a click puts one into the prompt (see studio.js)."""
    if not names:
        return ""
    chips = "".join(f'<button type="button" class="word">{escape(name)}</button>' for name in names)
    title = escape(words("words", count=len(names), model=model))
    search = escape(words("words.search"))
    return (
        f'<details class="words"><summary><b>{title}</b><span>{escape(words("words.hint"))}</span></summary>'
        f'<input type="search" placeholder="{search}" aria-label="{search}">'
        f'<div class="chips">{chips}</div><p class="nothing" hidden>{escape(words("words.none"))}</p></details>'
    )


def progress_note(text: str, share: float | None = None) -> str:
    """Draw a line on how something goes, with a bar above it.

    Args:
        text: the line.
        share: work done, 0 to 1; None for no bar.
    """
    bar = "" if share is None else f'<div class="grid-bar"><i style="width:{100 * share:.1f}%"></i></div>'
    return f'{bar}<p role="status" class="note">{escape(text)}</p>'


def note(text: str) -> str:
    """Draw a remark on a card; nothing for no text."""
    return f'<p class="remark">{escape(text)}</p>' if text else ""


RECIPES = {
    "classes": ("tessera convert --family dit --checkpoint DiT-XL-2-256x256.pt -o models/dit", "models/dit"),
    "scales": ("tessera convert --family var --checkpoint var_d16.pth --vae vae_ch160v4096z32.pth -o models/var",
               "models/var"),
    "video": ("", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
}  # fmt: skip
"""How to get a model for a tab that no model here can do: what to run first, if anything, and
what to start with then."""


def unsupported_notice(model: str, mode: str, other: str | None, words: Strings, makes_clips: bool = False) -> str:
    """Draw what stands in a tab that the chosen model can't do.

    Args:
        model: its name.
        mode: the tab.
        other: a model that can; None if there is none here.
        words: of the page.
        makes_clips: whether the model does.
    """
    reason = "clips" if makes_clips and mode in ("text", "image") else mode
    title, steps = escape(words(f"cant.{reason}", model=model)), ""
    if other is not None:
        remedy = words("cant.other", model=other)
    elif mode in RECIPES:
        remedy = words(f"cant.{mode}.how")
        command, folder = RECIPES[mode]
        lines = [line for line in (command, f"tessera studio --model {folder}") if line]
        # Word by word, so that no line breaks at a hyphen.
        words_of = (" ".join(f"<span>{escape(word)}</span>" for word in line.split()) for line in lines)
        steps = "<ol>" + "".join(f"<li><code>{line}</code></li>" for line in words_of) + "</ol>"
    else:
        remedy = words("cant.none")
    tiles = "".join(f'<i class="t{i}"></i>' for i in range(4))
    art = f'<div class="tiles" aria-hidden="true">{tiles}</div>'
    return f'<section class="cannot" role="status">{art}<h2>{title}</h2><p>{escape(remedy)}</p>{steps}</section>'


def hint(text: str) -> str:
    """Draw a quiet remark; nothing for no text."""
    return f'<p class="hint">{escape(text)}</p>' if text else ""


def origin(text: str) -> str:
    """Draw what a file says about how it was made; nothing for no text."""
    return f'<p class="hint origin">{escape(text)}</p>' if text else ""


def end_image(name: str, words: Strings, picture: str | None = None, note: str = "") -> str:
    """Draw the image that clips begin or end with.

    Args:
        name: key of what it is called.
        words: of the page.
        picture: data URI; None draws a place to drop one.
        note: what of it was left out.
    """
    title = escape(words(name))
    inside = (
        f"<p>{escape(words('video.none' if name == 'video' else 'end.none'))}</p>"
        if picture is None
        else f'<img src="{picture}" alt="{title}">'
    )
    empty = " empty" if picture is None else ""
    return f'<figure class="end-image{empty}"><figcaption>{title}</figcaption>{inside}{hint(note)}</figure>'


def file_address(path: Path) -> str:
    """Return where a file of the output folder is served, byte for byte: saved from there it keeps its settings."""
    return f"/outputs/{quote(path.name)}"


def preview_uri(image: Image.Image) -> str:
    """Return a small preview as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _empty_mosaic(busy: bool) -> str:
    """Draw the tiles that wait for an image; they shimmer while one is on its way."""
    tiles = "".join(f'<i class="t{(i * 3 + i // 4) % 4}" style="--n:{(i * 7) % 16}"></i>' for i in range(16))
    return f'<div class="mosaic{" busy" if busy else ""}" aria-hidden="true">{tiles}</div>'
