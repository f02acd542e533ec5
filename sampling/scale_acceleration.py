"""Cheaper next-scale generation as one setting: skip scales, prune tokens, drop guidance, refine with a smaller model.

Late scales hold nearly all the work and add the finest detail. None of this is exact; each run can be compared with
the exact one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dit.layers.scales import Grid
from sampling.token_pruning import MIDDLE, TokenPruning


@dataclass(frozen=True)
class ScaleAcceleration:
    """What to leave out.

    Scales are given by index; negative ones count from the last.

    Args:
        skip_last: scales at the end that are not generated at all (FastVAR, arXiv 2503.23367): the image is decoded
            from the coarser ones.
        prune: scale -> fraction of its tokens to leave out (FastVAR), see `sampling.token_pruning`.
        prune_source: the scale that fills the gaps; None is the one before the first pruned.
        prune_layers: first and last layer to prune as fractions of the depth.
        unguided: scales without guidance. From the first scale on after which all are unguided, the unconditional rows
            don't run at all, which halves the work; before that they run, because later scales need them.
        refiner: another transformer of the same tokenizer that generates from scale `refine_from` on (CoDe, arXiv
            2411.17787): the pipeline's is the drafter, usually the larger one.
        refine_from: see `refiner`.
        measure_drift: generate the exact image too and report how far the result is from it; costs a whole run.

    Raises:
        ValueError: a setting out of range, a refiner without `refine_from` or the other way round, or nothing to do.
    """

    skip_last: int = 0
    prune: Mapping[int, float] = field(default_factory=dict)
    prune_source: int | None = None
    prune_layers: tuple[float, float] = MIDDLE
    unguided: tuple[int, ...] = ()
    refiner: Any = None
    refine_from: int | None = None
    measure_drift: bool = False

    def __post_init__(self) -> None:
        if self.skip_last < 0:
            raise ValueError(f"skip_last is {self.skip_last}; expected 0 or more scales")
        if (self.refiner is None) != (self.refine_from is None):
            raise ValueError("a refiner and refine_from, the scale it begins at, belong together; give both or none")
        if not (self.skip_last or self.prune or self.unguided or self.refiner is not None):
            raise ValueError("this acceleration leaves nothing out; set skip_last, prune, unguided or refiner")
        first, last = self.prune_layers
        if not 0 <= first < last <= 1:
            raise ValueError(f"prune_layers is {self.prune_layers}; expected rising fractions of the depth, 0 to 1")

    def at(self, grids: tuple[Grid, ...]) -> AppliedAcceleration:
        """Resolve this acceleration for a schedule.

        Raises:
            ValueError: a scale that the schedule does not have, or none left to generate.
        """
        total = len(grids)
        count = total - self.skip_last
        if count < 1:
            raise ValueError(f"skip_last={self.skip_last} leaves nothing of {total} scales to generate")
        prune = {_index(scale, total, "prune"): share for scale, share in self.prune.items()}
        prune = {scale: share for scale, share in prune.items() if scale < count}
        unguided = {_index(scale, total, "unguided") for scale in self.unguided}
        off = count
        while off > 0 and off - 1 in unguided:
            off -= 1
        handover = None if self.refine_from is None else _index(self.refine_from, total, "refine_from")
        pruning = None
        if prune:
            source = min(prune) - 1 if self.prune_source is None else _index(self.prune_source, total, "prune_source")
            pruning = TokenPruning(prune, source, grids, self.prune_layers)
        elif self.prune:
            raise ValueError(f"the pruned scales {sorted(self.prune)} are all skipped; prune earlier ones")
        if handover is not None and not 0 < handover < count:
            raise ValueError(f"the refiner begins at scale {handover}; expected 1 to {count - 1}")
        skipped = tuple(sorted({_index(scale, total, "prune") for scale in self.prune} - set(prune)))
        return AppliedAcceleration(count, frozenset(unguided), off, handover, pruning, skipped)


@dataclass(frozen=True)
class AppliedAcceleration:
    """A `ScaleAcceleration` on one schedule.

    Args:
        num_scales: scales that are generated.
        unguided: scales without guidance.
        guided_until: from this scale on the unconditional rows don't run.
        handover: the scale at which the refiner takes over, or None.
        pruning: to attach to the network that generates, or None.
        unpruned: scales that were to be pruned and are not generated at all.
    """

    num_scales: int
    unguided: frozenset[int]
    guided_until: int
    handover: int | None
    pruning: TokenPruning | None
    unpruned: tuple[int, ...] = ()

    def inactive(self, guided: bool) -> dict[str, str]:
        """Return the parts of the setting that leave nothing out, each with the reason.

        Args:
            guided: whether the call has a second branch.
        """
        found = {}
        if self.unguided and not guided:
            found["unguided"] = "the call has no guidance that could be left out"
        if self.unpruned:
            found["prune"] = f"the scales {list(self.unpruned)} are skipped, so nothing of them is pruned"
        return found


FASTVAR = ScaleAcceleration(skip_last=2, prune={-4: 0.4, -3: 0.5})
"""The published setting for Infinity at 1024 pixels (13 scales): the gaps are filled from the scale of 24 x 24."""


def _index(scale: int, total: int, name: str) -> int:
    """Return the index of a scale that may be counted from the end."""
    if not -total <= scale < total:
        raise ValueError(f"{name} names scale {scale}; the schedule has {total}, so expected {-total} to {total - 1}")
    return scale % total
