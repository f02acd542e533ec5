"""Relevance of layers' outputs to the predictions, and relative errors of these outputs.

LRP-QViT (arXiv 2401.11243) gives layers bits by their relevance to the class that a network decides on: output times
gradient of the class. Networks that denoise decide on no class, but predict a tensor m, so the gradient is that of a
random projection of it: for v ~ N(0, I), the mean of (a_i d(v m)/da_i)^2 is a_i^2 |dm/da_i|^2, which is what a relative
error of 1 at the output a_i adds to the squared error of m, to first order (Hutchinson's estimator). One backward pass
does for all layers, where calling the network with each layer quantized takes a call for each format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.quant.recipes import GELUS
from dit.quant.roles import Role
from dit.quant.sensitivity_calls import GROUPS, Group, RecordedCall, Replay
from dit.quant.statistics import LayerStatistics

PROBES = 8
"""Random projections of each prediction."""


def relevances(replay: Replay, units: Sequence[Sequence[Role]], groups: Sequence[Group], seed: int = 0) -> np.ndarray:
    """Estimate the relevance of the layers' outputs to the guided predictions, and to what the groups' measures see.

    Args:
        replay: of recorded calls.
        units: layers.
        groups: of the units.
        seed: of the projections.

    Returns:
        Mean squared error per relative error of 1, (2, S, layers), in the order of the units.
    """
    group_of: list[Group] = [group for unit, group in zip(units, groups, strict=True) for _ in unit]
    roles = [role for unit in units for role in unit]
    generator = torch.Generator().manual_seed(seed)
    found = np.zeros((2, len(replay.segments), len(roles)))
    for number, part in enumerate(replay.segments):
        for calls in part.runs:
            found[:, number] += _of_step(replay, calls, roles, group_of, generator) / len(part.runs)
    return found


def _of_step(
    replay: Replay,
    calls: Sequence[RecordedCall],
    roles: Sequence[Role],
    group_of: Sequence[Group],
    generator: torch.Generator,
) -> np.ndarray:
    """Return the relevances of a step, (2, layers)."""
    found, outputs = np.zeros((2, len(roles))), [[] for _ in roles]
    with torch.enable_grad(), _kept_outputs(roles, outputs):
        parts = replay.predictions(calls, grad=True)
        views: list[tuple[Group | None, Tensor]] = [(None, replay.guided(parts))]
        for group in GROUPS:
            if group in group_of:
                views.append((group, replay.measured(parts, group)))
    flat = [(index, one) for index, kept in enumerate(outputs) for one in kept]
    tensors = [one for _, one in flat]
    for group, view in views:
        for _ in range(PROBES):
            probe = torch.randn(view.shape, generator=generator).to(view)
            gradients = torch.autograd.grad(view, tensors, probe, retain_graph=True, allow_unused=True)
            for (index, output), gradient in zip(flat, gradients, strict=True):
                if gradient is not None and group in (None, group_of[index]):
                    square = float((output.detach().float() * gradient.float()).square().sum())
                    found[0 if group is None else 1, index] += square / (PROBES * view.numel())
    return found


@contextmanager
def _kept_outputs(roles: Sequence[Role], outputs: Sequence[list[Tensor]]) -> Iterator[None]:
    """Collect the outputs of layers in a `with` block; gradients with respect to them are known."""

    def hook(kept: list[Tensor]) -> object:
        def keep(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.requires_grad_()
            kept.append(output)
            return output

        return torch.compiler.disable(keep)

    handles = [
        role.slot.linear.register_forward_hook(hook(kept))  # pyright: ignore[reportArgumentType]
        for role, kept in zip(roles, outputs, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def layer_errors(role: Role, quantized: nn.Module, statistics: LayerStatistics, sigmas: Sequence[float]) -> np.ndarray:
    """Return the squared relative errors of a quantized layer's output on the rows of a calibration.

    Where a GELU follows, errors are those behind it: it makes some of the output's numbers matter little, which is
    what FP4DiT (arXiv 2503.15465, section 4.1) chooses the levels of weights by.

    Args:
        role: the layer as it is.
        quantized: the same in few bits.
        statistics: of its inputs, with rows.
        sigmas: noise levels, S of them, as the statistics have them; each is that of the nearest bins, NaN that of all.

    Returns:
        (S,).

    Raises:
        ValueError: the statistics hold no rows.
    """
    plain = role.slot.linear
    rows = statistics.rows.to(plain.weight.device, plain.weight.dtype)  # (R, K)
    if not len(rows):
        raise ValueError("the statistics hold no rows; calibrate with rows=256")
    bias = torch.zeros(1, device=rows.device) if plain.bias is None else plain.bias.float()  # (N,)
    exact, found = F.linear(rows.float(), plain.weight.float()), quantized(rows).float() - bias  # (R, N)
    if role.after in GELUS:
        exact, found = F.gelu(exact + bias), F.gelu(found + bias)
    error = (found - exact).square().sum(1).cpu()  # (R,)
    signal = exact.square().sum(1).cpu()
    errors = []
    for sigma in sigmas:
        chosen = _near(statistics, sigma)  # (R,)
        errors.append(float(error[chosen].sum() / signal[chosen].sum().clamp(min=1e-30)))
    return np.array(errors)


def _near(statistics: LayerStatistics, sigma: float) -> Tensor:
    """Return which rows are of the bins that are nearest to a noise level, (R,)."""
    levels = statistics.sigmas[statistics.row_bins]  # (R,)
    known = torch.isfinite(levels)
    if not math.isfinite(sigma) or not bool(known.any()):
        return torch.ones_like(known)
    distance = torch.where(known, (levels - sigma).abs(), math.inf)
    return distance <= distance.min() + 1e-9
