"""Block maps of a plan: those of static patterns are made once, those of online ones for each call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.choices import Choice, Plan, Sink, StaysDense
from dit.attention.corrections import StateEntry
from dit.attention.grid import TokenGrid
from dit.attention.inputs import Inputs
from dit.attention.merged_map import merge_heads
from dit.attention.patterns import pattern, pattern_info
from dit.attention.patterns.svg2 import ClusterState
from dit.runtime.hooks import AttachError

KEPT_MAPS = 64
"""Most block maps of static patterns that a plan keeps, and as many that are merged of several."""
SAME = 0.02
"""Densities of a pattern are told apart if they differ by more than this share."""


class MapCache:
    """Block maps of static patterns by choice, grid and device, the last `KEPT_MAPS` of them.

    Args:
        plan: whose guards and tensors the maps follow.

    Attributes:
        version: grows whenever a density is learned that differs from the one that was known.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.version = 0
        self._maps: OrderedDict[Any, BlockMap] = OrderedDict()
        self._merged: OrderedDict[Any, tuple[BlockMap, tuple[BlockMap, ...]]] = OrderedDict()
        self._densities: dict[tuple[Choice, TokenGrid], float] = {}

    def __len__(self) -> int:
        return len(self._maps)

    def get(
        self,
        choice: Choice,
        grid: TokenGrid,
        inputs: Inputs,
        keys: Tensor | None = None,
        entry: StateEntry | None = None,
        step: int = 0,
    ) -> BlockMap:
        """Return the map of a call; online patterns look at it anew.

        Args:
            choice: its pattern.
            grid: its tokens.
            inputs: the call.
            keys: bool, (B, M), False for keys that nobody may look at.
            entry: where patterns that start from the last step keep what they need.
            step: number of the step of the call, for patterns that change with it.

        Raises:
            AttachError: the pattern can't be had on this grid, and the plan is of nothing else.
            StaysDense: it can't, in a plan that was found on other texts or sizes.
        """
        info, device = pattern_info(choice.pattern), inputs.query.device
        if info.online:
            known = set(info.parameters) - set(choice.params)
            given: dict[str, Any] = {"query": inputs.query, "key": inputs.key}
            given |= {name: one for name, one in {"value": inputs.value, "key_mask": keys}.items() if name in known}
            if "state" in known:
                given["state"] = _clusters(entry)
            return self._make(choice, grid, **given).to(device)
        turn = step % info.period_of(grid, choice.params)
        key = (choice, grid, device, turn)
        if key not in self._maps:
            given = {"step": turn} if choice.follows_step else {}
            self._maps[key] = self._make(choice, grid, **given).to(device)
            while len(self._maps) > KEPT_MAPS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(key)
        return self._maps[key]

    def merged(self, maps: tuple[BlockMap, ...], heads: tuple[tuple[int, ...], ...], keep: bool) -> BlockMap:
        """Return one map of several, see `merge_heads`.

        Args:
            maps: of groups of heads.
            heads: of each map.
            keep: the maps come again, so that the merged one is worth keeping.
        """
        if not keep:
            return _merge(maps, heads)
        key = (tuple(map(id, maps)), heads)  # the entry holds the maps, so that no other gets their numbers
        if key not in self._merged:
            self._merged[key] = _merge(maps, heads), maps
            while len(self._merged) > KEPT_MAPS:
                self._merged.popitem(last=False)
        self._merged.move_to_end(key)
        return self._merged[key][0]

    def density(self, choice: Choice, grid: TokenGrid) -> float | None:
        """Return the density that a choice had when its map was last made; None before the first time."""
        return self._densities.get((choice, grid))

    def note_density(self, choice: Choice, grid: TokenGrid, density: float) -> None:
        """Remember the density of a map that was made."""
        before = self._densities.get((choice, grid))
        if before is None or abs(density - before) > SAME * before:
            self._densities[choice, grid] = density
            self.version += 1

    def _make(self, choice: Choice, grid: TokenGrid, **given: Any) -> BlockMap:
        """Make a map with the sinks of the plan."""
        guards = self.plan.guards
        try:
            params = {**usual_blocks(choice.pattern, grid), **given, **self.plan.params_of(choice)}
            return with_sinks(pattern(choice.pattern, grid, **params), guards.sinks, guards.sink_rows)
        except ValueError as error:
            if not self.plan.is_uniform:
                raise StaysDense(f"{choice} can't be had with so many exact tokens") from error
            raise AttachError(f"{choice} can't be had on {grid}: {error}") from error


def _merge(maps: tuple[BlockMap, ...], heads: tuple[tuple[int, ...], ...]) -> BlockMap:
    """Join maps, whose densities are known."""
    joined, count = merge_heads(maps, heads), sum(map(len, heads))
    joined.cache["density"] = sum(density_of(one) * len(some) for one, some in zip(maps, heads, strict=True)) / count
    return joined


def density_of(block_map: BlockMap) -> float:
    """Return the density of a map, computed once."""
    if "density" not in block_map.cache:
        block_map.cache["density"] = block_map.density()
    return block_map.cache["density"]


def usual_blocks(name: str, grid: TokenGrid) -> dict[str, int]:
    """Return smaller blocks than a pattern's usual ones for sequences of which these would be a large part."""
    most = next((size for size in (128, 64, 32) if grid.visual_length >= 16 * size), 16)
    usual = {name: one for name, one in pattern_info(name).parameters.items() if name in ("block", "key_block")}
    return {name: most for name, one in usual.items() if isinstance(one, int) and one > most}


def _clusters(entry: StateEntry | None) -> ClusterState | None:
    """Return the centroids of a layer and branch, which a pattern reads and writes; None outside of steps."""
    if entry is None:
        return None
    kept = entry.get()
    if kept is None:
        kept = {"clusters": ClusterState()}
        entry.set(kept)
    return kept["clusters"]


def with_sinks(block_map: BlockMap, sinks: Sequence[Sink], rows: bool) -> BlockMap:
    """Return a map in which all queries look at all keys of the blocks that hold the sinks.

    Args:
        block_map: the map.
        sinks: see `Guards`.
        rows: whether the queries of these blocks look at all keys too.
    """
    if not sinks:
        return block_map

    def blocks_of(layout: Any) -> Tensor:  # (B', K', n), bool
        grid = layout.grid
        places = layout.block_of()[..., grid.visual_start : grid.visual_start + grid.visual_length]  # (B', K', T H W)
        found = torch.zeros(*places.shape[:2], layout.count, dtype=torch.bool, device=places.device)
        for kind, first, end in sinks:
            if kind == "blocks":
                found[..., first : min(end, layout.visual_count)] = True
            else:
                size = grid.height * grid.width
                some = places[..., first * size : min(end, grid.frames) * size]
                found.scatter_(-1, some, True)
        return found

    hit = blocks_of(block_map.keys)[..., None, :]  # (B', K', 1, m)
    if rows:
        hit = hit | blocks_of(block_map.queries)[..., None]  # (B', K', n, m)
    partial = block_map.partial
    if block_map.rule is not None:
        partial = (block_map.visits if partial is None else partial) & ~hit
    return replace(block_map, visits=block_map.visits | hit, partial=partial, parts=None, cache={})
