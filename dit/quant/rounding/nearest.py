"""The scales that have the least squared error when weights are rounded to the nearest value."""

from __future__ import annotations

import torch
from torch import Tensor

from dit.quant.formats.base import Format, Scales


def least_squares_scales(groups: Tensor, fmt: Format, importance: Tensor | None = None) -> Scales:
    """Return the scales of the least squared error.

    Formats that do not search themselves are tried with the whole range and each of their `clips`; each group keeps the
    best.

    Args:
        groups: (N, G, g) fp32.
        fmt: format of the weights.
        importance: weights of the squared errors that broadcast to (N, G, g), such as mean squares of the inputs.
    """
    scales = fmt.scales(groups, importance=importance)
    if fmt.searches:
        return scales
    least = _error(groups, fmt, scales, importance)
    clip = torch.ones_like(least)
    for factor in fmt.clips:
        error = _error(groups, fmt, fmt.scales(groups, factor), importance)
        better = error < least
        least, clip = torch.where(better, error, least), torch.where(better, factor, clip)
    return fmt.scales(groups, clip)


def _error(groups: Tensor, fmt: Format, scales: Scales, importance: Tensor | None) -> Tensor:
    """Return the squared error of each group, (N, G, 1), in units of its largest weight, so as not to overflow."""
    unit = groups.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)  # (N, G, 1)
    wrong = ((fmt.snap(groups, scales) - groups) / unit).square_()
    if importance is not None:
        wrong *= importance
    return wrong.sum(-1, keepdim=True)
