"""What a plan says of a layer: the choice of each group of heads, and the guards that keep attention dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

from torch import nn

from dit.attention.corrections import Correction, correction
from dit.attention.kernels.contract import kernel_names
from dit.attention.patterns import pattern_info

Sink = tuple[Literal["frames", "blocks"], int, int]
FIRST_FRAME: Sink = ("frames", 0, 1)
"""All queries look at the whole first frame, as published methods need it where that is encoded by itself."""


@dataclass(frozen=True)
class Choice:
    """What some heads compute.

    Args:
        pattern: one of `dit.attention.patterns.pattern_names()`; "dense" is the network's own attention.
        params: of the pattern; a value `TensorName(name)` stands for one of the plan's tensors.
        correction: one of `dit.attention.corrections.correction_names()`.
        correction_params: of the correction.
        kernel: "auto" or one of `dit.attention.kernels.contract.kernel_names()`.

    Raises:
        ValueError: an unknown name or parameter.
    """

    pattern: str
    params: Mapping[str, Any] = field(default_factory=dict)
    correction: str = "none"
    correction_params: Mapping[str, Any] = field(default_factory=dict)
    kernel: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", {name: _frozen(value) for name, value in self.params.items()})
        object.__setattr__(
            self, "correction_params", {name: _frozen(value) for name, value in self.correction_params.items()}
        )
        known = pattern_info(self.pattern).parameters
        unknown = sorted(set(self.params) - set(known))
        if unknown:
            accepted = ", ".join(known) or "no parameters"
            raise ValueError(f"pattern {self.pattern!r} takes no {', '.join(unknown)}; it takes {accepted}")
        _ = self.fix  # raises for what is unknown
        if self.kernel != "auto" and self.kernel not in kernel_names():
            raise ValueError(f"kernel is {self.kernel!r}; use 'auto' or one of {', '.join(kernel_names())}")

    @property
    def is_dense(self) -> bool:
        """Whether it is the network's own attention."""
        return self.pattern == "dense"

    @property
    def follows_step(self) -> bool:
        """Whether the pattern changes with the number of the step."""
        return pattern_info(self.pattern).follows_step(self.params)

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """What tells choices apart; hashable."""
        return (
            self.pattern,
            tuple(sorted(self.params.items())),
            self.correction,
            tuple(sorted(self.correction_params.items())),
            self.kernel,
        )

    @cached_property
    def fix(self) -> Correction:
        """The correction."""
        return correction(self.correction, **self.correction_params)

    @property
    def launch(self) -> tuple[Any, ...]:
        """What groups of heads must have in common to be computed together; hashable."""
        return self.correction, tuple(sorted(self.correction_params.items())), self.kernel

    def __hash__(self) -> int:
        """Return the hash of the key."""
        return self._hash

    def __str__(self) -> str:
        """Name the pattern with its parameters, and the correction."""
        return self._text

    @cached_property
    def _hash(self) -> int:
        return hash(self.key)

    @cached_property
    def _text(self) -> str:
        params = ", ".join(f"{name}={value}" for name, value in self.params.items())
        fixed = "" if self.correction == "none" else f" + {self.correction}"
        return f"{self.pattern}({params}){fixed}"


DENSE = Choice("dense")

AMOUNTS = ("density", "keep")
"""Parameters of patterns that say how much is computed."""


def amount_of(pattern: str) -> str:
    """Return the name of the parameter that says how much a pattern computes; empty if it has none."""
    known = pattern_info(pattern).parameters
    return next((name for name in AMOUNTS if name in known), "")


class TensorName(NamedTuple):
    """A parameter that is a tensor of the plan."""

    tensor: str


@dataclass(frozen=True)
class Guards:
    """When attention stays dense whatever the plan says, and what is exact whatever the pattern says.

    Text and other tokens that are not of the grid are always exact, as queries and as keys.

    Args:
        sigma_range: lowest and highest noise level at which attention is sparse; None is all.
        dense_first: steps at the beginning that are dense: a number, or below 1 a fraction of the steps.
        dense_last: likewise at the end.
        dense_layers: layers that are dense; negative numbers count from the last.
        min_tokens: sequences of fewer tokens are dense.
        sinks: ("frames", first, end) or ("blocks", first, end) of keys that all queries look at, besides what the
            pattern says; blocks are those of visual tokens in the pattern's order.
        sink_rows: whether the queries of the sinks look at all keys too.

    Raises:
        ValueError: an empty range, or a negative number.
    """

    sigma_range: tuple[float, float] | None = None
    dense_first: float = 0
    dense_last: float = 0
    dense_layers: tuple[int, ...] = ()
    min_tokens: int = 0
    sinks: tuple[Sink, ...] = ()
    sink_rows: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        object.__setattr__(self, "sinks", tuple((kind, int(first), int(end)) for kind, first, end in self.sinks))
        if self.sigma_range is not None:
            low, high = (float(level) for level in self.sigma_range)
            object.__setattr__(self, "sigma_range", (low, high))
            if not 0 <= low <= high:
                raise ValueError(f"sigma_range is {self.sigma_range}; give the lower level first, both at least 0")
        if min(self.dense_first, self.dense_last, self.min_tokens) < 0:
            raise ValueError(
                f"dense_first, dense_last and min_tokens must not be negative, got {self.dense_first}, "
                f"{self.dense_last}, {self.min_tokens}"
            )
        for kind, first, end in self.sinks:
            if kind not in ("frames", "blocks") or not 0 <= first < end:
                raise ValueError(f"sink {(kind, first, end)} is none; use ('frames' or 'blocks', first, end)")

    @property
    def needs_step(self) -> bool:
        """Whether they ask for the step of a call."""
        return self.sigma_range is not None or bool(self.dense_first or self.dense_last)

    def dense_step(self, step: int, num_steps: int, sigma: float) -> str:
        """Return why a step is dense; empty if it isn't."""
        first, last = (_steps(amount, num_steps) for amount in (self.dense_first, self.dense_last))
        if step < first or step >= num_steps - last:
            return "steps at the ends are dense"
        if self.sigma_range is not None and not self.sigma_range[0] <= sigma <= self.sigma_range[1]:
            return "noise levels outside of sigma_range are dense"
        return ""

    def dense_layer(self, layer: int, count: int) -> bool:
        """Return whether a layer is dense."""
        return layer in self.dense_layers or layer - count in self.dense_layers


class Group(NamedTuple):
    """Heads of a layer that compute the same."""

    choice: Choice
    heads: tuple[int, ...] | None
    """None: all."""

    def members(self, count: int) -> tuple[int, ...]:
        """Return the heads of a layer that has so many."""
        return tuple(range(count)) if self.heads is None else self.heads


class StaysDense(Exception):
    """A call can't be, or should not be, sparse; the text is the reason that is counted."""


class Plan(Protocol):
    """What the mechanism asks a plan; `dit.attention.plan.AttentionPlan` documents it."""

    @property
    def guards(self) -> Guards:
        """Guards of the plan."""
        ...

    @property
    def grid(self) -> tuple[int, int, int] | None:
        """The only grid that it is for."""
        ...

    @property
    def needs_step(self) -> bool:
        """Whether the step of a call decides anything."""
        ...

    @property
    def is_uniform(self) -> bool:
        """Whether it is one choice for everything."""
        ...

    @property
    def bins(self) -> int:
        """How many ranges of noise levels it tells apart."""
        ...

    def bin_of(self, sigma: float | None) -> int:
        """Return the number of the range of noise levels in which a level is; all in one resolve alike."""
        ...

    def resolve(self, sigma: float | None, layer: int, heads: int) -> tuple[Group, ...]:
        """Return what a layer computes."""
        ...

    def params_of(self, choice: Choice) -> dict[str, Any]:
        """Return the parameters of the pattern of a choice."""
        ...

    def check_layers(self, layers: int) -> None:
        """Refuse a network of another number of layers."""
        ...

    def check_model(self, model: nn.Module, any_weights: bool = False) -> None:
        """Refuse another network."""
        ...


def _frozen(value: Any) -> Any:
    """Return a value with tuples in place of lists, so that it can be compared and hashed."""
    if isinstance(value, TensorName):
        return value
    return tuple(_frozen(one) for one in value) if isinstance(value, list | tuple) else value


def _steps(amount: float, num_steps: int) -> int:
    """Return a number of steps that is given as such, or below 1 as a fraction."""
    return int(amount) if amount >= 1 else round(amount * num_steps)
