"""Take the images of the studio's tabs that the documents show: `python -m tests.studio.screenshots docs/studio`.

Generates with the built-in models in a server of its own, opens the page in a headless Chromium and keeps each tab at
the width of a desk, one of them on a phone too. Another run on the same machine gives the same images but for the
times.
"""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from apps.lora_examples.captioned_folder import write_captioned
from apps.lora_examples.new_object import draw_object_examples
from apps.stickers import load_sprites
from tests.studio.browsers import fill_number, open_browser
from tests.studio.test_server import PROJECT, note_says, open_page, wait_for_address

WIDTHS = {1280: 900, 390: 844}
"""Of the window, with its height."""
ON_A_PHONE = ("text",)
"""Tabs that are taken at the width of a phone too."""
PATIENCE = 600
"""Seconds that an image may take on a busy machine."""
PICTURES = (
    ("two stars on purple", 3),
    ("a crown above a frog on pink", 5),
    ("a fox on an orange background", 2),
    ("a panda left of a rocket on yellow", 7),
)


class Camera:
    """A page of the studio, and where its images go.

    Args:
        page: of playwright, open.
        folder: receives the images.
        tabs: only these; all if empty.
    """

    def __init__(self, page: Any, folder: Path, tabs: tuple[str, ...] = ()) -> None:
        self.page = page
        self._folder = folder
        self._tabs = tabs

    def take(self, name: str) -> None:
        """Keep the whole page at every width."""
        if self._tabs and name not in self._tabs:
            return
        for width, height in WIDTHS.items():
            if width < 600 and name not in ON_A_PHONE:
                continue
            self.page.set_viewport_size({"width": width, "height": height})
            self.page.mouse.move(0, 0)
            self.page.evaluate("document.activeElement?.blur(); window.scrollTo(0, 0)")
            self.page.wait_for_timeout(1500)  # until transitions and late fonts have settled
            data = self.page.screenshot(full_page=True)
            with Image.open(io.BytesIO(data)) as shot:
                shot.convert("RGB").save(self._folder / f"{name}-{width}.webp", quality=60, method=6)
        self.page.set_viewport_size({"width": 1280, "height": WIDTHS[1280]})

    def open(self, tab: str) -> None:
        """Open a tab by the name of its part of the address in the page."""
        names = {"text": "Text", "image": "Image", "inpaint": "Inpaint", "classes": "Class", "fine_tune": "Fine-tune"}
        self.page.get_by_role("tab", name=names.get(tab, tab.title()), exact=True).first.click()
        self.page.wait_for_function("tab => document.querySelector('#workspace').dataset.tab === tab", arg=tab)

    def start_again(self) -> None:
        """Load the page anew, as if for the first time, which empties the stage."""
        self.page.evaluate("localStorage.clear()")
        open_page(self.page, self.page.url)

    def choose(self, place: int, seed: int) -> None:
        """Put an image of the strip onto the stage."""
        self.page.locator("#strip .thumbnail-item").nth(place).click()
        self.page.wait_for_function(
            "seed => document.querySelector('#details').textContent.includes(`seed ${seed}`)", arg=seed
        )
        self.page.wait_for_timeout(500)

    def generate(self, prompt: str, seed: int) -> None:
        """Generate an image with a fixed seed and wait for it."""
        self.page.fill("#prompt textarea", prompt)
        fill_number(self.page, "#seed input", str(seed))
        self.page.press("#seed input", "Tab")
        self.page.wait_for_function("document.querySelector('#seed-mode input:checked')?.value === 'fixed'")
        self.page.evaluate("document.querySelector('#stage .note').textContent = ''")  # that of the last image
        self.page.click("#generate")
        note_says(self.page, "Done", PATIENCE)
        self.page.wait_for_timeout(800)


def shoot(camera: Camera) -> None:
    """Walk through the tabs as somebody would who uses them."""
    page = camera.page
    for prompt, seed in PICTURES:
        camera.generate(prompt, seed)
    camera.take("text")

    camera.choose(1, seed=2)
    page.click("#start-from")
    page.locator("#source canvas").wait_for(state="attached")
    camera.generate("a tiger face on an orange background", 9)
    camera.take("image")

    camera.choose(1, seed=7)
    page.click("#inpaint-it")
    canvas = page.locator("#source canvas")
    canvas.wait_for()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for step in range(5):  # strokes down the right half
        x, top, bottom = (0.57 + 0.09 * step, 0.2, 0.82)
        page.mouse.move(box["x"] + x * box["width"], box["y"] + top * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + x * box["width"], box["y"] + bottom * box["height"], steps=6)
        page.mouse.up()
    camera.generate("a panda left of a pizza on yellow", 4)
    camera.take("inpaint")

    camera.start_again()
    camera.open("video")
    page.click("#switch")
    page.locator("#first-image-file").wait_for()
    camera.generate("a snake flicking its tongue on blue", 5)
    page.wait_for_function("document.querySelectorAll('#stage .film canvas').length === 8")
    page.click("#stage .film button:nth-child(4)")  # a frame of its own, so that another run gives the same image
    camera.take("video")

    camera.start_again()
    camera.open("classes")
    page.locator(".cannot").wait_for()
    camera.take("class")
    camera.open("scales")
    page.locator("#switch").click()
    page.locator("#go").wait_for()
    camera.generate("three cherries on yellow", 12)
    camera.generate("a crown above a frog on pink", 5)
    camera.generate("a panda left of a rocket on yellow", 7)
    camera.take("scales")

    camera.start_again()
    camera.open("grid")
    page.fill("#grid-x-values textarea, #grid-x-values input", "8, 16, 28")
    page.locator("#grid-y input").click()
    page.get_by_role("option", name="Step cache", exact=True).click()
    page.fill("#grid-y-values textarea, #grid-y-values input", "off, taylorseer, budget")
    camera.generate(*PICTURES[-1])
    camera.take("grid")
    camera.open("gallery")
    page.locator(".gallery-cell img").first.wait_for()
    camera.take("gallery")
    _fine_tune(camera)


def _fine_tune(camera: Camera) -> None:
    """Teach the model a sticker that it has never drawn, for some steps."""
    page = camera.page
    with tempfile.TemporaryDirectory() as place:
        files = write_captioned(Path(place), draw_object_examples(load_sprites())[:12])
        camera.start_again()
        camera.open("fine_tune")
        page.set_input_files("#ft-files input[type=file]", [*files, *(file.with_suffix(".txt") for file in files)])
        page.locator(".ft-card").nth(11).wait_for()
        page.fill("#ft-name :is(input, textarea)", "dodo")
        page.click("#ft-advanced > button")
        page.wait_for_timeout(2000)  # until the panel has opened: a field filled before is set back
        for name, value in (("steps", 200), ("batch-size", 8), ("preview-every", 50), ("rank", 16)):
            page.fill(f"#ft-{name} input", str(value))
            page.press(f"#ft-{name} input", "Tab")
        page.click("#ft-start")
        page.locator(".ft-run h3 .finished").wait_for()
    camera.take("fine-tune")


def main(folder: Path, tabs: tuple[str, ...]) -> None:
    """Start a server, take the images, end it.

    Args:
        folder: receives the images.
        tabs: only these; all if empty.
    """

    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        command = [sys.executable, "-m", "apps", "studio", "--port", "0", "--no-browser", "--device", "cpu"]
        process = subprocess.Popen(
            [*command, "--output", str(Path(place) / "out")],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            cwd=PROJECT,
        )
        try:
            with open_browser() as browser:
                page = browser.new_page(viewport={"width": 1280, "height": WIDTHS[1280]}, reduced_motion="reduce")
                page.set_default_timeout(1000 * PATIENCE)
                open_page(page, wait_for_address(process, log, PATIENCE))
                shoot(Camera(page, folder, tabs))
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(120)


if __name__ == "__main__":
    main(Path(sys.argv[1]), tuple(sys.argv[2:]))
