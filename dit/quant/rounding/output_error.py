"""The error of a layer's output that a rounded weight causes, which adaptive rounding makes small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.quant.rounding.inputs import DAMPING, TINY, Inputs, share_of_noise

MOST_ROWS = 1024
"""Rows beyond which the error behind a function is not worth its time; for callers, who choose them."""


@dataclass(frozen=True, eq=False)
class Behind:
    """The error behind a function that follows the layer, on a sample of inputs.

    Attributes:
        inputs: (R, K), what the rounded layer is given.
        target: (R, N), what `after` is to return for them.
        after: elementwise, (R, N) -> (R, N).
        share: (N,), how much of each output's error is this one; the rest is that of the output itself.
        slope: (N,), mean square of the function's derivative, in whose units the output's own error then is.
    """

    inputs: Tensor
    target: Tensor
    after: Callable[[Tensor], Tensor]
    share: Tensor
    slope: Tensor

    def mixed(self, rounded: Tensor, own: Tensor) -> Tensor:
        """Return the error of each output, (N,), of a weight (N, K) whose outputs have the errors `own` (N,)."""
        behind = (self.after(self.inputs @ rounded.T) - self.target).square().mean(0)
        return self.share * behind + (1 - self.share) * self.slope * own


@dataclass(frozen=True, eq=False)
class OutputError:
    """Mean squared error of each output of a linear layer, up to a factor.

    Attributes:
        weight: (N, K) fp32, the weight before rounding.
        inputs: second moments of the inputs.
        damping: what the squared error of each weight counts besides.
        behind: the error behind a function that follows the layer, or None.
    """

    weight: Tensor
    inputs: Inputs
    damping: float
    behind: Behind | None = None

    @classmethod
    def of(cls, weight: Tensor, inputs: Inputs) -> OutputError:
        """Make the error of a layer without a function behind it."""
        return cls(weight, inputs, DAMPING * inputs.power.mean().item())

    def __call__(self, rounded: Tensor) -> Tensor:
        """Return the error of each output, (N,), of a weight (N, K); gradients flow to the weight."""
        difference = rounded - self.weight
        fixed = difference.detach()
        slope = self.inputs.times(fixed) + self.damping * fixed  # half the gradient: one product gives both
        own = (2 * difference * slope - fixed * slope).sum(1)
        return own if self.behind is None else self.behind.mixed(rounded, own)


def error_behind(weight: Tensor, rows: Tensor, seen: Tensor, after: Callable[[Tensor], Tensor]) -> Behind:
    """Describe the error behind a function, and decide for each output how far its sample can be trusted.

    A function such as GELU counts some inputs more than others, by the square of its derivative. Each output then has
    second moments of its own, which need far more rows than those that all share. The share of the error behind the
    function is that part of the difference which isn't noise of the sample: near 0 where there are fewer rows than
    inputs.

    Args:
        weight: (N, K) fp32.
        rows: (R, K) sample inputs.
        seen: (R, K), what the layer is given instead, such as their quantized values.
        after: elementwise, (R, N) -> (R, N).

    Raises:
        ValueError: `after` returns another shape, or has no derivative.
    """
    outputs = (rows @ weight.T).requires_grad_()
    with torch.enable_grad():
        target = after(outputs)
        if target.shape != outputs.shape or not target.requires_grad:
            raise ValueError(
                f"after made {tuple(target.shape)} of outputs {tuple(outputs.shape)}; use an elementwise function "
                "that torch can differentiate"
            )
        derivative = torch.autograd.grad(target.sum(), outputs)[0].square()  # (R, N)
    slope = derivative.mean(0)
    excess = derivative / slope.clamp(min=TINY) - 1  # (R, N), how much more than on average a row counts
    scaled = rows * rows.square().mean(0).clamp(min=TINY).rsqrt()
    alike = (scaled @ scaled.T).square()  # (R, R)
    of_means = ((alike @ excess) * excess).sum(0) / len(rows) ** 2
    of_squares = (excess.square() * scaled.square().sum(1).square()[:, None]).mean(0)
    share = 1 - share_of_noise(of_squares, of_means, len(rows))
    return Behind(seen, target.detach(), after, share, slope)
