"""The gallery of the page in a browser: search, selection, viewer, boards, undo, and ten thousand images."""

from __future__ import annotations

import itertools
import json
import os
import zipfile
from types import SimpleNamespace

import pytest
from PIL import Image

from apps.service.gallery_store import Person, Wanted
from apps.service.job_store import StoredPicture
from apps.studio.strings import Strings
from tests.studio.browsers import double_click
from tests.studio.serving import client_of, serving_page
from tests.studio.test_server import browser

__all__ = ["browser"]
LOCAL = Person("local", sees_all=True)
COUNTER = itertools.count(1)
MANY = 10_000
TABLES = ("jobs", "pictures", "gallery_items", "favourites", "boards", "board_items")
SETTINGS = {"model": "fake", "fingerprint": "0" * 16, "width": 64, "height": 32}
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def world(tmp_path_factory, browser):
    """Serve a page without users, and open it once: that takes most of the time."""
    with serving_page(tmp_path_factory.mktemp("gallery"), with_users=False) as served:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(30_000)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(served.address)
        page.wait_for_selector("#generate:not([disabled])")
        yield SimpleNamespace(served=served, page=page, errors=errors, gallery=served.engine.gallery)
        page.close()


@pytest.fixture
def local(world):
    """Begin with an empty gallery; afterwards the script has raised nothing."""
    with world.served.engine._store.using() as db:
        for table in TABLES:
            db.execute(f"DELETE FROM {table}")
    yield world
    world.page.evaluate("document.querySelectorAll('dialog').forEach((one) => one.close())")
    assert world.errors == []


def record(served, prompt, owner="local", **changes):
    """Put a finished image on record; returns its number."""
    store, number = served.engine._store, next(COUNTER)
    job, name = f"{number:016x}", f"picture-{number}.png"
    Image.new("RGB", (64, 32), (200, 30, 30)).save(served.out / name)
    with store.using() as db:
        query = "INSERT INTO jobs(id, owner, request, state, created, ended) VALUES (?, ?, '{}', 'done', 1, 2)"
        db.execute(query, (job, owner))
    settings = {**SETTINGS, "prompt": prompt, "seed": number, **changes}
    store.add_picture(StoredPicture(job, 0, name, json.dumps(settings), 1.0))
    return served.engine.gallery.numbers(LOCAL, Wanted())[0]


def seed(served, count):
    """Put as many images on record, with one file that they share by hard links."""
    Image.new("RGB", (16, 16), (30, 120, 200)).save(served.out / "one.png")
    for i in range(count):
        os.link(served.out / "one.png", served.out / f"many-{i}.png")
    with served.engine._store.using() as db:
        db.execute("BEGIN")
        query = "INSERT INTO jobs(id, owner, request, state, created, ended) VALUES ('m', 'local', '{}', 'done', 1, 2)"
        db.execute(query)
        rows = ((i, f"many-{i}.png", json.dumps({**SETTINGS, "seed": 1, "prompt": f"a fox {i}"})) for i in range(count))
        db.executemany("INSERT INTO pictures(job, place, name, settings, seconds) VALUES ('m', ?, ?, ?, 1)", rows)
        db.execute("COMMIT")


def open_gallery(page, count=None, name="Gallery"):
    """Open the tab, from another one, without filters."""
    page.locator("[role=tab]:visible").first.click()
    page.locator("[role=tab]:visible", has_text=name).first.click()
    page.evaluate("document.querySelectorAll('.gallery-bar [type=search]').forEach((one) => { one.value = ''; })")
    page.evaluate("window.tesseraGallery.open()")
    if count is not None:
        note_says(page, "1 item" if count == 1 else f"{count} items")
    page.locator(".gallery-cell").first.wait_for()


def note_says(page, text):
    page.wait_for_function("text => document.querySelector('.gallery-note')?.textContent.startsWith(text)", arg=text)


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def test_search_select_pack_delete_and_undo(local):
    page = local.page
    record(local.served, "a blue whale")
    apples = [record(local.served, f"a red apple {i}") for i in range(3)]
    open_gallery(page, 4)
    page.fill(".gallery-bar input[type=search]", "APPLE")
    note_says(page, "3 items")
    page.locator(".gallery-cell[aria-label^='a red apple 2']").click()
    page.locator(".gallery-cell[aria-label^='a red apple 0']").click(modifiers=["Control"])
    note_says(page, "2 selected")
    assert page.locator("[role=option][aria-selected=true]").count() == 2
    with page.expect_download() as loaded:
        press(page, "Download ZIP")
    with zipfile.ZipFile(loaded.value.path()) as packed:
        assert len(packed.namelist()) == 2
    press(page, "Delete")
    note_says(page, "2 deleted.")
    assert page.locator(".gallery-cell").count() == 1
    assert len(local.gallery.numbers(LOCAL, Wanted())) == 2
    press(page, "Undo")
    note_says(page, "2 restored.")
    assert sorted(local.gallery.numbers(LOCAL, Wanted(text="apple"))) == apples
    press(page, "Clear filters")
    note_says(page, "4 items")


def test_the_keyboard_moves_selects_marks_deletes_and_opens(local):
    page, numbers = local.page, [record(local.served, f"a fox {i}") for i in range(30)]
    open_gallery(page, 30)
    page.locator(".gallery-cell[tabindex='0']").focus()
    focused = "document.activeElement.getAttribute('aria-label')"
    page.wait_for_function(f"{focused}.startsWith('a fox 29,')")
    for key, place in (("ArrowRight", 28), ("End", 0), ("Home", 29), ("ArrowRight", 28), ("ArrowLeft", 29)):
        page.keyboard.press(key)
        page.wait_for_function(f"{focused}.startsWith('a fox {place},')")
    page.keyboard.press("ArrowDown")
    assert 0 < int(page.evaluate(focused).split()[2].rstrip(",")) < 28
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Shift+ArrowRight")
    note_says(page, "2 selected")
    page.keyboard.press("Escape")
    page.keyboard.press(" ")
    note_says(page, "1 selected")
    page.keyboard.press("f")
    page.locator(".gallery-cell .star").wait_for()
    assert local.gallery.numbers(LOCAL, Wanted(favourites=True)) == [numbers[-2]]
    page.keyboard.press("Delete")
    note_says(page, "1 deleted.")
    assert numbers[-2] not in local.gallery.numbers(LOCAL, Wanted())
    page.keyboard.press("Enter")
    page.locator(".gallery-view img").wait_for()


def test_the_viewer_zooms_pans_and_goes_to_neighbours(local):
    page = local.page
    source = local.served.engine.uploads.add(Image.new("RGB", (64, 32), (1, 2, 3)), "local")
    record(local.served, "a second")
    record(local.served, "a <b>first</b>", image=source)
    open_gallery(page, 2)
    double_click(page.locator(".gallery-cell").first)
    view, image = page.locator(".gallery-view"), page.locator(".gallery-frame img").first
    view.locator("td", has_text="a <b>first</b>").wait_for()
    assert view.locator("h2").inner_text() == "a <b>first</b>"
    assert not page.locator(".gallery-view b").count()
    page.keyboard.press("1")
    assert image.evaluate("one => one.getBoundingClientRect().width") == 64  # 100 %
    box = page.locator(".gallery-frame").bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.wheel(0, -100)
    page.wait_for_function(
        "Math.abs(document.querySelector('.gallery-frame img').getBoundingClientRect().width - 76.8) < .1"
    )
    before = image.bounding_box()["x"]
    page.mouse.down()
    page.mouse.move(middle[0] + 30, middle[1], steps=3)
    page.mouse.up()
    assert image.bounding_box()["x"] == pytest.approx(before + 30, abs=1)
    press(page, "Fit")
    assert image.get_attribute("style") == ""
    press(page, "Before/after")
    view.get_by_role("slider").fill("25")
    assert "25%" in page.locator(".gallery-pair img").nth(1).get_attribute("style")
    page.wait_for_function("[...document.querySelectorAll('.gallery-pair img')].every(one => one.naturalWidth === 64)")
    press(page, "Next")
    view.locator("td", has_text="a second").wait_for()
    assert page.get_by_role("button", name="Before/after", exact=True).is_disabled()
    page.keyboard.press("ArrowLeft")
    view.locator("td", has_text="a <b>first</b>").wait_for()
    page.keyboard.press("Escape")
    view.wait_for(state="detached")
    page.wait_for_function("document.activeElement.matches('.gallery-cell')")


def test_settings_stand_side_by_side_and_what_was_chosen_is_used(local):
    page = local.page
    for steps in (4, 9):
        record(local.served, "a fox by hand", steps=steps)
    open_gallery(page, 2)
    page.locator(".gallery-cell").first.click()
    assert page.get_by_role("button", name="Compare settings").is_disabled()
    page.keyboard.press("Shift+ArrowRight")
    press(page, "Compare settings")
    differs = page.locator(".gallery-view tr.differs th")
    differs.first.wait_for()
    assert {text.split()[0] for text in differs.all_inner_texts()} == {"Steps", "Seed"}
    row = page.locator(".gallery-view tr", has=page.locator("th", has_text="steps")).locator("td")
    assert row.all_inner_texts() == ["9", "4"]
    page.keyboard.press("Escape")
    press(page, "Before/after of two")
    page.locator(".gallery-pair img").nth(1).wait_for()
    page.keyboard.press("Escape")
    double_click(page.locator(".gallery-cell").nth(1))
    press(page, "Reuse settings")
    page.wait_for_function("document.querySelector('#steps input[type=number]')?.value === '4'")
    assert page.input_value("#prompt textarea") == "a fox by hand"


def test_boards_are_made_filled_renamed_and_removed(local):
    page, numbers = local.page, [record(local.served, f"a fox {i}") for i in range(3)]
    open_gallery(page, 3)
    page.locator(".gallery-cell").first.click()
    press(page, "Add to board")
    page.get_by_label("Name of the board").fill("red <i>things</i>")
    page.keyboard.press("Enter")
    note_says(page, "1 on the board red <i>things</i>.")
    (board,) = local.gallery.boards(LOCAL)
    assert local.gallery.numbers(LOCAL, Wanted(board=board.number)) == numbers[-1:]
    page.locator(".gallery-bar select").nth(2).select_option(str(board.number))
    note_says(page, "1 item")
    press(page, "Rename board")
    page.get_by_label("Name of the board").fill("blue")
    press(page, "OK")
    page.locator(".gallery-bar option", has_text="blue (1)").wait_for(state="attached")
    press(page, "Remove from board")  # it is selected still
    note_says(page, "1 taken off the board blue.")
    press(page, "Delete board")
    press(page, "OK")
    note_says(page, "3 items")
    assert local.gallery.boards(LOCAL) == []


def test_the_trash_is_emptied_when_that_is_meant(local):
    page = local.page
    for i in range(2):
        record(local.served, f"a fox {i}")
    open_gallery(page, 2)
    page.locator(".gallery-cell").first.click()
    page.keyboard.press("Delete")
    note_says(page, "1 deleted.")
    press(page, "Empty trash (1)")
    press(page, "Close")
    assert len(local.gallery.deleted()) == 1
    press(page, "Empty trash (1)")
    press(page, "OK")
    note_says(page, "1 removed for good.")
    assert local.gallery.deleted() == []


def test_clips_have_a_sign_and_a_phone_has_room_for_all(local):
    page = local.page
    record(local.served, "a clip", frames=4, fps=8.0)
    record(local.served, "\u4e00\u53ea\u732b")
    page.set_viewport_size({"width": 390, "height": 844})
    try:
        open_gallery(page, 2)
        page.locator(".gallery-cell .mark.clip").wait_for()
        page.fill(".gallery-bar input[type=search]", "\u732b")
        note_says(page, "1 item")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        parts = "[...document.querySelectorAll('.gallery-app *')]"
        assert page.evaluate(f"{parts}.filter((one) => one.getBoundingClientRect().right > innerWidth).length") == 0
    finally:
        page.set_viewport_size({"width": 1280, "height": 900})


def test_who_may_only_look_has_no_buttons_that_change_and_reads_chinese(browser, tmp_path):
    with serving_page(tmp_path) as served:
        record(served, "hers", owner="eve")
        record(served, "not hers", owner="ann")
        with client_of(served, "eve") as eve:
            cookies = [{"name": one.name, "value": one.value, "url": served.address} for one in eve.cookies.jar]
        context = browser.new_context(color_scheme="dark")
        context.add_cookies(cookies)
        page, words = context.new_page(), Strings("zh")
        page.goto(f"{served.address}/zh/")
        page.locator("[role=tab]:visible", has_text=words("tab.gallery")).first.click()
        note_says(page, words("gallery.count.one"))
        page.locator(".gallery-cell").first.click()
        page.get_by_role("button", name=words("gallery.deselect"), exact=True).wait_for()
        for key in ("delete", "favourite", "to_board"):
            assert page.get_by_role("button", name=words(f"gallery.{key}"), exact=True).count() == 0
        page.keyboard.press("Delete")
        assert len(served.engine.gallery.numbers(LOCAL, Wanted())) == 2
        context.close()


SCROLL = """async (steps) => {
  const scroll = document.querySelector(".gallery-scroll"), frame = () => new Promise(requestAnimationFrame);
  let longest = 0, gap = 0, most = 0, last = performance.now();
  const observer = new PerformanceObserver((list) => {
    for (const one of list.getEntries()) longest = Math.max(longest, one.duration);
  });
  observer.observe({ type: "longtask" });
  for (let i = 1; i <= steps; i++) {
    scroll.scrollTop = scroll.scrollHeight * i / steps;
    await frame();
    const now = performance.now();
    gap = Math.max(gap, now - last);
    last = now;
    most = Math.max(most, document.querySelectorAll(".gallery-app *").length);
  }
  await new Promise((done) => setTimeout(done, 600));
  return { longest, gap, most };
}"""
"""Scroll to the end; the longest task and the longest time between two frames, ms, and the most elements."""


def test_ten_thousand_images_are_scrolled_with_few_elements_and_requests(local, record_property):
    page, asked = local.page, []
    seed(local.served, MANY)
    open_gallery(page, MANY)
    page.locator(".gallery-cell img[src]").first.wait_for()
    page.on("request", lambda request: asked.append(request.url))
    found = page.evaluate(SCROLL, 240)
    record_property("stalls", json.dumps(found))  # for people: times depend on what else the machine does
    assert found["most"] < 1_000
    assert sum("/gallery/images?ids=" in url for url in asked) < 100
    assert sum(url.endswith("/thumbnail") for url in asked) < MANY / 2
    page.locator(".gallery-cell[aria-label^='a fox 0,']").wait_for()
    page.wait_for_function("[...document.querySelectorAll('.gallery-cell img')].some((one) => one.naturalWidth === 16)")
    assert page.evaluate("document.querySelector('.gallery-scroll').scrollTop") > 50_000
    assert len(list((local.served.out / ".tessera" / "thumbnails").glob("*.webp"))) < 10  # equal images share one
