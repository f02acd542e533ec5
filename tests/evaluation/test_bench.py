"""The benchmarks run on the tiny pipeline and say what they measured."""

import json

import pytest

from apps.bench import run
from tests.pipes.tiny import tiny_text_to_image_pipeline


def test_painting_report(tmp_path, capsys):
    tiny_text_to_image_pipeline().save_pretrained(tmp_path / "tiny")
    report = run("paint", model=str(tmp_path / "tiny"), output=tmp_path / "report.json", smoke=True, json_output=True)
    assert json.loads(capsys.readouterr().out) == report
    assert json.loads((tmp_path / "report.json").read_text()) == report
    seconds = report["seconds"]
    assert seconds["picture"] > seconds["forward pass"] > 0
    assert report["steps"] == 28
    assert report["gflops_per_pass"] >= 0
    assert report["machine"]["dtype"] == "float32"


@pytest.mark.slow  # four fresh imports of diffusers
def test_import_report():
    report = run("start", smoke=True)
    assert report["seconds"]["diffusers + pipelines"] > 0
    assert 0.2 < report["ratio"] < 5


def test_unknown_benchmark_lists_the_known():
    with pytest.raises(ValueError, match="choose one of paint, start, cache, cache-transfer, kv, shortcuts, search"):
        run("nothing")
