"""`tessera bench speed-up`: the tuner's setting beside others; what fails is told in its row."""

import pytest

from apps.benchmarks.run import run
from apps.benchmarks.speed_up import best_of


def test_the_fastest_of_each_kind_that_is_near_enough() -> None:
    rows = [
        {"shape": "a: one", "gain": 2.0, "PSNR, dB": 31.0},
        {"shape": "a: two", "gain": 3.0, "PSNR, dB": 29.9},
        {"shape": "a: three", "gain": 2.5, "PSNR, dB": 30.0},
        {"shape": "b: four", "failed": "ValueError: no"},
        {"shape": "c: five", "gain": 1.5, "PSNR, dB": 60.0},
    ]
    assert [row["shape"] for row in best_of(rows)] == ["best a: three", "best c: five"]


@pytest.mark.slow
def test_the_smoke_test_compares_all_kinds(tmp_path) -> None:
    report = run("speed-up", model="stickers", smoke=True, output=tmp_path / "speed.json")
    rows = report["tables"]["all"]
    ours = rows[0]
    assert ours["shape"].startswith("speed_up: balanced (")
    assert ours["PSNR, dB"] > 24
    kinds = {row["shape"].partition(":")[0] for row in rows}
    assert {"speed_up", "one technique", "fewer steps", "by hand"} <= kinds
    assert all("failed" in row or row["gain"] > 0 for row in rows)
    assert report["steps"] == 8
    assert (tmp_path / "speed.json").is_file()
