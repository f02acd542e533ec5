"""The browser that tests of the page run in: Chromium, or Firefox where the variable TESSERA_BROWSER says so."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")
IS_FIREFOX = os.environ.get("TESSERA_BROWSER", "chromium") == "firefox"
only_chromium = pytest.mark.skipif(IS_FIREFOX, reason="asks for what only Chromium has")


@contextmanager
def open_browser():
    """Launch the browser, a plain one of the system; skip the test where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    name, path = ("firefox-esr", FIREFOX) if IS_FIREFOX else ("chromium", CHROMIUM)
    if path is None:
        pytest.skip(f"no {name} here; apt-get install --no-install-recommends {name}")
    with sync_api.sync_playwright() as playwright:
        if IS_FIREFOX:
            opened = playwright.firefox.launch(channel="moz-firefox", executable_path=path)
        else:
            opened = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        try:
            yield opened
        finally:
            opened.close()


def fill_number(page, selector, value):
    """Type a number over the one that stands in a field: playwright's own way appends to it in Firefox."""
    page.locator(selector).press("Control+a")
    page.keyboard.type(value)


def double_click(locator):
    """Click twice; what playwright clicks in Firefox never is a double click, so the event is sent beside it."""
    if IS_FIREFOX:
        locator.click()
        locator.dispatch_event("dblclick")
    else:
        locator.dblclick()
