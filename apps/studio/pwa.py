"""The page as an app on a phone: manifest, icons, service worker, and what is shown when the server can't be reached.

Gradio's own switch (`pwa=True`) is off: its manifest has the icons of a file that is to be given, one language, no
colours and no scope, it answers for it behind the gate, which asks for a user, and it has no worker. Its page names
`/manifest.json` whether the switch is on or off, so that is where the English manifest is.

What is served here holds nothing of anybody, and needs no user: a browser fetches a manifest without cookies. There is
no share target: it would be a POST without `Origin` of this server, which the guard refuses, and rightly so.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from functools import lru_cache, partial
from html import escape
from typing import Any, NamedTuple
from xml.etree import ElementTree

import gradio as gr
from fastapi import FastAPI
from PIL import Image, ImageDraw
from starlette.requests import Request
from starlette.responses import Response

from apps.studio import theme
from apps.studio.strings import Strings, languages
from apps.studio.views import LOGO
from dit import __version__

SAFE = 0.56
"""Side of the logo in an icon of which a circle of 0.8 of its side is certain to be seen, with some room."""
OVERSAMPLING = 4
"""Pixels a side that are drawn for one of an icon: Pillow draws edges without steps in between."""
WORKER, OFFLINE = "/worker.js", "/offline.html"
MANIFEST = "application/manifest+json"


class Icon(NamedTuple):
    """An icon.

    Attributes:
        side: pixels.
        share: side of the logo, of that of the icon.
        paper: whether there is a background; else it is transparent.
        purpose: in the manifest; empty for one that isn't in it.
    """

    side: int
    share: float
    paper: bool
    purpose: str = ""


ICONS = {
    "/icon-192.png": Icon(192, 0.9, False, "any"),
    "/icon-512.png": Icon(512, 0.9, False, "any"),
    "/icon-maskable-192.png": Icon(192, SAFE, True, "maskable"),
    "/icon-maskable-512.png": Icon(512, SAFE, True, "maskable"),
    "/apple-touch-icon.png": Icon(180, 0.66, True),  # iOS paints what is transparent black
}
"""Address -> icon."""


def prefix(language: str) -> str:
    """Return what addresses of the page in a language begin with."""
    return "" if language == "en" else f"/{language}"


MANIFESTS = {f"{prefix(language)}/manifest.json": language for language in languages()}
PUBLIC = (*ICONS, *MANIFESTS, WORKER, OFFLINE)
"""Paths that need no user."""


def add_app(app: FastAPI, *, has_users: bool) -> None:
    """Add the routes of the app to a server; before the page, which has others of these names.

    Args:
        app: the server.
        has_users: whether people sign in; their browsers keep nothing but the page without a server.
    """
    files: dict[str, tuple[str, Callable[[], bytes]]] = {
        **{path: ("image/png", partial(draw, icon)) for path, icon in ICONS.items()},
        **{path: (MANIFEST, partial(_manifest_bytes, language)) for path, language in MANIFESTS.items()},
        WORKER: ("text/javascript", partial(worker, has_users)),
        OFFLINE: ("text/html", offline_page),
    }
    for path, (kind, content) in files.items():
        app.add_route(path, _serve(kind, content), ["GET"], include_in_schema=False)


def _serve(kind: str, content: Callable[[], bytes]) -> Callable[[Request], Response]:
    """Return a route that answers with a file which may have changed with the next version of the server."""

    def answer(request: Request) -> Response:
        body = content()
        tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        headers = {"Cache-Control": "no-cache", "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=kind, headers=headers)

    return answer


# --------------------------------------------------------------------------------- files


@lru_cache(maxsize=len(ICONS))
def draw(icon: Icon) -> bytes:
    """Draw an icon from the logo.

    Returns:
        A PNG file.
    """
    logo = ElementTree.fromstring(LOGO)
    large = icon.side * OVERSAMPLING
    unit = icon.share * large / float(logo.get("width", 0))  # pixels a unit of the logo
    start = (1 - icon.share) * large / 2
    image = Image.new("RGBA", (large, large), theme.PAPER if icon.paper else (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    for tile in logo.iter("rect"):
        left, top, width, height, radius = (float(tile.get(name, 0)) for name in ("x", "y", "width", "height", "rx"))
        box = [start + unit * value for value in (left, top, left + width, top + height)]
        pen.rounded_rectangle(box, unit * radius, fill=tile.get("fill"))
    small = image.resize((icon.side, icon.side), Image.Resampling.BOX)
    file = io.BytesIO()
    (small.convert("RGB") if icon.paper else small).save(file, "PNG", optimize=True)
    return file.getvalue()


def manifest(language: str) -> dict[str, Any]:
    """Return the manifest in a language; all are of one app, whose address is that of the page in the language."""
    words = Strings(language)
    return {
        "id": "/",
        "lang": language,
        "name": words("app.name"),
        "short_name": words("app.short_name"),
        "description": words("app.description"),
        "start_url": f"{prefix(language)}/",
        "scope": "/",
        "display": "standalone",
        "background_color": theme.PAPER,
        "theme_color": theme.PAPER,
        "categories": ["graphics", "photo"],
        "icons": [
            {"src": path, "sizes": f"{icon.side}x{icon.side}", "type": "image/png", "purpose": icon.purpose}
            for path, icon in ICONS.items()
            if icon.purpose
        ],
    }


def _manifest_bytes(language: str) -> bytes:
    return json.dumps(manifest(language), ensure_ascii=False).encode()


@lru_cache(maxsize=1)
def offline_page() -> bytes:
    """Return the page that says that the server can't be reached, in all languages; its script shows one."""
    mains = ""
    for language in languages():
        words = Strings(language)
        mains += (
            f'<main lang="{language}"{"" if language == "en" else " hidden"}>{LOGO}<h1>{escape(words("app.offline"))}'
            f"</h1><p>{escape(words('app.offline.hint'))}</p><button>{escape(words('app.retry'))}</button></main>\n"
        )
    names = ("PAPER", "INK", "SOFT", "NIGHT", "CHALK", "DIM")
    values = {name: getattr(theme, name) for name in names} | {"BUTTON": theme.CLAY.c600, "MAINS": mains}
    return _filled("offline.html", values).encode()


@lru_cache(maxsize=2)
def worker(has_users: bool) -> bytes:
    """Return the service worker; it differs in every version, of Gradio and of the page without a server too."""
    seen = hashlib.sha256(offline_page() + _template("worker.js").encode() + gr.__version__.encode()).hexdigest()
    pages = [f"{prefix(language)}/" for language in languages()]
    values = {"VERSION": f"{__version__}-{seen[:8]}", "PAGES": json.dumps(pages)}
    return _filled("worker.js", values | {"KEEPS_ASSETS": json.dumps(not has_users)}).encode()


def head() -> str:
    """Return what the head of the page says of the app, and the script that does the rest."""
    colours = f'data-light="{theme.PAPER}" data-night="{theme.NIGHT}"'
    script = f'<script data-languages="{" ".join(languages())}" {colours}>{_template("pwa.js")}</script>'
    return (
        '<meta name="mobile-web-app-capable" content="yes"><meta name="apple-mobile-web-app-capable" content="yes">'
        f'<meta name="apple-mobile-web-app-title" content="{escape(Strings("en")("app.short_name"))}">'
        '<link rel="apple-touch-icon" href="/apple-touch-icon.png">'
        f'<link rel="icon" type="image/png" href="/icon-192.png">{script}'
    )


def _template(name: str) -> str:
    return (theme.STATIC / name).read_text(encoding="utf-8")


def _filled(name: str, values: dict[str, str]) -> str:
    """Return a file of the folder `static` with values in the places of their names between two @."""
    text = _template(name)
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text
