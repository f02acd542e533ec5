"""The studio's page without a browser: its listeners, its markup, its words."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from html import unescape
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from gradio.blocks import postprocess_update_dict
from PIL import Image

from apps.commands.serve import check_host, check_port
from apps.service import limits
from apps.service.engine import Engine
from apps.service.events import Done
from apps.service.gallery_store import Person, Wanted
from apps.service.grid import Axis, Filled, compose, plan, read_axis
from apps.service.metadata import parse, save_picture
from apps.service.model_pool import inspect_model
from apps.service.named_settings import load_presets, preset_values
from apps.service.requests import OPTIONS, TextToImageRequest
from apps.service.styles import load_styles
from apps.studio import following as following_module
from apps.studio import lora_rows, views
from apps.studio.album import Shown
from apps.studio.app import build_page
from apps.studio.controls import CONTROLS
from apps.studio.examples import FAVOURITES, example_prompts
from apps.studio.following import restated
from apps.studio.forms import (
    AUTO,
    CUSTOM,
    FIXED,
    MODELS_OWN,
    RANDOM,
    form_to_request,
    read_mask,
    read_size,
    settings_to_form,
    size_choices,
)
from apps.studio.gallery_tab import GalleryHandlers
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.page_values import PageError
from apps.studio.problems import PLACE
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SAVED, SettingsHandlers
from apps.studio.strings import AREAS, Strings, languages
from apps.studio.tabs.classes import read_label
from apps.studio.vocabulary import read_vocabulary
from pipelines.info.inspection import pipelines_by_task
from tests.models import tiny_next_scale
from tests.pipes.test_class_to_image import tiny_pipeline
from tests.studio.fakes import FakePipeline

TAB = SimpleNamespace(session_hash="one tab", username=None)
ENGLISH = Strings("en")
PAGE = {name: one.option.control.start for name, one in CONTROLS.items()} | {
    "mode": "text", "prompt": "a fox", "negative_prompt": "", "model": "fake",
    "shape": "64x64", "width": 96, "height": 64,
    "steps": 4, "guidance": 4.0, "seed_mode": FIXED, "seed": 3, "num_images": 1, "batch_size": 1, "style": "",
    "scheduler": "", **lora_rows.show([]), "step_cache": "", "cache_amount": 0, "file_format": "png",
    "memory": "", "dtype": "", "attention": "", "grow_left": 0, "grow_top": 0, "grow_right": 0, "grow_bottom": 0,
    "mask_grow": 0, "mask_blur": 0, "mask_padding": 0,
    "inpaint_label": None, "keep_settings": True, "sidecar": False, "strength": 0.6, "repaint": 1.0,
    "label": None, "scale_label": None, "top_k": 900, "top_p": 0.95, "temperature": 1, "smooth": False,
    "kv_policy": "full", "kv_budget": 0.1, "kv_dtype": "auto", "search": "", "candidates": 4, "grid_x": "steps",
    "grid_x_values": "2, 3", "grid_y": "", "grid_y_values": "", "grid_z": "", "grid_z_values": "", "source": None,
    "mask": "", "first_image": None, "last_image": None, "video": None, "video_frames": None, "many": [],
    "frames": None,
}  # fmt: skip


@pytest.fixture
def studio(tmp_path):
    (tmp_path / "out").mkdir()
    pipe = FakePipeline(0.01)
    engine = Engine({"fake": str(tmp_path)}, tmp_path / "out", device="cpu", load=lambda source: pipe)
    engine.model().result(60)
    sessions = Sessions(None)
    generation = GenerationHandlers(engine, ENGLISH, sessions)
    yield SimpleNamespace(
        engine=engine,
        generation=generation,
        handlers=SettingsHandlers(engine, ENGLISH, sessions, generation),
        sessions=sessions,
        pipe=pipe,
    )
    engine.close()


def follow(studio, tab=TAB, seen=(), chosen=None):
    """Tell the changes of a page that follows, as the page asks for them; it has seen nothing if `seen` is None."""
    for changes in studio.generation.following.follow(tab, seen, chosen):
        if changes:
            yield changes
        else:
            time.sleep(0.005)


def generate(studio, tab=TAB, **changes):
    """Ask for images and follow them, as a page does that has seen all that is finished."""
    seen = studio.generation.album.names(studio.sessions.user(tab))
    asked = studio.generation.generate({**PAGE, **changes}, tab)
    yield asked
    if "pulse" in asked:
        yield from follow(studio, tab, seen)


def generate_values(generation, values):
    """Ask for images with these values of the page, and follow them."""
    return generate(SimpleNamespace(generation=generation, sessions=Sessions(None)), **values)


def pictures(told):
    """Return what the strip shows at last, the newest first; without sheets of grids."""
    strips = [changes["visit"] for changes in told if "visit" in changes]
    return [one for one in strips[-1] if isinstance(one, Shown)]


def followed(told):
    """Return the id of the job that a page shows."""
    return [changes["job"] for changes in told if "job" in changes][-1]


def test_a_change_is_repeated_for_a_moment(monkeypatch):
    """Gradio loses what only the first of two messages says that arrive together."""
    clock = iter([0.0, 0.1, 1.0, 1.5, 2.5, 2.6])
    monkeypatch.setattr(following_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    told = [
        {"strip": ["a"], "stage": "step"},
        {"stage": "step 2"},
        {"stage": "done"},
        None,
        {"queue_note": "1"},
        {"queue_note": "2"},
    ]
    assert list(restated((change for change in told), seconds=(0.2, 2.0))) == [
        {"strip": ["a"], "stage": "step"},
        {"stage": "step 2"},  # too early
        {"strip": ["a"], "stage": "done"},  # the last word on the stage
        None,
        {"stage": "done", "queue_note": "1"},
        {"strip": ["a"], "queue_note": "2"},
        {"stage": "done", "queue_note": "2"},  # the end; the strip is old by now
    ]


def test_what_is_told_is_closed_with_what_is_restated():
    closed = []

    def told():
        try:
            yield {"queue_note": ""}
        finally:
            closed.append(True)

    changes = restated(told())
    next(changes)
    changes.close()
    assert closed == [True]


def test_an_update_is_repeated_whole_though_gradio_empties_it():
    told = restated(change for change in ({"strip": gr.update(value=["a"])}, {"queue_note": ""}))
    postprocess_update_dict(gr.Gallery(render=False), next(told)["strip"], postprocess=False)
    assert list(told)[-1]["strip"]["value"] == ["a"]


def test_prompts_from_a_file_are_a_job_each(studio, tmp_path):
    (tmp_path / "prompts.txt").write_text('# mine\na fox\n"a cat"\n{"prompt": "a dog"}\n\n')
    changes = studio.handlers.take_prompts(str(tmp_path / "prompts.txt"))
    assert [(line.number, line.values["prompt"]) for line in changes["many"]] == [
        (2, "a fox"),
        (3, "a cat"),
        (4, "a dog"),
    ]
    visit = pictures(list(generate(studio, many=changes["many"])))
    assert [item.settings.prompt for item in visit] == ["a dog", "a cat", "a fox"]
    assert studio.handlers.drop_prompts()["many"] == []


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", ["prompts.csv", "prompts", "prompts.txt.png"])
def test_a_file_of_another_kind_holds_no_prompts(studio, tmp_path, language, name):
    (tmp_path / name).write_text("prompt,seed\na fox,5\n")
    words = Strings(language)
    handlers = SettingsHandlers(studio.engine, words, studio.sessions, studio.generation)
    changes = handlers.take_prompts(str(tmp_path / name))
    assert words("error.file.kind", file=name, choices=".txt, .jsonl") in unescape(changes[PLACE])
    assert changes["many"] == []
    settings = handlers.load_settings(str(tmp_path / name))
    assert words("error.settings.form", file=name) in unescape(settings[PLACE])


@pytest.mark.parametrize("language", ["en", "zh"])
def test_unknown_words_are_said_beside_the_picture_also_after_a_restart(studio, tmp_path, language):
    words = Strings(language)
    (tmp_path / "words.txt").write_text("a\nfox\non\n")
    sentence = "The model was not trained on the words 'teal'."
    studio.pipe.unknown_words = lambda texts: ("teal",)
    shown = pictures(list(generate(studio, prompt="a fox on <teal>")))[0]
    assert any("teal" in note for note in shown.notes)
    again = GenerationHandlers(studio.engine, words, studio.sessions)  # knows what is on record only
    (recorded,) = again.album.recent(studio.sessions.user(TAB))
    assert recorded == shown
    told = again.show(recorded)["details"]
    assert words("facts.unknown", words="teal") in unescape(told)
    assert 'alt="a fox on &lt;teal&gt;"' in again.show(recorded)["stage"]
    assert "fox" not in told
    (tmp_path / "words.txt").unlink()  # then what the record says
    assert "teal" in again.show(replace(recorded, notes=(sentence,)))["details"]
    assert 'class="hint"' not in again.show(replace(recorded, notes=()))["details"]


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"steps": 10**6}, "\u201cSteps\u201d is 1000000: choose 1 to 200"),
        ({"num_images": 99}, "\u201cNumber of images\u201d is 99: choose 1 to 16"),
        ({"shape": "9999x9999"}, "choose"),
        ({"shape": "/etc/passwd"}, "\u201cSize\u201d"),
        ({"seed": None}, "\u201cSeed\u201d is empty: choose 0 to 4294967295"),
        ({"seed": float("nan")}, "\u201cSeed\u201d is nan"),
        ({"model": "/etc"}, "choose one of fake"),
        ({"model": f"someone/model@{'0' * 40}"}, "choose one of fake"),  # the owner of the machine names those
        ({"mode": "image"}, "Choose an image"),
        ({"mode": "image", "source": "../../etc/passwd"}, "\u201cImage\u201d"),
        ({"mode": "inpaint", "source": "0" * 64}, "Nothing is marked"),
        ({"mode": "inpaint", "source": "0" * 64, "mask": "data:image/png;base64,AAAA"}, "can&#x27;t be read"),
        ({"mode": "classes"}, "Choose a class"),
        ({"mode": "grid", "grid_x": "module"}, "choose one of steps"),
        ({"scheduler": "os.system"}, "\u201cScheduler\u201d is os.system: choose one of euler"),
        ({"style": "<script>"}, "\u201cStyle\u201d is &lt;script&gt;"),
        ({"step_cache": "../x"}, "\u201cStep cache\u201d"),
        ({"step_cache": "fora", "cache_amount": -5}, "is -5: choose a number above 0, up to 100"),
        ({"guidance": "four"}, "\u201cGuidance\u201d is four"),
        ({"num_images": 2.5}, "2.5, which is not a whole number"),
    ],
)
def test_wishes_that_by_pass_the_widgets_are_refused(studio, wish, reason):
    problem = [changes["problem"] for changes in generate(studio, **wish) if "problem" in changes][-1]
    assert reason in problem
    assert 'role="alert"' in problem
    assert "<script>" not in problem


def test_a_random_seed_ignores_the_field(studio):
    assert len({pictures(list(generate(studio, seed_mode=RANDOM)))[0].settings.seed for _ in range(3)}) == 3


def test_settings_in_the_picture_put_the_page_in_place(studio):
    """The bar: image, settings, the same image again."""
    first = pictures(list(generate(studio, seed=9, width=96, height=64, shape=CUSTOM, guidance=2.5)))[0]
    changes = studio.handlers.load_settings(str(first.path))
    assert changes["mode"] == "text"
    again = pictures(list(generate(studio, **{name: value for name, value in changes.items() if name in PAGE})))[0]
    assert again.settings == first.settings
    with Image.open(first.path) as one, Image.open(again.path) as two:
        assert one.tobytes() == two.tobytes()
    assert studio.handlers.reuse_settings(first)["seed"] == 9
    assert studio.handlers.reuse_seed(first) == {"seed_mode": FIXED, "seed": 9}
    assert studio.handlers.reuse_seed(None) == studio.handlers.reuse_settings(None) == {}


def test_the_json_file_beside_a_picture_sets_what_the_picture_sets(studio, tmp_path):
    first = pictures(list(generate(studio, seed=9, sidecar=True)))[0]
    beside = first.path.with_name(f"{first.path.name}.json")
    assert studio.handlers.load_settings(str(beside)) == studio.handlers.load_settings(str(first.path))
    for name, text in (("a.json", "[" * 70_000), ("b.json", '{"prompt": "<b>"}'), ("c.json", "")):
        (tmp_path / name).write_text(text)
        shown = studio.handlers.load_settings(str(tmp_path / name))
        assert set(shown) == {PLACE}
        assert shown[PLACE]
        assert "<b>" not in shown[PLACE]


def test_a_file_that_the_browser_keeps_is_named_with_its_size_and_the_limit(studio):
    told = studio.handlers.refuse_file(json.dumps({"file": "<b>.png", "value": 30_000_000}))
    for text in ("&lt;b&gt;.png", "30000000", str(limits.MAX_UPLOAD_BYTES)):
        assert text in told[PLACE]
    for hostile in ("", "[]", "{}", "null", '{"file": "x", "value": "many"}', "[" * 100_000):
        assert studio.handlers.refuse_file(hostile) == {}


def test_the_page_is_fitted_to_the_model_of_settings_that_are_put_in_place(studio, tmp_path):
    (tmp_path / "vocabulary.txt").write_text("fox\npizza\n")
    first = pictures(list(generate(studio, seed=9, steps=5, shape="96x64")))[0]
    put = studio.handlers.load_settings(str(first.path))
    assert studio.handlers.adapted(put, "fake") is put  # it is fitted already
    fitted = studio.handlers.adapted(put, "another")
    assert fitted["model"] == "fake"
    assert "pizza" in fitted["words"]
    assert fitted["steps"] == {**gr.update(value=5, visible=True)}  # shown, with the value of the file
    for name in ("width", "height", "shape", "guidance", "scheduler"):
        assert fitted[name]["value"] == put[name]
    assert {AUTO, CUSTOM} <= {value for _, value in fitted["shape"]["choices"]}


def test_settings_of_a_model_that_is_not_here_say_so(studio, tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(gr, "Warning", warned.append)
    settings = pictures(list(generate(studio)))[0].settings.model_copy(update={"model": "<i>gone"})
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "gone.png", settings)
    shown = studio.handlers.load_settings(str(tmp_path / "gone.png"))
    assert "model" not in shown
    assert shown["seed"] == settings.seed
    assert len(warned) == 1
    assert "&lt;i&gt;gone" in warned[0]


def test_hostile_settings_are_refused(studio, tmp_path):
    settings = pictures(list(generate(studio)))[0].settings
    for number, change in enumerate(({"task": "inpaint"}, {"image": "0" * 64, "task": "image_to_image"})):
        file = tmp_path / f"{number}.png"
        hostile = settings.model_copy(update={"prompt": "<b>", **change})
        save_picture(Image.new("RGB", (8, 8)), file, hostile)
        shown = studio.handlers.load_settings(str(file))
        assert set(shown) == {PLACE}
        assert "<b>" not in shown[PLACE]
    (tmp_path / "x.png").write_bytes(b"\x89PNG but no")
    assert "x.png can&#x27;t be read" in studio.handlers.load_settings(str(tmp_path / "x.png"))[PLACE]


def pick(studio, told):
    return GalleryHandlers(studio.engine, studio.sessions, studio.generation).pick(TAB, told)


def test_pictures_of_strip_and_gallery_can_be_chosen(studio):
    visit = pictures(list(generate(studio, seed=9, num_images=3)))
    assert studio.handlers.choose(visit, SimpleNamespace(index=0))["chosen"] == visit[0]
    for index in (7, -1, "0", None):
        assert studio.handlers.choose(visit, SimpleNamespace(index=index)) == {}
    newest, *_ = numbers = studio.engine.gallery.numbers(Person("local"), Wanted())
    shown = [pick(studio, f"{number} use 1") for number in numbers]
    assert [one["chosen"].settings.seed for one in shown] == [11, 10, 9]
    assert shown[0]["mode"] == "text"
    visit[0].path.unlink()
    for gone in (f"{newest} use", "999 use"):
        with pytest.raises(PageError, match="gone"):
            pick(studio, gone)
    for told in ("", "x", "1" * 400, "-1 use", "\u00b2 use"):
        assert pick(studio, told) == {}


def test_a_painted_picture_can_be_started_from(studio):
    first = pictures(list(generate(studio)))[0]
    changes = studio.handlers.send(first, "inpaint")
    with Image.open(first.path) as image:
        assert studio.engine.uploads.get(changes["source"]).tobytes() == image.convert("RGB").tobytes()
    assert changes["mode"] == "inpaint"
    assert "<canvas" in changes["source_view"]
    assert studio.handlers.send(None, "image") == {}


def test_the_mask_of_the_brush():
    drawn = Image.new("L", (16, 8))
    drawn.paste(255, (0, 0, 8, 8))
    mask = np.asarray(read_mask(views.preview_uri(drawn)))
    assert mask[:, :8].all()
    assert not mask[:, 8:].any()


def test_the_controls_fit_the_model(studio, tmp_path):
    (tmp_path / "vocabulary.txt").write_text("fox\npizza\nice cream\nghost\n")
    changes = studio.handlers.load_model_controls("fake", "text")
    assert changes["shape"]["value"] == AUTO
    assert (changes["width"]["value"], changes["width"]["step"]) == (128, 16)
    assert (changes["steps"]["value"], changes["guidance"]["value"]) == (28, 4.0)
    assert "ice cream" in changes["words"]
    assert changes["chip_0"]["value"] == "a pizza on a blue background"
    assert changes["need"] == ""
    assert "<span>tessera</span> <span>convert</span>" in studio.handlers.load_model_controls("fake", "scales")["need"]
    assert "no such model" in studio.handlers.load_model_controls("../secret", "text")[PLACE]


def test_a_tab_that_a_model_cannot_do_offers_one_that_can(tmp_path):
    """Known from its folder: nothing is loaded to find out."""
    loaded = []
    engine = Engine(
        {"stickers": "stickers", "stickers-var": "stickers-var"},
        tmp_path,
        device="cpu",
        load=lambda source: loaded.append(source) or FakePipeline(),
    )
    engine.model("stickers").result(60)
    sessions = Sessions(None)
    handlers = SettingsHandlers(engine, ENGLISH, sessions, GenerationHandlers(engine, ENGLISH, sessions))
    assert engine.abilities("stickers-var").tasks == ("next_scale_text",)
    changes = handlers.check_support("stickers", "scales")
    assert changes["switch"] == gr.update(value="Use stickers-var", visible=True)
    assert "not scale by scale" in changes["need"]
    assert loaded == ["stickers"]
    nobody = handlers.check_support("stickers", "classes")
    assert nobody["switch"]["visible"] is False
    assert "<span>--model</span> <span>models/dit</span></code>" in nobody["need"]
    assert handlers.switch("classes") == {}
    assert handlers.switch("scales")["model"] == "stickers-var"
    assert loaded == ["stickers", "stickers-var"]
    assert "<b>" not in views.unsupported_notice("<b>", "image", "<b>", ENGLISH)
    engine.close()


def test_what_the_browser_remembers_is_put_in_place_and_checked(studio):
    saved = {name: PAGE[name] for name in SAVED} | {"prompt": "a ghost", "steps": 9, "mode": "grid"}
    changes = studio.handlers.open(saved, PAGE)
    assert changes["prompt"] == "a ghost"
    assert changes["steps"]["value"] == 9
    assert changes["tabs"]["selected"] == "grid"
    for name in ("steps", "step_cache", "cache_amount"):  # parts that share an update keep values of their own
        assert changes[name]["value"] == saved[name], name
    for odd in (None, [], "x", {"model": "../x", "prompt": "y"}, {"model": "fake", "prompt": ["y"], "source": "z"}):
        assert "prompt" not in studio.handlers.open(odd, PAGE)


# ---------------------------------------------------------------------------------- tasks


def test_every_kind_of_pipeline_is_offered_its_tasks():
    from pipelines.next_scale import NextScaleClassToImagePipeline

    scales = NextScaleClassToImagePipeline(tiny_next_scale.transformer(), tiny_next_scale.tokenizer())
    classes = tiny_pipeline("dit", id2label={0: "tench, Tinca tinca", 1: "goldfish"})
    assert list(pipelines_by_task(scales)) == ["next_scale_class"]
    assert list(pipelines_by_task(classes)) == ["class_to_image"]
    model = inspect_model("classes", classes)
    assert model.labels[1] == "goldfish"
    assert "ddim" in model.schedulers
    assert [read_label(text) for text in ("12: tench", "12", "tench", 7)] == [12, 12, "tench", 7]


@pytest.mark.parametrize("mode", ["classes", "scales"])
def test_pictures_of_classes(tmp_path, mode):
    from pipelines.next_scale import NextScaleClassToImagePipeline

    if mode == "classes":
        pipe = tiny_pipeline("dit", id2label={0: "tench", 1: "goldfish"})
    else:
        pipe = NextScaleClassToImagePipeline(tiny_next_scale.transformer(), tiny_next_scale.tokenizer())
    engine = Engine({"fake": "x"}, tmp_path, device="cpu", load=lambda source: pipe)
    engine.model().result(10)
    sessions = Sessions(None)
    studio = SimpleNamespace(generation=GenerationHandlers(engine, ENGLISH, sessions), sessions=sessions)
    settings = {"mode": mode, "label": "1: goldfish", "scale_label": "1", "shape": AUTO, "top_k": 0,
                "kv_policy": "window", "kv_budget": 0.5, "guidance": 2.0}  # fmt: skip
    told = list(generate(studio, **settings))
    first = pictures(told)[0]
    assert first.settings.label == 1
    if mode == "scales":
        assert any('class="scales"' in changes.get("stage", "") for changes in told)
        assert "KV cache window" in first.report
    shown = settings_to_form(parse(first.settings.model_dump_json()))
    assert shown.pop("mode") == mode
    again = pictures(generate(studio, **{**settings, **shown}))[0]
    with Image.open(first.path) as one, Image.open(again.path) as two:
        assert one.tobytes() == two.tobytes()
    engine.close()


# ----------------------------------------------------------------------------------- grid


def test_grids_vary_what_they_say():
    request = TextToImageRequest(prompt="a red fox", seed=1)
    axes = [read_axis("steps", "4, 8"), read_axis("prompt", "red, blue"), read_axis("step_cache", "off, taylorseer")]
    cells = plan(request, axes)
    assert len(cells) == 8
    assert {(cell.request.steps, cell.request.prompt) for cell in cells} == {
        (4, "a red fox"), (8, "a red fox"), (4, "a blue fox"), (8, "a blue fox"),
    }  # fmt: skip
    assert sum(cell.request.step_cache is not None for cell in cells) == 4
    assert {cell.request.seed for cell in cells} == {1}
    sheet = compose(axes, {(0, 0, 0): Filled(Image.new("RGB", (64, 32), "red"), 1.0, "10 of 28")}, side=64)
    colours = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert (255, 0, 0) in colours
    assert sheet.width > 128


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [("path", "x", "can vary"), ("steps", "", "1 to 8"), ("steps", "a", "no number"), ("steps", "1," * 20, "1 to 8")],
)
def test_axes_are_checked(name, text, reason):
    with pytest.raises(ValueError, match=reason):
        read_axis(name, text)


def test_grids_are_checked():
    request = TextToImageRequest(prompt="a fox", seed=1)
    for axes, reason in (
        ([read_axis("steps", "1,2"), read_axis("steps", "1,2"), Axis()], "something else"),
        ([read_axis("prompt", "cat, dog"), Axis(), Axis()], "must occur"),
        ([read_axis("steps", "0"), Axis(), Axis()], "steps"),
        ([read_axis("temperature", "1"), Axis(), Axis()], "has no temperature"),
        ([read_axis(n, "1,2,3,4,5,6,7,8") for n in ("steps", "seed", "guidance")], "at most"),
    ):
        with pytest.raises(ValueError, match=reason):
            plan(request, axes)


# ---------------------------------------------------------------------------------- words


def test_all_languages_say_the_same_things():
    assert languages()[0] == "en"
    assert set(languages()) == {"en", "zh"}
    for language in languages():
        strings = Strings(language)
        assert strings.keys() == ENGLISH.keys()
        for key in sorted(strings.keys()):
            text = strings(key)
            assert set(re.findall(r"{(\w+)}", text)) == set(re.findall(r"{(\w+)}", ENGLISH(key))), (language, key)
            assert text.strip()


def test_every_string_is_used_and_every_use_has_one(root):
    sources = "".join(path.read_text() for path in (root / "apps" / "studio").rglob("*.py"))
    labels = {one.label for one in OPTIONS.values()}
    built = (
        "tab.",
        "axis.",
        "grid.",
        "brush.",
        "cant.",
        "size.",
        "facts.",
        "seed.",
        "memory.",
        "attention.",
        "upscaler.",
        "expand.",
        "error.",
        "failed.",
        "ft.",
        "task.",
        "origin.",
        "signature.",
        "compare.",
        "profile.",
        "prompt_syntax.",
        *(f"{area}." for area in AREAS),
    )  # put together from parts
    for key in sorted(ENGLISH.keys()):
        assert (
            key.endswith((".hint", ".none"))
            or f'"{key}"' in sources
            or f"'{key}'" in sources
            or key.startswith(built)
            or key in {"language", *labels}
        ), key
    for key in re.findall(r'words\("([\w.]+)"', sources):
        assert ENGLISH(key)


def test_words_from_files_are_escaped_and_capped(tmp_path):
    (tmp_path / "vocabulary.txt").write_text("<img src=x onerror=alert(1)>\n\n  fox  \n" + "x\n" * 10_000)
    names = read_vocabulary(str(tmp_path))
    assert names[1] == "fox"
    assert len(names) == 5_000
    assert "<img" not in views.vocabulary(names[:2], "<b>", ENGLISH)
    assert read_vocabulary("user/repository") == []
    assert views.vocabulary([], "model", ENGLISH) == ""
    assert "<script>" not in views.stage(size=(1, 1), note="<script>")
    assert "<script>" not in views.note("<script>")
    assert "<script>" not in views.problem("<script>")


def test_examples_use_known_words_only():
    words = ["fox", "pizza", "red apple", "cat face", "bus"]
    prompts = example_prompts(words, 5)
    assert len(prompts) == 5
    known = {prompt for prompt, needs in FAVOURITES if set(needs) <= set(words)}
    assert known < set(prompts)
    assert all(any(word in prompt for word in words) for prompt in prompts)
    assert len(example_prompts([], 3)) == 3


def test_sizes():
    assert dict(size_choices(ENGLISH, 128, 128, 16)) == {
        "Auto 128 \u00d7 128": AUTO,
        "Portrait 128 \u00d7 160": "128x160",
        "Landscape 160 \u00d7 128": "160x128",
        "Custom": CUSTOM,
    }
    assert dict(size_choices(ENGLISH, 128, 128, 16, [(128, 128)])) == {"Auto 128 \u00d7 128": AUTO, "Custom": CUSTOM}
    some = [(128, 128), (192, 144), (96, 128), (112, 144), (64, 256), (48, 64)]
    assert list(dict(size_choices(ENGLISH, 128, 128, 16, some)).values()) == [AUTO, "112x144", "192x144", CUSTOM]
    assert read_size("160x128", 1, 1) == (160, 128)
    assert read_size(CUSTOM, 96.0, 64.0) == (96, 64)
    assert read_size(AUTO, 96.0, 64.0) == (None, None)


def test_styles_hold_a_place_for_the_prompt(studio):
    assert all(style.prompt.count("{prompt}") == 1 for style in load_styles().values())
    painted = pictures(list(generate(studio, style="watercolour", negative_prompt="blue")))[0].settings
    assert painted.prompt.startswith("watercolour of a fox")
    assert painted.negative_prompt == "blue, photograph"


# ----------------------------------------------------------------------------------- page


def test_presets_set_their_controls_and_none_the_models_own(studio):
    presets = load_presets()
    assert {"draft", "fine"} <= set(presets)
    draft = studio.handlers.choose_preset("draft", "fake")
    assert draft == {"steps": 6, "guidance": 4.0, "scheduler": "", "step_cache": "budget", "cache_amount": 0.5}
    assert studio.handlers.choose_preset("fine", "fake")["step_cache"] == ""
    assert studio.handlers.choose_preset("", "fake")["steps"] == 28


def test_a_preset_fills_what_a_request_leaves_open(studio):
    def paint_one(**wish):
        events = list(studio.engine.generate(TextToImageRequest(prompt="a fox", height=64, width=64, **wish)))
        return events[-2].metadata if isinstance(events[-1], Done) else events[-1].message

    assert paint_one(preset="fine").steps == 50
    assert paint_one(preset="fine", steps=3).steps == 3
    assert "choose among draft" in paint_one(preset="nonsense")
    assert "needs a profile" in paint_one(preset="draft")  # and not: which folder has none
    with pytest.raises(ValueError, match="sets steps, which this task"):
        preset_values("fine", {"guidance"})


def test_a_sidecar_lies_beside_the_picture(studio):
    (shown,) = pictures(generate(studio, sidecar=True, keep_settings=False))
    assert parse(shown.path.with_name(f"{shown.path.name}.json").read_text()) == shown.settings
    kept = Image.open(shown.path).info
    assert set(kept) == {"xmp", "XML:com.adobe.xmp"}, "that it was generated, and nothing else"
    assert "fox" not in kept["XML:com.adobe.xmp"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_is_no_public_api(studio, language):
    page = build_page(studio.engine, Strings(language), studio.sessions)
    assert {listener.api_visibility for listener in page.fns.values()} == {"private"}
    assert page.analytics_enabled is False


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_other_machines_are_kept_out(host, tmp_path):
    with pytest.raises(ValueError, match="nobody would be asked"):
        check_host(host)
    check_host(host, tmp_path / "users.json")


def test_hosts_and_ports():
    for host in ("127.0.0.1", "localhost", "127.1.2.3"):
        check_host(host)
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"Port {port}"):
            check_port("127.0.0.1", port)
    assert check_port("127.0.0.1", 0) > 0


def test_controls_that_do_not_fit_the_model_yet_leave_it_its_defaults():
    """Who generates before the page has heard of the model's defaults gets them, and not what stood there at first."""
    values = PAGE | {name: CONTROLS[name].option.control.start for name in MODELS_OWN}
    fitted = form_to_request({**values, "fitted": "fake"}, ("text_to_image",))
    assert (fitted.steps, fitted.guidance) == (28, 4.0)
    said = form_to_request({**values, "fitted": None, "steps": 50}, ("text_to_image",))
    assert (said.steps, said.guidance) == (50, None)  # what a person has set stays
    for early in (None, "another"):
        request = form_to_request({**values, "fitted": early}, ("text_to_image",))
        assert (request.steps, request.guidance, request.seed) == (None, None, 3)
        request = form_to_request({**values, "mode": "scales", "fitted": early}, ("next_scale_text",))
        assert (request.temperature, request.top_k, request.top_p, request.guidance) == (None,) * 4
