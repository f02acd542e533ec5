"""Simulator: what a pattern can save at most, before anything is computed.

Two bounds, as NATTEN's simulator has them (Generalized Neighborhood Attention, arXiv 2504.16922): the pairs of tokens
that the rule leaves, and the pairs in the blocks that have to be visited for them. Where both are equal, the pattern is
perfectly block-sparse. The second depends on the tiles, so better ones can be suggested.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dit.attention.grid import TokenGrid
from dit.attention.patterns import pattern, pattern_info
from dit.attention.patterns.neighborhood import NeighborhoodRule, axis_parts, table_counts

BLOCK_TOKENS = (64, 128, 256)
"""Tokens of the blocks that are suggested."""


@dataclass(frozen=True)
class Simulation:
    """The bounds of a pattern with parameters on a grid.

    Args:
        pattern: its name.
        params: its parameters.
        blocks: (n, m), blocks of queries and keys.
        rule_density: share of pairs of tokens that the rule asks for.
        visited_density: share of pairs in visited blocks.
        block_sparse: no visited block is partial.
    """

    pattern: str
    params: dict[str, Any]
    blocks: tuple[int, int]
    rule_density: float
    visited_density: float
    block_sparse: bool

    @property
    def rule_bound(self) -> float:
        """How many times fewer products the rule needs than dense attention."""
        return 1 / self.rule_density

    @property
    def tile_bound(self) -> float:
        """How many times fewer products are computed block by block: the most that attention can be faster."""
        return 1 / self.visited_density


def simulate(name: str, grid: TokenGrid, **params: Any) -> Simulation:
    """Compute the bounds of a static pattern.

    Args:
        name: of the pattern.
        grid: the tokens.
        **params: of the pattern.

    Raises:
        ValueError: an unknown pattern or parameter, or a pattern that looks at queries and keys.
    """
    if pattern_info(name).online:
        raise ValueError(
            f"pattern {name!r} chooses by queries and keys, so it has no density before a call; the report of an "
            "attached plan has what was visited"
        )
    made = pattern(name, grid, **params)
    return Simulation(
        name,
        dict(params),
        (made.queries.count, made.keys.count),
        made.token_density(),
        made.density(),
        made.asks_nowhere,
    )


def suggest(simulation: Simulation, grid: TokenGrid, tokens: Sequence[int] = BLOCK_TOKENS) -> list[Simulation]:
    """Find the tiles or blocks with the best bound for a rule, one of each size.

    Only the cut is changed, and what changes the rule by that is left out: a sliding tile attention with other tiles is
    another attention.

    Args:
        simulation: what is asked for.
        grid: the tokens.
        tokens: sizes of blocks to look for.

    Returns:
        The best of each size, by rising size; none where the blocks are part of the rule.
    """
    rule = pattern(simulation.pattern, grid, **simulation.params).rule
    rest = {name: value for name, value in simulation.params.items() if name not in ("tile", "key_tile", "block")}
    if rule is None:
        return []
    if isinstance(rule, NeighborhoodRule):
        found = [{"tile": tile} for tile in (_best_tile(rule, size) for size in tokens) if tile]
    else:
        found = [{"block": size} for size in tokens]
    best = [simulate(simulation.pattern, grid, **rest, **one) for one in found]
    return [one for one in best if abs(one.rule_density / simulation.rule_density - 1) < 1e-9]


def _best_tile(rule: NeighborhoodRule, tokens: int) -> tuple[int, int, int] | None:
    """Return the tile of so many tokens that visits the fewest pairs; None where no tile has so many.

    What is visited is a product over the axes too, so each side of each axis is looked at once.
    """
    visited = cache(
        lambda axis, side: _visited_on_axis(
            rule.tables[axis], axis_parts(rule.grid.shape[axis], side, rule.dilation[axis])
        )
    )
    return min(
        _tiles(rule.grid, tokens),
        key=lambda tile: math.prod(visited(axis, side) for axis, side in enumerate(tile)),
        default=None,
    )


def _visited_on_axis(table: Tensor, parts: Tensor) -> int:
    """Return the pairs of an axis that are visited in tiles: all of two tiles with any pair that the table allows."""
    sizes = torch.bincount(parts)  # (tiles,)
    visits = table_counts(table, parts, parts) > 0
    return int(sizes @ visits.long() @ sizes)


def _tiles(grid: TokenGrid, tokens: int) -> Iterator[tuple[int, int, int]]:
    """Yield the tiles of so many tokens whose sides are powers of two, and at most the next one from the axis on."""
    most = [1 << (size - 1).bit_length() for size in grid.shape]
    frames = 1
    while frames <= min(most[0], tokens):
        height = 1
        while height <= min(most[1], tokens // frames):
            width = tokens // frames // height
            if width <= most[2] and frames * height * width == tokens:
                yield frames, height, width
            height *= 2
        frames *= 2
