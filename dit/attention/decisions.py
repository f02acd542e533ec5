"""What the calls of a layer compute under a plan, decided once for each kind of call.

Guards ask for the step, the table of the plan for its noise level; grid, shape, dtype and device are those of the call.
Everything else follows from these, so that a call that comes again costs one look into a dictionary. What was decided
by a density that an online pattern has left since, or by other costs, is decided anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit.attention.call_notes import CallNote
from dit.attention.choices import Choice, Group, Plan, StaysDense, amount_of
from dit.attention.costs import LAUNCH_SECONDS, MARGIN, AttentionCosts, attention_costs
from dit.attention.grid import TokenGrid
from dit.attention.inputs import CallKind
from dit.attention.map_cache import MapCache, usual_blocks
from dit.attention.patterns import pattern_info
from dit.attention.sequences import grid_of
from dit.runtime.families.tokens import Axes, Kind
from dit.runtime.hooks import AttachError
from dit.runtime.step_context import StepContext

SLOWER = "all pairs are computed faster here"
SPARSEST = 0.1
"""Density of a map before it was made, where no parameter says it."""
LEAST_WEIGHED = 512
"""From so many tokens on a choice of kernel "auto" computes all pairs where that is predicted to be faster."""
KEPT = 256
"""Most decisions of a layer that are kept."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What one kind of call computes.

    Args:
        groups: of heads.
        grid: of the tokens.
        pays: whether that is predicted to take less time than dense attention.
        version: of the densities that this was decided by.
        costs: likewise.
    """

    groups: tuple[Group, ...]
    grid: TokenGrid
    pays: bool
    version: int
    costs: AttentionCosts


@dataclass(eq=False)
class Decisions:
    """Decide what the calls of one layer compute.

    Args:
        plan: what the layer follows.
        maps: what is known of its maps.
        note: the call of the network that is being made.
        index: the layer's number among those that the plan is for.
        count: how many these are.
        kind: who looks at whom.
        axes: what axes of the grid a sequence runs over.
    """

    plan: Plan
    maps: MapCache
    note: CallNote
    index: int
    count: int
    kind: Kind
    axes: Axes

    def __post_init__(self) -> None:
        self._known: dict[Any, Decision | str] = {}
        self._groups: dict[Any, tuple[Group, ...] | str] = {}

    def of(self, call: CallKind, step: StepContext | None) -> Decision:
        """Return what a call computes.

        Raises:
            StaysDense: all pairs, and why.
            AttachError: the plan is for another grid.
        """
        if call.shape[1] < self.plan.guards.min_tokens:
            raise StaysDense("the sequence is shorter than min_tokens")
        layout = self.note.layout
        steps = 0 if step is None else step.num_steps
        key = (self._bin(step), steps, call, self.note.reason if layout is None else layout)
        known = self._known.get(key)
        if isinstance(known, str):
            raise StaysDense(known)
        costs = attention_costs(call.device)
        if known is not None and known.version == self.maps.version and known.costs is costs:
            return known
        if len(self._known) >= KEPT:
            self._known.clear()
        try:
            groups = self.groups(step, call.shape[2]) if known is None else known.groups
            grid = self._grid(call) if known is None else known.grid
        except StaysDense as reason:
            self._known[key] = str(reason)
            raise
        version = self.maps.version
        decision = Decision(groups, grid, self._pays(call, groups, grid, costs, steps), version, costs)
        self._known[key] = decision
        return decision

    def groups(self, step: StepContext | None, heads: int) -> tuple[Group, ...]:
        """Return what the plan says of a step.

        Raises:
            StaysDense: a guard keeps it dense, or all heads are dense.
        """
        key = (self._bin(step), step is None, heads)
        if key not in self._groups:
            self._groups[key] = self._resolve(step, heads)
        found = self._groups[key]
        if isinstance(found, str):
            raise StaysDense(found)
        return found

    def grid(self, call: CallKind) -> TokenGrid:
        """Return the grid of a call.

        Raises:
            StaysDense: it isn't known, or no block map covers such a call.
        """
        if call.shape[1] != call.keys:
            raise StaysDense("queries and keys are of different sequences")
        if not call.is_plain:
            raise StaysDense("the call is causal or has dropout")
        if self.note.layout is None:
            raise StaysDense(self.note.reason)
        return grid_of(self.note.layout, self.kind, self.axes, call.shape[1])

    def _grid(self, call: CallKind) -> TokenGrid:
        """Return the grid of a call, if it is one of the plan's."""
        layout = self.note.layout
        if layout is not None and self.plan.grid not in (None, layout.grid):
            raise AttachError(
                f"the plan is for {self.plan.grid} tokens (frames, rows, columns), this call has {layout.grid}: attach "
                "plan.regrid((frames, rows, columns)), or plan.regrid(None) for any size"
            )
        return self.grid(call)

    def _bin(self, step: StepContext | None) -> int:
        """Return the range of noise levels of a step.

        Raises:
            StaysDense: a guard keeps it dense.
        """
        guards = self.plan.guards
        if guards.dense_layer(self.index, self.count):
            raise StaysDense("the layer is dense")
        if not self.plan.needs_step:
            return 0
        if step is None:
            raise StaysDense("no step context")
        if math.isnan(step.sigma):
            raise StaysDense("the noise level is not known")
        reason = guards.dense_step(step.step, step.num_steps, step.sigma)
        if reason:
            raise StaysDense(reason)
        return self.plan.bin_of(step.sigma)

    def _resolve(self, step: StepContext | None, heads: int) -> tuple[Group, ...] | str:
        """Return what the plan says of a step, or why that is dense."""
        groups = self.plan.resolve(None if step is None else step.sigma, self.index, heads)
        if all(group.choice.is_dense for group in groups):
            return "the plan says dense"
        if step is None and any(one.choice.fix.keeps_state or one.choice.follows_step for one in groups):
            return "no step context"
        return groups

    def _pays(
        self, call: CallKind, groups: tuple[Group, ...], grid: TokenGrid, costs: AttentionCosts, steps: int
    ) -> bool:
        """Return whether what the plan says is predicted to take less time than dense attention.

        Nothing is made for it: maps count as they did when they were last made, at first as `_guess` says.
        """
        sparse = [group for group in groups if not group.choice.is_dense]
        query = torch.empty(call.shape, dtype=call.dtype, device="meta")
        dense = costs.dense_seconds(query, grid.length)
        if grid.length < LEAST_WEIGHED or {one.choice.kernel for one in sparse} != {"auto"} or dense is None:
            return True
        launches = {(one.choice.launch, _is_online(one.choice)) for one in sparse}
        total, count = LAUNCH_SECONDS * len(launches), call.shape[2]
        left = count
        for group in sparse:
            heads = len(group.members(count))
            left -= heads
            refreshes = self._refresh_share(group.choice, steps)
            total += self._seconds(query, group.choice, heads, grid, costs) + refreshes * dense * heads / count
        return total + dense * left / count < MARGIN * dense

    def _refresh_share(self, choice: Choice, steps: int) -> float:
        """Return which share of the steps of a run compute the dense result too; each noise level begins with one."""
        share = choice.fix.refresh_share(steps)
        return min(max(share, self.plan.bins / max(steps, 1)), 1.0) if share else 0.0

    def _seconds(self, query: Tensor, choice: Choice, heads: int, grid: TokenGrid, costs: AttentionCosts) -> float:
        """Return the time of some heads under one choice."""
        sizes = {"block": 128, **usual_blocks(choice.pattern, grid), **choice.params}
        density = self.maps.density(choice, grid)
        density = _guess(choice) if density is None else density
        density += choice.fix.extra_density(density, sizes.get("key_block") or sizes["block"])
        blocks = grid.length // sizes["block"] + 1
        seconds = costs.group_seconds(query, heads, grid.length, density, blocks, _is_online(choice)) or 0.0
        return seconds + choice.fix.work * 1e-9 * query.numel() * heads / query.shape[2]


def _guess(choice: Choice) -> float:
    """Return the density of a map that was never made: what is asked for, or as low as they get."""
    amount = choice.params.get(amount_of(choice.pattern))
    return amount if isinstance(amount, float) else SPARSEST


def _is_online(choice: Choice) -> bool:
    """Return whether the pattern of a choice looks at queries and keys."""
    return pattern_info(choice.pattern).online


__all__ = ["LEAST_WEIGHED", "SLOWER", "SPARSEST", "Decision", "Decisions"]
