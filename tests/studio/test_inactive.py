"""What was asked for and did nothing is said: in the report of an image, in the log, on the wire and on the page."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from types import SimpleNamespace

import pytest

from apps.api.messages import event_message, picture_row, server_sent
from apps.commands.generate import report as tell
from apps.service.acceleration import RunningCache, describe, step_cache
from apps.service.engine import Engine, Picture, TextToImageRequest
from apps.service.job_store import JobStore, StoredPicture
from apps.service.option_values import StepCache
from apps.service.request_error import RequestError
from apps.service.requests import NextScaleTextRequest
from apps.studio.strings import Strings
from apps.studio.views import details
from tests.families.tiny import tiny_call, tiny_pipeline

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
    for word in ("taylorseer", "skipped no step", "gate Interval", "4 of 4 calls"):
        assert word in picture.report
    assert [record.levelname for record in caplog.records if "taylorseer" in record.message] == ["WARNING"]
    tell([([picture.path], picture)], json_output=False)
    assert "skipped no step" in capsys.readouterr().out.replace("\n", " ")
    tell([([picture.path], picture)], json_output=True)
    assert json.loads(capsys.readouterr().out)["pictures"][0]["report"] == picture.report
    told = json.loads(server_sent(1, *event_message(job, picture)).split(b"data: ")[1])
    assert told["report"] == picture.report
    stored = engine.pictures(job)
    assert picture_row(stored[0])["report"] == picture.report
    assert "skipped no step" in details(picture.metadata, picture.seconds, Strings("en"), picture.report)


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
    assert "of 4 steps forecast" in picture.report
    assert "no step" not in picture.report
    assert not [record for record in caplog.records if record.name.startswith("apps")]


def test_steps_that_cannot_be_found_are_the_reason(engine, monkeypatch):
    from sampling import resolve

    def unknown(*given, **more):
        raise resolve._Unknown("the timestep is not in the scheduler's table")

    monkeypatch.setattr(resolve.StepTracker, "_resolve", unknown)
    _, picture = painted(engine, step_cache=StepCache(preset="taylorseer", amount=3))
    assert "not in the scheduler's table" in picture.report


def test_a_picture_within_one_tile_is_not_decoded_in_tiles(engine):
    _, picture = painted(engine, memory="tiles")
    assert "fits one tile of 64 x 64" in picture.report


@pytest.mark.parametrize(
    ("asked", "kept", "words"),
    [
        ({"kv_policy": "scalekv", "kv_budget": 1.0}, 1.0, ["'scalekv'", "dropped nothing", "kv_budget 1"]),
        ({"kv_policy": "window"}, None, ["'window'", "no keys and values"]),
        ({"search": "best_of"}, None, ["'best_of'", "no candidates"]),
        ({"kv_policy": "window", "kv_budget": 0.5}, 0.5, []),
        ({"kv_policy": "full"}, 1.0, []),
    ],
)
def test_policies_and_searches_that_do_nothing(asked, kept, words, caplog):
    request = NextScaleTextRequest(prompt="a red apple", **asked)
    cache = None if kept is None else SimpleNamespace(policy="x", share=kept, full_bytes=2**20, peak_bytes=2**20)
    with caplog.at_level(logging.WARNING, "apps"):
        told = describe(SimpleNamespace(kv_report=cache), RunningCache(), SimpleNamespace(search=None), request)
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
    pipe, wish = tiny_pipeline("latte"), StepCache(preset="fbcache", amount=0.1)
    with pytest.raises(RequestError, match=r"'fbcache' doesn't fit this model.*taylorseer"), step_cache(pipe, wish):
        pipe(**tiny_call("latte"))
    with step_cache(pipe, StepCache(preset="taylorseer", amount=2)):  # nothing of the other is left
        pipe(**tiny_call("latte"))
