"""AdaRound: which of the two neighbouring values a weight takes is learned; for integers and floating-point formats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit.quant.formats.base import Format, Scales, grouped, ungrouped
from dit.quant.rounding.output_error import OutputError

ZETA, GAMMA = 1.1, -0.1
ITERATIONS = 300
LEARNING_RATE = 0.03
REGULARIZATION = 300.0
WARM_UP = 0.2
FIRST_BETA, LAST_BETA = 20.0, 2.0


def learn_directions(
    weight: Tensor,
    fmt: Format,
    group: int,
    scales: Scales,
    error: OutputError,
    iterations: int | None = None,
    lr: float | None = None,
    scale_aware: bool | None = None,
) -> Tensor:
    """Learn which weights are rounded up and which down (AdaRound, arXiv 2004.10568).

    A weight is below + h(V) * (above - below), h(V) = clip(sigmoid(V) * (zeta - gamma) + gamma, 0, 1) (equations 22 and
    23), and V is learned with Adam from the error of the output and a term that draws h to 0 and 1 (equation 24). In
    floating-point formats the distance of the neighbours differs within a group; there V = V' / distance is learned by
    V' (scale-aware AdaRound of FP4DiT, arXiv 2503.15465), the distance in units of its mean. Both terms are means over
    outputs, each relative to its error when rounded to nearest, so that lr fits layers of any size.

    Args:
        weight: (N, K) fp32.
        fmt: format of the weights.
        group: inputs that share a scale, 0 is the whole row.
        scales: of the weight in that format.
        error: of the output.
        iterations: steps of Adam; None is 300.
        lr: its rate; None is 0.03.
        scale_aware: whether V' is learned instead of V; None is for formats that aren't uniform.

    Returns:
        The rounded weight, (N, K), on the grid of the scales.
    """
    columns, iterations = weight.shape[1], iterations or ITERATIONS
    below, above = (ungrouped(one, columns) for one in fmt.neighbours(grouped(weight, group), scales))
    distance = above - below  # (N, K), 0 beyond the range
    fraction = ((weight - below) / torch.where(distance > 0, distance, 1)).clamp_(0, 1)
    unit = torch.ones_like(distance)
    if not fmt.uniform if scale_aware is None else scale_aware:
        unit = torch.where(distance > 0, distance, 1) / distance[distance > 0].mean().nan_to_num(1.0)
    reference = error(below + (fraction > 0.5) * distance).clamp(min=torch.finfo(torch.float32).tiny)  # (N,)
    learned = (_inverse_soft(fraction) * unit).requires_grad_()
    adam = torch.optim.Adam([learned], lr=lr or LEARNING_RATE)
    with torch.enable_grad():
        for iteration in range(iterations):
            soft = _soft(learned / unit)
            loss = (error(below + soft * distance) / reference).mean()
            beta = _beta(iteration / iterations)
            if beta is not None:
                loss = loss + REGULARIZATION * (1 - (2 * soft - 1).abs().pow(beta)).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    up = _soft((learned / unit).detach()) > 0.5
    return torch.where(up, above, below)


def _soft(value: Tensor) -> Tensor:
    """Return h, the part of the way from the value below to the one above."""
    return (torch.sigmoid(value) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def _inverse_soft(fraction: Tensor) -> Tensor:
    return torch.logit((fraction - GAMMA) / (ZETA - GAMMA))


def _beta(progress: float) -> float | None:
    """Return the exponent of the regularization, which falls with progress from 0 to 1; None before it begins."""
    if progress < WARM_UP:
        return None
    part = (progress - WARM_UP) / (1 - WARM_UP)
    return LAST_BETA + (FIRST_BETA - LAST_BETA) * (1 + math.cos(math.pi * part)) / 2
