"""The benchmarks of next-scale models: bytes of released sizes, and policies and searches on a tiny model."""

import json
from pathlib import Path

import pytest
import torch

from apps.benchmarks.next_scale import BUDGETS, COMPRESSING, _closed, memory_table
from apps.benchmarks.run import run
from pipelines import NextScaleClassToImagePipeline
from tests.models.tiny_next_scale import tokenizer, transformer
from tests.pipes.test_search import tiny_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tiny")
    NextScaleClassToImagePipeline(transformer(), tokenizer()).save_pretrained(place)
    (place / "scorer").mkdir()
    tiny_clip(place / "scorer")
    return place


def test_memory_of_released_sizes_keeps_its_promises() -> None:
    rows = {(row["model"], row["policy"]): row for row in memory_table()}
    models = {model for model, _ in rows}
    assert {"VAR-d16", "VAR-d36", "Infinity-2B", "Infinity-8B"} <= models
    for model in models:
        full = rows[model, "full"]
        assert full["peak / released kept"] <= 0.42
        assert full["stored / history"] == 1.0
        assert rows[model, "full int8"]["stored MiB"] < 0.54 * full["stored MiB"]  # steps and means count
        assert rows[model, "snapkv"]["stored / history"] <= 0.102
    for model in ("Infinity-2B", "Infinity-8B"):
        assert rows[model, "scalekv"]["stored / history"] <= 0.102
        assert rows[model, "scalekv"]["peak / released kept"] <= 0.25
    assert ("VAR-d16", "scalekv") not in rows  # there is no table for it


def test_policies_are_compared_on_a_model(folder: Path, capsys) -> None:
    report = run("kv", model=str(folder), smoke=True, json_output=True)
    assert json.loads(capsys.readouterr().out) == report
    rows = report["tables"]["quality"]
    assert [(row["policy"], row["budget"]) for row in rows] == [
        ("full", 1.0),
        *((policy, budget) for budget in BUDGETS for policy in COMPRESSING),
        ("int8", 1.0),
    ]
    assert all(0 < row["psnr"] <= 60 for row in rows[1:])
    assert rows[-1]["psnr"] > min(row["psnr"] for row in rows[1:-1])
    assert {row["recall"] for row in rows} == {None}  # classes are not stickers


def test_searches_are_compared_at_equal_cost(folder: Path, capsys) -> None:
    report = run("search", model=str(folder), smoke=True)
    methods = ["single", "tts", "best_of", "tts", "best_of", "tts", "judge's ceiling"]
    assert set(report["tables"]) == {"search, as the model generates"}, "classes are drawn in one way"
    for rows in report["tables"].values():
        assert [row["method"] for row in rows] == methods
        assert [row["cost"] for row in rows if row["method"] == "best_of"] == [2.0, 4.0]
        for row, wanted in zip((rows[1], rows[3], rows[5]), (1.2, 2.0, 4.0), strict=True):
            assert 0.8 * wanted < row["cost"] <= wanted + 1e-3
    assert "ceiling" in capsys.readouterr().out


def test_shortcuts_spend_less_than_the_exact_run(folder: Path) -> None:
    rows = run("shortcuts", model=str(folder), smoke=True)["tables"]
    ((title, rows),) = rows.items()
    assert "share of exact" in title
    shares = {row["setting"]: row["tokens"] for row in rows}
    assert shares["exact"] == 1.0
    assert shares["last two unguided"] < shares["last scale unguided"] < 1.0
    assert shares["last skipped, one unguided"] < shares["last scale skipped"] < 1.0
    assert all(row["psnr"] < 60 for row in rows[1:])


def test_other_models_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="name the model"):
        run("search", smoke=True)
    with pytest.raises(ValueError, match="needs a next-scale pipeline"):
        run("kv", model="stickers", smoke=True)


def test_the_gap_that_a_search_closes_and_its_error() -> None:
    single = torch.tensor([1.0] * 800 + [0.0] * 200)
    found = _closed(torch.tensor([1.0] * 900 + [0.0] * 100), single, ceiling=1.0)
    assert (found["recall"], found["of the gap"]) == (0.9, 0.5)
    assert found["+-"] == pytest.approx((0.5 * 0.5 / 200) ** 0.5, rel=0.1), "half of 200 wrong ones, each yes or no"
    assert _closed(single, single, 1.0) == {"recall": 0.8, "of the gap": None, "+-": None}
    assert _closed(single, single, 0.8)["of the gap"] is None
    assert _closed(None, None, None)["recall"] is None
