"""`tessera attention simulate`: what a pattern can save at most on a grid, and which tiles suit it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from apps.service.usage import UsageError, checking
from dit.attention.grid import TokenGrid
from dit.attention.simulator import Simulation, simulate, suggest


def run(name: str, *, grid: str, params: Sequence[str] = (), text: int = 0, json_output: bool = False) -> None:
    """Print the bounds of a pattern.

    Args:
        name: of the pattern.
        grid: "TxHxW" or "HxW".
        params: "name=value" each.
        text: text tokens in the same sequence.
        json_output: print one JSON object instead of a table.

    Raises:
        UsageError: an unknown pattern, grid or parameter.
    """
    with checking():
        tokens = read_grid(grid, text)
        asked = simulate(name, tokens, **dict(read_param(one) for one in params))
        better = suggest(asked, tokens)
    if json_output:
        report = {
            "grid": tokens.shape,
            "tokens": tokens.length,
            **_values(asked),
            "tiles": [_values(one) for one in better],
        }
        Console(soft_wrap=True).print_json(json.dumps(report))
    else:
        _show(asked, better, tokens, Console())


def read_grid(words: str, text: int = 0) -> TokenGrid:
    """Return the grid that a word such as 30x48x80 or 64x64 names, with text behind it.

    Raises:
        UsageError: another form.
    """
    sides = words.lower().split("x")
    if len(sides) not in (2, 3) or not all(side.isdecimal() for side in sides):
        raise UsageError(f"--grid is {words!r}; give TxHxW such as 30x48x80, or HxW for images")
    t, h, w = [1] * (3 - len(sides)) + [int(side) for side in sides]
    return TokenGrid(t, h, w, text, "last" if text else "none")


def read_param(words: str) -> tuple[str, Any]:
    """Return name and value of a parameter such as window=18,24,24, sink=true or axes=hwt.

    Raises:
        UsageError: no "=".
    """
    name, equals, value = words.partition("=")
    if not equals or not name:
        raise UsageError(f"--set is {words!r}; give NAME=VALUE, such as window=18,24,24")
    parts = [_read_value(part.strip()) for part in value.split(",")]
    return name.strip().replace("-", "_"), parts[0] if len(parts) == 1 else tuple(parts)


def _read_value(word: str) -> Any:
    named = {"true": True, "false": False, "none": None}
    if word.lower() in named:
        return named[word.lower()]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def _values(one: Simulation) -> dict[str, Any]:
    return {**asdict(one), "rule_bound": one.rule_bound, "tile_bound": one.tile_bound}


def _show(asked: Simulation, better: Sequence[Simulation], grid: TokenGrid, console: Console) -> None:
    shape = " x ".join(str(side) for side in grid.shape)
    title = f"{asked.pattern} on {shape} = {grid.visual_length} visual tokens"
    table = Table(title=title + (f" and {grid.text_length} of text" if grid.text_length else ""), box=box.SIMPLE)
    for column in ("", "rule", "at most", "visited", "at most", ""):
        table.add_column(column, justify="right")
    for one, label in ((asked, "as asked"), *((one, _cut(one)) for one in better)):
        table.add_row(
            label,
            f"{one.rule_density:.2%}",
            f"{one.rule_bound:.2f}x",
            f"{one.visited_density:.2%}",
            f"{one.tile_bound:.2f}x",
            "no partial block" if one.block_sparse else "",
        )
    console.print(table)
    if better and max(one.tile_bound for one in better) > asked.tile_bound * 1.001:
        best = max(better, key=lambda one: one.tile_bound)
        console.print(f"{_cut(best)} visits fewer pairs: {best.tile_bound:.2f}x instead of {asked.tile_bound:.2f}x")


def _cut(one: Simulation) -> str:
    tile = one.params.get("tile")
    return f"tile={','.join(str(side) for side in tile)}" if tile else f"block={one.params['block']}"
