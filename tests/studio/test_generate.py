from __future__ import annotations

import json
import signal
import textwrap
import time
from pathlib import Path

import pytest
from PIL import Image

from apps.commands.batch import BatchError, run_batch
from apps.commands.generate import DeviceOptions, run
from apps.commands.given_options import make_options
from apps.commands.outputs import picture_paths
from apps.service import engine as engine_module
from apps.service.metadata import MetadataError, read_picture
from apps.service.model_pool import name_models
from apps.service.option_text import parse_size
from apps.service.usage import UsageError
from tests.fresh import Python
from tests.studio.fakes import FakePipeline


@pytest.fixture
def fake(monkeypatch):
    pipe = FakePipeline()
    monkeypatch.setattr(engine_module.Engine, "_load_pipeline", lambda self, source, device, load_options: pipe)
    return pipe


CPU = DeviceOptions(device="cpu")


def test_one_picture_goes_where_it_was_asked(fake, tmp_path, capsys):
    wishes = make_options(prompt="a red apple", negative_prompt="blue", size="160x128", steps=2)
    run(wishes, tmp_path / "new" / "apple.png", CPU)
    settings = read_picture(tmp_path / "new" / "apple.png")
    assert (settings.width, settings.height, settings.steps, settings.seed) == (160, 128, 2, 0)
    assert settings.negative_prompt == "blue"
    assert "apple.png" in capsys.readouterr().out


def test_several_pictures_are_numbered_and_reported_as_json(fake, tmp_path, capsys):
    run(make_options(prompt="x", num=2, seed=5, steps=2), tmp_path / "a.png", CPU, json_output=True)
    told = capsys.readouterr()
    rows = json.loads(told.out)["pictures"]
    assert [row["path"] for row in rows] == [str(tmp_path / "a-0.png"), str(tmp_path / "a-1.png")]
    assert [read_picture(tmp_path / f"a-{i}.png").seed for i in range(2)] == [5, 6]
    assert [row["seed"] for row in rows] == [5, 6]
    assert told.err == ""


def test_a_sidecar_repeats_the_picture_even_when_the_picture_says_nothing(fake, tmp_path):
    first, second = tmp_path / "a.png", tmp_path / "b.webp"
    run(make_options(prompt="a fox", steps=2, seed=4), first, CPU, keep_settings=False, sidecar=True)
    with pytest.raises(MetadataError, match="carries no settings"):
        read_picture(first)
    run(make_options(), second, CPU, settings=tmp_path / "a.png.json")
    with Image.open(first) as one, Image.open(second) as other:
        assert one.tobytes() == other.tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.png.json", "b.webp"]


def test_presets_go_behind_words_and_before_settings(fake, tmp_path):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    run(make_options(prompt="a fox", steps=2, preset="fine"), first, CPU)
    assert read_picture(first).steps == 2
    run(make_options(preset="fine"), second, CPU, settings=first)
    assert read_picture(second).steps == 50


def test_wrong_wishes_are_refused_before_painting(fake, tmp_path):
    wrong = (({"size": "big"}, "160x128"), ({"size": "100"}, "multiple"), ({"num": 0}, "num_images"),
             ({"prompt": None}, "nothing to generate"), ({"scheduler": "magic"}, "scheduler"))  # fmt: skip
    for settings, reason in wrong:
        with pytest.raises(ValueError, match=reason):
            run(make_options(**{"prompt": "x", **settings}), tmp_path / "a.png", CPU)
    with pytest.raises(ValueError, match=r"\.png"):
        run(make_options(prompt="x"), tmp_path / "a.jpg", CPU)
    with pytest.raises(ValueError, match="multiple of 16"):
        run(make_options(prompt="x", size="72"), tmp_path / "a.png", CPU)
    assert fake.steps_run == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_a_picture_is_repeated_from_its_settings(fake, tmp_path, ending):
    """The bar: the same pixels, from the file alone, whatever its format; also for one of a batch."""
    first, second = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    run(make_options(prompt="a fox", seed=11, steps=3, size="96x64", guidance=2.0), first, CPU)
    run(make_options(), second, CPU, settings=first)
    with Image.open(first) as one, Image.open(second) as two:
        assert one.tobytes() == two.tobytes()
    assert read_picture(first) == read_picture(second)
    run(make_options(seed=12, prompt="a cat"), second, CPU, settings=first)  # what is said goes first
    assert (read_picture(second).seed, read_picture(second).prompt) == (12, "a cat")
    assert read_picture(second).steps == 3


def test_settings_can_be_left_out_of_the_file(fake, tmp_path):
    run(make_options(prompt="a secret", steps=2), tmp_path / "a.png", CPU, keep_settings=False)
    assert b"secret" not in (tmp_path / "a.png").read_bytes()
    with pytest.raises(MetadataError, match="no settings"):
        run(make_options(), tmp_path / "b.png", CPU, settings=tmp_path / "a.png")


def test_a_batch_goes_on_where_it_was(fake, tmp_path, capsys):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    file.write_text(
        '# comment\na red apple\n{"prompt": "a fox", "seed": 4, "steps": 3}\n{"prompt": "bad", "frames": 9}\n'
    )
    with pytest.raises(BatchError, match="1 of 3 lines failed"):
        run_batch(file, out, make_options(steps=2), CPU)
    assert len(list(out.glob("*.png"))) == 2
    assert {read_picture(path).steps for path in out.glob("*.png")} == {2, 3}
    before = fake.steps_run
    file.write_text(file.read_text().replace('"frames": 9', '"size": "64"') + '"one more"\n')
    capsys.readouterr()
    run_batch(file, out, make_options(steps=2), CPU, json_output=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["state"] for row in rows] == ["skipped", "skipped", "done", "done"]
    assert fake.steps_run == before + 4
    file.write_text('"a fox"\n{"prompt": "a fox", "steps": 999}\n')
    with pytest.raises(UsageError, match=r"Line 2.*steps.*200"):  # before anything is generated
        run_batch(file, out, make_options(), CPU)
    assert fake.steps_run == before + 4
    file.write_text('{"prompt": "x", "model": "/etc"}\n')
    with pytest.raises(ValueError, match="Line 1 holds model"):
        run_batch(file, out, make_options(), CPU)


def test_names_of_sidecars_are_checked_before_generating(fake, tmp_path):
    with pytest.raises(UsageError, match="too long"):
        run(make_options(prompt="a fox"), tmp_path / f"{'a' * 251}.png", CPU, sidecar=True)
    assert fake.steps_run == 0


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


def test_a_pinned_model_is_offered_by_its_whole_name_and_a_moving_one_is_not():
    pinned = f"someone/model@{'0123456789' * 4}"
    assert name_models([pinned]) == {pinned: pinned}
    with pytest.raises(ValueError, match="'main', which is no commit"):
        name_models(["stickers", "someone/model@main"])


@pytest.mark.parametrize("name", ["/etc", "../model", "~/model", "model", "a/b/c", "someone/model@main", "x/y"])
def test_settings_of_a_stranger_name_no_place_on_this_machine(fake, tmp_path, monkeypatch, name):
    run(make_options(prompt="x", steps=2), tmp_path / "a.png", CPU)
    (tmp_path / "x" / "y").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    settings = read_picture(tmp_path / "a.png").model_copy(update={"model": name})
    (tmp_path / "hostile.json").write_text(settings.model_dump_json())
    with pytest.raises(ValueError, match="neither built in nor a hub id"):
        run(make_options(), tmp_path / "b.png", CPU, settings=tmp_path / "hostile.json")
    run(make_options(model="stickers"), tmp_path / "b.png", CPU, settings=tmp_path / "hostile.json")


def test_ctrl_c_leaves_130_and_no_file(tmp_path):
    script = textwrap.dedent("""
        import sys, threading
        from pathlib import Path
        from apps import cli
        from apps.service import engine
        from tests.studio.fakes import FakePipeline
        pipe = FakePipeline(step_seconds=0.5)  # 75 seconds in all: even a starved signal comes in time
        engine.Engine._load_pipeline = lambda self, source, device, setup: pipe
        tell = lambda: (pipe.in_step.wait(), Path(sys.argv[1], "started").touch())
        threading.Thread(target=tell, daemon=True).start()
        cli.main(["generate", "x", "-o", sys.argv[1] + "/a.png", "--steps", "150", "--device", "cpu"])
    """)
    process = Python("-c", script, tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(60)
    assert process.poll() == 130, error
    assert [file.name for file in tmp_path.iterdir()] == ["started"]
    assert "Traceback" not in error


def test_unknown_words_of_the_prompt_are_told(tmp_path, capsys):
    run(make_options(prompt="three crabs on plaid", model="stickers", steps=1, num=2), tmp_path / "a.png", CPU)
    told = capsys.readouterr()
    assert told.err.count("warning") == 1
    assert "'plaid'" in told.err
    assert "crabs" not in told.err
    run(make_options(prompt="a crab on plaid", model="stickers", steps=1), tmp_path / "b.png", CPU, json_output=True)
    told = capsys.readouterr()
    (note,) = json.loads(told.out)["pictures"][0]["notes"]
    assert "'plaid'" in note
    assert told.err == ""
    run(make_options(prompt="three crabs on blue", model="stickers", steps=1), tmp_path / "c.png", CPU)
    assert "warning" not in capsys.readouterr().err


def test_unknown_words_are_in_the_rows_of_a_batch(fake, tmp_path, capsys):
    fake.unknown_words = lambda prompts: ("teal",) if "teal" in prompts[0] else ()
    file = tmp_path / "prompts.txt"
    file.write_text("a crab on teal\na crab on blue\n")
    run_batch(file, tmp_path / "out", make_options(steps=2), CPU, json_output=True)
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert "'teal'" in first["notes"][0]
    assert second["notes"] == []


def test_off_a_terminal_nothing_but_whole_notes_is_told_beside_the_result(fake, tmp_path, capsys):
    run(make_options(prompt="a fox", steps=2), tmp_path / "a.png", CPU)
    assert capsys.readouterr().err == ""
    fake.unknown_words = lambda prompts: tuple(f"teal{i}" for i in range(9))
    run(make_options(prompt="a fox", steps=2), tmp_path / "b.png", CPU)
    (note,) = capsys.readouterr().err.splitlines()
    assert all(f"'teal{i}'" in note for i in range(9))


def test_an_error_ends_with_one_full_stop(fake, tmp_path):
    for wishes in (make_options(prompt=" "), make_options(prompt="a fox", steps=1000)):
        with pytest.raises(UsageError) as caught:
            run(wishes, tmp_path / "a.png", CPU)
        assert str(caught.value).endswith(".")
        assert not str(caught.value).endswith("..")
