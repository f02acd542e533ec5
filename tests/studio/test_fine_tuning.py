"""Fine-tuning in the studio: runs of a server, their users, a real training, and the tab in a browser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import tomllib
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from PIL import Image

from apps.api.tokens import TokenTable, add_user
from apps.service import limits
from apps.service.engine import Engine
from apps.service.events import Failed
from apps.service.fine_tuning import MOST_FILES, Example, FineTuning, Plan, offer_runs, receive_image
from apps.service.fine_tuning_process import FineTuningError, failure_of, read_report
from apps.service.fine_tuning_run import Best, Point, RunFolder, to_toml
from apps.service.lora import LoraError, LoraFiles
from apps.service.option_values import Lora
from apps.service.requests import TextToImageRequest
from apps.service.uploads import UploadError, UploadStore
from apps.studio import fine_tune_views, loss_curve
from apps.studio.fine_tune_handlers import FineTuneHandlers, preview_prompts
from apps.studio.fine_tune_settings import SETTINGS, to_document
from apps.studio.fine_tune_views import Item
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.page_values import PageError
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SettingsHandlers
from apps.training.tasks.lora_config import LoraConfig
from tests.studio.fakes import FakePipeline
from tests.studio.serving import client_of, serving_page
from tests.studio.test_page import ENGLISH
from tests.studio.test_server import PROJECT, browser, open_page, page, server

__all__ = ["browser", "page", "server"]

HERE = SimpleNamespace(session_hash="one tab", username=None, client=SimpleNamespace(host="127.0.0.1"))
DOCUMENT = {
    "run": {"steps": 4, "batch_size": 1, "log_every": 1, "preview_every": 0, "save_every": 2, "validate_every": 0},
    "model": {"pretrained": "stickers"},
    "data": {"trigger": "zxc"},
    "task": {"score_images": 0},
}
FORM = {
    "ft_model": "fake", "ft_name": "cats", "ft_layers": "attention", "ft_trigger": "zxc", "ft_caption": "",
    **{f"ft_{name}": one.default for name, one in SETTINGS.items()},
}  # fmt: skip


@pytest.fixture
def made(tmp_path):
    """Yield the runs of a server, three images handed in, and a plan for them."""
    uploads, loras = UploadStore(tmp_path / "uploads"), LoraFiles()
    names = [uploads.add(Image.new("RGB", (96, 64), color)) for color in ("red", "green", "blue")]
    examples = [Example(name, f"a square {i}") for i, name in enumerate(names)]
    runs = FineTuning(tmp_path, uploads, loras)
    yield SimpleNamespace(runs=runs, uploads=uploads, loras=loras, plan=plan(examples), folder=tmp_path)
    runs.close()


def plan(examples, name="cats", document=None):
    return Plan(name, "stickers", examples, document or DOCUMENT)


def finished(runs, name, owner="ann", steps=(2, 4), best=2):
    """Put the files of a finished training in place, without one."""
    folder = runs.folder(name, owner)
    (folder.training / "loras").mkdir(parents=True)
    for step in steps:
        (folder.training / "loras" / f"step-{step:06d}.safetensors").write_bytes(b"x" * step)
    (folder.training / "best.json").write_text(json.dumps({"step": best, "loss": 0.5, "advice": "level"}))
    folder.change(state="finished")
    return folder


# ------------------------------------------------------------------------------- a run


@pytest.mark.parametrize(
    "name",
    ["", "..", "../x", "a/b", "/etc/x", "a b", "-x", "a;rm", "$(x)", "caf\u00e9", "x" * 41, "a\n", "cats-step-000200",
     ".hidden", "a.b", "a\x00b"],
)  # fmt: skip
def test_names_that_could_leave_the_folder_or_mislead_are_refused(made, name):
    with pytest.raises(FineTuningError) as error:
        made.runs.write(plan(made.plan.examples, name), "ann")
    assert error.value.key == "ft.name"
    assert not made.runs.root.exists()
    with pytest.raises(FineTuningError):
        made.runs.record(name, "ann")


@pytest.mark.parametrize("count", [0, 1, MOST_FILES + 1])
def test_the_number_of_files_is_checked(made, count):
    with pytest.raises(FineTuningError, match="choose 2 to 200"):
        made.runs.write(plan(made.plan.examples[:1] * count), "ann")


def test_a_run_has_its_files_in_its_folder_and_nothing_of_uploads_but_pixels(made):
    exif = Image.Exif()
    exif[0x010E] = "where it was taken"
    Image.new("RGB", (4000, 1000), "red").save(made.folder / "big.jpg", exif=exif)
    big, _ = receive_image(made.uploads, made.folder / "big.jpg", "ann")
    record = made.runs.write(plan([*made.plan.examples, Example(big)]), "ann")
    folder = made.runs.folder("cats", "ann")
    assert (record.state, record.files, record.trigger) == ("draft", 4, "zxc")
    assert sorted(file.name for file in folder.data.iterdir()) == [
        "0001.png", "0001.txt", "0002.png", "0002.txt", "0003.png", "0003.txt", "0004.png",
    ]  # fmt: skip
    with Image.open(folder.data / "0004.png") as image:
        assert (image.size, image.info) == ((1536, 384), {})
    settings = tomllib.loads(folder.config.read_text(encoding="utf-8"))
    assert settings["run"]["output"] == str(folder.path)
    assert settings["data"] == {"folder": str(folder.data), "trigger": "zxc"}


@pytest.mark.parametrize("text", ['"\n[run]\nsteps = 1', "\\", "'''", '"""', "\u72ac \U0001f431", "\x7f\x01", "$(rm)"])
def test_no_text_changes_another_setting(text):
    document = {"data": {"trigger": text, "list": [text, text]}, "run": {"steps": 3, "rate": 1e-05, "flag": True}}
    assert tomllib.loads(to_toml(document)) == document


def test_a_file_that_is_gone_leaves_no_half_of_a_run(made):
    with pytest.raises(UploadError):
        made.runs.write(plan([*made.plan.examples, Example("0" * 64)]), "ann")
    assert made.runs.runs() == []
    made.runs.write(made.plan, "ann")  # the name is free


def test_what_was_trained_when_the_server_ended_can_be_resumed(made):
    made.runs.write(made.plan, "ann")
    made.runs.folder("cats").change(state="running")
    again = FineTuning(made.folder, made.uploads, made.loras)
    assert (again.record("cats").state, again.record("cats").reason) == ("stopped", "ft.server")


def test_a_run_is_read_while_it_is_written_to(made):
    made.runs.write(made.plan, "ann")
    folder = finished(made.runs, "cats")
    lines = [
        {"kind": "train", "step": 10, "loss": 0.5, "seconds": 20.0},
        {"kind": "validation", "step": 10, "loss": 0.4},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train", "st'
    (folder.training / "log.jsonl").write_text(text)
    (folder.training / "config.json").write_text("{}")
    os.utime(folder.training / "config.json", (1_000, 1_000))
    os.utime(folder.training / "log.jsonl", (1_020, 1_020))
    progress = folder.progress(40)
    assert (progress.step, progress.seconds_left) == (10, 60.0)
    assert folder.progress(40, first=6).seconds_left == 150.0
    assert folder.progress(40, first=10).seconds_left is None
    assert progress.points == (Point("train", 10, 0.5), Point("validation", 10, 0.4))
    assert folder.best() == Best(2, 0.5, "level")
    (folder.training / "best.json").write_text("{")
    assert folder.best() is None
    assert folder.preview() is None


# ------------------------------------------------------------------------ users and LoRAs


def test_users_have_their_own_runs_and_loras(made):
    made.runs.write(made.plan, "ann")
    for act in (made.runs.record, made.runs.start, made.runs.stop, made.runs.delete, made.runs.check):
        with pytest.raises(FineTuningError) as error:
            act("cats", "bob")
        assert error.value.key == "ft.none"
    with pytest.raises(FineTuningError, match="is taken"):
        made.runs.write(made.plan, "bob")
    finished(made.runs, "cats")
    offer_runs(made.folder, made.loras)
    assert made.loras.names("ann") == ("cats", "cats-step-000004", "cats-step-000002")
    assert made.loras["cats"].name == "step-000002.safetensors"  # the best
    assert made.loras.names("bob") == made.loras.names() == ()
    assert [record.name for record in made.runs.runs("bob")] == []
    assert [record.name for record in made.runs.runs()] == ["cats"]  # an administrator
    with pytest.raises(FineTuningError, match="is taken"):
        made.runs.write(made.plan, "ann")  # it has been trained
    made.runs.delete("cats", None)
    assert (made.loras.names("ann"), made.runs.folder("cats").path.exists() if made.runs.runs() else False) == (
        (),
        False,
    )


def test_a_lora_of_another_user_can_not_be_asked_for(tmp_path, made):
    made.runs.write(made.plan, "ann")
    finished(made.runs, "cats")
    offer_runs(made.folder, made.loras)
    (tmp_path / "out").mkdir()
    engine = Engine({"fake": "x"}, tmp_path / "out", device="cpu", loras=made.loras, load=lambda source: FakePipeline())
    with pytest.raises(LoraError, match="no LoRA file 'cats'"):
        engine.submit(TextToImageRequest(prompt="x", lora=Lora(name="cats")), "bob")
    assert engine.loras == ()
    engine.close()


def test_no_error_names_loras_of_others(tmp_path, monkeypatch):
    (tmp_path / "ink.safetensors").write_bytes(b"x")
    loras = LoraFiles({"ink": tmp_path / "ink.safetensors"})
    loras.put("secret", {"secret": tmp_path / "a"}, "ann")
    (tmp_path / "out").mkdir()
    engine = Engine({"fake": "x"}, tmp_path / "out", device="cpu", loras=loras, load=lambda source: FakePipeline())
    sessions = Sessions(None)
    settings = SettingsHandlers(engine, ENGLISH, sessions, GenerationHandlers(engine, ENGLISH, sessions))
    refused = settings._lora_refused(Lora(name="other"), "bob")
    assert refused is not None
    assert "ink" in refused["problem"]
    assert "secret" not in refused["problem"]
    assert "secret" in settings._lora_refused(Lora(name="other"), "ann")["problem"]
    monkeypatch.setattr(engine, "check_lora", lambda lora, owner: lora)  # the worker looks again
    last = list(engine.stream(engine.submit(TextToImageRequest(prompt="x", lora=Lora(name="other")), "bob")))[-1]
    engine.close()
    assert isinstance(last, Failed)
    assert "choose among ink." in last.message


def test_loras_are_listed_while_others_are_put(tmp_path):
    loras = LoraFiles()
    ended = threading.Event()

    def put():
        while not ended.is_set():
            loras.put("cats", {"cats": tmp_path / "a", "cats-step-000002": tmp_path / "b"}, "ann")
            loras.put("cats", {}, "ann")

    thread = threading.Thread(target=put)
    thread.start()
    try:
        assert {len(loras.visible("ann")) for _ in range(2_000)} <= {0, 2}
    finally:
        ended.set()
        thread.join()


def test_the_owner_of_a_server_offers_loras_to_everybody(tmp_path):
    loras = LoraFiles({"ink": tmp_path / "ink.safetensors"})
    loras.put("cats", {"cats": tmp_path / "a", "cats-step-000002": tmp_path / "b"}, "ann")
    loras.put("cats-2", {"cats-2": tmp_path / "c"}, "bob")
    assert (loras.names(), loras.names("ann")) == (("ink",), ("ink", "cats", "cats-step-000002"))
    assert list(loras.visible("bob")) == ["ink", "cats-2"]
    loras.put("cats", {}, "ann")
    assert list(loras) == ["ink", "cats-2"]


def test_a_run_may_not_take_the_name_of_a_lora_of_the_server(made, tmp_path):
    made.loras._offered["cats"] = tmp_path / "cats.safetensors"
    with pytest.raises(FineTuningError, match="is taken"):
        made.runs.write(made.plan, "ann")


def test_a_second_training_is_refused(made):
    made.runs.write(made.plan, "ann")
    made.runs._active = "other", SimpleNamespace(stop=lambda: None, wait=lambda seconds: True, is_stopping=False)
    with pytest.raises(FineTuningError) as error:
        made.runs.start("cats", "ann")
    assert error.value.key == "ft.busy"
    assert made.runs.record("cats").state == "draft"


# -------------------------------------------------------------------------- the process


def test_reports_and_failures_are_read_without_paths(tmp_path):
    out = (
        "cats: files\n\u2503 frames \u2503 height \u2503\n\u2502      1 \u2502    128 \u2502   192 \u2502     3 \u2502"
        "                3 \u2502\n81,920 parameters are trained, in 20 layers; 2 steps of 1\n"
        "memory about 1,472 MiB on cpu (loaded 465, adapters 1, activations 6)\n"
    )
    found = read_report(out)
    assert (found.parameters, found.layers, found.memory, found.device) == (81_920, 20, 1_472, "CPU")
    assert [(one.frames, one.height, one.width, one.files) for one in found.buckets] == [(1, 128, 192, 3)]
    text = fine_tune_views.report(found, 2, 30, ENGLISH)
    for part in ("192 \u00d7 128", "30 steps of 2: every image is seen about 20 times", "1.4 GB"):
        assert part in text
    with pytest.raises(FineTuningError, match="can't be read"):
        read_report("something else")
    said = f"note\n\x1b[31merror:\x1b[0m {tmp_path}/data has no file\n"
    assert str(failure_of(said, 1, tmp_path)) == "Fine-tuning failed: /data has no file"
    assert failure_of("", -9, tmp_path).key == "ft.killed"
    assert "/secret" not in str(failure_of("OSError: /secret/place is full", 1, tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_stops_resumes_and_offers_what_it_made(made):
    made.runs.write(made.plan, "ann")
    assert made.runs.check("cats", "ann").buckets[0].files == 3
    made.runs.start("cats", "ann")
    with pytest.raises(FineTuningError) as error:
        made.runs.delete("cats", "ann")
    assert error.value.key == "ft.runs"
    folder = made.runs.folder("cats")
    while folder.progress(4).step == 0 and made.runs.running:
        time.sleep(0.05)
    made.runs.stop("cats", "ann")
    assert made.runs.wait(300)
    assert folder.record().state in ("stopped", "finished"), folder.log.read_text()  # it may have been faster
    if folder.record().state == "stopped":
        assert folder.has_checkpoint
        before = folder.progress(4).points
        made.runs.start("cats", "ann")
        assert made.runs.wait(300)
        assert folder.progress(4).points[: len(before)] == before
    assert folder.record().state == "finished", folder.log.read_text()
    assert [point.step for point in folder.progress(4).points if point.kind == "train"] == [1, 2, 3, 4]
    best = folder.best().step
    assert made.loras.names("ann") == ("cats", "cats-step-000004", "cats-step-000002")
    assert made.loras["cats"] == folder.training / "loras" / f"step-{best:06d}.safetensors"
    with pytest.raises(FineTuningError, match="has finished"):
        made.runs.start("cats", "ann")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_saves_and_ends_when_its_server_is_killed(made):
    long = {**DOCUMENT, "run": {**DOCUMENT["run"], "steps": 5_000, "save_every": 0}}
    made.runs.write(plan(made.plan.examples, document=long), "ann")
    folder = made.runs.folder("cats")
    program = (
        "import sys, time; from pathlib import Path; from apps.service.fine_tuning_process import TrainingProcess\n"
        "TrainingProcess(*map(Path, sys.argv[1:]), False, lambda process, code: None); time.sleep(900)"
    )
    places = [str(place) for place in (folder.config, folder.lock, folder.log)]
    server = subprocess.Popen([sys.executable, "-c", program, *places], cwd=PROJECT)
    try:
        while folder.progress(5_000).step == 0:
            assert server.poll() is None
            time.sleep(0.2)
    finally:
        server.kill()
        server.wait()
    with FileLock(folder.lock, timeout=300):  # held as long as the training lives
        assert folder.has_checkpoint, folder.log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_that_fails_says_why(made):
    bad = {**DOCUMENT, "lora": {"layers": ["no_such_layer"]}}
    made.runs.train(plan(made.plan.examples, document=bad), "ann")
    assert made.runs.wait(300)
    record = made.runs.record("cats")
    assert (record.state, record.reason) == ("failed", "ft.failed")
    assert "names no linear layer" in record.message
    assert str(made.folder) not in record.message


# ------------------------------------------------------------------------------- the tab


@pytest.fixture
def tab(tmp_path):
    """Yield the listeners of the tab, on a server that asks nobody who this is."""
    with serving_tab(tmp_path, None) as one:
        yield one


@contextmanager
def serving_tab(folder, tokens):
    (folder / "out").mkdir()
    engine = Engine({"fake": "x"}, folder / "out", device="cpu", load=lambda source: FakePipeline())
    runs, sessions = FineTuning(folder / "out", engine.uploads, engine.lora_files), Sessions(tokens)
    generation = GenerationHandlers(engine, ENGLISH, sessions)
    settings = SettingsHandlers(engine, ENGLISH, sessions, generation)
    handlers = FineTuneHandlers(engine, runs, ENGLISH, sessions, settings)
    yield SimpleNamespace(handlers=handlers, runs=runs, engine=engine, folder=folder)
    engine.close()


def files(folder, count=3):
    made = []
    for i in range(count):
        Image.new("RGB", (64, 64), (40 * i, 0, 0)).save(folder / f"p{i}.png")
        made.append(folder / f"p{i}.png")
    return made


def test_the_defaults_and_ranges_are_those_of_the_configuration():
    sections: Any = LoraConfig.model_fields
    config = {name: kind.annotation.model_fields for name, kind in sections.items()}
    for name, one in SETTINGS.items():
        assert one.default == config[one.section][one.name].default
        assert one.read(one.default) == one.default
        assert f"ft.{name}" in ENGLISH
    assert (SETTINGS["learning_rate"].least, SETTINGS["learning_rate"].is_above) == (0, True)
    assert SETTINGS["caption_dropout"].highest == 1
    document = to_document({**FORM, "ft_resolution": 0}, "stickers", 1)
    assert document["data"]["resolution"] is None  # the model's own
    assert document["optimizer"] == {"learning_rate": LoraConfig.model_fields["optimizer"].default.learning_rate}
    assert document["run"]["save_every"] == 100
    assert to_document({**FORM, "ft_steps": 4}, "stickers", 1)["run"] == {
        "steps": 4, "batch_size": 4, "seed": 0, "preview_every": 4, "log_every": 1, "validate_every": 1,
        "save_every": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("steps", 10**9), ("steps", 2.5), ("rank", "8"), ("rank", True), ("learning_rate", 0),
     ("learning_rate", float("nan")), ("caption_dropout", 1.1), ("resolution", 8), ("seed", -1), ("batch_size", None),
     ("layers", "blocks.*"), ("trigger", "x" * 201)],
)  # fmt: skip
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(FineTuningError) as error:
        to_document({**FORM, f"ft_{name}": value}, "stickers", 1)
    from apps.studio.problems import explain

    text = explain(error.value, ENGLISH)
    assert ENGLISH(f"ft.{name}") in text
    assert "{" not in text


def test_images_get_the_captions_of_files_of_their_name(tab, tmp_path):
    (tmp_path / "p1.txt").write_text("  a red\tpatch \n\n a second line ")
    (tmp_path / "alone.txt").write_text("x")
    handed = [*files(tmp_path), tmp_path / "p1.txt", tmp_path / "alone.txt"]
    told = tab.handlers.take_files(HERE, [str(file) for file in handed], [], "")
    items = told["ft_items"]
    assert [(one.name, one.caption) for one in items] == [("p0", ""), ("p1", "a red patch\na second line"), ("p2", "")]
    assert "alone.txt belongs to no image" in told["ft_problem"]
    captions = json.dumps({items[0].upload: "<b>\x00first</b>", items[2].upload: None, "other": "x"})
    told = tab.handlers.take_files(HERE, [str(tmp_path / "p1.png")], items, captions)  # the same image again
    assert [(one.name, one.caption) for one in told["ft_items"]] == [
        ("p0", "<b> first</b>"),
        ("p1", "a red patch\na second line"),
    ]
    assert "&lt;b&gt; first&lt;/b&gt;" in told["ft_cards"]
    for nonsense in ("[", "[1]", '"x"', "9" * 5000, "[" * 9000):
        assert len(tab.handlers.take_files(HERE, [], items, nonsense)["ft_items"]) == 3


def test_hostile_files_are_refused_and_the_others_taken(tab, tmp_path):
    (tmp_path / "evil.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    (tmp_path / "zip.png").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "p0.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "p1.txt").write_text("x" * (limits.MAX_PROMPT_CHARS + 1))
    (tmp_path / "big.png").write_bytes(bytes(limits.MAX_UPLOAD_BYTES + 1))
    names = ("evil.svg", "zip.png", "p0.txt", "p1.txt", "big.png")
    handed = [*files(tmp_path, 2), *(tmp_path / name for name in names)]
    told = tab.handlers.take_files(HERE, [str(file) for file in handed], [], "")
    assert [one.name for one in told["ft_items"]] == ["p0", "p1"]
    assert all(name in told["ft_problem"] for name in ("big.png", "evil.svg", "zip.png"))
    assert "<svg" not in told["ft_problem"]


def test_nobody_trains_from_another_machine_without_a_name(tab):
    for client in (SimpleNamespace(host="192.168.1.9"), SimpleNamespace(host="testclient"), None):
        stranger = SimpleNamespace(session_hash="x", username=None, client=client)
        for act in (lambda who: tab.handlers.start(who, FORM), lambda who: tab.handlers.take_files(who, [], [], "")):
            with pytest.raises(PageError, match=r"ft\.strangers"):
                act(stranger)
    assert tab.runs.runs() == []


def test_who_may_only_look_trains_nothing(tmp_path):
    add_user(tmp_path / "users.json", "eve", "view")
    add_user(tmp_path / "users.json", "ann", "generate")
    eve = SimpleNamespace(session_hash="x", username="eve", client=None)
    ann = SimpleNamespace(session_hash="y", username="ann", client=None)
    with serving_tab(tmp_path, TokenTable(tmp_path / "users.json")) as one:
        for act in (
            lambda: one.handlers.start(eve, FORM),
            lambda: one.handlers.check(eve, FORM),
            lambda: one.handlers.take_files(eve, [], [], ""),
            lambda: one.handlers.resume(eve, "cats"),
            lambda: one.handlers.delete(eve, "cats"),
        ):
            with pytest.raises(PageError, match="no_rights"):
                act()
        assert one.handlers.owner(ann) == "ann"


def test_a_run_is_drawn_watched_and_tried(tab, tmp_path):
    items = tab.handlers.take_files(HERE, [str(file) for file in files(tmp_path)], [], "")["ft_items"]
    values = {**FORM, "ft_items": items, "ft_captions": ""}
    planned = tab.handlers._plan(values)
    assert planned.document["task"]["preview_prompts"] == ["zxc"]
    tab.runs.write(planned, "local")
    assert "<script" not in tab.handlers.list_runs(HERE, "cats")["ft_run"]
    folder = tab.runs.folder("cats")
    folder.change(state="running")
    shown = tab.handlers.open(HERE, None)
    assert shown["ft_timer"]["active"]
    assert tab.handlers.tick(HERE, "cats", shown["ft_seen"], True) == {}  # no news
    assert tab.handlers.tick(HERE, "cats", None, False) == {}  # another tab is open
    (folder.training / "previews").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(folder.training / "previews" / "step-000002.png")
    (folder.training / "previews" / "prompts.txt").write_text("<i>a cat</i>\n")
    drawn = tab.handlers.tick(HERE, "cats", shown["ft_seen"], True)["ft_run"]
    assert "Preview at step 2" in drawn
    assert "&lt;i&gt;a cat" in drawn
    assert "<i>a" not in drawn
    finished(tab.runs, "cats", "local")
    tab.engine.lora_files.put("cats", folder.loras(), "local")
    ended = tab.handlers.tick(HERE, "cats", shown["ft_seen"], True)
    assert not ended["ft_timer"]["active"]
    assert ("cats" in ended["lora"]["choices"], ended["lora_row"]["visible"]) == (True, True)
    tried = tab.handlers.try_it(HERE, "cats", "fake")
    assert (tried["lora"]["value"], tried["prompt"], tried["mode"]) == ("cats", "zxc", "text")


def test_previews_show_captions_of_some_images():
    items = [Item(str(i), str(i), 1, "", f"image {i}\nmore" if i else "") for i in range(9)]
    data = {"trigger": "zxc", "caption": "a cat"}
    assert preview_prompts(items, data) == ["zxc a cat", "zxc image 2", "zxc image 4", "zxc image 6"]
    assert preview_prompts(items[:2], data) == ["zxc a cat", "zxc image 1"]
    assert preview_prompts(items[:1], {"trigger": "", "caption": ""}) == []


def test_a_curve_of_one_point_or_of_nonsense_is_drawn():
    assert loss_curve.draw([], 10, None, ENGLISH) == ""
    assert loss_curve.draw([Point("train", 1, float("nan"))], 10, None, ENGLISH) == ""
    assert "<circle" in loss_curve.draw([Point("train", 1, 0.0)], 0, 1, ENGLISH)
    many = loss_curve.draw([Point("train", step, 1 / step) for step in range(1, 5000)], 5000, None, ENGLISH)
    assert len(many) < 12_000


def test_the_files_of_runs_are_not_served(tmp_path):
    with serving_page(tmp_path) as served:
        runs = served.app.state.fine_tuning
        upload = [runs._uploads.add(Image.new("RGB", (8, 8), color), "ann") for color in ("red", "blue")]
        runs.write(plan([Example(one) for one in upload]), "ann")
        file = runs.folder("cats").data / "0001.png"
        assert file.is_file()
        paths = (f"/gradio_api/file={file}", "/outputs/fine-tuning", "/outputs/fine-tuning%2Fcats%2Fdata%2F0001.png")
        for name in ("ann", "bob"):
            with client_of(served, name) as client:
                assert [client.get(path).status_code for path in paths] == [403, 404, 404]


def test_a_server_without_the_page_has_no_fine_tuning(tmp_path):
    from apps.api.app import create_app

    (tmp_path / "out").mkdir()
    engine = Engine({"fake": "x"}, tmp_path / "out", device="cpu", load=lambda source: FakePipeline())
    app = create_app(engine)
    assert not hasattr(app.state, "fine_tuning")
    assert not [route for route in app.router.routes if "fine" in getattr(route, "path", "")]
    engine.close()


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_person_fine_tunes_in_a_browser(server, page, tmp_path):
    page.set_default_timeout(600_000)
    (tmp_path / "p1.txt").write_text("a fox")
    handed = [*files(tmp_path), tmp_path / "p1.txt"]
    page.get_by_role("tab", name="Fine-tune").first.click()
    page.set_input_files("#ft-files input[type=file]", handed)
    page.locator(".ft-card").nth(2).wait_for()
    assert page.locator(".ft-card textarea").nth(1).input_value() == "a fox"
    page.locator(".ft-card textarea").nth(0).fill("a ghost")
    page.fill("#ft-name :is(input, textarea)", "../fox")
    page.fill("#ft-trigger :is(input, textarea)", "fox")
    page.click("#ft-advanced > button")
    for name, value in (("steps", 4), ("batch-size", 1), ("preview-every", 2), ("rank", 2)):
        page.fill(f"#ft-{name} input", str(value))
        page.press(f"#ft-{name} input", "Tab")
    page.click("#ft-start")
    page.locator("#ft-problem [role=alert]").wait_for()
    page.fill("#ft-name :is(input, textarea)", "foxes")
    page.click("#ft-start")
    page.locator(".ft-run h3 .running").wait_for()
    page.locator(".curve svg polyline").first.wait_for()
    page.locator(".ft-run > img").wait_for()
    page.locator(".ft-run h3 .finished").wait_for()
    data = server[1] / "fine-tuning" / "foxes" / "data"
    assert [file.read_text() for file in sorted(data.glob("*.txt"))] == ["a ghost", "a fox"]
    open_page(page, server[0])  # a reload: it is read from the files
    page.get_by_role("tab", name="Fine-tune").first.click()
    page.locator(".ft-run h3 .finished").wait_for()
    assert RunFolder(server[1] / "fine-tuning" / "foxes").best() is not None
    page.click("#ft-try")
    page.wait_for_function("document.querySelector('#workspace').dataset.tab === 'text'")
    page.wait_for_function("document.querySelector('#lora input').value === 'foxes'")
    assert page.input_value("#prompt textarea") == "fox"
