"""Fine-tuning on a server: its runs, its users, and a real training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from PIL import Image

from apps.service import fine_tuning_run
from apps.service.engine import Engine
from apps.service.events import Failed
from apps.service.fine_tuning import FineTuning, offer_runs, receive_image
from apps.service.fine_tuning_plan import MOST_FILES, Example, Plan
from apps.service.fine_tuning_process import FineTuningError, failure_of, read_report
from apps.service.fine_tuning_run import Best, Point, to_toml
from apps.service.lora import LoraError, LoraFiles
from apps.service.option_values import Lora
from apps.service.requests import TextToImageRequest
from apps.service.tethered import tail, without_paths
from apps.service.uploads import UploadError, UploadStore
from apps.studio import fine_tune_views
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SettingsHandlers
from tests.studio.fakes import FakePipeline
from tests.studio.test_page import ENGLISH
from tests.studio.test_server import PROJECT

DOCUMENT = {
    "run": {"steps": 4, "batch_size": 1, "log_every": 1, "preview_every": 0, "save_every": 2, "validate_every": 0},
    "model": {"pretrained": "stickers"},
    "data": {"trigger": "zxc"},
    "task": {"score_images": 0},
}


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
    for other in (name, [name], {"a": name}, None, 7):
        with pytest.raises(FineTuningError):
            made.runs.record(other, "ann")


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


@pytest.mark.parametrize("name", ["data", "lock", "Cache"])
def test_names_of_the_parts_of_a_run_are_refused(made, name):
    with pytest.raises(FineTuningError) as error:
        made.runs.write(plan(made.plan.examples, name), "ann")
    assert error.value.key == "ft.reserved"


def test_two_requests_do_not_write_one_run_at_once(made, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    written = made.runs._write_example

    def slowly(*given):
        begun.set()
        assert go_on.wait(60)
        return written(*given)

    monkeypatch.setattr(made.runs, "_write_example", slowly)
    first = threading.Thread(target=made.runs.write, args=(made.plan, "ann"))
    first.start()
    assert begun.wait(60)
    for owner in ("ann", "bob"):
        with pytest.raises(FineTuningError) as error:
            made.runs.write(made.plan, owner)
        assert error.value.key == "ft.held"
    assert made.runs.runs() == []  # it isn't whole
    go_on.set()
    first.join()
    made.runs.write(made.plan, "ann")
    assert [record.name for record in made.runs.runs("ann")] == ["cats"]
    assert [path.name for path in made.runs.root.iterdir()] == ["cats"]
    monkeypatch.setattr("apps.service.fine_tuning.run_check", lambda *given: made.runs.delete("cats", "ann"))
    with pytest.raises(FineTuningError) as error:
        made.runs.check("cats", "ann")
    assert error.value.key == "ft.held"


def test_what_a_check_has_encoded_is_kept_when_the_run_is_written_again(made):
    made.runs.write(made.plan, "ann")
    folder = made.runs.folder("cats")
    (folder.path / "cache").mkdir()
    (folder.path / "cache" / "one").write_text("x")
    made.runs.write(plan(made.plan.examples[:2]), "ann")
    assert (folder.path / "cache" / "one").is_file()
    assert len(list(folder.data.glob("*.png"))) == 2


def test_a_leftover_folder_is_a_free_name_and_goes_when_the_server_starts(made):
    (made.runs.root / "cats" / "data").mkdir(parents=True)
    (made.runs.root / "cats" / "data" / "old.png").write_text("x")
    made.runs.write(made.plan, "ann")
    folder = made.runs.folder("cats", "ann")
    assert not (folder.data / "old.png").exists()
    (made.runs.root / ".dogs.part").mkdir()
    (made.runs.root / ".dogs.1234.old").mkdir()
    FineTuning(made.folder, made.uploads, made.loras)
    assert [path.name for path in made.runs.root.iterdir()] == ["cats"]


def test_a_run_that_has_learnt_nothing_may_be_written_again(made):
    made.runs.write(made.plan, "ann")
    folder = made.runs.folder("cats")
    folder.change(state="failed")
    assert made.runs.write(made.plan, "ann").state == "draft"
    folder.change(state="failed")
    (folder.training / "checkpoint-000002").mkdir(parents=True)
    (folder.training / "checkpoint-000002" / "state.json").write_text("{}")
    with pytest.raises(FineTuningError, match="is taken"):
        made.runs.write(made.plan, "ann")


def test_nothing_waits_for_a_process_that_still_saves(made):
    made.runs.write(made.plan, "ann")
    folder = made.runs.folder("cats")
    folder.change(state="stopped")
    with FileLock(folder.lock):
        for act in (
            lambda: made.runs.start("cats", "ann"),
            lambda: made.runs.delete("cats", "ann"),
            lambda: made.runs.write(made.plan, "ann"),
        ):
            with pytest.raises(FineTuningError) as error:
                act()
            assert error.value.key == "ft.saving"
    assert made.runs.record("cats").state == "stopped"
    made.runs.delete("cats", "ann")
    assert list(made.runs.root.iterdir()) == []


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


def test_a_log_is_read_on_from_where_it_was_read(made, monkeypatch):
    made.runs.write(made.plan, "ann")
    folder = made.runs.folder("cats")
    folder.training.mkdir()
    log = folder.training / "log.jsonl"

    def line(step, loss=0.5):
        return json.dumps({"kind": "train", "step": step, "loss": loss}) + "\n"

    parsed = []
    monkeypatch.setattr(fine_tuning_run.json, "loads", lambda text, read=json.loads: parsed.append(text) or read(text))
    log.write_text(line(1) + line(2)[:9])
    assert [point.step for point in folder.progress(9).points] == [1]
    log.write_text(line(1) + line(2) + line(3))
    assert [point.step for point in folder.progress(9).points] == [1, 2, 3]
    assert made.runs.folder("cats").progress(9).step == 3
    assert len([text for text in parsed if b"step" in text]) == 3
    log.write_text(line(1) + line(2))  # resumed from an earlier checkpoint
    assert [point.step for point in folder.progress(9).points] == [1, 2]
    log.write_text(line(1) + line(2, 0.25) + line(3) + line(4))  # and it has gone further between two looks
    assert [(point.step, point.loss) for point in folder.progress(9).points][1:] == [(2, 0.25), (3, 0.5), (4, 0.5)]
    log.unlink()
    assert folder.progress(9).points == ()


def test_a_record_is_read_anew_only_when_it_has_changed(made, monkeypatch):
    made.runs.write(made.plan, "ann")
    made.runs.runs()
    monkeypatch.setattr(Path, "read_text", lambda *given, **more: pytest.fail("read again"))
    assert made.runs.runs()[0].state == "draft"
    monkeypatch.undo()
    made.runs.folder("cats").change(state="stopped")
    assert made.runs.runs()[0].state == "stopped"


def test_a_training_that_the_end_of_the_server_stops_says_so(made):
    made.runs.write(made.plan, "ann")
    made.runs.folder("cats").change(state="running")
    process = SimpleNamespace(is_stopping=False, wait=lambda seconds: True)
    process.stop = lambda: made.runs._end(SimpleNamespace(is_stopping=True), 130)
    made.runs._active = "cats", process
    made.runs.close()
    assert (made.runs.record("cats").state, made.runs.record("cats").reason) == ("stopped", "ft.server")


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
        engine.submit(TextToImageRequest(prompt="x", loras=(Lora(name="cats"),)), "bob")
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
    refused = settings._lora_refused((Lora(name="other"),), "bob")
    assert refused is not None
    assert "ink" in refused["problem"]
    assert "secret" not in refused["problem"]
    assert "secret" in settings._lora_refused((Lora(name="other"),), "ann")["problem"]
    monkeypatch.setattr(engine, "check_lora", lambda lora, owner: lora)  # the worker looks again
    last = list(engine.stream(engine.submit(TextToImageRequest(prompt="x", loras=(Lora(name="other"),)), "bob")))[-1]
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
    row = {"frames": 1, "height": 128, "width": 192, "files": 3, "batches": 3}
    memory = {"loaded": 465.0, "batch": 1006.2, "total": 1471.6}
    said = {"device": "cpu", "parameters": 81_920, "layers": 20, "files": [row], "memory_mib": memory}
    out = f"a note\n{json.dumps(said)}\n"
    found = read_report(out)
    assert (found.parameters, found.layers, found.memory, found.device) == (81_920, 20, 1_472, "CPU")
    assert [(one.frames, one.height, one.width, one.files) for one in found.buckets] == [(1, 128, 192, 3)]
    text = fine_tune_views.report(found, 2, 30, ENGLISH)
    for part in ("192 \u00d7 128", "30 steps of 2: every image is seen about 20 times", "1.4 GB"):
        assert part in text
    for other in ("", "something else", "[]", "{}", json.dumps({**said, "files": 3})):
        with pytest.raises(FineTuningError, match="can't be read"):
            read_report(other)
    said = f"note\n\x1b[31merror:\x1b[0m {tmp_path}/data has no file\n"
    assert str(failure_of(said, 1, tmp_path)) == "Fine-tuning failed: data has no file"
    assert failure_of("", -9, tmp_path).key == "ft.killed"
    assert (
        str(failure_of("OSError: /secret/place is full", 1, tmp_path)) == "Fine-tuning failed: OSError: place is full"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.pretrained = '/srv/my models/x': no such file", "model.pretrained = 'x': no such file"),
        (
            "the last is /srv/my out/runs/cats/cats/checkpoint-000002; lower it",
            "the last is cats/checkpoint-000002; lower it",
        ),
        ("No such file: '/srv/my out/runs/cats'", "No such file: 'cats'"),
        ("(/var/cache/x.bin, ~/token)", "(x.bin, token)"),
        ("C:\\Models\\x.bin is broken", "x.bin is broken"),
        ("see https://example.org/a/b; 3/4, blocks.*/x, owner/model", None),
    ],
)
def test_names_stand_where_paths_stood(text, shown):
    assert without_paths(text, Path("/srv/my out/runs/cats")) == (text if shown is None else shown)


def test_only_the_end_of_a_long_log_is_read(tmp_path):
    log = tmp_path / "output.log"
    assert tail(log) == ""
    log.write_bytes(b"x" * 10**6 + b"\nerror: the end\n")
    assert len(tail(log)) < 10**5
    assert failure_of(tail(log), 1, tmp_path).values["message"] == "the end"


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
