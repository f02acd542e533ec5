"""What was asked for and did nothing is said: in the report of an image, in the log, on the wire and on the page."""

from __future__ import annotations

import json
import logging
import re
import sqlite3
import time
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from apps.api.messages import event_message, picture_row, server_sent
from apps.commands.generate import report as tell
from apps.service.acceleration import accelerated, reports_on
from apps.service.engine import Engine
from apps.service.events import Picture
from apps.service.job_store import JobStore, StoredPicture
from apps.service.metadata import read_picture, request_from_settings
from apps.service.option_values import Acceleration, StepCache
from apps.service.reports import TEXTS, report_text
from apps.service.request_error import RequestError
from apps.service.requests import NextScaleTextRequest, TextToImageRequest, explain
from apps.studio.forms import form_to_request
from apps.studio.problems import explain as page_explain
from apps.studio.strings import Strings, languages
from apps.studio.views import details
from tests.families.tiny import tiny_call, tiny_pipeline
from tests.studio.test_page import PAGE

ASK = {"prompt": "a red apple", "steps": 4, "seed": 5, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    pipe = tiny_pipeline("pixart")
    engine = Engine({"tiny": "x"}, tmp_path_factory.mktemp("out"), device="cpu", load=lambda source: pipe)
    yield engine
    engine.close()


def painted(engine: Engine, **settings) -> tuple[str, Picture]:
    job = engine.submit(TextToImageRequest(**ASK, **settings))
    events = list(engine.follow(job))
    found = [event for event in events if isinstance(event, Picture)]
    assert found, events[-1]
    return job, found[0]


def test_a_step_cache_that_skips_nothing_is_said_everywhere(engine, caplog, capsys):
    with caplog.at_level(logging.WARNING, "apps"):
        job, picture = painted(engine, step_cache=StepCache(preset="taylorseer", amount=1))
    for word in ("taylorseer", "0 of 4 calls", "did nothing", "gate Interval"):
        assert word in picture.report
    assert [record.levelname for record in caplog.records if "taylorseer" in record.message] == ["WARNING"]
    tell([([picture.path], picture)], json_output=False)
    assert "did nothing" in capsys.readouterr().out.replace("\n", " ")
    tell([([picture.path], picture)], json_output=True)
    assert json.loads(capsys.readouterr().out)["pictures"][0]["report"] == picture.report
    told = json.loads(server_sent(1, *event_message(job, picture)).split(b"data: ")[1])
    assert told["report"] == picture.report
    stored = engine.pictures(job)
    assert picture_row(stored[0])["report"] == picture.report
    for language, word in (("en", "did nothing"), ("zh", "\u672a\u8d77\u4f5c\u7528")):
        words = Strings(language)
        assert word in details(picture.metadata, picture.seconds, words, words.report(picture.reports))


def test_who_asks_after_the_end_hears_the_same(engine):
    """A page may begin to follow a job that has ended by then: a fast one."""
    job, picture = painted(engine, step_cache=StepCache(preset="taylorseer", amount=2))
    while engine.job(job).ended is None:
        time.sleep(0.005)
    told = next(event for event in engine.follow(job) if isinstance(event, Picture))
    assert told.report
    assert (told.report, told.notes, told.seconds) == (picture.report, picture.notes, picture.seconds)


def test_a_step_cache_that_skips_says_how_many(engine, caplog):
    with caplog.at_level(logging.WARNING, "apps"):
        _, picture = painted(engine, step_cache=StepCache(preset="taylorseer", amount=3))
    assert "1 of 4 calls forecast" in picture.report
    assert "did nothing" not in picture.report
    assert not [record for record in caplog.records if record.name.startswith("apps")]


def test_steps_that_cannot_be_found_are_the_reason(engine, monkeypatch):
    from sampling import step_tracker

    def unknown(*given, **more):
        raise step_tracker._StepNotFound("the timestep is not in the scheduler's table")

    monkeypatch.setattr(step_tracker.StepTracker, "_resolve", unknown)
    _, picture = painted(engine, step_cache=StepCache(preset="taylorseer", amount=3))
    assert "not in the scheduler's table" in picture.report


def test_a_picture_within_one_tile_is_not_decoded_in_tiles(engine):
    _, picture = painted(engine, memory="tiles")
    assert "fits one tile" in picture.report


@pytest.mark.parametrize(
    ("asked", "kept", "words"),
    [
        ({"kv_policy": "scalekv", "kv_budget": 1.0}, 1.0, ["did nothing", "budget 1"]),
        ({"kv_policy": "window"}, None, ["window", "no keys and values"]),
        ({"search": "best_of"}, None, ["best_of", "no candidates"]),
        ({"kv_policy": "window", "kv_budget": 0.5}, 0.5, []),
        ({"kv_policy": "full"}, 1.0, []),
    ],
)
def test_policies_and_searches_that_do_nothing(asked, kept, words, caplog):
    request = NextScaleTextRequest(prompt="a red apple", **asked)
    cache = None if kept is None else SimpleNamespace(policy="x", share=kept, full_bytes=2**20, peak_bytes=2**20)
    with caplog.at_level(logging.WARNING, "apps"):
        handle = SimpleNamespace(report=lambda: SimpleNamespace(parts=()), parts={})
        pipe, output = SimpleNamespace(kv_report=cache), SimpleNamespace(search=None)
        told = report_text(reports_on(pipe, handle, output, request))
    assert all(word in told for word in words)
    assert len(caplog.records) == bool(words)


def test_lines_of_older_versions_get_the_new_column(tmp_path):
    file = tmp_path / "jobs.sqlite"
    old = sqlite3.connect(file)
    old.execute(
        "CREATE TABLE pictures(job TEXT NOT NULL, place INTEGER NOT NULL, name TEXT NOT NULL, settings TEXT NOT NULL, "
        "seconds REAL NOT NULL, PRIMARY KEY(job, place)) WITHOUT ROWID"
    )
    old.execute("INSERT INTO pictures VALUES ('a', 0, 'x.png', '{}', 1.5)")
    old.commit()
    old.close()
    store = JobStore(file)
    store.add_picture(StoredPicture("a", 1, "y.png", "{}", 2.0, "cached"))
    assert store.pictures("a") == [
        StoredPicture("a", 0, "x.png", "{}", 1.5),
        StoredPicture("a", 1, "y.png", "{}", 2.0, "cached"),
    ]
    store.close()
    again = JobStore(file)
    assert [picture.report for picture in again.pictures("a")] == ["", "cached"]
    again.close()


def test_a_cache_that_does_not_fit_is_told_from_the_first_call_too():
    """Latte's blocks see frames and places in turn, which only a call shows."""
    pipe, config = tiny_pipeline("latte"), Acceleration.from_text('{"step_cache": "fbcache:threshold=0.1"}')
    with pytest.raises(RequestError, match=r"step_cache.*taylorseer"), accelerated(pipe, config):
        pipe(**tiny_call("latte"))
    other = Acceleration.from_text('{"step_cache": "taylorseer:every=2"}')
    with accelerated(pipe, other):  # nothing of the other is left
        pipe(**tiny_call("latte"))


def test_reports_have_all_sentences_in_all_languages():
    for language in languages():
        texts = Strings(language)._report_texts()
        assert texts.keys() == TEXTS.keys()
        for key, text in texts.items():
            assert set(re.findall(r"{(\w+)", text)) <= set(re.findall(r"{(\w+)", TEXTS[key])), (language, key)


def test_one_acceleration_is_recorded_repeated_and_reported(engine):
    asked = {"step_cache": {"preset": "taylorseer", "params": {"every": 3}}, "decoder_tiling": True}
    _, picture = painted(engine, acceleration=asked)
    assert [(one.part, one.is_active) for one in picture.reports] == [("step_cache", True), ("decoder_tiling", False)]
    kept = read_picture(picture.path)
    assert kept.acceleration.to_dict() == Acceleration.from_dict(asked).to_dict()
    _, same = painted(engine, memory="tiles", step_cache=StepCache(preset="taylorseer", amount=3))
    assert same.image.tobytes() == picture.image.tobytes()
    again = next(event for event in engine.generate(request_from_settings(kept)) if isinstance(event, Picture))
    assert again.image.tobytes() == picture.image.tobytes()


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"acceleration": {"step_cache": "fora", "few_step": "nonsense"}}, "few_step"),
        ({"acceleration": {"step_cache": {"preset": "budget", "params": {"profile": "/etc/passwd"}}}}, "profile"),
        ({"acceleration": {"next_scale": {"skip_last": 1, "refiner": "/models/other"}}}, "refiner"),
        ({"acceleration": {"parallel": "context"}}, "parallel"),
        ({"acceleration": {"offload": "model"}}, "offload"),
        ({"acceleration": {"quantization": "int8"}}, "quantization"),
        ({"acceleration": {"caching": True}}, "caching"),
        ({"acceleration": {"compile": True}}, "compile"),
        ({"acceleration": {"attention": "../../etc/passwd"}}, "attention"),
        ({"acceleration": {"kv_cache": "scalekv"}}, "kv_cache"),
        # a pattern that takes minutes to match, and values that a mechanism would only trip over
        (
            {"acceleration": {"step_cache": {"preset": "taylorseer", "params": {"patterns": ["(\\w+)+!"]}}}},
            "taylorseer",
        ),
        ({"acceleration": {"step_cache": {"preset": "magcache", "params": {"ratios": ["a"]}}}}, "fbcache"),
        ({"acceleration": {"step_cache": {"preset": "speca", "params": {"base": -5}}}}, "base"),
        ({"acceleration": {"step_cache": {"preset": "taylorseer", "params": {"every": 10**400}}}}, "every"),
        ({"acceleration": {"attention": "flex"}, "attention": "native"}, "attention"),
        ({"acceleration": {"step_cache": "fora"}, "step_cache": {"preset": "fora"}}, "step_cache"),
    ],
)
def test_what_a_request_can_not_accelerate_is_refused(asked, word):
    with pytest.raises(ValidationError) as caught:
        TextToImageRequest(**ASK, **asked)
    assert word in explain(caught.value)
    assert "/etc" not in explain(caught.value)
    for language in languages():
        assert page_explain(caught.value, Strings(language))


@pytest.mark.parametrize("value", ["x", None, True, float("nan"), float("inf"), [0.1], 1e300])
def test_parameters_of_another_type_are_refused_and_not_tripped_over(value):
    cache = {"preset": "fbcache", "params": {"threshold": value}}
    with pytest.raises(ValidationError):
        TextToImageRequest(**ASK, acceleration={"step_cache": cache})


def test_a_preset_leaves_alone_what_the_acceleration_decides(engine):
    _, picture = painted(engine, preset="draft", acceleration={"step_cache": "taylorseer:every=2"})
    kept = picture.metadata
    assert (kept.step_cache, kept.steps) == (None, 4)
    assert kept.acceleration.step_cache.preset == "taylorseer"
    again = next(event for event in engine.generate(request_from_settings(kept)) if isinstance(event, Picture))
    assert again.image.tobytes() == picture.image.tobytes()


def test_the_page_leaves_out_what_its_acceleration_decides():
    page = {**PAGE, "mode": "scales", "acceleration": '{"kv_cache": {"policy": "scalekv", "budget": 0.2}}'}
    request = form_to_request(page, ("next_scale_text",))
    assert (request.kv_policy, request.kv_budget, request.kv_dtype) == (None, None, None)
    assert request.acceleration.kv_cache.policy == "scalekv"
    with pytest.raises(ValueError, match="kv_policy"):  # somebody chose another one
        form_to_request({**page, "kv_policy": "window"}, ("next_scale_text",))
    few = form_to_request({**PAGE, "acceleration": '{"few_step": "flux-hyper"}'}, ("text_to_image",))
    assert (few.steps, few.guidance) == (None, None)  # of the preset
