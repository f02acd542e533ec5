"""Tuning on a server: its process, what the tab shows of it, and three clicks in a browser to a tuned request."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest

from apps.api.app import create_app
from apps.api.tokens import TokenTable, add_user
from apps.commands.serve import _start, check_port
from apps.service import tuning
from apps.service.engine import Engine
from apps.service.tuning import TECHNIQUES, Tuning, TuningError, Tunings, TuningSettings
from apps.studio import speed, speed_views
from apps.studio.app import FORMS, UPLOADS, mount
from apps.studio.page_values import PageError
from apps.studio.sessions import Sessions
from apps.studio.speed_handlers import SpeedHandlers
from apps.studio.strings import Strings
from tests.studio.browsers import open_browser
from tests.studio.fakes import FakePipeline
from tests.studio.serving import ROLES

ENGLISH = Strings("en")
PROGRESS = {
    "event": "progress",
    "phase": "single",
    "done": 2,
    "total": 9,
    "seconds_left": 30.0,
    "text": "x",
    "front": [],
}
CHOICE = {"parts": {"step_cache": {"preset": "budget", "params": {"budget": 0.25, "profile": "/a/secret.safetensors"}}},
          "gain": 2.95, "quality": {"psnr": 31.2}, "reached": 0.875, "seconds": 0.1}  # fmt: skip
DONE = {
    "event": "done",
    "baseline": {"clock": "wall", "wall": 0.3},
    "profiles": {"balanced": CHOICE},
    "front": [CHOICE],
}


@pytest.fixture
def tunings(monkeypatch):
    """Yield a function that makes tunings whose process is a script."""
    made = []

    def of(script):
        monkeypatch.setattr(
            tuning, "command_of", lambda lock, arguments: [sys.executable, "-c", textwrap.dedent(script)]
        )
        made.append(Tunings())
        return made[-1]

    yield of
    for one in made:
        one.close()


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_command_names_what_is_tuned_behind_names_of_options():
    settings = TuningSettings("mine", "--output=/etc/passwd", 2.5, {"steps": 8, "guidance": None}, "cpu", "float32")
    arguments = settings.arguments()
    assert arguments[:5] == ["tune", "--minutes=2.5", "--device=cpu", "--dtype=float32", "--json-lines"]
    assert arguments[-2:] == ["--", "--output=/etc/passwd"]
    assert "--steps=8" in arguments
    assert [one for one in arguments if one.startswith("--only")] == [f"--only={name}" for name in TECHNIQUES]


@pytest.mark.parametrize("minutes", [0, -1, 61, float("nan"), float("inf")])
def test_times_out_of_range_are_refused(minutes):
    with pytest.raises(TuningError, match="above 0, up to 60") as refused:
        TuningSettings("mine", "x", minutes)
    assert refused.value.key == "tuning.minutes"


def test_a_tuning_is_followed_stopped_and_only_one_runs(tunings):
    found = tunings(f"""
        import sys
        print("a library says something")
        print('{json.dumps(PROGRESS)}', flush=True)
        sys.stdin.read()
        sys.exit(130)
    """)
    found.start(TuningSettings("mine", "x", 1.0))
    until(lambda: found.last.news)
    assert found.last.state == "running"
    assert found.last.share == pytest.approx(0.5)
    with pytest.raises(TuningError, match="running"):
        found.start(TuningSettings("other", "x"))
    found.stop()
    assert found.wait(20)
    assert found.last.state == "stopped"


def test_a_result_is_kept_and_the_next_tuning_may_start(tunings):
    found = tunings(f"print('{json.dumps(DONE)}')")
    for _ in range(2):
        found.start(TuningSettings("mine", "x"))
        assert found.wait(20)
        assert found.last.state == "done"
        assert found.last.profiles["balanced"]["gain"] == 2.95


def test_why_a_tuning_failed_is_told_without_paths(tunings):
    found = tunings("import sys; sys.exit('error: /data/models/x has no network that denoises')")
    found.start(TuningSettings("mine", "x"))
    assert found.wait(20)
    assert found.last.state == "failed"
    assert found.last.reason == "x has no network that denoises"
    assert "no network that denoises" in speed_views.failure(found.last, ENGLISH)


def test_settings_are_drawn_without_files_and_escaped():
    hostile = {**CHOICE, "parts": {"<script>": {"preset": "<b>", "params": {"profile": "/a/secret.safetensors"}}}}
    html = speed_views.result({"balanced": CHOICE, "fastest": hostile}, [CHOICE, hostile], 0.3, ENGLISH)
    assert "2.9\u00d7" in html or "3.0\u00d7" in html
    assert "step cache budget=0.25" in html
    assert "secret" not in html
    assert "<script>" not in html and "<b>" not in html  # noqa: PT018  (one thing)
    assert html.count("<circle") == 3  # the plain run, too


@pytest.mark.parametrize(
    ("news", "said"),
    [({}, "Loading mine"), (PROGRESS, "Single techniques: 3 of 9, 0:30 left"), (DONE, "mine is tuned.")],
)
def test_every_moment_of_a_tuning_is_said(news, said):
    assert said in speed_views.progress(Tuning(TuningSettings("mine", "x", 1.0), "running", news), ENGLISH)


def test_only_administrators_may_tune_where_people_sign_in(tmp_path, tunings):
    for name, role in ROLES.items():
        add_user(tmp_path / "users.json", name, role)
    table, found = TokenTable(tmp_path / "users.json"), tunings(f"print('{json.dumps(DONE)}')")
    engine = Engine({"fake": "x"}, None, device="cpu", load=lambda source: FakePipeline(0.005))
    handlers = SpeedHandlers(engine, found, ENGLISH, Sessions(table), SimpleNamespace())
    try:
        for name in ("ann", "eve"):
            for listener, given in ((handlers.start, ("fake", 1.0)), (handlers.stop, ("fake",))):
                with pytest.raises(PageError, match="no_rights"):
                    listener(SimpleNamespace(username=name), *given)
        assert found.last is None
        shown = handlers.open(SimpleNamespace(username="ann"), "fake")
        assert shown["speed_start"]["interactive"] is False
        handlers.start(SimpleNamespace(username="root"), "fake", 1.0)
        assert found.wait(20)
        shown = handlers.open(SimpleNamespace(username="ann"), "fake")  # what holds for all may be used by all
        assert shown["speed_use_balanced"]["visible"] is True
        with pytest.raises(PageError, match="no_model"):
            handlers.start(SimpleNamespace(username="root"), "/etc", 1.0)
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.browser
def test_three_clicks_from_a_model_to_a_tuned_request(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(speed, "MINUTES", 0.5)
    (tmp_path / "out").mkdir()
    engine = Engine({"stickers": "stickers"}, tmp_path / "out", device="cpu")
    engine.model().result(120)
    app = create_app(engine, None, uploads=UPLOADS, forms=FORMS)
    mount(app, engine)
    port = check_port("127.0.0.1", 0)
    server = _start(app, "127.0.0.1", port)
    try:
        with open_browser() as browser:
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_selector("#generate:not([disabled])")
            page.get_by_role("tab", name="Speed").click()
            page.click("#speed-start:not([disabled])")
            page.get_by_text("stickers is tuned.").wait_for(timeout=120_000)
            page.click("#speed-use-balanced")
            page.get_by_role("tab", name="Text", selected=True).wait_for()
            page.fill("#prompt textarea", "a red apple")
            page.click("#generate")
            page.get_by_text("profile balanced").first.wait_for(timeout=60_000)
            assert page.locator(".speed-table tbody tr").count() >= 2
    finally:
        app.state.tunings.close()
        server.should_exit = True
        engine.close()
    assert list((tmp_path / "cache" / "tessera").glob("tuning-*.json"))
