"""README's ratios of times are the ranges over all runs that the result files hold."""

import json

import pytest

from tests.architecture.sources import ROOT


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def ranges(name: str) -> dict[str, tuple[float, float]]:
    report = json.loads((ROOT / "docs/results" / f"{name}.json").read_text(encoding="utf-8"))
    assert len(report["runs"]) >= 3
    assert all(found["runs"] == len(report["runs"]) for found in report["ranges"])
    return {found["of"]: (found["from"], found["to"]) for found in report["ranges"]}


def test_the_share_of_the_released_code(readme: str) -> None:
    found = ranges("released")
    names = ("ours, float32", "ours, float32, no guidance", "ours, bfloat16", "ours, bfloat16, no guidance")
    row = " | ".join(f"{found[name][0]:.2f} to {found[name][1]:.2f}" for name in names)
    assert f"| of the released code's time | {row} |" in readme


def test_the_share_of_torch(readme: str) -> None:
    found = ranges("costs").values()
    low, high = min(one[0] for one in found), max(one[1] for one in found)
    assert f"a layer then takes {low:.2f} to {high:.2f} of torch's" in " ".join(readme.split())


def test_the_time_that_a_step_cache_saves(readme: str) -> None:
    ((low, high),) = ranges("cache/time").values()
    assert f"{100 * low:.0f} to {100 * high:.0f} % is saved in time" in " ".join(readme.split())
