"""One attention layer under a plan: which pairs each call computes, why a call was dense, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.call_notes import CallNote
from dit.attention.choices import Choice, Group, Plan, StaysDense
from dit.attention.corrections import Correction, CorrectionCall, StateEntry
from dit.attention.costs import pays
from dit.attention.decisions import LEAST_WEIGHED, SLOWER, Decision, Decisions
from dit.attention.functional import attention_reference, log_sum_exp
from dit.attention.inputs import CallKind, Inputs, head_slice
from dit.attention.key_masks import KeyMask, read_mask
from dit.attention.layer_statistics import Statistics
from dit.attention.map_cache import MapCache, density_of
from dit.attention.merged_map import can_merge
from dit.attention.patterns import pattern_info
from dit.attention.sparse import block_sparse_attention
from dit.runtime.families.tokens import Axes, Kind
from dit.runtime.state import StateStore
from dit.runtime.step_context import StepContext, current_step


class Part(NamedTuple):
    """Heads of one choice, and the pairs that a call of them computes; None: all."""

    group: Group
    heads: tuple[int, ...]
    block_map: BlockMap | None


class Launch(NamedTuple):
    """Parts that are computed together."""

    parts: tuple[Part, ...]

    @property
    def heads(self) -> tuple[int, ...]:
        """All heads, rising."""
        return tuple(sorted(head for part in self.parts for head in part.heads))

    @property
    def choice(self) -> Choice:
        """One of the choices, whose correction and kernel are those of all."""
        return self.parts[0].group.choice

    @property
    def name(self) -> str:
        """What tells apart what corrections keep: the heads, and the choice of each."""
        if len(self.parts) == 1:
            return f"{self.parts[0].group.heads}.{self.choice}"
        return "; ".join(f"{part.heads}.{part.group.choice}" for part in self.parts)


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
        self.decisions = Decisions(self.plan, self.maps, self.note, self.index, self.count, self.kind, self.axes)
        self.heads: int | None = None
        self.last_call: CallKind | None = None
        self.last_step: StepContext | None = None
        self._corrected: dict[tuple[Group, ...], list[tuple[Correction, str, int]]] = {}

    def __call__(self, inputs: Inputs) -> Tensor:
        """Attend: (B, N, K, E)."""
        step = self.last_step = current_step()
        call = self.last_call = inputs.kind
        self.heads = call.shape[2]
        begun = time.perf_counter()
        try:
            decision = self.decisions.of(call, step)
            if not decision.pays:
                raise StaysDense(SLOWER)
            mask = self._mask(inputs)
        except StaysDense as reason:
            out = self._dense(inputs)
            self.statistics.dense += 1
            self.statistics.reasons[str(reason)] += 1
            self.statistics.seconds["dense"] += self._seconds(begun, inputs)
            return out
        out = self._sparse(inputs.with_all_heads(), decision, mask, step)
        self.statistics.sparse += 1
        self.statistics.seconds["sparse"] += self._seconds(begun, inputs)
        if self.measure_error:
            self._compare(inputs.with_all_heads(), mask, out)
        return out

    def refreshes(self, step: StepContext) -> bool:
        """Return whether a correction of the layer wants the dense result of a step, which no cache should skip."""
        call = self.last_call
        if call is None:
            return False
        try:
            decision = self.decisions.of(call, step)
        except StaysDense:
            return False
        if not decision.pays:
            return False
        corrected = self._corrected.get(decision.groups)
        if corrected is None:  # nothing is kept yet
            return any(group.choice.fix.keeps_state for group in decision.groups)
        for fix, name, heads in corrected:
            if fix.keeps_state:
                batch, length, _, width = call.shape
                query = torch.empty(batch, length, heads, width, dtype=call.dtype, device="meta")
                if fix.must_refresh(query, step, self._entry(name, step)):
                    return True
        return False

    # ----------------------------------------------------------------------- computing

    @staticmethod
    def _mask(inputs: Inputs) -> KeyMask:
        """Return the mask of a call.

        Raises:
            StaysDense: no block map covers it.
        """
        if inputs.attn_mask is not None and not isinstance(inputs.attn_mask, Tensor):
            raise StaysDense(f"the mask is a {type(inputs.attn_mask).__name__}")
        return read_mask(inputs.attn_mask, inputs.query.shape[1], inputs.key.shape[1], inputs.query.shape[0])

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

    def _sparse(self, inputs: Inputs, decision: Decision, mask: KeyMask, step: StepContext | None) -> Tensor:
        """Attend by the plan, with as few launches as kernels allow: one for all choices of the same correction."""
        parts = [self._part(inputs, group, decision, mask, step) for group in decision.groups]
        launches = tuple(self._joined(parts, inputs.query.device))
        sparse = (one for one in launches if one.parts[0].block_map is not None)
        self._corrected[decision.groups] = [(one.choice.fix, one.name, len(one.heads)) for one in sparse]
        if len(launches) == 1:
            out = self._launch(inputs, launches[0], mask, step)
        else:
            out = inputs.query.new_empty(*inputs.query.shape[:3], inputs.value.shape[3])  # (B, N, K, E)
            for launch in launches:
                found = self._launch(inputs.of_heads(launch.heads), launch, mask, step)
                run = head_slice(launch.heads)
                if run is None:
                    out.index_copy_(2, torch.tensor(launch.heads, device=out.device), found)
                else:
                    out[:, :, run] = found
        return out if mask.rows is None else out.masked_fill(~mask.rows[..., None, None], 0)

    def _part(self, inputs: Inputs, group: Group, decision: Decision, mask: KeyMask, step: StepContext | None) -> Part:
        """Return the pairs that the heads of one choice compute."""
        choice, heads = group.choice, group.members(inputs.query.shape[2])
        self.statistics.choices[str(choice)] += 1
        if choice.is_dense:
            return Part(group, heads, None)
        some = inputs.of_heads(heads)
        try:
            entry = self._entry(f"{group.heads}.{choice}", step, "pattern")
            number = 0 if step is None else step.step
            block_map = self.maps.get(choice, decision.grid, some, mask.keys, entry, number)
            self.maps.note_density(choice, decision.grid, density_of(block_map))
            weighed = choice.kernel == "auto" and decision.grid.length >= LEAST_WEIGHED
            if weighed and not pays(some.query, block_map, online=pattern_info(choice.pattern).online):
                raise StaysDense(SLOWER)
        except StaysDense as reason:
            self.statistics.reasons[str(reason)] += 1
            return Part(group, heads, None)
        return Part(group, heads, None if block_map.is_dense else block_map)

    def _joined(self, parts: list[Part], device: torch.device) -> list[Launch]:
        """Return which parts are computed together: dense ones, and those of one correction and kernel.

        What kernels prepare of static maps is kept, so these are not joined with maps that come only once.
        """
        sets: dict[Any, list[Part]] = {}
        for number, part in enumerate(parts):
            if part.block_map is None:
                sets.setdefault("dense", []).append(part)
            elif not part.group.choice.fix.joins_heads:
                sets[number] = [part]
            else:
                online = pattern_info(part.group.choice.pattern).online
                sets.setdefault((part.group.choice.launch, online), []).append(part)
        found = []
        for some in sets.values():
            maps = [one.block_map for one in some if one.block_map is not None]
            if not maps or can_merge(maps, some[0].group.choice.kernel, device):
                found.append(Launch(tuple(some)))
            else:
                found += [Launch((one,)) for one in some]
        return found

    def _launch(self, inputs: Inputs, launch: Launch, mask: KeyMask, step: StepContext | None) -> Tensor:
        """Attend by the choices of one launch."""
        block_map = self._map_of(launch)
        choice, share = launch.choice, 1 / (self.heads or 1)
        if block_map is None:
            self.statistics.kernels["dense"] += 1
            self.statistics.add_dense(len(launch.heads) * share)
            return self._dense(inputs)
        fix, entry = choice.fix, self._entry(launch.name, step)
        is_refresh = fix.keeps_state and fix.must_refresh(inputs.query, step, entry)
        for part in launch.parts:
            self.statistics.refreshes += is_refresh
            if is_refresh or part.block_map is None:
                self.statistics.add_dense(len(part.heads) * share)
            else:
                self.statistics.add_map(part.block_map, len(part.heads) * share)
        self.statistics.kernels[choice.kernel] += 1

        def sparse(*, tail: Any = None, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
            options = {"kernel": choice.kernel, "scale": inputs.factor, "key_mask": mask.keys, "tail": tail}
            if return_lse:
                return block_sparse_attention(
                    inputs.query, inputs.key, inputs.value, block_map, return_lse=True, **options
                )
            return block_sparse_attention(inputs.query, inputs.key, inputs.value, block_map, **options), None

        def dense(*, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
            lse = log_sum_exp(inputs.query, inputs.key, mask.keys, inputs.factor) if return_lse else None
            return self._dense(inputs), lse

        call = CorrectionCall(
            inputs.query, inputs.key, inputs.value, block_map, inputs.factor, sparse, dense, mask.keys, step, entry
        )  # fmt: skip
        return fix(call)

    def _map_of(self, launch: Launch) -> BlockMap | None:
        """Return the map of a launch, joined of those of its parts."""
        maps = tuple(part.block_map for part in launch.parts if part.block_map is not None)
        if len(maps) < 2:
            return maps[0] if maps else None
        keep = not any(pattern_info(part.group.choice.pattern).online for part in launch.parts)
        return self.maps.merged(maps, tuple(part.heads for part in launch.parts), keep)

    def _entry(self, name: str, step: StepContext | None, use: str = "correction") -> StateEntry | None:
        """Return where a launch keeps what its correction needs at the next step, or a choice what its pattern needs.

        Other heads, or other choices at a later noise level, find nothing there.
        """
        if step is None:
            return None
        return StateEntry(self.store, self.mechanism, f"{self.name}#{name}.{use}", step.branch)

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
