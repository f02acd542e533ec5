"""One call of a network under a step cache, and what is kept of its branch between the steps of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dit.runtime.hooks import Attachment
from dit.runtime.step_context import StepContext
from sampling.step_cache.forecasters import Anchor, Forecaster, Weights
from sampling.step_cache.gates import Gate, Signal
from sampling.step_cache.values import Rebuild, Values, flatten, mix

LEAD = "cond"
"""The branch that is called at every step where the other is left out at some."""


class Cache(Protocol):
    """What calls and regions ask of the cache that they belong to; see `engine.StepCache`."""

    name: str
    gate: Gate
    forecaster: Forecaster

    def decide(self, call: Call) -> bool:
        """Return whether the call is computed."""
        ...

    def keep(self, call: Call, slot: str, output: Any, values: Values, base: Values | None) -> None:
        """Keep what a computed step gave, for forecasts."""
        ...

    def set_residual_cost(self, component: str, share: float) -> None:
        """Set the fraction of a network's work that a forecast step still does."""
        ...


@dataclass
class BranchState:
    """State of one branch of one network in a run; tensors are in the state store, but the gate's.

    Attributes:
        memory: of the gate.
        anchors: computed steps, newest first, by the branches that calls consist of.
        shapes: of the inputs, by the branch of the call.
        last_step: of the newest call.
        skips: forecasts in a row.
        rebuild: what makes outputs of tensors, by slot.
    """

    memory: dict[str, Any] = field(default_factory=dict)
    anchors: dict[str, list[Anchor]] = field(default_factory=dict)
    shapes: dict[str, tuple] = field(default_factory=dict)
    last_step: int = -1
    skips: int = 0
    rebuild: dict[str, Rebuild] = field(default_factory=dict)


@dataclass
class Call:
    """One call of a network under the cache.

    Attributes:
        here: where it is.
        state: of its branch.
        parts: branches that its batch consists of, in order. What is kept of a call for both branches serves later
            calls for one of them, and the other way round; where branches are never called apart there is one part.
        computed: the decision; None until it is made.
        weights: of the forecast, by part.
        signal: what the gate observes, of the whole batch.
    """

    cache: Cache
    attachment: Attachment
    component: str
    here: StepContext
    state: BranchState
    parts: tuple[str, ...]
    computed: bool | None = None
    weights: dict[str, Weights] = field(default_factory=dict)
    signal: Signal = None

    def decide(self, signal: Signal = None) -> bool:
        """Decide once; return whether the step is computed."""
        if self.computed is None:
            self.signal = signal
            self.computed = self.cache.decide(self)
        return self.computed

    def keep(self, slot: str, output: Any, base: Values | None = None) -> None:
        """Keep a computed output for forecasts.

        Args:
            slot: whose output it is.
            output: any structure of tensors.
            base: tensors that are taken off the output's, where the difference is what is forecast.
        """
        tensors, self.state.rebuild[slot] = flatten(output)
        values = tuple(tensor.detach().clone() for tensor in tensors) if base is None else _less(tensors, base)
        self.cache.keep(self, slot, output, values, base)

    def push(self, slot: str, values: Values) -> None:
        """Push values in front of those of earlier steps; keep as many as the forecaster combines."""
        store, depth = self.attachment.state, self.cache.forecaster.depth
        for part, own in zip(self.parts, split(values, len(self.parts)), strict=True):
            old = store.get(self.cache.name, self._layer(slot), part) or ()
            store.set(self.cache.name, self._layer(slot), part, (own, *old[: depth - 1]))

    def forecast(self, slot: str, base: Values | None = None) -> Any:
        """Return the forecast of an output that was kept before.

        Args:
            slot: whose output.
            base: tensors that the difference is added to.
        """
        count = len(self.parts)
        bases = [None] * count if base is None else split(base, count)
        found = [self._forecast(slot, *one) for one in zip(self.parts, bases, strict=True)]
        return self.state.rebuild[slot](join(found))

    def _forecast(self, slot: str, part: str, base: Values | None) -> Values:
        # weighted sum of the computed steps
        known = len(self.state.anchors[part])
        history = self.attachment.state.get(self.cache.name, self._layer(slot), part)
        values, more = mix(history, self.weights[part][:known]), self.weights[part][known:]
        # add back what was subtracted from them
        if base is not None:
            share = 1.0 + sum(more)
            values = tuple(value + start * share for value, start in zip(values, base, strict=True))
        return values

    def newest(self, slot: str) -> Values:
        """Return what was kept last of a slot."""
        return join([self.attachment.state.get(self.cache.name, self._layer(slot), part)[0] for part in self.parts])

    def lead(self, tensors: Any) -> Any:
        """Return the rows of the branch that gates observe, of tensors that are as long as the batch."""
        if len(self.parts) == 1:
            return tensors
        if isinstance(tensors, torch.Tensor):
            return tensors.chunk(len(self.parts))[self.parts.index(LEAD)]
        return tuple(map(self.lead, tensors)) if isinstance(tensors, tuple | list) else tensors

    def _layer(self, slot: str) -> str:
        return f"{self.component}.{slot}"


def split(values: Values, parts: int) -> list[Values]:
    """Return the values of each part of a batch: views of tensors (parts * B, ...); scalars belong to every part."""
    if parts == 1:
        return [values]
    pieces = [tensor.chunk(parts) if tensor.ndim else (tensor,) * parts for tensor in values]
    return list(zip(*pieces, strict=True))


def join(parts: list[Values]) -> Values:
    """Return the values of a whole batch; the reverse of `split`."""
    return parts[0] if len(parts) == 1 else tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))


def _less(tensors: Values, base: Values) -> Values:
    return tuple((tensor - start).detach() for tensor, start in zip(tensors, base, strict=True))
