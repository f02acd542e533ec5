"""What stands around the prompt on the page: help on every control, earlier prompts, presets, generating for ever."""

from __future__ import annotations

import json
import re

import pytest

from apps.service.events import Done
from apps.service.requests import OPTIONS, TextToImageRequest
from apps.studio.app import build_page
from apps.studio.controls import CONTROLS, HELD, help_of
from apps.studio.prompt_notes import became
from apps.studio.prompt_tools import EARLIER, PromptTools, settings_of
from apps.studio.sessions import Sessions
from apps.studio.strings import FOLDER, Strings, languages
from tests.studio.browsers import open_browser
from tests.studio.fakes import FakePipeline
from tests.studio.serving import serving_page
from tests.studio.test_page import PAGE, studio

__all__ = ["studio"]
ENGLISH = Strings("en")
SELF_MADE = {"model", "prompt", "label", "shape"}


# ------------------------------------------------------------------------------------ help


@pytest.mark.parametrize("language", languages())
def test_every_control_has_help_from_its_declaration(studio, language):
    page = build_page(studio.engine, Strings(language), Sessions(None))
    elements = {one.elem_id for one in page.blocks.values() if getattr(one, "elem_id", None)}
    markup = next(one.value for one in page.blocks.values() if getattr(one, "elem_id", None) == "help")
    described = dict(re.findall(r'data-for="([^"]+)">([^<]+)<', markup))
    assert described.keys() <= elements
    wanted = {name.replace("_", "-") for name in CONTROLS} & elements
    assert wanted <= described.keys()
    assert len(wanted) == len(CONTROLS)  # every option with a control stands on the page
    assert all(name.replace("_", "-") in described for name in HELD if name.replace("_", "-") in elements)
    assert all(len(text) > 3 for text in described.values())


def test_help_is_that_of_the_options_and_is_translated():
    chinese = json.loads((FOLDER / "help" / "zh.json").read_text(encoding="utf-8"))
    assert chinese.keys() == OPTIONS.keys()  # an option that is new has its English help until it stands there
    for name, one in OPTIONS.items():
        english = help_of(name, ENGLISH)
        assert one.option.help.lower().endswith(english.lower())
        assert not english.startswith("With --")
        assert help_of(name, Strings("zh")) == chinese[name][:1].upper() + chinese[name][1:]
        assert re.search("[\u4e00-\u9fff]", chinese[name])


# ------------------------------------------------------------------------- earlier prompts


def test_earlier_prompts_are_those_of_the_user_each_once_the_newest_first(studio):
    engine, tools = studio.engine, PromptTools(studio.engine, ENGLISH)
    for owner, prompt in (("ann", "a fox"), ("ann", "a cat"), ("bob", "a secret"), ("ann", "a fox")):
        request = TextToImageRequest(prompt=prompt, steps=1, height=64, width=64, seed=1)
        assert any(isinstance(event, Done) for event in engine.generate(request, owner=owner))
    assert tools.earlier("ann") == ["a fox", "a cat"]
    assert tools.earlier("bob") == ["a secret"]
    assert tools.earlier("eve") == []
    assert EARLIER == 100


# ----------------------------------------------------------------------------- own presets


def test_what_stands_on_the_page_becomes_a_preset_and_comes_back(studio):
    tools = PromptTools(studio.engine, ENGLISH)
    values = {**PAGE, "steps": 7, "guidance": 2.5, "step_cache": "fora", "cache_amount": 0, "scheduler": "heun"}
    changes = tools.save("ann", "mine", values)
    assert changes["preset"]["value"] == "mine"
    assert "mine" in changes["preset"]["choices"]
    assert "mine" not in tools.choices("bob")
    shown = studio.handlers.choose_preset("mine", "fake", "ann")
    assert (shown["steps"], shown["guidance"], shown["scheduler"], shown["step_cache"]) == (7, 2.5, "heun", "fora")
    assert (shown["shape"], shown["width"], shown["height"]) == ("custom", 64, 64)
    assert set(studio.handlers.choose_preset("mine", "fake", "bob")) == {"problem"}
    assert tools.delete("ann", "mine")["preset"]["value"] == ""
    assert "mine" not in tools.choices("ann")


def test_a_preset_holds_no_prompt_no_seed_and_no_image():
    found = settings_of({**PAGE, "mode": "inpaint"})
    assert not {"prompt", "seed", "image", "mask", "strength", "mask_grow"} & found.keys()


def test_the_stage_says_what_the_prompt_became(studio):
    request = TextToImageRequest(prompt="{red|red} fox", prompt_syntax="dynamic", steps=1, height=64, width=64, seed=1)
    events = list(studio.engine.generate(request))
    settings = next(event.metadata for event in events if hasattr(event, "metadata"))
    assert became(settings, ENGLISH) == ("The prompt was read as: red fox",)
    weighted = settings.model_copy(update={"prompt": "a (red:1.4) fox", "prompt_syntax": "weights"})
    assert became(weighted.model_copy(update={"prompt_template": None}), ENGLISH) == ("Words with a weight: red 1.4",)
    assert became(weighted.model_copy(update={"prompt_template": None, "prompt_syntax": None}), ENGLISH) == ()


# --------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving_page(tmp_path_factory.mktemp("served"), FakePipeline(0.01), with_users=False) as found:
        for prompt in ("an old fox", "a new cat"):
            request = TextToImageRequest(prompt=prompt, steps=1, height=64, width=64, seed=1)
            assert any(isinstance(event, Done) for event in found.engine.generate(request))
        yield found


@pytest.fixture(scope="module")
def browser():
    with open_browser() as one:
        yield one


@pytest.fixture
def page(served, browser):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.goto(served.address)
    opened.wait_for_selector("#steps .help-tip", timeout=30_000)
    opened.wait_for_function("JSON.parse(document.querySelector('#earlier textarea').value).length > 0")
    yield opened
    context.close()


def test_help_is_reached_by_keyboard_mouse_and_screen_readers(page):
    tip = page.locator("#steps .help-tip").first
    assert page.locator(".help-bubble").count() == 0
    tip.focus()
    bubble = page.locator(".help-bubble")
    assert bubble.is_visible()
    assert bubble.text_content() == help_of("steps", ENGLISH)
    page.keyboard.press("Escape")
    assert not bubble.is_visible()
    tip.click()
    assert bubble.is_visible()
    assert tip.get_attribute("aria-label") == "Help: Steps"
    described = page.locator("#steps input").first.get_attribute("aria-describedby")
    assert page.locator(f"[id={described}]").text_content() == help_of("steps", ENGLISH)
    missing = page.evaluate(
        """() => [...document.querySelectorAll('.help-texts [data-for]')].map((one) => one.dataset.for)
          .filter((id) => document.getElementById(id)?.offsetParent && !document.querySelector(`#${id} .help-tip`))"""
    )
    assert missing == []


def test_arrows_and_the_menu_bring_earlier_prompts_back(page):
    field = page.locator("#prompt textarea")
    field.fill("my draft")
    field.press("Home")
    field.press("ArrowUp")
    assert field.input_value() == "a new cat"
    field.press("ArrowUp")
    assert field.input_value() == "an old fox"
    field.press("End")
    field.press("ArrowDown")
    field.press("ArrowDown")
    assert field.input_value() == "my draft"
    page.locator("[data-tool=history]").focus()
    page.keyboard.press("Enter")
    page.keyboard.type("old")
    assert page.locator("#history-list li").all_text_contents() == ["an old fox"]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert field.input_value() == "an old fox"
    assert not page.locator("#prompt-tools .history").is_visible()
    page.locator("[data-tool=history]").click()
    page.keyboard.press("Escape")
    assert not page.locator("#prompt-tools .history").is_visible()


def test_generating_for_ever_queues_one_at_a_time_until_it_is_switched_off(page, served):
    page.locator("#prompt textarea").fill("for ever")
    page.locator("[data-tool=forever]").click()
    most = 0

    def seeds():
        jobs = [json.loads(one.request) for one in served.engine.jobs("local", 100)]
        return [one["seed"] for one in jobs if one["prompt"] == "for ever"]

    for _ in range(200):
        most = max(most, len(served.engine.unfinished("local")))
        if len(seeds()) >= 3:
            break
        page.wait_for_timeout(100)
    assert len(set(seeds())) == len(seeds()) >= 3
    assert most <= 1
    page.locator("[data-tool=forever]").click()
    assert page.locator("[data-tool=forever]").get_attribute("aria-pressed") == "false"
    page.wait_for_timeout(700)
    count = len(seeds())
    page.wait_for_timeout(1500)
    assert len(seeds()) == count
    assert served.engine.unfinished("local") == []


def test_a_sound_is_asked_for_and_remembered(page):
    page.evaluate(
        "() => { window.tones = 0; const real = OscillatorNode.prototype.start;"
        "OscillatorNode.prototype.start = function (...at) { window.tones++; return real.apply(this, at); }; }"
    )
    page.locator("#prompt textarea").fill("quiet")
    page.locator("#generate").click()
    page.wait_for_function("document.querySelector('#stop').disabled === false")
    page.wait_for_function("document.querySelector('#stop').disabled === true")
    page.wait_for_timeout(600)
    assert page.evaluate("window.tones") == 0
    page.locator("[data-tool=sound]").click()
    assert page.evaluate("window.tones") == 2  # so that one hears what it is
    page.locator("#generate").click()
    page.wait_for_function("window.tones === 4", timeout=20_000)
    assert page.evaluate("localStorage.getItem('tessera-sound')") == "on"
    page.reload()
    page.wait_for_selector("[data-tool=sound][aria-pressed=true]", timeout=30_000)


def test_a_preset_is_saved_chosen_and_deleted_on_the_page(page, served):
    page.locator("#advanced button").first.click()
    page.locator("#preset-name input, #preset-name textarea").fill("from the page")
    page.locator("#preset-save").click()
    page.wait_for_function("document.querySelector('#preset input').value === 'from the page'")
    assert "from the page" in served.engine.presets.of("local")
    page.locator("#preset-delete").click()
    page.wait_for_function("document.querySelector('#preset input').value !== 'from the page'")
    assert served.engine.presets.of("local") == {}
