"""The simulator's bounds are those of Generalized Neighborhood Attention's paper; its command prints them."""

import json
from typing import Any

import pytest

from apps import cli
from apps.commands.attention_simulate import read_grid, read_param
from apps.service.usage import UsageError
from dit.attention import TokenGrid
from dit.attention.simulator import simulate, suggest

HUNYUAN = TokenGrid(30, 48, 80)


@pytest.mark.parametrize(
    ("grid", "params", "rule", "tiles"),
    [
        (HUNYUAN, {"window": (18, 24, 24), "tile": (2, 8, 8)}, 11.11, 5.44),
        (HUNYUAN, {"window": (18, 24, 24), "stride": (16, 8, 8), "tile": (2, 8, 8)}, 11.11, 11.11),
        (TokenGrid(1, 256, 256), {"window": (1, 80, 80), "tile": (1, 16, 8)}, 10.24, 7.51),
        (TokenGrid(1, 256, 256), {"window": (1, 80, 80), "stride": (1, 16, 16), "tile": (1, 16, 8)}, 10.24, 10.24),
        (TokenGrid(1, 64, 64), {"window": (1, 32, 32), "stride": (1, 16, 16), "tile": (1, 16, 8)}, 4.0, 3.2),
    ],
)
def test_bounds_of_generalized_neighborhood_attention(
    grid: TokenGrid, params: dict[str, Any], rule: float, tiles: float
) -> None:
    found = simulate("neighborhood", grid, **params)
    assert found.rule_bound == pytest.approx(rule, abs=0.006)
    assert found.tile_bound == pytest.approx(tiles, abs=0.006)
    assert found.block_sparse == (rule == tiles)


def test_the_best_tiles_of_a_rule_are_found() -> None:
    asked = simulate("neighborhood", TokenGrid(1, 64, 64), window=(1, 32, 32), stride=(1, 16, 16))
    assert asked.tile_bound == pytest.approx(3.2)
    best = suggest(asked, TokenGrid(1, 64, 64), tokens=(64, 128))
    assert [one.params["tile"] for one in best][:1] == [(1, 8, 8)]
    assert best[0].tile_bound == pytest.approx(4.0)
    assert best[0].block_sparse
    assert best[1].tile_bound == pytest.approx(3.2)  # no tile of 128 fits better


def test_nothing_is_suggested_where_blocks_are_part_of_the_rule() -> None:
    assert suggest(simulate("sliding_tile", HUNYUAN), HUNYUAN) == []
    assert suggest(simulate("radial", HUNYUAN), HUNYUAN) == []
    grid = TokenGrid(13, 30, 45, 226, "first")
    blocks = suggest(simulate("in_frame_band", grid), grid)
    assert [one.params["block"] for one in blocks] == [64, 128, 256]
    assert blocks[0].tile_bound > blocks[1].tile_bound > blocks[2].tile_bound


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["attention", "simulate", *arguments])
    said = capsys.readouterr()
    return int(leaving.value.code or 0), said.out, said.err


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["neighborhood", "--grid", "30x48x80", "--set", "window=18,24,24", "--set", "tile=2,8,8"]
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "11.11x" in out
    assert "tile=4,4,4 visits fewer pairs: 7.90x instead of 5.44x" in out
    code, out, _ = run(capsys, *arguments, "--set", "stride=16,8,8", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["tile_bound"] == pytest.approx(100 / 9)
    assert report["block_sparse"]
    assert report["params"]["stride"] == [16, 8, 8]
    assert {len(one["params"]["tile"]) for one in report["tiles"]} == {3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "--grid", "8x8"], "there is no attention pattern 'nothing'"),
        (["radial", "--grid", "8"], "--grid is '8'"),
        (["radial", "--grid", "8x8", "--set", "decay"], "--set is 'decay'"),
        (["radial", "--grid", "8x8", "--set", "window=2"], "takes no window; it takes decay"),
    ],
)
def test_wrong_usage_says_what_is_accepted(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in err


def test_grids_and_parameters_are_read() -> None:
    assert read_grid("30x48X80", 7) == TokenGrid(30, 48, 80, 7, "last")
    assert read_grid("64x32") == TokenGrid(1, 64, 32)
    assert read_param("window=18, 24,24") == ("window", (18, 24, 24))
    assert read_param("key-tile=none") == ("key_tile", None)
    assert read_param("sink=true") == ("sink", True)
    assert read_param("decay=.5") == ("decay", 0.5)
    assert read_param("axes=hwt,thw") == ("axes", ("hwt", "thw"))
    with pytest.raises(UsageError):
        read_param("=3")
