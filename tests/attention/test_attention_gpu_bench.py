"""`tessera bench attention-gpu`: its smoke test in the interpreter, and what it refuses."""

import importlib.util
import json

import pytest

from apps.benchmarks import attention_gpu
from apps.benchmarks.run import run
from apps.service.usage import UsageError

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_the_smoke_test_fills_all_tables(tmp_path, capsys):
    file = tmp_path / "report.json"
    report = run("attention-gpu", smoke=True, device="cpu", output=file)
    assert json.loads(file.read_text()) == report
    tables = report["tables"]
    assert list(tables) == ["checks", "dense", "sparse", "eight bits"]
    assert not report["left out"]
    most = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 5e-3}
    for row in tables["checks"]:
        assert row["relative error"] < (0.06 if "8" in row["form"] else most[row["dtype"]]), row["form"]
        assert row["largest error of the LSE"] < (0.1 if "8" in row["form"] else 1e-5)
    assert {row["map"] for row in tables["sparse"]} == {"neighborhood, tiles", "random, raster", "random, tiles"}
    best = tables["dense"][0]["ms"]
    for row in tables["sparse"]:
        assert row["speed-up"] == round(best / row["ms"], 2)
        assert 0 < row["order's share"] < 1
    errors = [row["error to the first row"] for row in tables["eight bits"]]
    assert errors[0] == 0 < errors[1] < errors[2] < 0.06
    assert "share" in capsys.readouterr().out


@needs_triton
def test_without_a_gpu_only_the_smoke_test_runs():
    with pytest.raises(UsageError, match="--smoke"):
        run("attention-gpu", device="cpu")


def test_triton_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("apps.benchmarks.on_gpu.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"tessera\[triton\]"):
        run("attention-gpu", device="cpu", smoke=True)


def test_time_that_is_over_is_told(monkeypatch):
    monkeypatch.setattr(attention_gpu, "SECONDS", -1.0)
    monkeypatch.setattr(attention_gpu, "check_rows", lambda scale: iter([{"form": "one"}, {"form": "two"}]))
    report = attention_gpu._run(attention_gpu._small(attention_gpu.torch.device("cpu")))
    assert report["tables"] == {"checks": [{"form": "one"}]}
    assert "'checks'" in report["left out"][0]
