"""Accessibility: axe-core finds nothing on any tab, the keyboard is enough, and layouts hold right to left."""

from __future__ import annotations

import httpx
import pytest

from tests.studio.serving import serving_page
from tests.studio.test_server import browser

__all__ = ["browser"]
RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa")
"""Of WCAG 2.1, levels A and AA."""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving_page(tmp_path_factory.mktemp("page"), with_users=False) as found:
        yield found


def opened(browser, served, language="", width=1280):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(f"{served.address}{language}/")
    page.wait_for_selector("#generate:not([disabled])")
    return page


def tabs_of(page):
    """Yield the name of each tab, opened."""
    for tab in page.locator("#tabs .tab-container button[role=tab]").all():
        tab.click()
        page.wait_for_function("tab => tab.getAttribute('aria-selected') === 'true'", arg=tab.element_handle())
        page.wait_for_timeout(400)  # what the tab asks of the server
        yield tab.inner_text()


@pytest.mark.parametrize(
    ("language", "is_dark", "width"),
    [
        ("", False, 1280),
        pytest.param("", True, 390, marks=pytest.mark.slow),
        pytest.param("/zh", True, 1280, marks=pytest.mark.slow),
        pytest.param("/zh", False, 390, marks=pytest.mark.slow),
    ],
)
def test_axe_finds_nothing_on_any_tab(browser, served, language, is_dark, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = opened(browser, served, language, width)
    if is_dark:
        page.click(".night")
    found, passed = [], 0
    for name in tabs_of(page):
        answer = axe.run(page, options={"runOnly": list(RULES)}).response
        passed += len(answer["passes"])
        found += [(name, one["impact"], one["id"], one["nodes"][0]["html"][:200]) for one in answer["violations"]]
    page.close()
    assert passed > 100
    assert found == []


def test_an_image_is_made_by_keyboard_alone(browser, served):
    page = opened(browser, served)
    page.evaluate("document.activeElement.blur()")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('#prompt textarea')"):
            break
    page.keyboard.type("a red apple")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "generate":
            break
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#stage .note')?.textContent.startsWith('Done')", timeout=30_000)
    assert page.locator("#stage img.smooth, #stage img.crisp").count() == 1
    page.close()


def test_tabs_are_moved_through_by_arrows(browser, served):
    page = opened(browser, served)
    page.get_by_role("tab", name="Text").focus()
    for key, name in (
        ("ArrowRight", "Image"),
        ("End", "Server"),
        ("ArrowRight", "Text"),
        ("ArrowLeft", "Server"),
    ):
        page.keyboard.press(key)
        page.wait_for_function(
            "name => document.querySelector('[role=tab][aria-selected=true]').textContent.trim() === name", arg=name
        )
        assert page.evaluate("document.activeElement.textContent.trim()") == name
    page.close()


@pytest.mark.slow
def test_nothing_overflows_right_to_left(browser, served):
    page = opened(browser, served)
    page.evaluate("document.documentElement.dir = 'rtl'")
    wide = []
    for name in tabs_of(page):
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
                wide.append((name, width))
    page.close()
    assert wide == []


def test_the_address_of_a_language_needs_no_slash(served):
    answer = httpx.get(f"{served.address}/zh", trust_env=False)
    assert answer.status_code == 307
    assert answer.headers["location"] == "/zh/"


def test_a_tab_that_no_model_can_do_leaves_the_tabs_beside_it_as_they_are(browser, served):
    page = opened(browser, served)
    page.get_by_role("tab", name="Class").click()
    page.locator("#need .cannot").wait_for()
    assert not page.locator("#prompt-tools, #go").first.is_visible()
    for name, part in (
        ("Models", "#models-chosen"),
        ("Speed", "#speed-start"),
        ("Gallery", ".gallery-app"),
        ("Text", "#go"),
    ):
        page.get_by_role("tab", name=name, exact=True).click()
        page.locator(part).wait_for(state="visible")
    page.close()
