from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from apps import engine as engine_module
from apps.generate import parse_size, picture_paths, run
from apps.metadata import read_png
from apps.shelf import name_models
from tests.studio.fakes import FakePipeline


@pytest.fixture
def fake(monkeypatch):
    pipe = FakePipeline()
    monkeypatch.setattr(engine_module.Engine, "_load_pipeline", lambda self, source: pipe)
    return pipe


def test_one_picture_goes_where_it_was_asked(fake, tmp_path, capsys):
    run("a red apple", tmp_path / "new" / "apple.png", negative_prompt="blue", size="160x128", steps=2, device="cpu")
    settings = read_png(tmp_path / "new" / "apple.png")
    assert (settings.width, settings.height, settings.steps, settings.seed) == (160, 128, 2, 0)
    assert settings.negative_prompt == "blue"
    assert "apple.png" in capsys.readouterr().out


def test_several_pictures_are_numbered_and_reported_as_json(fake, tmp_path, capsys):
    run("x", tmp_path / "a.png", num=2, seed=5, steps=2, device="cpu", json_output=True)
    told = capsys.readouterr()
    rows = json.loads(told.out)["pictures"]
    assert [row["path"] for row in rows] == [str(tmp_path / "a-0.png"), str(tmp_path / "a-1.png")]
    assert [read_png(tmp_path / f"a-{i}.png").seed for i in range(2)] == [5, 6]
    assert [row["seed"] for row in rows] == [5, 6]
    assert told.err == ""


def test_wrong_wishes_are_refused_before_painting(fake, tmp_path):
    for settings, reason in (({"size": "big"}, "160x128"), ({"size": "100"}, "multiple"), ({"num": 0}, "num_images")):
        with pytest.raises(ValueError, match=reason):
            run("x", tmp_path / "a.png", device="cpu", **settings)
    with pytest.raises(ValueError, match=r"\.png"):
        run("x", tmp_path / "a.jpg", device="cpu")
    with pytest.raises(ValueError, match="multiple of 16"):
        run("x", tmp_path / "a.png", size="72", device="cpu")
    assert fake.steps_run == 0
    assert list(tmp_path.iterdir()) == []


def test_sizes_and_names():
    assert parse_size("128") == (128, 128)
    assert parse_size("160X96") == (160, 96)
    assert parse_size(None) == (None, None)
    assert [path.name for path in picture_paths(Path("b.png"), 2)] == ["b-0.png", "b-1.png"]


def test_models_are_named_without_their_paths(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "mine").mkdir(parents=True)
    folders = [str(tmp_path / parent / "mine") for parent in ("a", "b")]
    assert name_models(["stickers", *folders, "user/repository", folders[0]]) == {
        "stickers": "stickers",
        "mine": folders[0],
        "mine (2)": folders[1],
        "user/repository": "user/repository",
    }


def test_ctrl_c_leaves_130_and_no_file(tmp_path):
    script = textwrap.dedent("""
        import sys, threading
        from pathlib import Path
        from apps import cli, engine
        from tests.studio.fakes import FakePipeline
        pipe = FakePipeline(step_seconds=0.5)  # 75 seconds in all: even a starved signal comes in time
        engine.Engine._load_pipeline = lambda self, source: pipe
        tell = lambda: (pipe.in_step.wait(), Path(sys.argv[1], "started").touch())
        threading.Thread(target=tell, daemon=True).start()
        cli.main(["generate", "x", "-o", sys.argv[1] + "/a.png", "--steps", "150", "--device", "cpu"])
    """)
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE, env=os.environ)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error.decode()
    assert [file.name for file in tmp_path.iterdir()] == ["started"]
    assert b"Traceback" not in error
