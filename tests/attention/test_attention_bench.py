"""The benchmark of attention runs, and reports ratios under names that runs of other days have too."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.benchmarks import attention, attention_plan
from apps.benchmarks.run import run
from apps.benchmarks.runs import has_ratios, ranges
from dit.attention.kernels import products
from dit.attention.search import Survey


def test_a_short_run_measures_all_tables() -> None:
    report = run("attention", smoke=True, json_output=True)
    tables = report["tables"]
    assert set(tables) == {"dense attention", "sparse attention", "exact pairs", "choosing the pairs"}
    dtypes = (torch.float32, torch.bfloat16)
    for row, dtype, most in zip(tables["dense attention"], dtypes, (5, 1.5), strict=True):
        assert ("gain" in row) == products.has_fast_products(dtype), "only what would be used is compared"
        if "gain" in row:
            assert row["gain"] > 0
            assert 0.5 < row["error / torch's"] < most
    sparse = tables["sparse attention"]
    assert {row["density"] for row in sparse} == {0.25, 0.5}  # a block of four is the least
    assert all(row["of ideal"] > 0 for row in sparse)
    assert all(row["pairs"] < row["density"] for row in tables["exact pairs"])
    assert has_ratios(report)
    found = ranges([report, report])
    assert {row["ratio"] for row in found} >= {"gain", "of ideal", "beside the best dense"}
    assert all(row["runs"] == 2 for row in found)


def test_maps_deliver_what_they_say() -> None:
    for shared in (True, False):
        block_map = attention.random_map(4096, 0.35, shared)
        assert abs(block_map.density() - 0.35) < 0.02
        assert block_map.visits.shape[1] == (1 if shared else attention.HEADS)
        assert torch.equal(block_map.visits.sum(-1).unique(), torch.tensor([11]))


def test_a_searched_plan_is_measured_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    surveys: dict[str, Survey] = {}
    measure = attention_plan._survey

    def once(pipe: Any, prompts: Sequence[str], arguments: dict[str, Any]) -> Survey:
        asked = repr((prompts, arguments))
        surveys[asked] = surveys.get(asked) or measure(pipe, prompts, arguments)
        return surveys[asked]

    monkeypatch.setattr(attention_plan, "_survey", once)  # two tables ask for the same one
    report = run("attention-plan", smoke=True, prompts=2, output=tmp_path / "plan.json", json_output=True)
    assert set(report["tables"]) == {"candidates of one density", "searched", "end to end", "judged"}
    assert {row["corrections"] for row in report["tables"]["searched"]} == {"none", "none or pooled_tail", "all"}
    end = report["tables"]["end to end"][0]
    assert end["tokens"] == 180
    assert 0.15 < end["computed"] < 0.8  # four steps: every range of noise levels begins with a refresh
    assert report["tables"]["judged"][0]["clips"] == 2
    assert len(surveys) == 1
    kept = json.loads((tmp_path / "plan.json").read_text())
    assert {row["ratio"] for row in kept["ranges"]} == {"gain"}
