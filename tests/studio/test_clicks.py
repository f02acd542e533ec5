"""How many clicks it takes from a fresh start to a video, and to a LoRA of one's own images, with the built-in models.

The third way, to a tuned model, is in `test_speed_tab`.
"""

from __future__ import annotations

import pytest
from PIL import Image

from apps.service.metadata import read_picture
from tests.studio.browsers import fill_number, open_browser
from tests.studio.test_server import note_says, open_page
from tests.studio.test_upscaling import built_in_studio

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(900)]
COUNT = """
if (window.clicks === undefined) {
    window.clicks = 0;
    addEventListener("pointerdown", (event) => { if (event.isTrusted) window.clicks += 1; }, true);
}
"""


@pytest.fixture
def page(tmp_path):
    with open_browser() as browser, built_in_studio(tmp_path) as address:
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.set_default_timeout(240_000)
        opened.add_init_script(COUNT)
        open_page(opened, address)
        yield opened


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).first.click()


def test_three_clicks_to_a_video(page, tmp_path):
    open_tab(page, "Video")
    page.locator("#prompt textarea").fill("a red apple moving right")
    page.click("#generate")
    note_says(page, "Done", 300)
    page.wait_for_function("document.querySelector('#stage video')?.readyState >= 2")
    assert page.evaluate("window.clicks") <= 3
    assert len(list(tmp_path.rglob("*.mp4"))) == 1


def test_six_clicks_to_a_lora_of_own_images(page, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (128, 128), (60 * i, 90, 200 - 40 * i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a ghost")
    open_tab(page, "Fine-tune")
    with page.expect_file_chooser() as choosing:
        page.click("#ft-choose")
    choosing.value.set_files(sorted(folder.iterdir()))
    page.locator(".ft-card").nth(3).wait_for()
    page.fill("#ft-name :is(input, textarea)", "mine")
    page.click("#ft-advanced > button")  # only to be through in a minute
    fill_number(page, "#ft-steps input", "4")
    fill_number(page, "#ft-preview-every input", "4")
    page.keyboard.press("Tab")
    page.click("#ft-start")
    page.locator(".ft-run h3 .finished").wait_for()
    page.click("#ft-try")
    page.wait_for_function("document.querySelector('#lora input')?.value === 'mine'")
    page.keyboard.press("Control+Enter")  # the prompt is filled in
    note_says(page, "Done", 120)
    assert page.evaluate("window.clicks") <= 6
    (found,) = (tmp_path / "out").glob("*.png")
    assert [one.name for one in read_picture(found).loras] == ["mine"]
