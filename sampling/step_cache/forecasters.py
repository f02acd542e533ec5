"""Forecasters of skipped steps: weights of the steps that were computed.

Every forecast is a weighted sum of what was kept, so a forecaster is a function from *where* steps were computed and
where the forecast is wanted to weights: a few numbers, the same for every tensor, free of any device. Newest first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from dit.runtime.step_context import StepContext
from sampling.step_cache.profile import Profile

Variable = Literal["sigma", "step"]
Weights = Sequence[float | Tensor]


class Anchor(NamedTuple):
    """A step that was computed."""

    step: int
    sigma: float


class Forecaster(ABC):
    """Weights of the computed steps.

    Attributes:
        depth: how many computed steps are kept.
    """

    depth: int = 1

    @abstractmethod
    def weights(self, anchors: Sequence[Anchor], here: StepContext, memory: dict[str, Any]) -> Weights | None:
        """Return weights of the newest anchors, newest first; None if there are too few and the step must be computed.

        One more than there are anchors is that of what enters the region now, where the region adds to its input.

        Args:
            anchors: steps that were computed, newest first.
            here: where the forecast is wanted.
            memory: of the gate and this branch, for those that mix by what a gate measured.
        """


@dataclass(frozen=True)
class Reuse(Forecaster):
    """The newest computed step again: what FORA, TeaCache, FBCache and MagCache do."""

    @property
    def depth(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """One step."""
        return 1

    def weights(self, anchors: Sequence[Anchor], here: StepContext, memory: dict[str, Any]) -> Weights | None:
        """Use the newest computed step again."""
        return (1.0,) if anchors else None


@dataclass(frozen=True)
class Newton(Forecaster):
    """The polynomial through the newest `order + 1` computed steps.

    In sigma it is exact for predictions that are polynomials of the noise level, whatever the grid; where sigma is
    unknown or repeats (two calls a step), the step index stands in. With fewer steps the order is lower.

    Args:
        order: of the polynomial; 0 is reuse.
        variable: along what.
    """

    order: int = 1
    variable: Variable = "sigma"

    def __post_init__(self) -> None:
        if not 0 <= self.order <= 4:
            raise ValueError(f"order {self.order} is outside 0 to 4 (higher ones only amplify noise)")

    @property
    def depth(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`order + 1` steps."""
        return self.order + 1

    def weights(self, anchors: Sequence[Anchor], here: StepContext, memory: dict[str, Any]) -> Weights | None:
        """Return the Lagrange weights of the computed steps."""
        points, now = positions(anchors[: self.depth], here, self.variable)
        return lagrange(points, now) if points else None


@dataclass(frozen=True)
class Taylor(Forecaster):
    """TaylorSeer (arXiv 2503.06923, eq. 5-6): a Taylor series in step indices with differences for derivatives.

    Derivatives are backward differences over the distance of the two newest computed steps, nested to `order`. Unlike
    `Newton` of order 2 and up it is no interpolation: the series takes differences for derivatives at the newest step.

    Args:
        order: of the series.
        damping: 1 is TaylorSeer; below 1 the k-th derivative is weighted by HiCache's scaled Hermite polynomial
            (arXiv 2508.16984) instead of dt^k: `s^k H_k(s dt)` with H_1 = x and H_2 = x^2 - 1.
    """

    order: int = 1
    damping: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.order <= 4 or not 0 < self.damping <= 1:
            raise ValueError(f"need order in 0 to 4 and damping in (0, 1], got {self.order} and {self.damping}")

    @property
    def depth(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`order + 1` steps."""
        return self.order + 1

    def weights(self, anchors: Sequence[Anchor], here: StepContext, memory: dict[str, Any]) -> Weights | None:
        """Return the coefficients of the series in the computed steps."""
        if not anchors:
            return None
        kept = anchors[: self.depth]
        count = len(kept)
        rows = [[float(i == j) for j in range(count)] for i in range(count)]  # derivative 0 at each anchor
        total, ahead = rows[0], float(here.step - kept[0].step)
        for order in range(1, count):
            gaps = [kept[i].step - kept[i + 1].step for i in range(count - order)]
            rows = [
                [(a - b) / gap for a, b in zip(rows[i], rows[i + 1], strict=True)] for i, gap in enumerate(gaps)
            ]  # derivative of this order at each anchor
            factor = self._basis(order, ahead) / math.factorial(order)
            total = [old + factor * new for old, new in zip(total, rows[0], strict=True)]
        return tuple(total)

    def _basis(self, order: int, x: float) -> float:
        if self.damping == 1.0:
            return x**order
        scaled = self.damping * x
        before, value = 1.0, scaled
        for k in range(1, order):  # H_{k+1} = x H_k - k H_{k-1}
            before, value = value, scaled * value - k * before
        return self.damping**order * value


@dataclass(frozen=True)
class FoCa(Forecaster):
    """FoCa (arXiv 2508.16211): step by step, the mean of the slope at the newest computed step and the running slope.

    The slope at the anchor is that of the two newest computed steps; the running one is that of the last two values,
    forecast or computed (Heun's rule). Beyond `horizon` steps the change fades as 1 / distance. The recursion begins
    at the oldest of `depth` computed steps.

    Args:
        horizon: steps until the change fades.
    """

    horizon: float = 3.0

    @property
    def depth(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Four steps."""
        return 4

    def weights(self, anchors: Sequence[Anchor], here: StepContext, memory: dict[str, Any]) -> Weights | None:
        """Run the recursion of FoCa, on weights instead of tensors."""
        kept = list(reversed(anchors[: self.depth]))  # oldest first
        if not kept:
            return None
        units = [[float(i == j) for j in range(len(kept))] for i in range(len(kept))]
        full, value, before = [units[0]], units[0], None
        anchor_at, index = kept[0].step, 1
        for step in range(kept[0].step + 1, here.step + 1):
            if index < len(kept) and step == kept[index].step:
                before, value = value, units[index]
                full, anchor_at, index = [*full, value], step, index + 1
            else:
                before, value = value, self._ahead(full, value, before, step - anchor_at)
        return tuple(reversed(value))

    def _ahead(
        self, full: list[list[float]], value: list[float], before: list[float] | None, ahead: float
    ) -> list[float]:
        if len(full) < 2 or before is None:
            return full[-1]
        reach = min(ahead, self.horizon) / 2 * min(1.0, self.horizon / ahead)
        slopes = zip(full[-1], full[-2], value, before, strict=True)
        return [new + reach * ((new - old) + (now - then)) for new, old, now, then in slopes]


@dataclass(frozen=True)
class TrajectoryAlignment(Forecaster):
    """DiCache's trajectory alignment (arXiv 2508.17356): between the two newest steps as far as the probe has gone.

    The fraction, `mean |p - p''| / mean |p' - p''|` of the probe's residuals now, at the newest and at the second
    computed step, comes from a `Probe` gate.

    Args:
        low: least fraction.
        high: largest fraction.
    """

    low: float = 1.0
    high: float = 1.5

    @property
    def depth(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Two steps."""
        return 2

    def weights(self, anchors: Sequence[Anchor], here: StepContext, memory: dict[str, Any]) -> Weights | None:
        """Return the fraction of the newest step and the rest for the second newest."""
        if not anchors:
            return None
        share = memory.get("share")
        if len(anchors) < 2 or share is None:
            return (1.0,)
        share = min(max(share, self.low), self.high)
        return (share, 1.0 - share)


@dataclass(frozen=True)
class Gram(Forecaster):
    """Least squares by a profile's Gram matrix: the weights that were best in the calibration runs.

    Where the profile is of the blocks, what enters them at the forecast step is weighted too.

    Args:
        profile: of this model, see `calibrate_budget`.
        points: how many computed steps are combined.
        ridge: added to the diagonal, as a fraction of its mean.
    """

    profile: Profile
    points: int = 2
    ridge: float = 1e-5

    @property
    def depth(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`points` steps."""
        return self.points

    def weights(self, anchors: Sequence[Anchor], here: StepContext, memory: dict[str, Any]) -> Weights | None:
        """Look up the least-squares weights in the profile."""
        if not anchors:
            return None
        sigmas = [anchor.sigma for anchor in anchors[: self.points]]
        return self.profile.weights(sigmas, here.sigma, self.ridge)


def positions(anchors: Sequence[Anchor], here: StepContext, variable: Variable) -> tuple[list[float], float]:
    """Return the positions of anchors and forecast on the axis; step indices where sigmas repeat or are unknown."""
    sigmas = [anchor.sigma for anchor in anchors]
    if variable == "sigma" and math.isfinite(here.sigma + sum(sigmas)) and len(set(sigmas)) == len(sigmas):
        return sigmas, here.sigma
    return [float(anchor.step) for anchor in anchors], float(here.step)


def lagrange(points: Sequence[float], now: float) -> tuple[float, ...]:
    """Return the weights of the polynomial through the points, at `now`."""
    basis: Callable[[int], float] = lambda i: math.prod(  # noqa: E731
        (now - other) / (points[i] - other) for j, other in enumerate(points) if j != i
    )
    return tuple(basis(i) for i in range(len(points)))
