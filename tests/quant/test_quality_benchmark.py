"""`tessera bench quantization-quality` runs, keeps models beside each other, and its rows add up."""

from pathlib import Path

import pytest
import torch

from apps.benchmarks.quantization_quality import _row, _share, likeness
from apps.benchmarks.run import run


@pytest.mark.slow
def test_it_runs_and_keeps_models_beside_each_other(tmp_path: Path) -> None:
    threads, output = torch.get_num_threads(), tmp_path / "quality.json"
    report = run("quantization-quality", model="stickers", smoke=True, output=output)
    torch.set_num_threads(threads)
    assert torch.is_grad_enabled(), "as it was"
    rows = {row["network"]: row for row in report["tables"]["quality"]}
    assert rows["bfloat16"]["points"] == 0.0
    assert rows["ours viditq"]["PSNR, dB"] > 40
    assert rows["plain rounding"]["ours ahead in, %"] == 100.0
    cached = {row["network"]: row for row in report["tables"]["with a step cache"]}
    assert cached["viditq w8a8"]["cost"] == cached["bfloat16"]["cost"], "the same steps are computed"
    assert cached["viditq w8a8"]["lost, dB"] < 1.0


def test_paired_answers_add_up() -> None:
    row = _row("one", "w8a8", [True, False, True, True], [True, True, False, False], [30.0, 40.0, 50.0, 60.0])
    assert (row["gained"], row["lost"], row["points"]) == (2, 1, 25.0)
    assert (row["PSNR, dB"], row["median"], row["least"]) == (45.0, 45.0, 30.0)


def test_equal_samples_have_a_finite_likeness_and_shares_are_of_the_excess() -> None:
    same = torch.rand(2, 3, 4, 4)
    assert likeness(same, same) == [100.0, 100.0]
    assert _share(now=1.25, before=1.5, reference=1.0) == pytest.approx(50.0)
