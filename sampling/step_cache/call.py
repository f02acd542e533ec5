"""One call of a network under a step cache, and what is kept of its branch between the steps of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from dit.runtime.hooks import Attachment
from dit.runtime.step_context import StepContext
from sampling.step_cache.forecasters import Anchor, Forecaster, Weights
from sampling.step_cache.gates import Gate, Signal
from sampling.step_cache.values import Rebuild, Values, flatten, mix


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
    """State of one branch of one network in a run; tensors are in the state store, but the gate's."""

    memory: dict[str, Any] = field(default_factory=dict)
    anchors: list[Anchor] = field(default_factory=list)
    shapes: tuple = ()
    last_step: int = -1
    skips: int = 0
    rebuild: dict[str, Rebuild] = field(default_factory=dict)


@dataclass
class Call:
    """One call of a network under the cache.

    Attributes:
        here: where it is.
        state: of its branch.
        computed: the decision; None until it is made.
        weights: of the forecast.
        signal: what the gate observed.
    """

    cache: Cache
    attachment: Attachment
    component: str
    here: StepContext
    state: BranchState
    computed: bool | None = None
    weights: Weights = ()
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
        depth = self.cache.forecaster.depth
        old = self.history(slot) or ()
        self.attachment.state.set(self.cache.name, self._layer(slot), self.here.branch, (values, *old[: depth - 1]))

    def forecast(self, slot: str, base: Values | None = None) -> Any:
        """Return the forecast of an output that was kept before.

        Args:
            slot: whose output.
            base: tensors that the difference is added to.
        """
        # weighted sum of the computed steps
        known = len(self.state.anchors)
        values, more = mix(self.history(slot), self.weights[:known]), self.weights[known:]
        # add back what was subtracted from them
        if base is not None:
            share = 1.0 + sum(more)
            values = tuple(value + start * share for value, start in zip(values, base, strict=True))
        return self.state.rebuild[slot](values)

    def history(self, slot: str) -> Any:
        """Return what was kept of a slot, newest first."""
        return self.attachment.state.get(self.cache.name, self._layer(slot), self.here.branch)

    def _layer(self, slot: str) -> str:
        return f"{self.component}.{slot}"


def _less(tensors: Values, base: Values) -> Values:
    return tuple((tensor - start).detach() for tensor, start in zip(tensors, base, strict=True))
