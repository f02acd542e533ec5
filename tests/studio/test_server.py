"""The studio as it is started by people: in its own process, over HTTP and in a real browser."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from apps.service.metadata import read_picture
from apps.studio.forms import read_mask
from apps.studio.strings import Strings
from tests.pipes.tiny import tiny_text_to_image_pipeline
from tests.studio.browsers import double_click, fill_number, only_chromium, open_browser

PROJECT = Path(__file__).resolve().parents[2]
STRINGS = json.loads((PROJECT / "apps" / "studio" / "strings" / "zh.json").read_text(encoding="utf-8"))
AFTER_DONE = 2_000
"""Milliseconds until the page has heard the last word of a job; leaving it before that is an error in its console."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Serve a tiny random model; yields the address and the output folder."""
    folder = tmp_path_factory.mktemp("studio")
    tiny_text_to_image_pipeline().save_pretrained(folder / "tiny")
    (folder / "tiny" / "vocabulary.txt").write_text("fox\npizza\nghost\nice cream\n")
    command = [sys.executable, "-m", "apps", "studio", "--model", str(folder / "tiny"), "--port", "0"]
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        [*command, "--no-browser", "--device", "cpu", "--output", str(folder / "out")],
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=PROJECT,
    )
    try:
        yield wait_for_address(process, folder / "log"), folder / "out"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(120)  # Gradio gives open connections five seconds; a busy machine takes its time too
        finally:
            process.kill()
    assert "Traceback" not in (folder / "log").read_text()


def wait_for_address(process, log, seconds=150):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        if found:
            return found[0]
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    raise AssertionError(f"no address within {seconds} s: {log.read_text()}")


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=" + str(PROJECT / "pyproject.toml"),
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/file={out}/.tessera/jobs.sqlite",
        "/zh/gradio_api/file={out}/.tessera/jobs.sqlite",
        "/zh/gradio_api/file=/etc/passwd",
        "/gradio_api/file={out}/../log",
        "/gradio_api/file={out}/..%2flog",
        "/gradio_api/file={out}/../tiny/vocabulary.txt",
        "/gradio_api/file=http://127.0.0.1:22/",
        "/monitoring",
    ],
)
def test_nothing_but_the_pictures_is_served(server, path):
    address, out = server
    request = httpx.Request("GET", address + "/")
    raw = path.format(out=out).encode()
    request = httpx.Request("GET", request.url.copy_with(raw_path=raw))  # as written: httpx would tidy the dots up
    with httpx.Client(trust_env=False) as client:
        assert client.send(request).status_code in (403, 404)


def test_links_out_of_the_output_folder_are_not_followed(server, tmp_path):
    address, out = server
    (tmp_path / "secret.txt").write_text("secret")
    (out / "link.txt").symlink_to(tmp_path / "secret.txt")
    try:
        answer = httpx.get(f"{address}/gradio_api/file={out}/link.txt", trust_env=False)
    finally:
        (out / "link.txt").unlink()
    assert answer.status_code == 403
    assert "secret" not in answer.text


def test_another_name_for_this_machine_is_turned_away(server):
    address, _ = server
    assert httpx.get(address, headers={"Host": "evil.example"}, trust_env=False).status_code == 400
    assert httpx.get(address, trust_env=False).status_code == 200


def test_the_page_offers_no_api(server):
    address, _ = server
    told = httpx.get(f"{address}/gradio_api/info", trust_env=False).json()
    assert told == {"named_endpoints": {}, "unnamed_endpoints": {}}
    assert httpx.get(f"{address}/v1/models", trust_env=False).status_code == 404  # `tessera studio` serves no API


@pytest.fixture(scope="module")
def browser():
    with open_browser() as one:
        yield one


@pytest.fixture
def page(server, browser):
    """Open the page; at the end there was no error in the console and no request to another server."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    open_page(page, server[0])
    yield page
    assert errors == [], errors
    assert [url for url in requests if not url.startswith((server[0], "data:", "blob:"))] == []
    page.close()


def open_page(page, address):
    page.goto(address)
    # The model is there and has told its words; a page that opens on a tab without examples has them too.
    page.wait_for_function("[...document.querySelectorAll('.chip')].some(chip => chip.textContent.trim())")


def note_says(page, start, seconds=60):
    page.wait_for_function(
        "start => document.querySelector('#stage .note')?.textContent.startsWith(start)",
        arg=start,
        timeout=1000 * seconds,
    )


def problem_says(page, start, seconds=60):
    page.wait_for_function(
        "start => (document.querySelector('#problem [role=alert]')?.textContent ?? '').startsWith(start)",
        arg=start,
        timeout=1000 * seconds,
    )


def strip_shows(page, seed, seconds=60):
    """Waits until the strip begins with the image of a seed; what stands there instead is part of the failure."""
    first, deadline = None, time.monotonic() + seconds
    while first != str(seed):
        label = page.evaluate("document.querySelector('#strip .caption-label')?.textContent ?? null")
        first = label and label.strip().split("\n")[0]  # the second line is for screen readers
        if time.monotonic() > deadline:
            found = page.evaluate("document.querySelector('#strip')?.outerHTML")
            raise AssertionError(f"the strip shows {first}, not {seed}: {found}")
        time.sleep(0.1)


def newest(out, before):
    (painted,) = set(out.glob("*.png")) - before
    return painted


def paint_one(page, out, prompt="a ghost"):
    before = set(out.glob("*.png"))
    page.fill("#prompt textarea", prompt)
    page.click("#generate")
    deadline = time.monotonic() + 60
    while not set(out.glob("*.png")) - before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    note_says(page, "Done")
    return newest(out, before)


def tab(page, name):
    page.get_by_role("tab", name=name, exact=True).first.click()
    page.wait_for_function("tab => document.querySelector('#workspace').dataset.tab === tab", arg=name.lower())


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height"), [(1280, 900), pytest.param(390, 844, marks=pytest.mark.slow)])
def test_type_paint_stop(server, page, width, height):
    _, out = server
    page.set_viewport_size({"width": width, "height": height})
    before = set(out.glob("*.png"))
    page.fill("#prompt textarea", "a ghost")
    page.press("#prompt textarea", "Control+Enter")
    note_says(page, "Done")
    painted = newest(out, before)
    settings = read_picture(painted)
    assert settings.prompt == "a ghost"
    assert f"seed {settings.seed}" in page.inner_text("#details")
    strip_shows(page, settings.seed)
    thumbnail = page.get_attribute("#strip img", "src")
    served = httpx.get(thumbnail, trust_env=False)
    assert served.content == painted.read_bytes()  # the file itself, its settings with it

    assert not page.locator("#sides").is_visible()
    page.locator("#shape label", has_text="Custom").click()
    assert page.input_value("#height input[type=number]") == "32"  # the model's own size, though it was hidden
    for side in ("#width", "#height"):
        page.fill(f"{side} input[type=number]", "128")
        page.press(f"{side} input[type=number]", "Tab")
    fill_number(page, "#num-images input[type=number]", "16")
    fill_number(page, "#steps input[type=number]", "100")
    page.press("#steps input[type=number]", "Tab")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.wait_for_function(  # stops within the page: a fast machine is through with all sixteen in seconds
        """() => {
            const note = document.querySelector('#stage .note')?.textContent ?? '';
            const begun = /^Image ([2-9]|1[0-6]) of 16/.test(note);
            if (begun) document.querySelector('#stop').click();
            return begun;
        }""",
        timeout=60_000,
    )
    note_says(page, "Stopped")
    pictures = sorted(set(out.glob("*.png")) - before - {painted})
    assert 1 <= len(pictures) < 16
    assert read_picture(pictures[0]).width == 128
    time.sleep(1)
    assert set(out.glob("*.png")) == before | {painted, *pictures}  # nothing generates on behind the page
    assert page.get_by_role("button", name="Generate", exact=True).is_enabled()
    for name in ("Image", "Inpaint", "Class", "Scales", "Grid", "Gallery", "Text"):
        page.get_by_role("tab", name=name, exact=True).first.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name


@only_chromium
@pytest.mark.slow
@pytest.mark.browser
def test_a_slow_browser_shows_the_picture_in_its_strip(server, page):
    """It takes in an image, 'done' and what follows at once, and Gradio turns each message into the next in place."""
    _, out = server
    page.context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": 8})
    strip_shows(page, read_picture(paint_one(page, out)).seed)


@pytest.mark.browser
def test_words_examples_and_dark_mode(page):
    page.click(".words summary")
    page.fill(".words input", "ice")
    assert page.locator(".word:visible").all_inner_texts() == ["ice cream"]
    page.click(".word:visible")
    assert page.input_value("#prompt textarea") == "ice cream"
    page.fill(".words input", "submarine")
    assert page.locator(".nothing").is_visible()

    page.locator(".chip:visible").first.click()  # an example generates at once
    note_says(page, "Done")
    assert page.input_value("#prompt textarea") == page.locator(".chip:visible").first.inner_text()
    page.click("#reuse-seed")
    page.wait_for_function("document.querySelector('#seed-mode input:checked')?.value === 'fixed'")
    assert f"seed {page.input_value('#seed input')}" in page.inner_text("#details")
    with page.expect_download() as download:
        page.click("#download")
    saved = download.value.path()
    assert read_picture(Path(saved)).seed == int(page.input_value("#seed input"))
    with Image.open(saved) as image:
        assert image.format == "PNG"

    page.click(".night")
    assert page.evaluate("document.body.classList.contains('dark')")
    page.reload()
    page.wait_for_function("document.body.classList.contains('dark')")


@pytest.mark.browser
def test_settings_of_a_picture_paint_it_again(server, page):
    """The bar: from the file alone, in a page that knows nothing of it, bit for bit."""
    _, out = server
    fill_number(page, "#steps input[type=number]", "7")
    page.press("#steps input[type=number]", "Tab")
    first = paint_one(page, out)
    page.wait_for_timeout(AFTER_DONE)
    page.evaluate("localStorage.clear()")
    page.reload()
    page.locator(".chip:visible").first.wait_for()
    page.wait_for_function("document.querySelector('#steps input[type=number]').value === '28'")
    page.set_input_files("#settings input[type=file]", first)
    page.wait_for_function("document.querySelector('#steps input[type=number]').value === '7'")
    before = set(out.glob("*.png"))
    page.click("#generate")
    note_says(page, "Done")
    again = newest(out, before)
    assert read_picture(again) == read_picture(first)
    with Image.open(first) as one, Image.open(again) as two:
        assert one.tobytes() == two.tobytes()


@pytest.mark.browser
def test_inpaint_with_the_brush(server, page):
    _, out = server
    original = paint_one(page, out)
    page.click("#inpaint-it")
    canvas = page.locator("#source canvas")
    canvas.wait_for()
    page.wait_for_function("document.querySelector('#workspace').dataset.tab === 'inpaint'")
    page.fill("#prompt textarea", "a fox")
    page.click("#generate")
    problem_says(page, "Nothing is marked")
    assert page.locator("#stage img").is_visible()  # what is shown stays
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.3 * box["height"], steps=5)
    page.mouse.up()
    page.wait_for_function("document.querySelector('#mask textarea, #mask input').value.startsWith('data:image/png')")
    painted = paint_one(page, out, "a fox")
    settings = read_picture(painted)
    assert settings.task == "inpaint"
    with Image.open(out / ".tessera" / "uploads" / f"{settings.mask}.png") as image:
        marked = np.asarray(image.convert("L")) > 0
    assert 0.02 < marked.mean() < 0.5
    before, after = (np.asarray(Image.open(path).convert("RGB")) for path in (original, painted))
    assert (after[~marked] == before[~marked]).all()
    assert (after[marked] != before[marked]).any()
    page.click("[data-tool=undo]")
    page.wait_for_function("document.querySelector('#mask textarea, #mask input').value === ''")


@pytest.mark.browser
def test_the_brush_is_sized_and_the_image_zoomed_a_mask_is_loaded_and_a_side_dragged(server, page, tmp_path):
    Image.effect_noise((120, 80), 90).convert("RGB").save(tmp_path / "in.png")
    given = Image.new("L", (240, 160))
    given.paste(255, (40, 40, 80, 80))
    given.save(tmp_path / "mask.png")
    given.resize((160, 160)).save(tmp_path / "square.png")
    handed = "document.querySelector('#mask textarea, #mask input').value"
    tab(page, "Inpaint")
    page.set_input_files("#source input[type=file]:not(#mask-file)", tmp_path / "in.png")
    canvas = page.locator("#source canvas")
    canvas.wait_for()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    width, middle = page.input_value("#brush-size"), (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.wheel(0, -100)
    assert int(page.input_value("#brush-size")) > int(width)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -300)
    page.keyboard.up("Control")
    assert canvas.bounding_box()["width"] > 2 * box["width"]
    page.mouse.click(*middle)  # what is under the pointer is marked, at any zoom
    marked = read_mask(page.evaluate(handed))
    assert marked.getpixel((60, 40)) == 255
    assert 0 < np.asarray(marked).mean() < 255 / 4
    canvas.press("0")
    assert canvas.bounding_box() == box
    canvas.press("Control+z")
    assert page.evaluate(handed) == ""
    canvas.press("Control+Shift+z")
    assert read_mask(page.evaluate(handed)).tobytes() == marked.tobytes()

    page.set_input_files("#mask-file", tmp_path / "square.png")
    page.get_by_text("The mask has 160 \u00d7 160 pixels").wait_for()
    drawn = page.evaluate(handed)
    page.set_input_files("#mask-file", tmp_path / "mask.png")
    page.wait_for_function(f"drawn => {handed} !== drawn", arg=drawn)
    assert read_mask(page.evaluate(handed)).getbbox() == (20, 20, 40, 40)  # of the image's size

    handle = page.locator("#source .handle[data-side=right]").bounding_box()
    start = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(start[0] + 0.5 * box["width"], start[1], steps=4)
    page.mouse.up()
    page.wait_for_function("document.querySelector('#grow-right input').value === '50'")
    shown, whole = page.locator("#source .view").bounding_box(), page.locator("#source .brush").bounding_box()
    assert shown["width"] / whole["width"] == pytest.approx(1 / 1.5, abs=0.01)
    fill_number(page, "#grow-right input", "0")  # the field moves the side back
    page.wait_for_function("!document.querySelector('#source .brush-frame').classList.contains('grown')")

    fill_number(page, "#mask-padding input[type=number]", "8")
    page.press("#mask-padding input[type=number]", "Tab")
    painted = paint_one(page, server[1], "a fox")
    found = read_picture(painted)
    assert (found.mask_padding, found.whole) == (8, (120, 80))
    with Image.open(painted) as image, Image.open(tmp_path / "in.png") as before:
        changed = np.asarray(image.convert("RGB")) != np.asarray(before)
    assert changed[20:40, 20:40].any()
    changed[20:40, 20:40] = False
    assert not changed.any()


@pytest.mark.browser
def test_what_was_set_survives_a_reload(page):
    page.fill("#prompt textarea", "a pizza")
    fill_number(page, "#steps input[type=number]", "9")
    page.press("#steps input[type=number]", "Tab")
    page.wait_for_function("(localStorage.getItem('tessera-settings') ?? '').length > 100")
    time.sleep(0.5)
    page.reload()
    page.wait_for_function("document.querySelector('#prompt textarea')?.value === 'a pizza'")
    assert page.input_value("#steps input[type=number]") == "9"


@pytest.mark.browser
def test_chinese_gallery_and_a_hostile_upload(server, page, tmp_path):
    address, out = server
    painted = paint_one(page, out)
    page.wait_for_timeout(AFTER_DONE)
    page.click(".language")
    page.wait_for_url(f"{address}/zh/")
    page.locator(".chip:visible").first.wait_for()
    assert page.inner_text("#generate") == STRINGS["generate"]
    page.get_by_role("tab", name=STRINGS["tab.gallery"], exact=True).first.click()
    double_click(page.locator(".gallery-cell").first)
    page.get_by_role("button", name=Strings("zh")("gallery.use")).click()
    seed = str(read_picture(painted).seed)
    page.wait_for_function("seed => document.querySelector('#details')?.textContent.includes(seed)", arg=seed)
    hostile = PngImagePlugin.PngInfo()
    hostile.add_itxt("tessera", '{"prompt": "<img src=x onerror=document.title=1>", "model": "../../etc"}')
    Image.new("RGB", (8, 8)).save(tmp_path / "hostile.png", pnginfo=hostile)
    page.set_input_files("#settings input[type=file]", tmp_path / "hostile.png")
    page.locator("#problem [role=alert]").wait_for()
    assert 'src="x"' not in page.content()
    assert page.title() != "1"


@pytest.mark.browser
def test_the_first_visit_is_in_the_browsers_language(server, browser):
    address, _ = server
    for locale, place in (("zh-CN", "/zh/"), ("en-GB", "/"), ("fr-FR", "/")):
        context = browser.new_context(locale=locale)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(address)
        page.wait_for_url(f"{address}{place}")
        page.locator("#generate").wait_for()
        assert page.inner_text("#generate") == (STRINGS["generate"] if place == "/zh/" else "Generate")
        if locale == "zh-CN":  # what is chosen goes before what the browser asks for, from then on
            page.click(".language")
            page.wait_for_url(f"{address}/")
            page.goto(f"{address}/?x=1")
            page.locator("#generate").wait_for()
            assert page.inner_text("#generate") == "Generate"
        context.close()
