"""`tessera bench quantization-gpu`: its smoke test in the interpreter, and what it refuses."""

import importlib.util
import json

import pytest

from apps.benchmarks import quantization_gpu
from apps.benchmarks.run import run
from apps.service.usage import UsageError

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_the_smoke_test_fills_the_tables(tmp_path, capsys):
    file = tmp_path / "report.json"
    report = run("quantization-gpu", smoke=True, device="cpu", output=file)
    assert json.loads(file.read_text()) == report
    tables = report["tables"]
    assert list(tables) == ["checks", "linear layers", "blocks"]
    assert not report["left out"]
    assert all(row["holds"] for row in tables["checks"]), tables["checks"]
    assert len({row["kernel"] for row in tables["checks"]}) == 8
    rows = {row["layer"]: row for row in tables["linear layers"]}
    assert {"bfloat16", "float8", "int8", "W4A8 g64"} <= set(rows)
    assert rows["float8"]["error"] < 0.06
    assert rows["int8"]["error"] < rows["W4A8 g64"]["error"] * 2 < 0.03
    assert rows["int8"]["bar"] == 1.4
    assert rows["int8"]["holds"] == (rows["int8"]["speed-up"] >= 1.4)
    errors = {(row["block"], row["layers"]): row.get("error") for row in tables["blocks"]}
    for block in ("DiT-XL", "FLUX"):
        assert errors[block, "bfloat16"] is None
        assert 0 < errors[block, "int8"] < errors[block, "W4A8 g64"] < 0.3
    assert "speed-up" in capsys.readouterr().out


@needs_triton
def test_without_a_gpu_only_the_smoke_test_runs():
    with pytest.raises(UsageError, match="--smoke"):
        run("quantization-gpu", device="cpu")


def test_triton_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("apps.benchmarks.on_gpu.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"tessera\[triton\]"):
        run("quantization-gpu", device="cpu", smoke=True)


def test_time_that_is_over_is_told(monkeypatch):
    monkeypatch.setattr(quantization_gpu, "SECONDS", -1.0)
    monkeypatch.setattr(quantization_gpu, "check_rows", lambda sizes: iter([{"kernel": "one"}, {"kernel": "two"}]))
    report = quantization_gpu._run(quantization_gpu._small(quantization_gpu.torch.device("cpu")))
    assert report["tables"] == {"checks": [{"kernel": "one"}]}
    assert "'checks'" in report["left out"][0]


def test_made_up_layers_have_what_the_scheme_asks_for():
    linear = quantization_gpu.nn.Linear(64, 32)
    layer = quantization_gpu.made_layer(linear, quantization_gpu.SVDQUANT)
    assert (layer.scheme.weights, layer.scheme.rank, layer.scheme.raw_branch) == ("int4_group", 32, True)
    assert layer.stored["low_rank_up"].shape == (32, 32)
    assert layer.stored["input_balance"].unique().tolist() == [1.0]


def test_what_cannot_run_says_why():
    def fails():
        raise RuntimeError("no such product\nsecond line")

    sizes = quantization_gpu._small(quantization_gpu.torch.device("cpu"))
    assert quantization_gpu.gain_of(sizes, fails, 1.0) == {"why not": "no such product"}
