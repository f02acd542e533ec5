"""The command behind `docs/results/cache/coverage.json` tells pipelines in which a cache works from others."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.tiny import tiny_call, tiny_pipeline
from tests.step_cache import coverage
from tests.step_cache.pipelines import examine, examine_all
from tests.step_cache.test_unlisted import STEPS, Denoiser, Pipe


class Lost(Pipe):
    """From a step on its network receives timesteps that no scale explains."""

    first = STEPS

    def set_progress_bar_config(self, **_: Any) -> None:
        """As pipelines of diffusers have it."""

    def received(self, step: int, timestep: Tensor) -> Tensor:
        return torch.tensor([7e5]) if step >= self.first else super().received(step, timestep)


def lost(first: int) -> tuple[Lost, dict[str, Any]]:
    one = Lost(Denoiser())
    one.first = first
    return one, {"prompt": "a crab"}


def test_pipelines_in_which_all_regions_skip() -> None:
    found = examine(lambda: (tiny_pipeline("class_dit"), tiny_call("class_dit")))
    assert found["pipeline"] == found["blocks"] == "skips"
    assert set(found["steps"].values()) == {"CC.C.C"}


@pytest.mark.parametrize(
    ("first", "state", "steps", "reason"),
    [
        (STEPS, "skips", "CC.C.C", ""),
        (4, "skips in part", "CC.C", "2 calls: no step context"),
        (0, "inactive", None, "scale of timesteps is not known"),
    ],
)
def test_steps_that_are_not_found_are_in_the_report(first: int, state: str, steps: str | None, reason: str) -> None:
    found = examine(partial(lost, first))
    assert found["pipeline"] == state
    assert found["steps"] == ({} if steps is None else {"call_0": steps})
    assert reason in found.get("reason", "")
    assert found["blocks"].startswith("refused: "), "it has no blocks"


def test_the_worst_case_that_runs_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = [("Lost", partial(lost, STEPS)), ("Lost", partial(lost, 4)), ("Lost", "ImportError: no module")]
    monkeypatch.setattr("tests.step_cache.pipelines.cases", lambda folder: iter(given))
    monkeypatch.setattr("tests.step_cache.pipelines._class_of", lambda pipe: "Lost")
    lines: list[str] = []
    results = examine_all(tmp_path, lines.append)
    assert {name: found["pipeline"] for name, found in results.items()} == {"Lost": "skips in part"}
    assert len(lines) == 3


def test_the_command_refuses_what_cannot_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["coverage", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        coverage.read_arguments()
    assert f"{tmp_path} has no folder tests/pipelines" in capsys.readouterr().err
    (tmp_path / "tests" / "pipelines").mkdir(parents=True)
    monkeypatch.setattr(coverage, "REQUIRED", ("torch", "no_such_package"))
    with pytest.raises(SystemExit, match="2"):
        coverage.read_arguments()
    assert "pip install no_such_package" in capsys.readouterr().err
    monkeypatch.setattr(coverage, "REQUIRED", ("torch",))
    assert coverage.read_arguments().checkout == tmp_path


def test_readme_says_what_the_report_says() -> None:
    report = json.loads((coverage.ROOT / "docs/results/cache/coverage.json").read_text(encoding="utf-8"))
    states, whole = report["pipelines"], report["whole pipelines"]
    skip = states["skips"] + states.get("skips in part", 0)
    assert sum(states.values()) == len(whole)
    assert set(states) <= {"skips", "skips in part", "not built"}
    assert report["work"]["output"] == report["networks"] == len(report["results"])
    text = " ".join((coverage.ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"work in all {report['networks']} networks" in text
    assert f"what the blocks add in {report['work']['blocks']}. Of {len(whole)} whole pipelines" in text
    assert f"{skip} skip steps and {states['not built']} could not be built" in text
    assert f"{len(report['pipelines without a case'])} more pipelines have no case" in text
    assert all(found.get("reason") for found in whole.values() if found["pipeline"] != "skips")
