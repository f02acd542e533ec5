"""Costs of attention decide between a block map and dense attention, and are kept by machine."""

import json
from pathlib import Path

import pytest
import torch

from apps.cli import main
from dit.attention import TokenGrid, costs, pattern
from dit.attention.block_map import make_block_map
from dit.attention.costs import AttentionCosts, attention_costs, measure_attention_costs, pays
from dit.attention.layout import raster_layout

COSTS = AttentionCosts("made up", {"native float32": (1.0, 2.0), "sparse float32": (2.0, 4.0)}, 0.0)


def share(visited: int) -> tuple[torch.Tensor, object]:
    """Return a query of 1024 tokens and a map of `visited` of 8 blocks."""
    index = torch.arange(8)
    layout = raster_layout(TokenGrid(1, 32, 32), 128)
    return torch.empty(1, 1024, 2, 64), make_block_map(layout, (index[:, None] - index) % 8 < visited)


def test_sparse_pays_where_it_is_predicted_to_be_faster() -> None:
    assert pays(*share(3), COSTS)  # 2 x 3/8 of the dense time
    assert not pays(*share(4), COSTS)  # the same time
    busy = AttentionCosts("made up", COSTS.pair, 40.0, 70.0)  # 8 blocks of 40 us beside 1 ms of dense attention
    assert not pays(*share(3), busy)
    assert pays(*share(1), busy)
    assert not pays(*share(1), busy, online=True)  # 70 us more for each block


def test_widths_between_are_interpolated() -> None:
    assert COSTS.of_pair("native", torch.float32, 96) == pytest.approx(1.5e-9)
    assert COSTS.of_pair("native", torch.bfloat16, 96) is None
    query, block_map = share(8)
    assert COSTS.sparse_seconds(query, block_map) == pytest.approx(2 * 1024**2 * 2e-9)
    assert COSTS.dense_seconds(query, 1024) == pytest.approx(2 * 1024**2 * 1e-9)


def test_measured_costs_are_kept_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert attention_costs().machine == "typical"
    threads = torch.get_num_threads()
    measured = measure_attention_costs(repeats=1)
    assert torch.get_num_threads() == threads
    assert {"native float32", "sparse float32", "sparse bfloat16"} <= set(measured.pair)
    assert all(narrow > 0 for narrow, _ in measured.pair.values())
    measured.save()
    assert attention_costs() == measured
    monkeypatch.setattr(costs, "_machine", lambda: "another")
    assert attention_costs().machine == "typical"


def test_the_command_line_keeps_what_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="0"):
        main(["attention", "costs", "--repeats", "1", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert Path(said["file"]).is_relative_to(tmp_path)
    assert attention_costs().pair["sparse bfloat16"] == pytest.approx(said["pair"]["sparse bfloat16"])


def test_every_map_of_a_short_sequence_is_left_to_dense_attention() -> None:
    grid = TokenGrid(1, 16, 16)
    query = torch.empty(1, 256, 2, 64)
    assert not pays(query, pattern("dense", grid))
