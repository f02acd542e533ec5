"""The studio's page without a browser: its listeners, its markup, its words."""

from __future__ import annotations

from types import SimpleNamespace

import gradio as gr
import pytest

from apps.engine import Engine
from apps.metadata import read_picture
from apps.studio import check_host, check_port, handlers, views
from apps.studio.app import build_page
from apps.studio.examples import FAVOURITES, example_prompts
from apps.studio.handlers import CUSTOM, FIXED, RANDOM, Handlers, read_size, shapes
from apps.studio.vocabulary import read_vocabulary
from tests.studio.fakes import FakePipeline

TAB = SimpleNamespace(session_hash="one tab")


@pytest.fixture
def studio(tmp_path):
    engine = Engine({"fake": str(tmp_path)}, tmp_path / "out", device="cpu", load=lambda source: FakePipeline(0.01))
    (tmp_path / "out").mkdir()
    return Handlers(engine)


def paint(studio, visit=(), prompt="a fox", shape="64x64", steps=4, seed_mode=FIXED, seed=3, count=1, model="fake"):
    return studio.paint(list(visit), prompt, "", model, shape, 96, 64, steps, 4.0, seed_mode, seed, count, TAB)


def test_a_picture_reaches_strip_and_stage_as_the_file_itself(studio):
    views_told = list(paint(studio, count=2))
    shown = [view for view in views_told if isinstance(view[3], list)]
    visit = shown[-1][3]
    assert [item.settings.seed for item in visit] == [4, 3]  # newest first
    assert read_picture(visit[0].path) == visit[0].settings
    assert views.file_uri(visit[0].path) in shown[-1][0]
    assert [caption for _, caption in handlers.strip_items(visit)] == ["4", "3"]
    assert "Done in" in views_told[-1][0]
    assert views_told[0][6]["interactive"] is False
    assert views_told[-1][6]["interactive"] is True


def test_stop_ends_the_job_of_this_tab_only(studio):
    other = SimpleNamespace(session_hash="another tab")
    job = paint(studio, steps=100)
    while "Step" not in next(job)[0]:
        pass
    studio.stop(other)
    assert "Step" in next(job)[0]
    studio.stop(TAB)
    told = list(job)
    assert len(told) <= 3
    assert "Stopped" in told[-1][0]
    assert not any(isinstance(view[3], list) for view in told)
    studio.stop(TAB)  # nothing runs: nothing happens


def test_fast_steps_do_not_flood_the_page(tmp_path):
    engine = Engine({"fake": "x"}, tmp_path, device="cpu", load=lambda source: FakePipeline())
    told = list(paint(Handlers(engine), steps=150, count=4))
    steps = [view for view in told if isinstance(view[0], str) and "Picture " in view[0]]
    assert 1 <= len(steps) <= 20  # of 600


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"steps": 10**6}, "steps"),
        ({"count": 99}, "num_images"),
        ({"shape": "9999x9999"}, "choose"),
        ({"shape": "/etc/passwd"}, "not understood"),
        ({"seed": None}, "missing"),
        ({"seed": float("nan")}, "cannot convert"),
        ({"model": "/etc"}, "choose among fake"),
    ],
)
def test_wishes_that_by_pass_the_widgets_are_refused(studio, wish, reason):
    last = list(paint(studio, **wish))[-1]
    assert reason in last[0]
    assert 'role="alert"' in last[0]


def test_a_random_seed_ignores_the_field(studio):
    seeds = {list(paint(studio, seed_mode=RANDOM))[-2][3][0].settings.seed for _ in range(3)}
    assert len(seeds) == 3


def test_pictures_can_be_chosen_and_painted_again(studio):
    visit = next(view[3] for view in paint(studio, seed=9) if isinstance(view[3], list))
    chosen = studio.choose(visit, SimpleNamespace(index=0))[4]
    assert chosen == visit[0]
    assert studio.reuse_seed(chosen) == (FIXED, 9)
    prompt, _, shape, width, height, steps, _, mode, seed, count = studio.reuse_settings(chosen)
    assert (prompt, shape, width, height, steps, mode, seed, count) == ("a fox", CUSTOM, 64, 64, 4, FIXED, 9, 1)
    for index in (7, -1, "0", None):
        assert all(part == gr.skip() for part in studio.choose(visit, SimpleNamespace(index=index)))
    assert studio.reuse_seed(None) == (gr.skip(), gr.skip())


def test_the_controls_fit_the_model(studio, tmp_path):
    (tmp_path / "vocabulary.txt").write_text("fox\npizza\nice cream\nghost\n")
    shape, width, _, steps, guidance, words, *chips = studio.settle("fake")
    assert shape["value"] == "128x128"
    assert (width["value"], width["step"], steps, guidance) == (128, 16, 28, 4.0)
    assert "ice cream" in words
    assert chips[0]["value"] == "a pizza on a blue background"
    with pytest.raises(gr.Error, match="no such model"):
        studio.settle("../secret")


def test_words_from_files_are_escaped_and_capped(tmp_path):
    (tmp_path / "vocabulary.txt").write_text("<img src=x onerror=alert(1)>\n\n  fox  \n" + "x\n" * 10_000)
    words = read_vocabulary(str(tmp_path))
    assert words[1] == "fox"
    assert len(words) == 5_000
    assert "<img" not in views.vocabulary(words[:2], "<b>")
    assert read_vocabulary("user/repository") == []
    assert views.vocabulary([], "model") == ""
    assert "<script>" not in views.stage(size=(1, 1), note="<script>")


def test_examples_use_known_words_only():
    words = ["fox", "pizza", "red apple", "cat face", "bus"]
    prompts = example_prompts(words, 5)
    assert len(prompts) == 5
    known = {prompt for prompt, needs in FAVOURITES if set(needs) <= set(words)}
    assert known < set(prompts)
    assert all(any(word in prompt for word in words) for prompt in prompts)
    assert len(example_prompts([], 3)) == 3


def test_sizes():
    assert dict(shapes(128, 16)) == {
        "Square 128 \u00d7 128": "128x128",
        "Portrait 128 \u00d7 160": "128x160",
        "Landscape 160 \u00d7 128": "160x128",
        "Custom": CUSTOM,
    }
    assert read_size("160x128", 1, 1) == (160, 128)
    assert read_size(CUSTOM, 96.0, 64.0) == (96, 64)


def test_the_page_is_no_public_api(studio):
    page = build_page(studio._engine)
    assert {listener.api_visibility for listener in page.fns.values()} == {"private"}
    assert page.analytics_enabled is False


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_other_machines_are_kept_out(host):
    with pytest.raises(ValueError, match="no passwords"):
        check_host(host)


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
