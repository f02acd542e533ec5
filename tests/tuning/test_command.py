"""`tessera tune` from the command line to a file that speed_up reads."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from apps import cli
from pipelines import load_pipeline, speed_up
from pipelines.tuning.record import TuningRecord
from tests.architecture.test_command_line import HEAVY, ROOT
from tests.pipes.tiny import tiny_text_to_image_pipeline
from tests.tuning.test_tuner import offer_few


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_text_to_image_pipeline().save_pretrained(path)
    return path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["tune", *arguments])
    return int(leaving.value.code or 0)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from apps.cli import main\n"
        "try:\n    main(['tune', '--help'])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--quality" in done.stdout


def test_a_model_is_tuned_and_its_file_is_a_profile(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipelines.tuning.tuner.offer", partial(offer_few, {"step_cache"}))
    monkeypatch.setattr("pipelines.tuning.tuner.try_solvers", lambda *_: [])
    prompts, file = tmp_path / "prompts.txt", tmp_path / "tuned.json"
    prompts.write_text("# two of them\na cat\n\na red apple\n")
    given = ["--prompts", str(prompts), "--output", str(file), "--steps", "6", "--minutes", "2", "--dtype", "float32"]
    assert run(str(folder), "--quality", "psnr>=5", *given, "--json") == 0
    told = capsys.readouterr()
    shown = json.loads(told.out)
    assert "psnr>=5" in shown["profiles"]
    assert shown["file"] == str(file)
    assert "verify" in told.err
    record = TuningRecord.load(file)
    assert (record.learned, record.held_out) == (["a cat"], ["a red apple"])
    assert record.conditions.steps == 6
    pipe = load_pipeline(str(folder))
    with speed_up(pipe, profile=str(file)) as handle:
        assert handle.config.to_dict() == {"version": 1, **shown["profiles"]["psnr>=5"]["parts"]}

    known = [one for one in record.measurements if one.purpose == "single"]
    assert run(str(folder), "--quality", "psnr>=99", *given) == 1
    told = capsys.readouterr()
    assert "no setting that was verified in the time reaches psnr>=99" in told.err
    assert "settings that no other dominates" in told.out
    again = [one for one in TuningRecord.load(file).measurements if one.purpose == "single"]
    assert again == known, "tables were measured anew"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quality", "good"], "psnr>=30"),
        (["--memory", "lots"], "8GB"),
        (["--minutes", "0"], "minutes"),
    ],
)
def test_wrong_usage_leaves_with_2(
    folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(folder), *arguments) == 2
    assert said in capsys.readouterr().err


def test_a_file_with_one_prompt_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "one.txt"
    file.write_text("a cat\n")
    assert run(str(folder), "--prompts", str(file)) == 2
    assert "at least 2" in capsys.readouterr().err
