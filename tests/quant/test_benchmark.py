"""`tessera bench quantization` runs, and its rows say what they are about."""

import json
from pathlib import Path

import torch

from apps.benchmarks.run import run


def test_the_benchmark_of_quantization_runs(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    report = run("quantization", smoke=True, output=tmp_path / "report.json")
    torch.set_num_threads(threads)
    tables = report["tables"]
    layers = {row["shape"].split(": ")[1]: row for row in tables["linear layers"]}
    assert layers["torch bfloat16"]["gain"] == 1.0
    assert layers["ours W8A8 plain"]["error"] < 0.02 < layers["ours W4A8 g64"]["error"] < 0.1
    block = {row["shape"].split(": ")[1]: row for row in tables["block of DiT-XL"]}
    assert block["torch float32"]["error"] == 0.0
    assert block["ours W8A8 viditq"]["error"] < 0.03
    sizes = {row["format"]: row["times smaller"] for row in tables["size"]}
    assert sizes["viditq w4a8"] > sizes["viditq w8a8"] > 1.8
    assert json.loads((tmp_path / "report.json").read_text())["benchmark"] == "quantization"
