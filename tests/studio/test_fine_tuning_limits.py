"""What a server accepts of fine-tuning: time, pixels, files, bytes and uploads."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from apps import cli
from apps.service import limits, tether
from apps.service.fine_tuning import FineTuning
from apps.service.fine_tuning_plan import MOST_FILES, Example, check_plan
from apps.service.fine_tuning_process import FineTuningError, TrainingProcess
from apps.service.limits import FineTuningLimits, fine_tuning_limits
from apps.service.lora import LoraFiles
from apps.service.uploads import UploadStore
from apps.studio.fine_tune_settings import to_document
from apps.studio.handed_in import HandedIn
from apps.studio.problems import explain
from tests.studio.test_fine_tuning import DOCUMENT, plan
from tests.studio.test_fine_tuning_tab import FORM
from tests.studio.test_page import ENGLISH


def made(folder, **most):
    uploads = UploadStore(folder / "uploads")
    examples = [Example(uploads.add(Image.new("RGB", (64, 64), color))) for color in ("red", "green")]
    return FineTuning(folder, uploads, LoraFiles(), FineTuningLimits(**most)), examples


def refused(act):
    with pytest.raises(FineTuningError) as error:
        act()
    assert "{" not in explain(error.value, ENGLISH)
    return error.value


def with_run(**run):
    return {**DOCUMENT, "run": {**DOCUMENT["run"], **run}}


def test_a_step_may_have_so_many_pixels():
    examples = [Example("0" * 64)] * 2
    most = FineTuningLimits(batch_pixels=4 * 512**2)
    check_plan(replace(plan(examples, document=with_run(batch_size=4)), side=512), most)
    error = refused(lambda: check_plan(replace(plan(examples, document=with_run(batch_size=5)), side=512), most))
    assert (error.key, error.values["fitting"]) == ("ft.pixels", 4)


@pytest.mark.parametrize("name", ["save_every", "preview_every"])
def test_files_are_not_written_too_often(name):
    examples, most = [Example("0" * 64)] * 2, FineTuningLimits()
    error = refused(lambda: check_plan(plan(examples, document=with_run(steps=1_000, **{name: 49})), most))
    assert (error.key, error.values["lowest"]) == ("ft.often", 50)
    accepted = {**with_run(steps=1_000, save_every=0, preview_every=0), "data": {}}
    check_plan(plan(examples, document=accepted), most)


@pytest.mark.parametrize("steps", [1, 19, 500, 999, 20_000])
def test_the_tab_asks_for_no_more_files_than_are_accepted(steps):
    document = to_document({**FORM, "ft_steps": steps, "ft_preview_every": 1}, "stickers", 1)
    check_plan(plan([Example("0" * 64)] * 2, document=document), FineTuningLimits())
    assert to_document({**FORM, "ft_preview_every": 0}, "stickers", 1)["run"]["preview_every"] == 0


def test_the_runs_of_a_user_and_of_all_take_so_many_bytes(tmp_path):
    runs, examples = made(tmp_path, user_bytes=20_000, all_bytes=30_000)
    runs.write(plan(examples, "one"), "ann")
    folder = runs.folder("one")
    (folder.path / "big").write_bytes(bytes(20_000))
    assert refused(lambda: runs.write(plan(examples, "two"), "ann")).key == "ft.room"
    assert refused(lambda: runs.start("one", "ann")).key == "ft.room"
    runs.write(plan(examples, "two"), "bob")
    (runs.folder("two").path / "big").write_bytes(bytes(10_000))
    assert refused(lambda: runs.write(plan(examples, "three"), "eve")).key == "ft.room"
    assert sorted(path.name for path in runs.root.iterdir()) == ["one", "two"]  # nothing of what was refused
    runs.delete("one", "ann")
    runs.write(plan(examples, "three"), "eve")


@pytest.mark.parametrize(
    ("seconds", "bytes_", "reason"), [(59, 0, ""), (61, 0, "ft.time"), (0, 10**6, "ft.room_ended")]
)
def test_a_training_that_comes_to_a_limit_is_stopped(tmp_path, seconds, bytes_, reason):
    runs, examples = made(tmp_path, minutes=1, user_bytes=10**6)
    runs.write(plan(examples), "ann")
    folder = runs.folder("cats")
    folder.change(state="running")
    (folder.path / "big").write_bytes(bytes(bytes_))
    process = SimpleNamespace(seconds=seconds, is_stopping=False)
    process.stop = lambda: setattr(process, "is_stopping", True)
    runs._active = "cats", process
    runs._look(process)
    assert process.is_stopping == bool(reason)
    runs._end(process, 130)
    assert (folder.record().state, folder.record().reason) == ("stopped", reason)
    if reason:
        assert f"error.{reason}" in ENGLISH


def test_a_process_is_looked_at_while_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("apps.service.fine_tuning_process.LOOK_SECONDS", 0.01)
    monkeypatch.setattr(
        "apps.service.fine_tuning_process.command_of",
        lambda lock, arguments: [tether.sys.executable, "-c", "import sys; sys.stdin.read()"],
    )
    ends = []
    process = TrainingProcess(
        tmp_path / "x.toml", tmp_path / "lock", tmp_path / "log", False, lambda _, code: ends.append(code),
        lambda one: one.stop(),
    )  # fmt: skip
    assert process.wait(60)
    assert ends == [0]


def test_the_kernel_ends_a_training_before_the_server(tmp_path, monkeypatch, capsys):
    score = tmp_path / "oom_score_adj"
    monkeypatch.setattr(tether, "OOM_FILE", score)
    tether._offer_to_end()  # a system without it
    assert not score.exists()
    score.write_text("0")
    tether._offer_to_end()
    assert 0 < int(score.read_text()) <= 1_000
    score.unlink()
    score.mkdir()
    tether._offer_to_end()
    assert "the server may be ended first" in capsys.readouterr().err


def test_the_options_of_a_server_are_its_limits():
    for command in (cli.studio, cli.serve):
        given = [inspect.signature(command).parameters[f"train_{name}"].default
                 for name in ("minutes", "megapixels", "user_gb", "gb")]  # fmt: skip
        assert fine_tuning_limits(*given) == FineTuningLimits()
    assert fine_tuning_limits(1.5, 0.25, 1, 2) == FineTuningLimits(
        minutes=1.5, batch_pixels=512**2, user_bytes=limits.GB, all_bytes=2 * limits.GB
    )
    for wrong in (float("nan"), float("inf"), 0.0):
        with pytest.raises(ValueError, match="--train-user-gb"):
            fine_tuning_limits(1, 1, wrong, 1)


def test_two_sets_of_images_with_captions_may_be_handed_in(tmp_path):
    kept = HandedIn()
    files = [tmp_path / f"{i}.{ending}" for i in range(MOST_FILES) for ending in ("png", "txt")]
    for file in files:
        file.write_text("x")
        kept.add(str(file), "ann")
    assert all(file.is_file() and kept.owns(str(file), "ann") for file in files)
    assert limits.UploadQuota().pictures >= 2 * 2 * MOST_FILES
