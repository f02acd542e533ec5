"""The page's look: contrast of all its texts, and what has to be seen together."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from apps.service import limits
from apps.studio.forms import read_mask
from apps.studio.theme import CLAY, theme
from tests.studio.browsers import fill_number
from tests.studio.test_server import browser, note_says, open_page, page, problem_says, server

__all__ = ["browser", "page", "server"]
LEAST = 4.5
"""Contrast of text that WCAG 2.1 AA asks for."""
TABS = (
    "text", "image", "inpaint", "video", "classes", "scales", "grid", "compare", "gallery", "models", "speed",
    "fine_tune",
)  # fmt: skip
PAIRS = (
    ("body_text_color", "body_background_fill"),
    ("body_text_color", "background_fill_primary"),
    ("body_text_color", "background_fill_secondary"),
    ("body_text_color", "input_background_fill"),
    ("body_text_color_subdued", "body_background_fill"),
    ("body_text_color_subdued", "background_fill_primary"),
    ("body_text_color_subdued", "background_fill_secondary"),
    ("block_title_text_color", "background_fill_primary"),
    ("input_placeholder_color", "input_background_fill"),
    ("input_placeholder_color", "input_background_fill_focus"),
    ("button_primary_text_color", "button_primary_background_fill"),
    ("button_primary_text_color", "button_primary_background_fill_hover"),
    ("button_secondary_text_color", "button_secondary_background_fill"),
    ("button_secondary_text_color", "button_secondary_background_fill_hover"),
    ("checkbox_label_text_color_selected", "checkbox_label_background_fill_selected"),
)
"""Variables of the theme: a text and what it stands on."""

MEASURE = """() => {
  const parse = (text) => {
    const found = text.match(/[\\d.]+/g).map(Number), scale = text.startsWith("color(") ? 255 : 1;
    return [found[0] * scale, found[1] * scale, found[2] * scale, found[3] ?? 1];
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const backdrop = (element) => {
    const layers = [];
    for (let one = element; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour[3] > 0) layers.push(colour);
      if (colour[3] === 1) break;
    }
    return layers.reduceRight((under, top) => over(top, under), [255, 255, 255, 1]);
  };
  const found = [];
  const measure = (element, style, text) => {
    const box = element.getBoundingClientRect();
    if (element.closest("[disabled], [aria-hidden=true]") || !box.width || !box.height) return;
    if (getComputedStyle(element).visibility === "hidden") return;
    const under = backdrop(element);
    found.push([text.slice(0, 40), over(parse(style.color), under).slice(0, 3), under.slice(0, 3)]);
  };
  for (const element of document.querySelectorAll("body *")) {
    if (["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue;
    const own = [...element.childNodes].find((node) => node.nodeType === 3 && node.textContent.trim());
    if (own) measure(element, getComputedStyle(element), own.textContent.trim());
    if (element.matches("input:is([type=text], [type=number], [type=search], :not([type])), textarea")) {
      measure(element, getComputedStyle(element), element.value || "value");
      if (element.placeholder) measure(element, getComputedStyle(element, "::placeholder"), element.placeholder);
    }
  }
  return found;
}"""
"""Every text that can be read on the page: its beginning, its colour and that of what it stands on, RGB to 255."""


IN_SIGHT = """(place) => {
  const box = document.querySelector(place).getBoundingClientRect();
  return box.height > 0 && box.top >= 0 && box.bottom <= innerHeight;
}"""


def luminance(colour) -> float:
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (one / 255 for one in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other) -> float:
    """Return the contrast of two colours as WCAG 2.1 defines it, 1 to 21."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def colour_of(found, name: str) -> tuple[int, ...]:
    """Return a colour of the theme as RGB; one that the theme doesn't set for the dark is that of the light."""
    value = getattr(found, name, None) or getattr(found, name.removesuffix("_dark"))
    if value.startswith("*primary_"):
        value = getattr(CLAY, f"c{value.removeprefix('*primary_')}")
    value = {"white": "#ffffff", "black": "#000000"}.get(value, value)
    return tuple(int(value[i : i + 2], 16) for i in (1, 3, 5))


def test_contrast_is_that_of_the_standard():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("ending", ["", "_dark"])
@pytest.mark.parametrize("pair", PAIRS, ids="-on-".join)
def test_the_texts_of_the_theme_can_be_read(pair, ending):
    found = theme()
    assert contrast(*(colour_of(found, name + ending) for name in pair)) >= LEAST


def choose(page, tab: str) -> None:
    page.locator("#tabs .tab-container button[role=tab]").nth(TABS.index(tab)).click()
    page.wait_for_function("tab => document.querySelector('#workspace').dataset.tab === tab", arg=tab)


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_every_text_of_the_page_can_be_read(server, page, is_dark):
    if is_dark:
        page.click(".night")
    page.click("#advanced > button")
    page.click(".words summary")
    page.fill("#prompt textarea", "")  # and no number out of range: a slider's field corrects it when it is left
    page.click("#generate")
    problem_says(page, "The prompt is empty")
    texts = []
    for tab in TABS:
        choose(page, tab)
        page.wait_for_timeout(400)  # until colours have changed over
        for text, colour, under in page.evaluate(MEASURE):
            assert contrast(colour, under) >= LEAST, (tab, text, colour, under)
            texts.append(text)
    assert len(texts) > 200
    assert any(text.startswith("The prompt is empty") for text in texts)  # opening another tab takes it away


def source(tmp_path, width: int, height: int):
    Image.new("RGB", (width, height), "orange").save(tmp_path / "source.png")
    return tmp_path / "source.png"


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("size", [(128, 128), (96, 192), (192, 96)])
def test_the_brush_and_the_button_that_generates_are_on_one_screen(server, page, tmp_path, size):
    choose(page, "inpaint")
    page.set_input_files("#source input[type=file]", source(tmp_path, *size))
    page.locator("#source canvas").wait_for()
    page.wait_for_timeout(500)
    top = page.locator("#source canvas").bounding_box()
    bottom = page.locator("#generate").bounding_box()
    assert top["y"] >= 0
    assert bottom["y"] + bottom["height"] <= 900
    tools = page.locator("[data-tool=draw]").bounding_box()
    assert top["y"] + top["height"] <= tools["y"] < bottom["y"]
    choose(page, "text")
    assert page.locator("#brush-tools").is_hidden()


@pytest.mark.browser
@pytest.mark.slow
def test_the_stage_stays_in_sight_while_settings_are_tuned(server, page):
    page.fill("#prompt textarea", "a fox")
    fill_number(page, "#steps input[type=number]", "2")
    page.click("#generate")
    note_says(page, "Done")
    page.locator("#strip img").first.wait_for()  # with facts and thumbnails the stage's panel is at its highest
    page.click("#advanced > button")
    page.locator("#settings-file").wait_for()
    for height in (900, 720):
        page.set_viewport_size({"width": 1280, "height": height})
        page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")  # where the last of the settings are
        assert page.evaluate("scrollY") > 400
        frame = page.locator("#stage .frame").bounding_box()
        assert 0 <= frame["y"] < frame["y"] + frame["height"] <= height
    page.set_viewport_size({"width": 390, "height": 844})  # a phone has no room for it
    page.locator("#settings-file").scroll_into_view_if_needed()
    assert page.locator("#stage .frame").bounding_box()["y"] < 0


@pytest.mark.browser
@pytest.mark.slow
def test_an_error_is_in_sight_and_goes_when_its_cause_goes(server, page, tmp_path):
    said = page.locator("#problem [role=alert]")
    page.set_viewport_size({"width": 390, "height": 844})
    page.fill("#prompt textarea", "")
    page.click("#generate")
    said.wait_for()
    page.wait_for_function(IN_SIGHT, arg="#problem")
    choose(page, "inpaint")  # another tab, another request
    said.wait_for(state="detached")

    page.set_input_files("#source input[type=file]", source(tmp_path, 64, 64))
    page.locator("#source canvas").wait_for()
    page.click("#generate")
    problem_says(page, "Nothing is marked")
    page.click("[data-tool=invert]")  # marks all of it
    said.wait_for(state="detached")

    (tmp_path / "prompts.csv").write_text("prompt\na fox\n")
    choose(page, "text")
    page.set_input_files("#prompt-file input[type=file]", tmp_path / "prompts.csv")
    problem_says(page, "prompts.csv is not one of .txt, .jsonl")
    assert not page.locator(".toast-body").count()  # errors have one place
    assert page.get_attribute("#prompt-file input[type=file]", "accept") == ".txt,.jsonl"


@pytest.mark.browser
@pytest.mark.slow
def test_a_picture_sent_to_another_tab_is_in_sight_there(server, page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.fill("#prompt textarea", "a fox")
    fill_number(page, "#steps input[type=number]", "2")
    page.click("#generate")
    note_says(page, "Done")
    page.click("#inpaint-it")
    page.locator("#source canvas").wait_for()
    page.wait_for_function(IN_SIGHT, arg="#source canvas")


@pytest.mark.browser
@pytest.mark.slow
def test_a_grid_has_no_frames_and_whole_labels(server, page):
    choose(page, "grid")
    page.fill("#prompt textarea", "a fox")
    page.locator("#tab-grid textarea").nth(0).fill("1, 2")
    page.get_by_label("Y axis").click()
    page.get_by_role("option", name="Guidance").click()  # the longest of the common labels
    page.locator("#tab-grid textarea").nth(1).fill("1, 2")
    page.click("#generate")
    note_says(page, "Done")
    cells = page.evaluate(
        """[...document.querySelectorAll('.grid-view :is(table, tr, th, td)')].map(
          (one) => getComputedStyle(one).borderTopWidth)"""
    )
    assert len(cells) > 4
    assert set(cells) == {"0px"}
    lines = page.evaluate(
        """[...document.querySelectorAll('.grid-view th span')].map(
          (one) => one.offsetHeight / parseFloat(getComputedStyle(one).lineHeight))"""
    )
    assert lines
    assert all(count < 1.5 for count in lines), lines  # no word is broken


@pytest.mark.browser
@pytest.mark.slow
def test_the_keyboard_sees_where_it_is(server, page):
    for selector in ("#steps input[type=range]", "#generate", ".language"):
        page.focus(selector)
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", selector
    page.focus("#model input")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    shadow = "getComputedStyle(document.querySelector('#model .wrap-inner')).boxShadow"
    assert page.evaluate(shadow) != "none"


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("language", ["", "zh/"])
def test_nothing_breaks_on_a_narrow_screen(server, browser, language):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(60_000)
    open_page(page, f"{server[0]}/{language}")
    page.click("#advanced > button")
    for tab in TABS:
        choose(page, tab)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
        labels = page.evaluate(
            """[...document.querySelectorAll('#settings :is(label, button):not([aria-haspopup])')].map((one) => {
              const box = one.getBoundingClientRect();
              return [one.textContent.trim(), box.left, box.right, box.height];
            }).filter((one) => one[3] > 0)"""
        )
        for text, left, right, height in labels:
            assert 0 <= left < right <= 390, (tab, text)
            assert height <= 80, (tab, text)  # no label is broken into a column of words
    page.close()


@pytest.mark.browser
@pytest.mark.slow
def test_thumbnails_are_named_by_what_they_show(server, page):
    page.fill("#prompt textarea", "a red apple")
    fill_number(page, "#seed input", "41")
    page.click("#generate")
    page.locator("#strip button[aria-label='a red apple, seed 41']").first.wait_for()
    choose(page, "gallery")
    page.locator(".gallery-cell[aria-label='a red apple, seed 41']").first.wait_for()
    caption = page.locator(".gallery-cell .text").first
    assert caption.evaluate("one => one.clientHeight < 2 * parseFloat(getComputedStyle(one).lineHeight)")  # one line


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("tone", [(217, 96, 58), (255, 255, 255), (0, 0, 0), (120, 120, 120), (233, 180, 76)])
def test_the_brush_can_be_seen_on_an_image_of_any_colour(server, page, tmp_path, tone):
    Image.new("RGB", (96, 96), tone).save(tmp_path / "plain.png")
    choose(page, "inpaint")
    page.set_input_files("#source input[type=file]", tmp_path / "plain.png")
    page.locator("#source canvas").wait_for()
    page.click("[data-tool=invert]")  # marks all of it
    with Image.open(io.BytesIO(page.locator("#source .brush").screenshot())) as shot:
        marked = shot.convert("RGB").resize(shot.size).crop((40, 40, shot.width - 40, shot.height - 40))
    found = [colour for count, colour in marked.getcolors(1 << 24) or [] if count > 50]
    assert max(contrast(one, other) for one in found for other in found) >= 3  # of WCAG for what isn't text
    mask = read_mask(page.input_value("#mask textarea"))
    assert mask.getextrema() == (255, 255)  # the stripes are for eyes only


@pytest.mark.browser
@pytest.mark.slow
def test_a_file_over_the_limit_is_refused_in_the_language_and_the_place_of_other_errors(server, browser, tmp_path):
    (tmp_path / "large.png").write_bytes(bytes(limits.MAX_UPLOAD_BYTES + 1))
    page = browser.new_page()
    open_page(page, f"{server[0]}/zh/")
    for place in ("#settings", "#prompt-file", "#source"):
        page.set_input_files(f"{place} input[type=file]", tmp_path / "large.png")
        problem_says(page, "large.png \u6709 20971521 \u5b57\u8282")
        assert not page.locator(".toast-body").count()
        choose(page, "image")  # another tab; the error goes
        page.locator("#problem [role=alert]").wait_for(state="detached")
        choose(page, "text")
    page.close()
