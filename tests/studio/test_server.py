"""The studio as it is started by people: in its own process, over HTTP and in a real browser."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image

from apps.metadata import read_picture
from tests.pipes.tiny import tiny_text_to_image_pipeline

PROJECT = Path(__file__).resolve().parents[2]
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


def wait_for_address(process, log):
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        if found:
            return found[0]
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    raise AssertionError(f"no address within 150 s: {log.read_text()}")


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=" + str(PROJECT / "pyproject.toml"),
        "/gradio_api/file=pyproject.toml",
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
        assert client.send(request).status_code == 403


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


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium here; apt-get install --no-install-recommends chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()


def note_says(page, start, seconds=60):
    page.wait_for_function(
        "start => document.querySelector('#stage .note')?.textContent.startsWith(start)",
        arg=start,
        timeout=1000 * seconds,
    )


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_type_paint_stop(server, browser, width, height):
    address, out = server
    page = browser.new_page(viewport={"width": width, "height": height})
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    before = set(out.glob("*.png"))

    page.goto(address)
    page.locator(".chip:visible").first.wait_for()  # the model is there and has told its words
    page.fill("#prompt textarea", "a ghost")
    page.press("#prompt textarea", "Enter")
    note_says(page, "Done")
    (painted,) = set(out.glob("*.png")) - before
    settings = read_picture(painted)
    assert settings.prompt == "a ghost"
    assert f"seed {settings.seed}" in page.inner_text("#details")
    assert page.inner_text("#strip .caption-label") == str(settings.seed)
    thumbnail = page.get_attribute("#strip img", "src")
    served = httpx.get(thumbnail, trust_env=False)
    assert served.content == painted.read_bytes()  # the file itself, its settings with it

    assert not page.locator("#sides").is_visible()
    page.locator("#shape label", has_text="Custom").click()
    assert page.input_value("#height input[type=number]") == "32"  # the model's own size, though it was hidden
    for side in ("#width", "#height"):
        page.fill(f"{side} input[type=number]", "128")
        page.press(f"{side} input[type=number]", "Tab")
    page.fill("#count input[type=number]", "16")
    page.fill("#steps input[type=number]", "100")
    page.press("#steps input[type=number]", "Tab")
    page.get_by_role("button", name="Paint", exact=True).click()
    note_says(page, "Picture 2 of 16")
    page.get_by_role("button", name="Stop", exact=True).click()
    note_says(page, "Stopped")
    pictures = sorted(set(out.glob("*.png")) - before - {painted})
    assert 1 <= len(pictures) < 16
    assert read_picture(pictures[0]).width == 128
    time.sleep(1)
    assert set(out.glob("*.png")) == before | {painted, *pictures}  # nothing paints on behind the page
    assert page.get_by_role("button", name="Paint", exact=True).is_enabled()

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert errors == []
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
    page.close()


@pytest.mark.browser
def test_words_examples_and_dark_mode(server, browser):
    address, _ = server
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(address)
    page.locator(".chip:visible").first.wait_for()
    page.click(".words summary")
    page.fill(".words input", "ice")
    assert page.locator(".word:visible").all_inner_texts() == ["ice cream"]
    page.click(".word:visible")
    assert page.input_value("#prompt textarea") == "ice cream"
    page.fill(".words input", "submarine")
    assert page.locator(".nothing").is_visible()

    page.locator(".chip:visible").first.click()  # an example paints at once
    note_says(page, "Done")
    assert page.input_value("#prompt textarea") == page.locator(".chip:visible").first.inner_text()
    page.click("#reuse-seed")
    page.wait_for_function("document.querySelector('#seed-mode input:checked')?.value === 'Fixed'")
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
    page.close()
