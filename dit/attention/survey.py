"""Survey of candidate patterns: how far each is from dense attention, by noise level, layer and head.

The pipeline computes dense attention as always. Beside each call some of its queries, spread over the grid, are
attended again as each candidate would, from one product of these queries with all keys: for 64 of 4,096 queries that is
a few percent of the work, whatever the number of candidates. Nothing but sums is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.choices import Choice, StaysDense
from dit.attention.corrections import CorrectionCall, StateEntry, correction
from dit.attention.grid import TokenGrid
from dit.attention.inputs import Inputs
from dit.attention.kernels.contract import Tail
from dit.attention.key_masks import KeyMask
from dit.attention.map_cache import MapCache
from dit.attention.mechanism import PlannedAttention
from dit.attention.patterns.scores import sampled_queries
from dit.attention.plan import AttentionPlan
from dit.attention.planned_layer import PlannedLayer
from dit.runtime.hooks import AttachError
from dit.runtime.step_context import StepContext, current_step

SURVEYED = ("none", "pooled_tail", "residual", "ratio_residual")
"""Corrections that can be computed for some queries alone."""


@dataclass
class Sums:
    """What was seen of one layer at one noise level.

    Args:
        error: squared distance to dense attention, (C, K).
        norm: squared norm of dense attention, (K,).
        density: sum of the densities of the maps, (C, K).
        calls: how many calls these are of.
    """

    error: Tensor
    norm: Tensor
    density: Tensor
    calls: int = 0


class SurveyedLayer(PlannedLayer):
    """A layer that attends densely, and looks at what candidates would have computed."""

    survey: AttentionSurvey

    def __call__(self, inputs: Inputs) -> Tensor:
        """Attend densely: (B, N, K, E)."""
        out = self._dense(inputs)
        try:
            grid, mask = self.decisions.grid(inputs.kind), self._mask(inputs)
        except StaysDense as reason:
            self.survey.skipped[str(reason)] += 1
            return out
        with torch.no_grad():
            self.survey.look(self, inputs.with_all_heads(), grid, mask)
        return out


class AttentionSurvey(PlannedAttention):
    """Measure candidates while a pipeline runs densely.

    Args:
        candidates: what heads could compute; corrections that need all queries of a call are refused.
        rows: queries that are looked at in each call.

    Attributes:
        sums: what was seen, by (layer, noise level); the level is NaN where nobody tracks steps.
        skipped: calls that couldn't be looked at, by reason.
        grid: the visual grid of the calls; None before the first.

    Raises:
        ValueError: a candidate that can't be surveyed.
    """

    name = "attention_survey"
    layer_type = SurveyedLayer

    def __init__(self, candidates: Sequence[Choice], rows: int = 64) -> None:
        odd = sorted({one.correction for one in candidates} - set(SURVEYED))
        if odd:
            raise ValueError(
                f"{', '.join(odd)} can't be surveyed, because it needs all queries of a call; use the corrections "
                f"{', '.join(SURVEYED)}"
            )
        super().__init__(AttentionPlan.uniform("dense"))
        self.candidates, self.rows = tuple(candidates), rows
        self.sums: dict[tuple[int, float], Sums] = {}
        self.skipped: Counter[str] = Counter()
        self.grid: tuple[int, int, int] | None = None
        self.layer_count = self.head_count = 0
        self.survey_maps = MapCache(AttentionPlan.uniform("dense"))

    def _take(self, attachment: Any, note: Any, layer: Any, index: int, total: int) -> None:
        super()._take(attachment, note, layer, index, total)
        for one in self.layers:
            if isinstance(one, SurveyedLayer):
                one.survey = self
        self.layer_count = total

    def look(self, layer: SurveyedLayer, inputs: Inputs, grid: TokenGrid, mask: KeyMask) -> None:
        """Compare all candidates with dense attention for some queries of a call.

        Raises:
            ValueError: the grid is another than in earlier calls.
        """
        if self.grid not in (None, grid.shape):
            raise ValueError(f"the pipeline changed from {self.grid} to {grid.shape} tokens: survey one size at a time")
        self.grid, self.head_count = grid.shape, inputs.query.shape[2]
        step = current_step()
        key = layer.index, float("nan") if step is None else step.sigma
        some = SomeQueries.of(inputs, mask, sampled_queries(grid, self.rows).to(inputs.query.device))
        dense = some.dense()[0]  # (B, R, K, E)
        sums = self.sums.setdefault(_known(self.sums, key), self._nothing(inputs))
        sums.norm += dense.square().sum((0, 1, 3)).double()
        sums.calls += 1
        maps: dict[Any, BlockMap | None] = {}
        for number, choice in enumerate(self.candidates):
            if choice.is_dense:
                sums.density[number] += 1
                continue
            name = choice.pattern, tuple(sorted(choice.params.items()))
            if name not in maps:  # choices that differ by correction share their map
                maps[name] = self._map(choice, grid, inputs, 0 if step is None else step.step)
            block_map = maps[name]
            if block_map is None:  # counts as bad as zeros, and as dear as all pairs
                sums.error[number] += dense.square().sum((0, 1, 3)).double()
                sums.density[number] += 1
                continue
            state = None
            if step is not None:
                state = StateEntry(layer.store, self.name, f"{layer.name}#{number}", step.branch)
            fix = correction(choice.correction, **choice.correction_params)
            is_refresh = fix.keeps_state and fix.must_refresh(some.query, step, state)
            out = fix(some.call(block_map, step, state))  # (B, R, K, E)
            sums.error[number] += (out - dense).square().sum((0, 1, 3)).double()
            sums.density[number] += 1 if is_refresh else _computed(block_map, choice.correction == "pooled_tail")

    def _map(self, choice: Choice, grid: TokenGrid, inputs: Inputs, number: int) -> BlockMap | None:
        """Return the map of a candidate; None where so many exact tokens leave no room for its density."""
        try:
            return self.survey_maps.get(choice, grid, inputs, step=number)
        except AttachError as reason:
            self.skipped[str(reason)] += 1
            return None

    def _nothing(self, inputs: Inputs) -> Sums:
        heads, device = inputs.query.shape[2], inputs.query.device
        table = torch.zeros(len(self.candidates), heads, dtype=torch.float64, device=device)  # (C, K)
        return Sums(table.clone(), table.new_zeros(heads), table.clone())


def _computed(block_map: BlockMap, has_tail: bool) -> Tensor:
    """Return the share of pairs that a map computes, by head; a pooled key is one of a pair too, (K',)."""
    visited = block_map.head_densities().mean(0)  # (K',)
    if not has_tail:
        return visited
    pooled = block_map.keys.visual_count / block_map.keys.grid.length
    return (visited + (1 - visited) * pooled).clamp(max=1)


def _known(sums: dict[tuple[int, float], Sums], key: tuple[int, float]) -> tuple[int, float]:
    """Return the key under which NaN was kept; NaN differs from itself."""
    return next((one for one in sums if one[0] == key[0] and str(one[1]) == str(key[1])), key)


@dataclass(frozen=True)
class SomeQueries:
    """Attention of some queries of a call, from one product with all keys.

    Args:
        query: (B, R, K, E), float32.
        key: (B, M, K, E), float32.
        value: (B, M, K, E), float32.
        scores: (B, K, R, M), masked keys at -inf.
        rows: (R,), positions of the queries in the sequence.
        scale: factor of the scores.
        key_mask: bool, (B, M).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    rows: Tensor
    scale: float
    key_mask: Tensor | None

    @classmethod
    def of(cls, inputs: Inputs, mask: KeyMask, rows: Tensor) -> SomeQueries:
        """Multiply some queries with all keys."""
        scale = inputs.query.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale
        query, key, value = inputs.query[:, rows].float(), inputs.key.float(), inputs.value.float()
        scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * scale  # (B, K, R, M)
        if mask.keys is not None:
            scores = scores.masked_fill(~mask.keys[:, None, None], -torch.inf)
        return cls(query, key, value, scores, rows, scale, mask.keys)

    def dense(self, *, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
        """Attend to all keys, (B, R, K, E)."""
        return self._attend(self.scores, self.value, return_lse)

    def call(self, block_map: BlockMap, step: StepContext | None, state: StateEntry | None) -> CorrectionCall:
        """Return the call as a correction takes it."""

        def sparse(*, tail: Tail | None = None, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
            scores = self.scores.masked_fill(~block_map.row_mask(self.rows), -torch.inf)  # (B, K, R, M)
            value = self.value
            if tail is not None:
                pooled = self.query.transpose(1, 2) @ tail.key.float().mT * self.scale  # (B, K, R, m)
                pooled = (pooled + tail.log_count[..., None, :]).masked_fill(block_map.visited(self.rows), -torch.inf)
                scores = torch.cat([scores, pooled], dim=-1)  # (B, K, R, M + m)
                value = torch.cat([value, tail.value.float().transpose(1, 2)], dim=1)  # (B, M + m, K, E)
            return self._attend(scores, value, return_lse)

        return CorrectionCall(
            self.query, self.key, self.value, block_map, self.scale, sparse, self.dense, self.key_mask, step, state
        )

    def _attend(self, scores: Tensor, value: Tensor, return_lse: bool) -> tuple[Tensor, Tensor | None]:
        lse = scores.logsumexp(-1)  # (B, K, R)
        weights = (scores - lse.masked_fill(lse.isneginf(), 0)[..., None]).exp()  # (B, K, R, M)
        out = (weights @ value.transpose(1, 2)).transpose(1, 2)  # (B, R, K, E)
        return out, lse if return_lse else None
