"""Wrong usage leaves with 2 before any model is loaded, work that failed with 1; outputs are checked and kept."""

from __future__ import annotations

import errno
import json

import pytest
from PIL import Image

from apps import cli
from apps.commands.loading import load_for_command
from apps.commands.outputs import free_output
from apps.service import engine as engine_module
from apps.service.logs import no_loading_bars
from apps.service.metadata import read_picture
from apps.service.usage import UsageError, checking
from apps.service.writable import check_writable
from tests.studio.fakes import FakePipeline


def leave(*words):
    with pytest.raises(SystemExit) as left:
        cli.main([str(word) for word in words])
    return int(left.value.code or 0)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with an image, a text that is no settings, and a file of prompts."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("in.png")
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("a fox\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "typed.jsonl").write_text('{"prompt": "x", "steps": "many"}\n')
    (tmp_path / "folder.png").mkdir()
    return tmp_path


@pytest.fixture
def no_model(monkeypatch):
    """Nothing may be loaded."""

    def load(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(engine_module.Engine, "_load_pipeline", load)
    monkeypatch.setattr("apps.commands.loading.load_pipeline", load)


@pytest.fixture
def fake(monkeypatch):
    pipe = FakePipeline()
    monkeypatch.setattr(engine_module.Engine, "_load_pipeline", lambda self, source, device, load_options: pipe)
    return pipe


GENERATE = [
    ("--steps 999", "steps: choose 1 to 200"),
    ("--guidance 99", "guidance: choose 0 to 31"),
    ("--num 99", "num_images: choose 1 to 16"),
    ("--batch-size 9", "batch_size: choose 1 to 8"),
    ("--frames 999", "frames: choose 1 to 257"),
    ("--seed 4294967296", "seed: choose 0 to 4294967295"),
    ("--model nonsense", "no model 'nonsense'"),
    ("--model ./nowhere", "no model './nowhere'"),
    ("--model someone/model@main", "no commit"),
    ("--scheduler magic", "scheduler: choose euler"),
    ("--preset magic", "no preset 'magic'"),
    ("--style magic", "no style 'magic'"),
    ("--attention magic", "attention backend 'magic'"),
    ("--device abacus", "'abacus'"),
    ("--size big", "128"),
    ("--size 100x", "160x128"),
    ("--size 7", "32 to 2048"),
    ("--image in.png --expand far", "share from 0 to 2"),
    ("--cache magic", "budget=0.35"),
    ("--cache fora:every=x", "needs a number"),
    ("--mask in.png", "--image"),
    ("--strength 0.5", "--image"),
    ("--expand 0.5", "--image"),
    ("--kv-budget 0.5", "--kv-policy"),
    ("--lora-scale 0.5", "--lora"),
    ("--candidates 3", "candidates"),
    ("--top-k 3", "top_k: text_to_image has no such setting"),
    ("--model stickers-var --steps 3", "steps: next_scale_text has no such setting"),
    ("--memory low --offload model", "--offload"),
    ("--memory low --device cpu", "memory profile 'low'"),
    ("--base stickers", "--base goes with"),
    ("--settings notes.json", "settings"),
    ("--lora notes.txt", "safetensors"),
    ("-o a.jpg", "'.png'"),
    ("-o notes.txt/a.png", "notes.txt/a.png"),
    ("-o /proc/nowhere/a.png", "/proc/nowhere/a.png"),
    (f"-o {'a' * 300}.png", "name"),
    ("-o folder.png", "is a folder"),
]


@pytest.mark.parametrize(("words", "told"), GENERATE)
def test_generate_refuses_before_a_model_is_loaded(place, no_model, capsys, words, told):
    before = sorted(place.iterdir())
    assert leave("generate", "a fox", *words.split()) == 2
    said = capsys.readouterr()
    assert told in said.err
    assert len(said.err.splitlines()) == 1
    for foreign in ("Traceback", "Input should", ".part"):
        assert foreign not in said.err
    assert sorted(place.iterdir()) == before


COMMANDS = [
    ("generate --batch notes.txt --size big", "128"),
    ("generate --batch notes.txt --steps 999", "steps: choose 1 to 200"),
    ("generate --batch notes.txt --model nonsense", "no model 'nonsense'"),
    ("generate --batch notes.txt -o notes.json", "notes.json"),
    ("generate --batch latin.txt", "UTF-8"),
    ("generate --batch typed.jsonl", "Line 1 holds values of another type: steps (int)"),
    ("generate x --batch notes.txt", "--batch"),
    ("evaluate nonsense", "no model 'nonsense'"),
    ("evaluate stickers --set magic", "magic"),
    ("evaluate stickers --vocabulary nowhere.txt", "nowhere.txt"),
    ("evaluate stickers --device abacus", "'abacus'"),
    ("evaluate stickers -o notes.txt/report", "notes.txt/report"),
    ("bench magic", "magic"),
    ("bench paint --model nonsense", "no model 'nonsense'"),
    ("bench costs --device abacus", "'abacus'"),
    ("bench costs -o notes.txt/a.json", "notes.txt/a.json"),
    ("bench search", "name the model"),
    ("calibrate-cache nonsense", "no model 'nonsense'"),
    ("calibrate-cache -o notes.txt/a.safetensors", "notes.txt/a.safetensors"),
    ("convert --family dit --checkpoint in.png -o notes.json", "notes.json"),
    ("convert --family var --checkpoint folder.png -o new", "folder.png"),
    ("train notes.json", "notes.json"),
    ("serve --model nonsense", "no model 'nonsense'"),
    ("serve --host 0.0.0.0", "0.0.0.0"),
    ("serve --base stickers", "--base goes with"),
    ("studio --output notes.txt/out", "notes.txt/out"),
    ("studio --lora folder.png", "LoRA"),
    ("token ../x --auth-file users.json", "../x"),
]


@pytest.mark.parametrize(("words", "told"), COMMANDS)
def test_commands_refuse_before_a_model_is_loaded(place, no_model, capsys, words, told):
    assert leave(*words.split()) == 2
    said = capsys.readouterr()
    assert told in said.err
    assert "Traceback" not in said.err


def test_what_only_the_model_knows_is_wrong_usage_too(place, fake, capsys):
    assert leave("generate", "x", "--size", "72", "--device", "cpu") == 2
    assert "multiple of 16" in capsys.readouterr().err
    assert leave("generate", "x", "-o", "a.mp4", "--device", "cpu") == 2
    assert ".png" in capsys.readouterr().err


def test_a_setting_that_a_picture_has_not_is_not_ignored(place, fake, capsys):
    assert leave("generate", "x", "--steps", "2", "-o", "a.png", "--device", "cpu") == 0
    for words, told in (("--top-k 3", "--top-k"), ("--steps 999", "steps: choose 1 to 200")):
        capsys.readouterr()
        assert leave("generate", "--settings", "a.png", "-o", "b.png", "--device", "cpu", *words.split()) == 2
        assert told in capsys.readouterr().err


def test_the_default_output_keeps_what_is_there(place, fake, capsys):
    for expected in ("tessera.png", "tessera-1.png", "tessera-2.png"):
        assert leave("generate", "x", "--steps", "1", "--device", "cpu") == 0
        said = capsys.readouterr()
        assert expected in said.out
        assert ("is kept" in said.err) is (expected != "tessera.png")
    first = read_picture(place / "tessera.png").prompt
    assert leave("generate", "another", "--steps", "1", "--device", "cpu", "-o", "tessera.png") == 0
    assert (first, read_picture(place / "tessera.png").prompt) == ("x", "another")  # what is named is replaced
    assert leave("generate", "x", "--steps", "1", "--num", "2", "--device", "cpu", "--json") == 0
    written = [row["path"] for row in json.loads(capsys.readouterr().out.partition("\n")[2])["pictures"]]
    assert written == ["tessera-1-0.png", "tessera-1-1.png"]


def test_a_free_name_is_free_of_clips_and_settings_too(place):
    assert free_output(1).name == "tessera.png"
    (place / "tessera.mp4").touch()
    (place / "tessera-1.png.json").touch()
    assert free_output(1).name == "tessera-2.png"
    (place / "tessera-0.png").touch()
    assert free_output(2).name == "tessera-1.png"


def test_a_full_disk_is_work_that_failed_and_names_the_file_asked_for(place, fake, monkeypatch, capsys):
    def fail(image, path, settings, **_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path.with_name(".0123.part")))

    monkeypatch.setattr("apps.commands.outputs.save_picture", fail)
    assert leave("generate", "x", "--steps", "1", "--device", "cpu", "-o", "a.png") == 1
    said = capsys.readouterr().err
    assert "'a.png'" in said
    assert "No space left" in said
    assert ".part" not in said


def test_a_model_that_can_not_be_read_is_work_that_failed(place, monkeypatch, capsys):
    def fail(*_):
        raise OSError("the disk is broken")

    monkeypatch.setattr(engine_module.Engine, "_load_pipeline", fail)
    assert leave("generate", "x", "--device", "cpu") == 1
    assert "the disk is broken" in capsys.readouterr().err


def test_checks_leave_other_errors_alone(place):
    with pytest.raises(UsageError, match="odd"), checking():
        raise ValueError("odd")
    with pytest.raises(OSError, match="gone"), checking():
        raise OSError("gone")
    with pytest.raises(UsageError, match=r"in\.png/x"):
        check_writable(place / "in.png" / "x.json")
    check_writable(place / "new" / "x.json")
    assert not (place / "new").exists()


def test_loading_draws_no_bars(capfd):
    import diffusers

    pipe = load_for_command("stickers", "cpu")
    pipe("a fox", num_inference_steps=1, output_type="latent")
    assert capfd.readouterr() == ("", "")
    assert diffusers.utils.logging.is_progress_bar_enabled()
    diffusers.utils.logging.disable_progress_bar()
    try:
        with no_loading_bars():
            pass
        assert not diffusers.utils.logging.is_progress_bar_enabled()  # as it was
    finally:
        diffusers.utils.logging.enable_progress_bar()


@pytest.mark.parametrize("command", ["generate", "studio", "serve", "evaluate", "convert"])
def test_many_options_are_in_panels(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert leave(command, "--help") == 0
    panels = capsys.readouterr().out.split("\u256d\u2500 ")[1:]
    for panel in panels:
        options = [line for line in panel.splitlines() if line.startswith("\u2502 --") or line.startswith("\u2502 *")]
        assert len(options) <= 11, panel
    assert len([panel for panel in panels if panel.startswith("Options ") and panel.count("--") > 1]) == 0
