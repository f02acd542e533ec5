"""One attention layer under a plan: which pairs each call computes, why a call was dense, and what it cost."""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.call_notes import CallNote
from dit.attention.choices import Choice, Group, Plan, Sink, StaysDense
from dit.attention.corrections import CorrectionCall, StateEntry, correction, correction_type
from dit.attention.costs import MARGIN, attention_costs, pays
from dit.attention.functional import attention_reference, log_sum_exp
from dit.attention.grid import TokenGrid
from dit.attention.key_masks import KeyMask, read_mask
from dit.attention.patterns import pattern, pattern_info
from dit.attention.patterns.svg2 import ClusterState
from dit.attention.sequences import grid_of
from dit.attention.sparse import block_sparse_attention
from dit.runtime.families.tokens import Axes, Kind
from dit.runtime.hooks import AttachError
from dit.runtime.state import StateStore
from dit.runtime.step_context import StepContext, current_step

KEPT_MAPS = 64
"""Most block maps of static patterns that a plan keeps."""
SLOWER = "all pairs are computed faster here"
SPARSEST = 0.1
"""Density of a map before it was made."""
LEAST_WEIGHED = 512
"""From so many tokens on a choice of kernel "auto" computes all pairs where that is predicted to be faster."""
MOST_RULED = 2**14
"""Most tokens of which a report counts the pairs that a rule allows."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """One attention call.

    Args:
        query: (B, N, K, E).
        key: (B, M, K, E).
        value: (B, M, K, E).
        attn_mask: as the network gives it.
        dropout_p: of the network's call.
        is_causal: likewise.
        scale: factor of the scores; None is 1 / sqrt(E).
        enable_gqa: keys have fewer heads.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Any = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def of_heads(self, heads: Sequence[int]) -> Inputs:
        """Return the call of some heads; keys must have as many as queries."""
        index = torch.tensor(heads, device=self.query.device)
        parts = (x.index_select(2, index) for x in (self.query, self.key, self.value))
        query, key, value = parts
        return replace(self, query=query, key=key, value=value)

    def with_all_heads(self) -> Inputs:
        """Return the call with as many heads of keys as of queries."""
        copies = self.query.shape[2] // self.key.shape[2]
        if copies == 1:
            return replace(self, enable_gqa=False)
        key, value = (x.repeat_interleave(copies, dim=2) for x in (self.key, self.value))
        return replace(self, key=key, value=value, enable_gqa=False)


class MapCache:
    """Block maps of static patterns by choice, grid and device, the last `KEPT_MAPS` of them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._maps: OrderedDict[Any, BlockMap] = OrderedDict()
        self.densities: dict[tuple[Any, TokenGrid], float] = {}

    def __len__(self) -> int:
        return len(self._maps)

    def get(
        self,
        choice: Choice,
        grid: TokenGrid,
        inputs: Inputs,
        keys: Tensor | None = None,
        entry: StateEntry | None = None,
    ) -> BlockMap:
        """Return the map of a call; online patterns look at it anew.

        Args:
            choice: its pattern.
            grid: its tokens.
            inputs: the call.
            keys: bool, (B, M), False for keys that nobody may look at.
            entry: where patterns that start from the last step keep what they need.
        """
        sinks, rows = self.plan.guards.sinks, self.plan.guards.sink_rows
        device = inputs.query.device
        if pattern_info(choice.pattern).online:
            known = set(pattern_info(choice.pattern).parameters) - set(choice.params)
            given: dict[str, Any] = {"query": inputs.query, "key": inputs.key}
            given |= {name: one for name, one in {"value": inputs.value, "key_mask": keys}.items() if name in known}
            if "state" in known:
                given["state"] = _clusters(entry)
            return with_sinks(self._make(choice, grid, **given), sinks, rows).to(device)
        key = (choice.key, grid, str(device))
        if key not in self._maps:
            self._maps[key] = with_sinks(self._make(choice, grid), sinks, rows).to(device)
            while len(self._maps) > KEPT_MAPS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(key)
        return self._maps[key]

    def _make(self, choice: Choice, grid: TokenGrid, **given: Any) -> BlockMap:
        """Make a map.

        Raises:
            AttachError: the pattern can't be had on this grid, and the plan is of nothing else.
            StaysDense: it can't, in a plan that was found on other texts or sizes.
        """
        try:
            params = {**_usual_blocks(choice.pattern, grid), **self.plan.params_of(choice)}
            return pattern(choice.pattern, grid, **given, **params)
        except ValueError as error:
            if not self.plan.is_uniform:
                raise StaysDense(f"{choice} can't be had with so many exact tokens") from error
            raise AttachError(f"{choice} can't be had on {grid}: {error}") from error


def _density_of(block_map: BlockMap) -> float:
    """Return the density of a map, computed once."""
    if "density" not in block_map.cache:
        block_map.cache["density"] = block_map.density()
    return block_map.cache["density"]


def _usual_blocks(name: str, grid: TokenGrid) -> dict[str, int]:
    """Return smaller blocks than a pattern's usual ones for sequences of which these would be a large part."""
    most = next((size for size in (128, 64, 32) if grid.visual_length >= 16 * size), 16)
    usual = {name: one for name, one in pattern_info(name).parameters.items() if name in ("block", "key_block")}
    return {name: most for name, one in usual.items() if isinstance(one, int) and one > most}


class Statistics:
    """What a layer computed."""

    def __init__(self) -> None:
        self.sparse, self.dense, self.refreshes = 0, 0, 0
        self.reasons: Counter[str] = Counter()
        self.choices: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.seconds = {"sparse": 0.0, "dense": 0.0}
        self.density, self.weight = 0.0, 0.0
        self.maps: dict[int, tuple[BlockMap, float]] = {}
        self.error, self.measured = 0.0, 0

    def add_dense(self, share: float) -> None:
        """Count that a share of a call's heads computed all pairs."""
        self.density += share
        self.weight += share

    def add_map(self, block_map: BlockMap, share: float) -> None:
        """Count a map that a share of a call's heads computed."""
        self.density += _density_of(block_map) * share
        self.weight += share
        if len(self.maps) < KEPT_MAPS or id(block_map) in self.maps:
            before = self.maps.get(id(block_map), (block_map, 0.0))[1]
            self.maps[id(block_map)] = (block_map, before + share)

    def token_density(self) -> float | None:
        """Return the mean share of pairs that the rules ask for; None where counting them would take too long."""
        if not self.maps or any(
            one.rule is not None and one.queries.grid.length > MOST_RULED for one, _ in self.maps.values()
        ):
            return None
        total = sum(share for _, share in self.maps.values())
        for one, _ in self.maps.values():
            if "token_density" not in one.cache:
                one.cache["token_density"] = one.token_density()
        return sum(one.cache["token_density"] * share for one, share in self.maps.values()) / total

    def report(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "sparse": self.sparse,
            "dense": self.dense,
            "refreshes": self.refreshes,
            "reasons": dict(self.reasons),
            "patterns": dict(self.choices),
            "kernels": dict(self.kernels),
            "density": self.density / self.weight if self.weight else None,
            "token_density": self.token_density(),
            "seconds": dict(self.seconds),
            "error": self.error / self.measured if self.measured else None,
        }


@dataclass(eq=False)
class PlannedLayer:
    """An attention layer under a plan.

    Args:
        number: unique in the process; compiled code names the layer by it.
        name: normalised.
        index: among the layers of its network that the plan is for.
        count: how many these are.
        kind: who looks at whom.
        axes: what axes of the grid a sequence runs over.
        plan: what it follows.
        note: the call of the network that is being made.
        maps: block maps, shared by all layers.
        store: where corrections keep tensors.
        dense: the attention that the layer computes without a plan.
        measure_error: queries of a sparse call that are compared with dense attention.
    """

    number: int
    name: str
    index: int
    count: int
    kind: Kind
    axes: Axes
    plan: Plan
    note: CallNote
    maps: MapCache
    store: StateStore
    mechanism: str
    dense: Callable[..., Tensor]
    measure_error: int = 0

    def __post_init__(self) -> None:
        self.statistics = Statistics()
        self.heads: int | None = None
        self.last_shape, self.last_dtype = torch.Size((1, 1, 1, 1)), torch.float32
        self.last_step: StepContext | None = None

    def __call__(self, inputs: Inputs) -> Tensor:
        """Attend: (B, N, K, E)."""
        step = self.last_step = current_step()
        self.last_shape, self.last_dtype = inputs.query.shape, inputs.query.dtype
        self.heads = inputs.query.shape[2]
        begun = time.perf_counter()
        try:
            groups, grid, mask = self._find(inputs, step)
        except StaysDense as reason:
            out = self._dense(inputs)
            self.statistics.dense += 1
            self.statistics.reasons[str(reason)] += 1
            self.statistics.seconds["dense"] += self._seconds(begun, inputs)
            return out
        if not self._pays(inputs, groups, grid):
            out = self._dense(inputs)
            self.statistics.dense += 1
            self.statistics.reasons[SLOWER] += 1
            self.statistics.seconds["dense"] += self._seconds(begun, inputs)
            return out
        out = self._sparse(inputs.with_all_heads(), groups, grid, mask, step)
        self.statistics.sparse += 1
        self.statistics.seconds["sparse"] += self._seconds(begun, inputs)
        if self.measure_error:
            self._compare(inputs.with_all_heads(), mask, out)
        return out

    def refreshes(self, step: StepContext) -> bool:
        """Return whether a correction of the layer wants the dense result of a step, which no cache should skip."""
        if self.heads is None:
            return False
        try:
            groups = self._groups(step, self.heads)
        except StaysDense:
            return False
        for group in groups:
            fix = correction(group.choice.correction, **group.choice.correction_params)
            if not fix.keeps_state:
                continue
            batch, length, heads, width = self.last_shape
            heads = heads if group.heads is None else len(group.heads)
            query = torch.empty(batch, length, heads, width, dtype=self.last_dtype, device="meta")
            if fix.must_refresh(query, step, self._entry(group, step)):
                return True
        return False

    # ------------------------------------------------------------------------ deciding

    def _find(self, inputs: Inputs, step: StepContext | None) -> tuple[tuple[Group, ...], TokenGrid, KeyMask]:
        """Return what a call computes: groups of heads, its grid and its mask.

        Raises:
            StaysDense: it is dense.
            AttachError: the plan is for another grid.
        """
        length = inputs.query.shape[1]
        if length < self.plan.guards.min_tokens:
            raise StaysDense("the sequence is shorter than min_tokens")
        groups = self._groups(step, inputs.query.shape[2])
        layout = self.note.layout
        if layout is not None and self.plan.grid not in (None, layout.grid):
            raise AttachError(
                f"the plan is for {self.plan.grid} tokens (frames, rows, columns), this call has {layout.grid}: attach "
                "plan.regrid((frames, rows, columns)), or plan.regrid(None) for any size"
            )
        return groups, *self._sequence(inputs)

    def _sequence(self, inputs: Inputs) -> tuple[TokenGrid, KeyMask]:
        """Return the grid and the mask of a call.

        Raises:
            StaysDense: they aren't known, or no block map covers such a call.
        """
        length = inputs.query.shape[1]
        if length != inputs.key.shape[1]:
            raise StaysDense("queries and keys are of different sequences")
        if inputs.is_causal or inputs.dropout_p:
            raise StaysDense("the call is causal or has dropout")
        if self.note.layout is None:
            raise StaysDense(self.note.reason)
        grid = grid_of(self.note.layout, self.kind, self.axes, length)
        if inputs.attn_mask is not None and not isinstance(inputs.attn_mask, Tensor):
            raise StaysDense(f"the mask is a {type(inputs.attn_mask).__name__}")
        return grid, read_mask(inputs.attn_mask, length, length, inputs.query.shape[0])

    def _groups(self, step: StepContext | None, heads: int) -> tuple[Group, ...]:
        """Return what the plan says of a step.

        Raises:
            StaysDense: a guard keeps it dense, or all heads are dense.
        """
        guards = self.plan.guards
        if guards.dense_layer(self.index, self.count):
            raise StaysDense("the layer is dense")
        if step is None and self.plan.needs_step:
            raise StaysDense("no step context")
        if step is not None and self.plan.needs_step:
            if math.isnan(step.sigma):
                raise StaysDense("the noise level is not known")
            reason = guards.dense_step(step.step, step.num_steps, step.sigma)
            if reason:
                raise StaysDense(reason)
        groups = self.plan.resolve(None if step is None else step.sigma, self.index, heads)
        if all(group.choice.is_dense for group in groups):
            raise StaysDense("the plan says dense")
        if step is None and any(correction_type(one.choice.correction).keeps_state for one in groups):
            raise StaysDense("no step context")
        return groups

    def _pays(self, inputs: Inputs, groups: tuple[Group, ...], grid: TokenGrid) -> bool:
        """Return whether what the plan says is predicted to take less time than dense attention.

        Nothing is made for it: maps count as they did when they were last made, at first as sparse as plans get.
        """
        kernels = {one.choice.kernel for one in groups if not one.choice.is_dense}
        costs = attention_costs(inputs.query.device)
        dense = costs.dense_seconds(inputs.query, grid.length)
        if grid.length < LEAST_WEIGHED or kernels != {"auto"} or dense is None:
            return True
        total, count = 0.0, inputs.query.shape[2]
        for group in groups:
            heads = count if group.heads is None else len(group.heads)
            if group.choice.is_dense:
                total += dense * heads / count
                continue
            density = self.maps.densities.get((group.choice.key, grid), SPARSEST)
            sizes = {"block": 128, **_usual_blocks(group.choice.pattern, grid), **group.choice.params}
            blocks = grid.length // sizes["block"] + 1
            online = pattern_info(group.choice.pattern).online
            total += costs.group_seconds(inputs.query, heads, grid.length, density, blocks, online) or 0.0
        return total < MARGIN * dense

    # ----------------------------------------------------------------------- computing

    def _dense(self, inputs: Inputs) -> Tensor:
        """Attend as the layer does without a plan."""
        return self.dense(
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.attn_mask,
            inputs.dropout_p,
            inputs.is_causal,
            inputs.scale,
            inputs.enable_gqa,
        )

    def _sparse(
        self, inputs: Inputs, groups: tuple[Group, ...], grid: TokenGrid, mask: KeyMask, step: StepContext | None
    ) -> Tensor:
        """Attend by the plan, one launch for each group of heads."""
        if groups[0].heads is None:
            out = self._group(inputs, groups[0], grid, mask, step)
        else:
            parts, order = [], []
            for group in groups:
                parts.append(self._group(inputs.of_heads(group.heads or ()), group, grid, mask, step))
                order += group.heads or ()
            inverse = torch.tensor(order, device=inputs.query.device).argsort()
            out = torch.cat(parts, dim=2).index_select(2, inverse)  # (B, N, K, E)
        return out if mask.rows is None else out.masked_fill(~mask.rows[..., None, None], 0)

    def _group(
        self, inputs: Inputs, group: Group, grid: TokenGrid, mask: KeyMask, step: StepContext | None
    ) -> Tensor:
        """Attend by one choice."""
        choice, share = group.choice, len(group.heads or range(self.heads or 1)) / (self.heads or 1)
        self.statistics.choices[str(choice)] += 1
        if choice.is_dense:
            self.statistics.add_dense(share)
            return self._dense(inputs)
        try:
            block_map = self.maps.get(choice, grid, inputs, mask.keys, self._entry(group, step, "pattern"))
            self.maps.densities[choice.key, grid] = _density_of(block_map)
            online = pattern_info(choice.pattern).online
            weighed = choice.kernel == "auto" and grid.length >= LEAST_WEIGHED
            if weighed and not pays(inputs.query, block_map, online=online):
                raise StaysDense(SLOWER)
        except StaysDense as reason:
            self.statistics.reasons[str(reason)] += 1
            self.statistics.kernels["dense"] += 1
            self.statistics.add_dense(share)
            return self._dense(inputs)
        fix, entry = correction(choice.correction, **choice.correction_params), self._entry(group, step)
        if fix.keeps_state and fix.must_refresh(inputs.query, step, entry):
            self.statistics.refreshes += 1
            self.statistics.add_dense(share)
        else:
            self.statistics.add_map(block_map, share)
        if block_map.is_dense:
            self.statistics.kernels["dense"] += 1
            return self._dense(inputs)
        self.statistics.kernels[choice.kernel] += 1
        scale = inputs.query.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale

        def sparse(*, tail: Any = None, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
            options = {"kernel": choice.kernel, "scale": scale, "key_mask": mask.keys, "tail": tail}
            if return_lse:
                return block_sparse_attention(
                    inputs.query, inputs.key, inputs.value, block_map, return_lse=True, **options
                )
            return block_sparse_attention(inputs.query, inputs.key, inputs.value, block_map, **options), None

        def dense(*, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
            lse = log_sum_exp(inputs.query, inputs.key, mask.keys, scale) if return_lse else None
            return self._dense(inputs), lse

        call = CorrectionCall(
            inputs.query, inputs.key, inputs.value, block_map, scale, sparse, dense, mask.keys, step, entry
        )  # fmt: skip
        return fix(call)

    def _entry(self, group: Group, step: StepContext | None, use: str = "correction") -> StateEntry | None:
        """Return where a group of heads keeps what its correction, or its pattern, needs at the next step.

        Other heads, or another choice at a later noise level, find nothing there.
        """
        if step is None:
            return None
        return StateEntry(self.store, self.mechanism, f"{self.name}#{group.heads}.{group.choice}.{use}", step.branch)

    # ----------------------------------------------------------------------- measuring

    @staticmethod
    def _seconds(begun: float, inputs: Inputs) -> float:
        if inputs.query.device.type == "cuda":
            return 0.0  # kernels run behind; a profiler tells
        return time.perf_counter() - begun

    @torch.no_grad()
    def _compare(self, inputs: Inputs, mask: KeyMask, out: Tensor) -> None:
        """Compare some queries with dense attention: relative L2 distance."""
        length = out.shape[1]
        rows = torch.linspace(0, length - 1, min(self.measure_error, length), device=out.device).long().unique()
        exact = attention_reference(inputs.query[:, rows], inputs.key, inputs.value, mask.keys, inputs.scale)
        live = torch.ones_like(exact[..., 0], dtype=torch.bool)  # (B, R, K)
        if mask.rows is not None:
            live &= mask.rows[:, rows, None]
        difference = ((out[:, rows].double() - exact.double()) * live[..., None]).norm()
        self.statistics.error += float(difference / (exact.double() * live[..., None]).norm().clamp(min=1e-12))
        self.statistics.measured += 1


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
    return replace(block_map, visits=block_map.visits | hit, partial=partial, cache={})
