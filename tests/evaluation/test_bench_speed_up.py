"""`tessera bench speed-up`: the tuner's setting beside others; what fails is told in its row."""

import pytest

from apps.benchmarks.run import run
from apps.benchmarks.speed_up import best_of
from apps.benchmarks.speed_up_shapes import dit_pipeline


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


def test_predictions_stand_beside_what_was_measured(tmp_path) -> None:
    report = run("speed-up-shapes", smoke=True, output=tmp_path / "shapes.json")
    (rows,) = report["tables"].values()
    assert report["steps"] == 4
    assert report["plain"]["seconds"] >= 0
    for row in rows:  # none where nothing is faster on so small a network, which is a matter of moments
        assert row["chosen for"] in ("", "psnr>=30", "psnr>=24")
        assert row["predicted time, % of measured"] == pytest.approx(100 * row["gain"] / row["predicted"], abs=1.5)
        assert row["PSNR, dB"] >= 24


def test_blocks_of_the_random_network_act() -> None:
    pipe = dit_pipeline("DiT-S/4", 32, (8, 16))
    assert all(weight.any() for name, weight in pipe.transformer.named_parameters() if name.endswith("weight"))
