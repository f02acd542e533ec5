"""The tunings that built-in models ship: of these very weights, small, without a dominated point, usable by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines import load_pipeline, speed_up
from pipelines.acceleration import AccelerationConfig
from pipelines.tuning.front import dominates
from pipelines.tuning.profiles import NAMED_GOALS
from pipelines.tuning.record import TUNING_FILE, TuningRecord
from tests.conftest import ROOT

FILES = sorted((ROOT / "pipelines" / "pretrained").glob(f"*/{TUNING_FILE}"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_a_shipped_tuning_is_small_and_keeps_its_promises(file: Path) -> None:
    assert file.stat().st_size < 40_000
    record = TuningRecord.load(file)
    assert record.profiles
    assert not set(map(str, record.learned)) & set(map(str, record.held_out))
    for name, choice in record.profiles.items():
        goal = NAMED_GOALS[name]
        assert choice.is_verified
        assert goal.threshold is not None
        assert choice.quality["psnr"] >= goal.threshold
        config = AccelerationConfig.from_dict(choice.parts)
        for named in config.files().values():
            assert Path(named).name == named, "a shipped setting names no file of another machine"
            assert (file.parent / named).is_file()
    gains: dict[str, Any] = {name: choice.gain for name, choice in record.profiles.items()}
    assert min(gains.values()) > 1
    points = [(-(one.gain or 0), -one.quality["psnr"], one.memory or 0) for one in record.front]
    assert not any(dominates(first, second) for first in points for second in points)
    assert str(Path.home()) not in json.dumps(record.baseline)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_a_name_finds_it_for_the_model_as_it_is(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no tuning of this machine's user
    pipe = load_pipeline(file.parent.name)
    record = TuningRecord.load(file)
    with speed_up(pipe, profile=next(iter(record.profiles))) as handle:
        report = handle.report()
    assert report.origin == str(file), "it is of other weights: tune the model anew"
    assert report.measured["all"] > 1
