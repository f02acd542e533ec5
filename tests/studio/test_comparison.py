"""Comparisons: settings as they are typed, runs and numbers, the page and the sheet that are saved, the tab."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from apps.cli import main
from apps.service import comparison as comparison_module
from apps.service import comparison_settings
from apps.service import engine as engine_module
from apps.service.comparison import (
    Comparison,
    Progress,
    ReferenceFailedError,
    Result,
    StoppedError,
    compare,
    front,
)
from apps.service.comparison_page import LOSSLESS_PIXELS, SCRIPT, TEXTS, document, fragment
from apps.service.comparison_plot import plot
from apps.service.comparison_settings import (
    MOST,
    VARIED,
    Setting,
    SettingError,
    plan,
    read_setting,
    read_settings,
)
from apps.service.comparison_sheet import contact_sheet, save_contact_sheet
from apps.service.engine import Engine
from apps.service.events import Done, Step
from apps.service.grid import Axis
from apps.service.metadata import PictureSettings
from apps.service.provenance import parse_packet, read_origin
from apps.service.request_error import RequestError
from apps.service.requests import NextScaleTextRequest, TextToImageRequest
from apps.studio.compare_handlers import PLACE, CompareHandlers
from apps.studio.sessions import Sessions
from apps.studio.strings import Strings
from apps.studio.tabs.compare import STARTS, settings_of
from pipelines.acceleration import AccelerationConfig
from tests.pipes.tiny import tiny_text_to_image_pipeline
from tests.studio.fakes import FakePipeline
from tests.studio.test_page import PAGE
from tests.studio.test_server import browser

__all__ = ["browser"]

HOSTILE = "<script>alert(1)</script>\"'&"
REQUEST = TextToImageRequest(prompt="a fox", seed=5, steps=4, model="tiny")
TAB = SimpleNamespace(session_hash="one tab", username=None)
ENGLISH = Strings("en")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A tiny random model that really denoises."""
    folder = tmp_path_factory.mktemp("out")
    one = Engine({"tiny": "x"}, folder, device="cpu", load=lambda source: tiny_text_to_image_pipeline())
    one.model().result(60)
    yield one
    one.close()


@pytest.fixture(scope="module")
def found(engine):
    """A comparison of equal, near and failing settings, with its progress."""
    settings = [
        Setting("reference"),
        Setting(HOSTILE, {"steps": 3}),
        Setting("same", {"steps": 4}),
        Setting("cached", {"step_cache": {"preset": "taylorseer"}, "steps": 8}),
        Setting("fails", {"scheduler": "ddpm"}),
    ]
    *progress, result = compare(engine, REQUEST, settings)
    return SimpleNamespace(progress=progress, result=result)


# ---------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("text", "label", "fields"),
    [
        ("", "default", {}),
        ("default", "default", {}),
        ("as it is:", "as it is", {}),
        ("steps=10  dtype=bfloat16", "steps=10 dtype=bfloat16", {"steps": 10, "dtype": "bfloat16"}),
        ("fast: steps=10", "fast", {"steps": 10}),
        ("attention-density=0.5", "attention-density=0.5", {"attention_density": 0.5}),
        ("step_cache=off", "step_cache=off", {"step_cache": None}),
        ('{"steps": 10, "scheduler": "unipc"}', '{"steps": 10, "scheduler": "unipc"}', {"steps": 10,
                                                                                        "scheduler": "unipc"}),
    ],
)  # fmt: skip
def test_settings_are_read_as_they_are_typed(text, label, fields):
    assert read_setting(text) == Setting(label, fields)


def test_caches_and_accelerations_are_read_by_their_own_rules(tmp_path):
    assert read_setting("cache=budget=0.35").fields["step_cache"].amount == 0.35
    assert read_setting("preset=fine").fields == {"preset": "fine"}
    text = '{"step_cache": "budget=0.35"}'
    for one in (text, f"named: {text}", f"acceleration='{text}'"):
        fields = read_setting(one).fields
        assert set(fields) == {"acceleration"}
        assert set(fields["acceleration"].parts) == {"step_cache"}
    saved = AccelerationConfig.from_dict({"step_cache": "taylorseer"})
    (tmp_path / "saved.json").write_text(json.dumps(saved.to_dict()))
    named = read_setting(str(tmp_path / "saved.json"))
    assert named.label == "saved"
    assert named.fields["acceleration"].parts["step_cache"].preset == "taylorseer"
    with pytest.raises(FileNotFoundError):
        read_setting(str(tmp_path / "gone.json"))
    with pytest.raises(RequestError, match="not understood"):  # of strangers no file is read
        read_setting(str(tmp_path / "saved.json"), may_read_files=False)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("steps", "compare.form"),
        ("=4", "compare.form"),
        ("steps='4", "compare.form"),
        ("{", "compare.form"),
        ("[1]", "compare.form"),
        ("seed=4", "compare.field"),
        ("width=64", "compare.field"),
        ('{"prompt": "x"}', "compare.field"),
        ("steps=many", "compare.value"),
        ("x" * 5_000, "compare.long"),
    ],
)
def test_settings_of_another_form_are_refused(text, key):
    with pytest.raises(RequestError) as caught:
        read_setting(text)
    assert caught.value.key == key


def test_lists_and_grids_of_settings():
    assert [one.label for one in read_settings(["steps=3"])] == ["default", "steps=3"]
    axes = [Axis("steps", ("4", "8")), Axis("dtype", ("float32", "bfloat16"))]
    grid = read_settings([], axes)
    assert [one.fields for one in grid] == [
        {"steps": 4, "dtype": "float32"},
        {"steps": 4, "dtype": "bfloat16"},
        {"steps": 8, "dtype": "float32"},
        {"steps": 8, "dtype": "bfloat16"},
    ]
    both = read_settings(["a:", "b: scheduler=heun"], axes[:1])
    assert [one.label for one in both] == ["a, steps=4", "a, steps=8", "b, steps=4", "b, steps=8"]
    assert both[-1].fields == {"scheduler": "heun", "steps": 8}
    assert [one.label for one in read_settings(["steps=3", "steps=3"])] == ["steps=3", "steps=3 (2)"]
    for texts in ([], ["x: steps=1"] * (MOST + 1)):
        with pytest.raises(RequestError, match=f"give 2 to {MOST}"):
            read_settings(texts)


def test_too_many_settings_are_refused_before_one_is_made(monkeypatch):
    def made(*args, **names):
        raise AssertionError("a setting was made although there are too many")

    monkeypatch.setattr(comparison_settings, "_combinations", made)
    monkeypatch.setattr(comparison_settings, "read_setting", made)
    many = {"steps": "1,2,3,4,5,6,7,8", "guidance": "1,2,3,4,5,6,7,8", "temperature": "1,2", "top_k": "1,2"}
    lines = [f"vary {name}={values}" for name, values in many.items()]
    for settings, said in (
        ("\n".join(lines), "256 settings"),
        ("default\n" * 20_000, "20000 settings"),
        ("vary steps=1,2\n" * 5_000, "varied twice"),  # 2 ** 5000 combinations
    ):
        with pytest.raises(RequestError, match=said):
            settings_of({"compare_settings": settings})


def test_a_plan_changes_what_a_setting_says_and_nothing_else():
    asked = REQUEST.model_copy(update={"num_images": 3, "batch_size": 3})
    part = read_setting('{"few_step": {"steps": 2}}') if "few_step" in VARIED else None
    assert part is None
    cached = read_setting('{"step_cache": "taylorseer"}')
    first, second, third = plan(
        asked.model_copy(update={"step_cache": None}), [Setting("a"), Setting("b", {"steps": 9}), cached]
    )
    assert first == REQUEST
    assert second == REQUEST.model_copy(update={"steps": 9})
    assert third.acceleration.parts["step_cache"].preset == "taylorseer"
    # A part of an acceleration replaces the option of all that says the same.
    (alone,) = plan(TextToImageRequest(prompt="x", seed=1, step_cache={"preset": "fbcache"}), [cached])
    assert alone.step_cache is None
    for setting, kind in (
        (Setting("x", {"steps": 1_000}), ValidationError),
        (Setting("x", {"top_k": 3}), RequestError),
    ):
        with pytest.raises(SettingError, match="The setting 'x'") as caught:
            plan(REQUEST, [setting])
        assert isinstance(caught.value.error, kind)
    with pytest.raises(SettingError, match="steps"):
        plan(NextScaleTextRequest(prompt="x"), [Setting("x", {"steps": 3})])


# ---------------------------------------------------------------------------- measured


def test_numbers_are_those_of_the_images(found):
    reference, near, same, cached, failed = found.result.results
    assert (reference.psnr, same.psnr) == (math.inf, math.inf)
    assert same.ssim == pytest.approx(1.0)
    assert 0 < near.psnr < 80
    assert near.ssim < 1
    error = np.square(np.asarray(near.frames[0], float) - np.asarray(reference.frames[0], float)).mean()
    assert near.psnr == pytest.approx(10 * math.log10(255**2 / error), abs=1e-3)
    assert "taylorseer" in cached.report
    assert [part.part for part in cached.reports] == ["step_cache"]
    assert [one.settings.steps for one in (reference, near, same, cached)] == [4, 3, 4, 8]
    assert {one.settings.seed for one in (reference, near, same, cached)} == {5}
    assert all(one.first_seconds > 0 and one.seconds > 0 for one in (reference, near, same, cached))
    assert failed.problem
    assert (failed.frames, failed.psnr, failed.settings) == ((), None, None)


def test_the_progress_only_grows_and_names_what_goes_on(found):
    assert all(isinstance(one, Progress) for one in found.progress)
    shares = [one.share for one in found.progress if one.place < 4]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1
    seen = {(one.place, one.run) for one in found.progress if isinstance(one.event, Done)}
    assert seen == {(place, run) for place in range(4) for run in (1, 2)}
    assert {one.label for one in found.progress} == {one.setting.label for one in found.result.results[:-1]}


def test_times_and_memory_are_those_of_later_runs(monkeypatch, engine):
    settings = [Setting("a"), Setting("b", {"steps": 2})]
    events = compare(engine, REQUEST, settings, runs=1)
    *_, once = events
    assert all(one.first_seconds >= one.seconds > 0 for one in once.results)
    with pytest.raises(ValueError, match="runs is 0"):
        next(compare(engine, REQUEST, settings, runs=0))
    pictures = [SimpleNamespace(seconds=s, image=Image.new("RGB", (16, 16)), clip=None, metadata=None, report="",
                                reports=(), notes=()) for s in (9.0, 1.0, 2.0, 4.0)]  # fmt: skip
    result = comparison_module._result(Setting("x"), pictures, 10.0, 7)
    assert (result.first_seconds, result.seconds, result.memory) == (10.0, 2.0, 7)


def test_the_front_is_what_nothing_beats():
    def one(seconds, psnr):
        return Result(Setting("x"), seconds=seconds, psnr=psnr)

    assert front([one(4, math.inf), one(2, 30), one(1, 20), one(3, 25), one(5, 40), one(2, None)]) == (0, 1, 2)
    assert front([one(4, math.inf), one(1, math.inf)]) == (1,)


def test_other_sizes_are_not_compared():
    frames = (Image.new("RGB", (16, 16)),)
    reference = Result(Setting("a"), frames)
    for other in ((Image.new("RGB", (16, 8)),), frames * 2, ()):
        assert comparison_module._against(reference, Result(Setting("b"), other)).psnr is None
    small = (Image.new("RGB", (8, 8)),)
    found = comparison_module._against(Result(Setting("a"), small), Result(Setting("b"), small))
    assert (found.psnr, found.ssim) == (math.inf, None)


def test_it_stops_within_a_step_and_when_it_is_closed(engine):
    stop, seen = threading.Event(), []
    events = compare(engine, REQUEST, [Setting("a"), Setting("b")], stop=stop)
    stop_at_step = (seen.append(one) or (stop.set() if isinstance(one.event, Step) else None) for one in events)
    with pytest.raises(StoppedError):
        list(stop_at_step)
    assert {one.label for one in seen} == {"a"}
    events = compare(engine, REQUEST, [Setting("a"), Setting("b")])
    next(events)
    events.close()
    assert engine.unfinished("local") == []


def test_without_a_reference_there_is_nothing_to_compare(engine):
    with pytest.raises(ReferenceFailedError):
        list(compare(engine, REQUEST, [Setting("a", {"scheduler": "ddpm"}), Setting("b")]))


# ---------------------------------------------------------------------------- written


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        (self.scripts if self.tags and self.tags[-1][0] in ("script", "style") else self.texts).append(data)


def decoded(uri):
    return base64.b64decode(uri.removeprefix("data:image/webp;base64,"))


def test_the_page_stands_alone_and_escapes_what_people_typed(found):
    comparison = replace(found.result, request=REQUEST.model_copy(update={"prompt": HOSTILE}))
    text = document(comparison)
    assert "<script>alert" not in text
    page = _Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert HOSTILE in page.texts
    places = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert places
    assert all(place.startswith("data:image/webp;base64,") for place in places)
    assert not re.search(r"https?://(?!ns\.adobe|www\.w3|iptc|cv\.iptc)", re.sub(r"base64,[^\" ]+", "", text))
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.read_bytes()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_the_page_holds_the_images_as_they_are_with_their_marks(found):
    page = _Page(fragment(found.result))
    images = {attributes["alt"]: attributes["src"] for tag, attributes in page.tags if tag == "img"}
    for one in found.result.results:
        if one.frames:
            with Image.open(io.BytesIO(decoded(images[one.setting.label]))) as image:
                assert image.convert("RGB").tobytes() == one.frames[0].tobytes()
                assert parse_packet(image.info["xmp"]).model == "tiny"
    assert "fails" not in images
    assert any(found.result.results[-1].problem in text for text in page.texts)


def clips(sizes=(32, 32), count=5):
    rng = np.random.default_rng(0)
    frames = [tuple(Image.fromarray(rng.integers(0, 255, (*sizes, 3), np.uint8)) for _ in range(count))
              for _ in range(2)]  # fmt: skip
    results = [Result(Setting(name), one, 8.0, None, 2.0, 1.0 + i, 2**20, 20.0, 0.5)
               for i, (name, one) in enumerate(zip("ab", frames, strict=True))]  # fmt: skip
    return Comparison(REQUEST, tuple(results), 2, (0,))


def test_clips_have_all_their_frames_and_a_clock():
    comparison = clips()
    page = _Page(fragment(comparison))
    section = next(attributes for tag, attributes in page.tags if tag == "section")
    assert (section["data-frames"], section["data-fps"]) == ("5", "8")
    cards = [attributes["data-frames"].split() for tag, attributes in page.tags if tag == "img"]
    for sources, one in zip(cards, comparison.results, strict=True):
        assert [Image.open(io.BytesIO(decoded(source))).convert("RGB").tobytes() for source in sources] == [
            frame.tobytes() for frame in one.frames
        ]
    assert any(attributes.get("class") == "cmp-play" for _, attributes in page.tags)
    assert TEXTS["lossy"] not in page.texts


def test_long_clips_are_compressed_and_the_page_says_so(monkeypatch):
    monkeypatch.setattr("apps.service.comparison_page.LOSSLESS_PIXELS", 5 * 32 * 32 - 1)
    assert LOSSLESS_PIXELS > 5 * 32 * 32
    assert TEXTS["lossy"] in _Page(fragment(clips())).texts


def test_the_sheet_shows_every_setting_its_difference_and_its_mark(found, tmp_path):
    path = save_contact_sheet(found.result, tmp_path / "sheet.png")
    assert read_origin(path).stated.is_generated
    sheet = np.asarray(contact_sheet(found.result).convert("RGB"), int)
    with Image.open(path) as written:
        assert (np.asarray(written.convert("RGB")) == sheet).all()
    # 32 pixels are enlarged to 256: of a difference, the middle of each of them is the amplified pixel.
    one, other = (np.asarray(found.result.results[place].frames[0], int) for place in (0, 1))
    wanted = np.minimum(np.abs(one - other) * 8, 255)
    top, left = 2 * 22 + 12 + 12 + 256 + 3 * 22 + 12, 12 + 256 + 12
    shown = sheet[top + 4 : top + 256 : 8, left + 4 : left + 256 : 8]
    assert (shown == wanted).all()
    assert contact_sheet(clips()).width > 512


def test_the_plot_places_points_by_seconds_and_decibels(found):
    drawing = ElementTree.fromstring(plot(found.result, "<s>", "dB", "equal"))
    circles = list(drawing.iter("circle"))
    assert [circle.find("title").text for circle in circles] == [
        one.setting.label for one in found.result.results if one.psnr is not None
    ]
    points = [(float(circle.get("cx")), float(circle.get("cy"))) for circle in circles]
    compared = [one for one in found.result.results if one.psnr is not None]
    assert [x for x, _ in sorted(points)] == sorted(x for x, _ in points)
    order = sorted(range(len(compared)), key=lambda place: compared[place].seconds)
    assert order == sorted(range(len(points)), key=lambda place: points[place][0])
    assert points[0][1] == points[2][1] == min(y for _, y in points), "equal ones are on the top line"
    filled = [circle.get("class") == "cmp-best" for circle in circles]
    assert filled == [place in found.result.front for place in range(len(circles))]
    lonely = Comparison(REQUEST, (found.result.results[0],), 1, (0,))
    assert plot(lonely, "s", "dB", "equal") == ""


# ---------------------------------------------------------------------------- command line


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = []

    def load(self, source, device, load_options):
        loaded.append(source)
        return tiny_text_to_image_pipeline()

    monkeypatch.setattr(engine_module.Engine, "_load_pipeline", load)
    return SimpleNamespace(folder=tmp_path, loaded=loaded)


def leave(*words):
    with pytest.raises(SystemExit) as left:
        main(words)
    return left.value.code


def test_the_command_writes_page_and_sheet_and_tells_the_numbers(place, capsys):
    words = ("compare", "stickers", "a fox", "--settings", "default", "--settings", "fast: steps=2", "--steps", "3")
    assert leave(*words, "--device", "cpu", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["page"], told["sheet"]) == ("comparison.html", "comparison.png")
    assert [one["label"] for one in told["settings"]] == ["default", "fast"]
    assert told["settings"][0]["psnr"] == "inf"
    assert [PictureSettings.model_validate(one["settings"]).steps for one in told["settings"]] == [3, 2]
    assert _Page((place.folder / "comparison.html").read_text()).tags[0][0] == "html"
    assert leave(*words, "--device", "cpu", "--runs", "1") == 0  # what is there is kept
    said = capsys.readouterr().out
    assert "2. fast" in said
    assert "comparison-1.html" in said
    assert read_origin(place.folder / "comparison-1.png").stated.is_generated
    axis = ("compare", "stickers", "a fox", "--vary", "steps=1,2", "--device", "cpu", "--runs", "1", "--json")
    assert leave(*axis, "-o", "grid.html") == 0
    assert [one["label"] for one in json.loads(capsys.readouterr().out)["settings"]] == ["steps=1", "steps=2"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--settings", "x: steps=1000"), "The setting 'x'"),
        (("--settings", "seed=4"), "can't be varied"),
        (("--settings", "gone.json"), "gone.json"),
        ((), "give 2 to"),
        (("--vary", "steps"), "write NAME=A,B"),
        (("--settings", "steps=3", "-o", "a.png"), "use '.html'"),
        (("--settings", "steps=3", "-o", "nowhere.html/a.html"), "nowhere.html"),
    ],
)
def test_wrong_settings_are_refused_before_a_model_is_loaded(place, capsys, words, said):
    (place.folder / "nowhere.html").write_text("")
    assert leave("compare", "stickers", "a fox", *words, "--device", "cpu") == 2
    assert said in capsys.readouterr().err
    assert place.loaded == []


# ---------------------------------------------------------------------------- studio


@pytest.fixture
def tab(tmp_path):
    pipe = FakePipeline()
    engine = Engine({"fake": "x"}, tmp_path, device="cpu", load=lambda source: pipe)
    engine.model().result(10)
    yield SimpleNamespace(handlers=CompareHandlers(engine, ENGLISH, Sessions(None)), engine=engine, pipe=pipe)
    engine.close()


VALUES = {**PAGE, "mode": "compare", "model": "fake", "prompt": "a fox", "steps": 3, "compare_runs": 1}


def run(tab, settings, **changes):
    return [one for one in tab.handlers.compare({**VALUES, "compare_settings": settings, **changes}, TAB) if one]


def test_the_tab_shows_and_saves_what_was_found(tab, tmp_path):
    first, *_, last = run(tab, "default\n# a remark\n\n<script>x: steps=2")
    assert first["compare_stop"]["interactive"] is True
    assert last["compare_stop"]["interactive"] is False
    assert "2 settings compared" in last["compare_note"]
    assert "<script>" not in last["compare_result"]
    assert 'class="cmp ' in last["compare_result"]
    page, sheet = (last[name]["value"] for name in ("compare_page", "compare_sheet"))
    assert "<!doctype html>" in (tmp_path / page.rsplit("/", 1)[1]).read_text()
    assert read_origin(tmp_path / sheet.rsplit("/", 1)[1]).stated.model == "fake"


def test_reports_and_failures_are_in_the_language_of_the_page(found, tab):
    chinese = CompareHandlers(tab.engine, Strings("zh"), Sessions(None))
    shown = chinese._show(found.result)["compare_result"]
    for one in found.result.results:
        assert not one.report or one.report not in shown
    assert found.result.results[-1].problem not in shown
    assert re.search(r"[\u4e00-\u9fff]", chinese._translated(found.result.results[-1]).problem)


@pytest.mark.parametrize(
    ("settings", "changes", "said"),
    [
        ("default\nslow: steps=1000", {}, "slow: \u201cSteps\u201d is 1000: choose 1 to 200."),
        ("default\nsteps=2", {"prompt": " "}, "The prompt is empty"),
        ("default\nnonsense", {}, "is not understood"),
        ("default\n/etc/passwd.json", {}, "is not understood"),
        ("", {}, "give 2 to"),
    ],
)
def test_the_tab_says_what_is_wrong_in_its_place(tab, settings, changes, said):
    *_, last = run(tab, settings, **changes)
    assert said in re.sub(r"&#x27;", "'", last[PLACE])
    assert tab.pipe.steps_run == 0


@pytest.mark.parametrize("runs", [math.inf, math.nan, 10**400, -1, "2", None])
def test_runs_that_no_slider_sends_are_refused(tab, runs):
    *_, last = run(tab, "default\nsteps=2", compare_runs=runs)
    assert 'role="alert"' in last[PLACE]
    assert tab.pipe.steps_run == 0


def test_the_tab_stops_and_starts_again(tab):
    tab.pipe.at_step = lambda step: tab.handlers.stop_comparison(TAB)
    *_, last = run(tab, "default\nsteps=2")
    assert ENGLISH("stopped") in last["compare_note"]
    assert tab.engine.unfinished("local") == []
    tab.pipe.at_step = lambda step: None
    assert "compare_result" in run(tab, "default\nsteps=2")[-1]


def test_a_comparison_that_waits_in_line_holds_no_thread(tab):
    begun, gate = threading.Event(), threading.Event()

    def hold(step):
        begun.set()
        assert gate.wait(60)

    tab.pipe.at_step = hold
    tab.engine.submit(TextToImageRequest(prompt="a fox", steps=2, model="fake"), "other")
    assert begun.wait(10)
    changes = tab.handlers.compare({**VALUES, "compare_settings": "default\nsteps=2"}, TAB)
    with ThreadPoolExecutor(1) as pool:
        try:
            for _ in range(4):  # the first says that it begins, the others that it waits
                pool.submit(next, changes).result(20)
        finally:
            gate.set()
    changes.close()


def test_a_second_click_begins_no_second_comparison(tab):
    events = tab.handlers.compare({**VALUES, "compare_settings": "default\nsteps=2"}, TAB)
    next(events)
    assert run(tab, "default\nsteps=2") == []
    events.close()
    assert "compare_result" in run(tab, "default\nsteps=2")[-1]


def test_lines_that_vary_make_a_grid():
    lines = "a:\nb: scheduler=heun\nvary steps=4,8\n# vary dtype=float32,bfloat16"
    assert [one.label for one in settings_of({"compare_settings": lines})] == [
        "a, steps=4", "a, steps=8", "b, steps=4", "b, steps=8",
    ]  # fmt: skip
    assert [one.label for one in settings_of({"compare_settings": "vary steps=4,8"})] == ["steps=4", "steps=8"]
    for wrong, key in (
        ("vary steps", "compare.vary"),
        ("vary seed=1,2", "compare.field"),
        ("vary steps=x", "grid.number"),
    ):
        with pytest.raises(RequestError) as caught:
            settings_of({"compare_settings": wrong})
        assert caught.value.key == key


def test_what_the_field_holds_at_first_can_be_read():
    assert len(settings_of({"compare_settings": STARTS})) == 4
    assert {f"compare.{key}": text for key, text in TEXTS.items()}.items() <= {
        key: ENGLISH(key)
        for key in ENGLISH.keys()  # noqa: SIM118
    }.items()


# ---------------------------------------------------------------------------- in a browser


PIXELS = """place => { const canvas = document.querySelectorAll('.cmp-view canvas')[place];
return [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]; }"""


@pytest.mark.browser
def test_the_saved_page_works_without_a_network(browser, tmp_path, found):
    (tmp_path / "images.html").write_text(document(found.result), encoding="utf-8")
    (tmp_path / "clips.html").write_text(document(clips(count=3)), encoding="utf-8")
    errors = []
    context = browser.new_context(viewport={"width": 390, "height": 844}, offline=True)
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(f"file://{tmp_path}/images.html")
    page.wait_for_selector(".cmp[data-ready]")
    assert page.evaluate("document.documentElement.scrollWidth") == 390, "nothing sticks out on a phone"
    view = page.locator(".cmp-view")
    assert HOSTILE in view.inner_text()
    box = view.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.25, box["y"] + box["height"] / 2)
    assert float(page.evaluate("document.querySelector('.cmp-view input').value")) == pytest.approx(25, abs=3)
    assert re.search(r"inset\(0px 0px 0px 2\d", page.evaluate("document.querySelectorAll('canvas')[1].style.clipPath"))
    page.click("[data-mode-of=difference]")
    page.locator(".cmp-gain input").fill("16")
    shown = np.array(page.evaluate(PIXELS, 1), int).reshape(32, 32, 4)[..., :3]
    one, other = (np.asarray(found.result.results[place].frames[0], int) for place in (0, 1))
    assert (shown == np.minimum(np.abs(one - other) * 16, 255)).all()
    page.click("[data-place='2']")  # equal to the reference
    assert not np.array(page.evaluate(PIXELS, 1)).reshape(-1, 4)[:, :3].any()
    page.goto(f"file://{tmp_path}/clips.html")
    page.wait_for_selector(".cmp[data-ready]")
    page.locator(".cmp-frame input").fill("2")  # stops the clock
    for place, clip in enumerate(clips(count=3).results):
        shown = np.array(page.evaluate(PIXELS, place)).reshape(32, 32, 4)[..., :3]
        assert (shown == np.asarray(clip.frames[2])).all(), "both show the same frame"
    page.click(".cmp-play")
    frame = page.locator(".cmp-frame input")
    seen = set()
    for _ in range(100):  # polled from here: the page's own policy lets no other script run
        seen.add(frame.input_value())
        page.wait_for_timeout(20)
        if len(seen) == 3:
            break
    assert seen == {"0", "1", "2"}
    assert errors == []
    context.close()
