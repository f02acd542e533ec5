"""The page that asks for name and token, and the routes that start and end a browser session."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from urllib.parse import parse_qs

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from apps.api.guards import OWN_SITES
from apps.api.logins import LoginTable, clear_cookie, set_cookie
from apps.api.messages import error_body

PATHS = ("/login", "/login/", "/logout")
"""Paths that need no user."""
MAX_FIELDS = 8
"""Of the form."""
TEXTS = json.loads(Path(__file__).with_name("login.json").read_text(encoding="utf-8"))
"""Texts by language."""
STYLE = """
:root { color-scheme: light dark; --bg: #faf8f5; --card: #fff; --text: #26232b; --dim: #5d5866; --line: #ddd6cc;
  --main: #a8401f; --error: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --bg: #17161a; --card: #211f26; --text: #eceaf0; --dim: #b3aebc;
  --line: #3d3a44; --main: #b84a27; --error: #ff8f85; } }
* { box-sizing: border-box; } body { margin: 0; min-height: 100vh; display: grid; place-items: center; padding: 20px;
  background: var(--bg); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
form { width: min(100%, 380px); display: grid; gap: 14px; padding: 28px; border-radius: 20px; background: var(--card);
  border: 1px solid var(--line); }
h1 { margin: 0; font-size: 22px; } p { margin: 0; color: var(--dim); font-size: 14px; }
label { display: grid; gap: 5px; font-size: 14px; }
input, button { font: inherit; padding: 10px 13px; border-radius: 12px; }
input { border: 1px solid var(--line); background: var(--bg); color: var(--text); width: 100%; }
button { border: 0; background: var(--main); color: #fff; font-weight: 700; cursor: pointer; }
.error { color: var(--error); font-weight: 700; }
"""


def add_login(app: FastAPI, logins: LoginTable) -> None:
    """Add the routes of the login page.

    Args:
        app: the server.
        logins: keeps the sessions.
    """

    @app.get("/login", include_in_schema=False)
    def show(request: Request) -> HTMLResponse:
        return _page(request)

    @app.post("/login", include_in_schema=False)
    async def sign_in(request: Request) -> Response:
        text = (await request.body()).decode("utf-8", errors="replace")
        try:
            fields = parse_qs(text, max_num_fields=MAX_FIELDS)
        except ValueError as error:
            message = f"The form has more than {MAX_FIELDS} fields; send username and password."
            raise HTTPException(422, error_body("bad_request", message)) from error
        name, token = (fields.get(field, [""])[0].strip() for field in ("username", "password"))
        value = logins.open(name, token)
        if value is None:
            return _page(request, is_wrong=True)
        logins.close(request.headers.get("cookie", ""))  # who signs in again leaves nothing behind
        is_secure = request.headers.get("origin", "").startswith("https://")  # also behind a proxy that ends TLS
        return RedirectResponse("/", 303, {"Set-Cookie": set_cookie(value, is_secure)})

    @app.get("/logout", include_in_schema=False)
    @app.post("/logout", include_in_schema=False)
    def sign_out(request: Request) -> Response:
        if request.method == "GET" and request.headers.get("sec-fetch-site", "none") not in OWN_SITES:
            return _leaving(request)  # a link on another page, which should not sign anybody out
        logins.close(request.headers.get("cookie", ""))
        return RedirectResponse("/login", 303, {"Set-Cookie": clear_cookie()})


def _texts(request: Request) -> tuple[str, dict[str, str]]:
    """Return the browser's language and the texts in it, escaped."""
    accepted = request.headers.get("accept-language", "").lower()
    language = next((name for name in TEXTS if name != "en" and accepted.startswith(name)), "en")
    return language, {key: escape(value) for key, value in TEXTS[language].items()}


def _document(language: str, form: str, status: int) -> HTMLResponse:
    """Return a page that is one form."""
    return HTMLResponse(
        f'<!doctype html><html lang="{language}"><meta charset="utf-8"><title>tessera</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>{form}</html>',
        status,
        {"Cache-Control": "no-store"},
    )


def _leaving(request: Request) -> HTMLResponse:
    """Ask whether to sign out."""
    language, text = _texts(request)
    form = (
        f'<form method="post" action="/logout"><h1>{text["leave"]}</h1><button>{text["leave_button"]}</button></form>'
    )
    return _document(language, form, 200)


def _page(request: Request, is_wrong: bool = False) -> HTMLResponse:
    """Ask for name and token."""
    language, text = _texts(request)
    error = f'<p class="error" role="alert">{text["wrong"]}</p>' if is_wrong else ""
    form = (
        f'<form method="post" action="/login"><h1>{text["title"]}</h1><p>{text["hint"]}</p>{error}'
        f'<label>{text["name"]}<input name="username" autocomplete="username" autofocus required></label>'
        f'<label>{text["token"]}<input name="password" type="password" autocomplete="current-password" required>'
        f"</label>"
        f"<button>{text['button']}</button></form>"
    )
    return _document(language, form, 401 if is_wrong else 200)
