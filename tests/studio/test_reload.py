"""Pages that are closed, reloaded and opened again, in a real browser: jobs go on, and every page finds them."""

from __future__ import annotations

import re
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from apps.service.metadata import read_picture
from tests.fresh import Python
from tests.studio.browsers import double_click, fill_number
from tests.studio.test_server import browser, note_says, open_page, problem_says, tab, wait_for_address

pytestmark = pytest.mark.browser
__all__ = ["browser"]


class Server:
    """A server of a slow model that can be killed and started again on its folder."""

    def __init__(self, folder):
        self.folder = folder
        self.out = folder / "out"
        self.log = folder / "log"
        self.start()

    def start(self):
        self.process = Python("-m", "tests.studio.slow_server", self.folder, log=self.log)
        self.address = wait_for_address(self.process, self.log)

    def kill(self):
        self.process.kill()
        self.process.wait(60)

    def end(self):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(120)
        finally:
            self.process.kill()
        assert "Traceback" not in self.log.read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("reload"))
    yield server
    server.end()


@pytest.fixture
def pages(server, browser):
    """Open pages of one browser; at the end nothing runs and nothing waits."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(60_000)

    def page():
        one = context.new_page()
        open_page(one, server.address)
        return one

    yield page
    if {"running", "queued"} & set(states(server)):
        end_all(page())
    context.close()


def end_all(last):
    """Stop what runs and drop what waits."""
    if last.locator("#clear").is_visible():
        last.click("#clear")
    last.wait_for_timeout(1500)
    if last.locator("#stop").is_enabled():
        last.click("#stop")
    last.wait_for_function("document.querySelector('#stop').disabled")


def ask(page, prompt, seed, steps=100, count=16):
    """Ask for as many images as take a while."""
    page.fill("#prompt textarea", prompt)
    for name, value in (("steps", steps), ("num-images", count)):
        page.fill(f"#{name} input[type=number]", str(value))
        page.press(f"#{name} input[type=number]", "Tab")
    fill_number(page, "#seed input", str(seed))
    page.press("#seed input", "Tab")
    page.wait_for_function("document.querySelector('#seed-mode input:checked')?.value === 'fixed'")
    page.click("#generate")


def ask_again(page, prompt):
    """Ask for the same with other words."""
    page.fill("#prompt textarea", prompt)
    page.click("#generate")


def step_goes_on(page):
    """Wait until the page has told two different steps: it follows, and doesn't show what once was."""
    script = "document.querySelector('#stage .note')?.textContent ?? ''"
    page.wait_for_function(f"({script}).includes('step')")
    before = page.evaluate(script)
    page.wait_for_function(f"before => ({script}) !== before && ({script}).includes('tep')", arg=before)


def line_says(page, text):
    page.wait_for_function("text => document.querySelector('#queue-note').textContent.includes(text)", arg=text)


def idle(page):
    page.wait_for_function("document.querySelector('#stop').disabled")


def stop(page):
    page.click("#stop")
    note_says(page, "Stopped")


def states(server):
    """Read the states of the jobs from a copy: the engine holds the record itself."""
    copy = server.folder / "copy.sqlite"
    for ending in ("", "-wal"):
        source = server.out / ".tessera" / f"jobs.sqlite{ending}"
        if source.is_file():
            copy.with_name(copy.name + ending).write_bytes(source.read_bytes())
    database = sqlite3.connect(copy)
    rows = database.execute("SELECT state FROM jobs ORDER BY number").fetchall()
    database.close()
    return [state for (state,) in rows]


def test_a_reload_goes_on_with_the_same_job_and_its_queue(server, pages):
    page = pages()
    ask(page, "a ghost", 100)
    note_says(page, "Image 1")
    ask_again(page, "a pizza")
    line_says(page, "1 waiting")
    count = len(states(server))
    page.reload()
    page.locator(".chip:visible").first.wait_for()
    step_goes_on(page)
    line_says(page, "1 waiting")
    assert "a pizza" in page.input_value("#waiting input")
    assert len(states(server)) == count
    assert states(server)[-2:] == ["running", "queued"]
    page.click("#stop")  # the one that was there before the reload
    page.wait_for_function("!document.querySelector('#queue-note').textContent.includes('waiting')")
    step_goes_on(page)
    assert states(server)[-2:] == ["stopped", "running"]
    stop(page)
    assert states(server)[-2:] == ["stopped", "stopped"]


@pytest.mark.slow
def test_another_page_finds_what_a_closed_one_asked_for(server, pages):
    first = pages()
    ask(first, "a ghost", 300)
    note_says(first, "Image 1")
    first.close()
    second = pages()
    step_goes_on(second)
    assert second.locator("#stop").is_enabled()
    stop(second)
    idle(second)
    third = pages()
    time.sleep(1.5)
    assert third.locator("#stop").is_disabled()


@pytest.mark.slow
def test_two_pages_see_one_queue(server, pages):
    one, other = pages(), pages()
    ask(one, "a ghost", 400)
    step_goes_on(other)  # which asked for nothing
    ask_again(other, "a pizza")
    line_says(one, "1 waiting")
    one.bring_to_front()
    one.click("#drop")
    one.wait_for_function("!document.querySelector('#queue-note').textContent.includes('waiting')")
    other.wait_for_function("!document.querySelector('#queue-note').textContent.includes('waiting')")
    other.bring_to_front()  # a hidden page draws no frames, which clicks wait for
    stop(other)
    one.bring_to_front()
    note_says(one, "Stopped")
    idle(one)


@pytest.mark.slow
def test_a_page_finds_its_jobs_after_the_server_was_killed(server, pages):
    page = pages()
    ask(page, "a ghost", 600, steps=40)
    note_says(page, "Image 2", 180)
    page.close()
    server.kill()
    server.start()
    page = pages()
    step_goes_on(page)
    strip = page.locator("#strip .caption-label").first.inner_text().split("\n")[0]
    assert int(strip) >= 600  # what was finished before is there
    stop(page)


def test_the_buttons_act_on_what_the_stage_shows(server, pages):
    page = pages()
    ask(page, "a fox", 700, steps=3, count=1)
    page.wait_for_function("document.querySelector('#details').textContent.includes('seed 700')")
    idle(page)
    ask(page, "a ghost", 800, count=1)
    page.wait_for_function("document.querySelector('#stage .preview')")
    for button in ("#download", "#reuse-seed", "#reuse-settings", "#start-from", "#inpaint-it"):
        page.wait_for_function(f"document.querySelector('{button}').disabled")
    assert page.inner_text("#details") == ""
    stop(page)
    page.wait_for_function("document.querySelector('#details').textContent.includes('seed 700')")
    assert not page.locator("#stage .preview").count()
    with page.expect_download() as download:
        page.click("#download")
    assert read_picture(Path(download.value.path())).seed == 700
    page.wait_for_timeout(2500)  # as long as changes are repeated

    page.fill("#prompt textarea", "")
    page.click("#generate")
    problem_says(page, "")
    page.locator("#problem [role=alert]").wait_for()
    assert page.locator("#stage img").is_visible()
    page.fill("#prompt textarea", "a pizza")  # the field is corrected
    page.locator("#problem [role=alert]").wait_for(state="detached")


def test_a_picture_of_the_gallery_can_be_used_while_another_is_generated(server, pages):
    page = pages()
    ask(page, "a fox", 900, steps=3, count=1)
    page.wait_for_function("document.querySelector('#details').textContent.includes('seed 900')")
    idle(page)
    ask(page, "a ghost", 1000)
    note_says(page, "Image 1")
    tab(page, "Gallery")
    double_click(page.locator(".gallery-cell[aria-label^='a fox']").first)
    page.get_by_role("button", name="Show on the stage").click()
    page.wait_for_function("document.querySelector('#details').textContent.includes('seed 900')")
    line_says(page, "step")
    page.wait_for_timeout(1500)
    assert "seed 900" in page.inner_text("#details")
    assert page.locator("#reuse-seed").is_enabled()
    page.click("#stop")
    idle(page)


@pytest.mark.slow
def test_a_grid_survives_a_reload_and_can_be_read(server, pages):
    page = pages()
    tab(page, "Grid")
    page.fill("#prompt textarea", "a fox")
    page.fill("#grid-x-values textarea, #grid-x-values input", "20, 21, 22")
    page.fill("#grid-y-values textarea, #grid-y-values input", "1, 4")
    page.click("#generate")
    page.locator(".grid-view img").first.wait_for()
    page.set_viewport_size({"width": 390, "height": 844})
    page.reload()
    page.locator(".grid-view img").nth(5).wait_for()
    idle(page)
    page.wait_for_function("document.querySelector('#details').textContent.includes('6 of 6 cells')")
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        sizes = page.eval_on_selector_all(
            ".grid-view th, .grid-view small", "all => all.map(one => getComputedStyle(one).fontSize)"
        )
        assert min(float(re.match(r"[\d.]+", size)[0]) for size in sizes) >= 12
    page.evaluate("document.body.classList.add('dark')")
    dark = page.evaluate("getComputedStyle(document.querySelector('.grid-view th[scope=row]')).backgroundColor")
    assert max(map(int, re.findall(r"\d+", dark)[:3])) < 80
    page.wait_for_function("[...document.querySelectorAll('.grid-view img')].every(one => one.complete)")
    broken = page.eval_on_selector_all(".grid-view img", "all => all.filter(one => !one.naturalWidth).length")
    assert broken == 0
    page.screenshot(path=str(server.folder / "grid.png"), full_page=True)
