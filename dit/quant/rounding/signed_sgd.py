"""AutoRound: small shifts of the weights before rounding, and their ranges, learned by the sign of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from dit.quant.formats.base import Format, Scales, grouped, ungrouped
from dit.quant.rounding.output_error import OutputError

ITERATIONS = 200
CLIP_RANGE = (0.5, 1.5)
"""Of the factors that are learned."""
TINY = torch.finfo(torch.float32).tiny


def learn_shifts(
    weight: Tensor,
    fmt: Format,
    group: int,
    scales: Scales,
    error: OutputError,
    iterations: int | None = None,
    lr: float | None = None,
) -> tuple[Tensor, Scales]:
    """Learn shifts and ranges by signed gradient descent (AutoRound, arXiv 2309.05516, equations 3 to 6).

    Weights are rounded after V times the distance of the neighbouring values was added, V in -0.5 to 0.5, with the step
    times a factor of its group; the paper has two factors, for the ends of the range. V and factor go against the sign
    of their gradient at a rate that falls to 0; gradients pass straight through rounding. Each output keeps the best
    weights that were seen.

    Args:
        weight: (N, K) fp32.
        fmt: format of the weights.
        group: inputs that share a scale, 0 is the whole row.
        scales: to start from.
        error: of the output.
        iterations: steps; None is 200.
        lr: first rate; None is 1 / iterations.

    Returns:
        The rounded weight (N, K) and its scales.
    """
    columns, iterations = weight.shape[1], iterations or ITERATIONS
    groups = grouped(weight, group)
    below, above = fmt.neighbours(groups, scales)
    distance = above - below  # (N, G, g)
    first_clip = scales.step / fmt.scales(groups, clip=1.0).step  # (N, G, 1)
    shift, clip = torch.zeros_like(groups), torch.ones_like(first_clip)
    best = ungrouped(fmt.snap(groups, scales), columns)
    best_scales, least = scales, error(best)
    rate = lr or 1 / iterations
    for iteration in range(iterations):
        shift.requires_grad_()
        clip.requires_grad_()
        now = scales if iteration == 0 else fmt.scales(groups, clip=first_clip * clip.detach())
        with torch.enable_grad():
            values = _straight_through(groups, fmt, now, shift * distance * clip.detach(), scales.step * clip)
            rounded = ungrouped(values, columns)
            errors = error(rounded)
            by_shift, by_clip = torch.autograd.grad((errors / least.clamp(min=TINY)).sum(), [shift, clip])
        better = errors.detach() < least
        least = torch.where(better, errors.detach(), least)
        best = torch.where(better[:, None], rounded.detach(), best)
        best_scales = now.where(better, best_scales)
        now_rate = rate * (1 - iteration / iterations)
        shift = (shift.detach() - now_rate * by_shift.sign()).clamp_(-0.5, 0.5)
        clip = (clip.detach() - now_rate * by_clip.sign()).clamp_(*CLIP_RANGE)
    return best, best_scales


def _straight_through(groups: Tensor, fmt: Format, scales: Scales, shift: Tensor, step: Tensor) -> Tensor:
    """Round shifted weights; gradients reach the shift inside the range and the step everywhere.

    Args:
        groups: (N, G, g).
        fmt: format of the weights.
        scales: to round with.
        shift: (N, G, g), added before rounding; it grows with the step.
        step: (N, G, 1), the step that is learned; its value is not used, the scales have theirs.

    Returns:
        (N, G, g), the values that `fmt.snap` gives; as a function of step it is step * code.
    """
    with torch.no_grad():
        shifted = groups + shift
        values = fmt.snap(shifted, scales)
        ends = torch.tensor([-torch.inf, torch.inf], device=groups.device).expand(*groups.shape[:2], 2)
        lowest, highest = fmt.snap(ends, scales).unsqueeze(-2).unbind(-1)  # (N, G, 1) each
        inside = (shifted >= lowest) & (shifted <= highest)
    by_step = torch.where(inside, values - groups, values) / scales.step
    return values + torch.where(inside, shift - shift.detach(), 0) + by_step * (step - step.detach())
