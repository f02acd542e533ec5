"""Paths from noise to data that a guided model takes in many small steps: what a few-step student learns from."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sampling.diffusion_targets import NoiseProcess
from sampling.objectives import shift_sigmas

Predict = Callable[[Tensor, Tensor, Sequence[Any]], Tensor]
"""(noisy (B, ...), timesteps (B,), arguments of each sample) -> velocity (B, ...)."""


def teacher_sigmas(start: float, end: float, substeps: int, shift: float) -> Tensor:
    """Return noise levels between two of the student's, evenly spread before the shift, (substeps + 1,)."""
    even = torch.tensor([start, end], dtype=torch.float64)
    plain = even / (shift - (shift - 1) * even)  # the inverse of `shift_sigmas`
    return shift_sigmas(torch.linspace(float(plain[0]), float(plain[1]), substeps + 1, dtype=torch.float64), shift)


@torch.no_grad()
def guided_path(
    predict: Predict,
    process: NoiseProcess,
    noise: Tensor,
    levels: Tensor,
    substeps: int,
    guidance: float,
    conditional: Sequence[Any],
    unconditional: Sequence[Any],
) -> Tensor:
    """Follow a guided model from noise to data by Heun's method, and note where it is at the student's levels.

    Args:
        predict: The model.
        process: Its noise process, a flow.
        noise: (B, ...).
        levels: Of the student, (S + 1,), falling.
        substeps: Steps of the model for one of the student.
        guidance: Scale of classifier-free guidance; 1 or less calls only the conditional branch.
        conditional: Arguments of the network for the prompts, of each sample.
        unconditional: Those for no prompt, of each sample.

    Returns:
        (S + 1, B, ...); the first is the noise.
    """

    def velocity(sample: Tensor, sigma: Tensor) -> Tensor:
        times = process.timesteps(sigma.expand(len(sample)))  # (B,)
        cond = predict(sample, times, conditional)
        if guidance <= 1:
            return cond
        uncond = predict(sample, times, unconditional)
        return uncond + guidance * (cond - uncond)

    path, sample = [noise], noise
    for start, end in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        for one, two in teacher_sigmas(start, end, substeps, process.shift).unfold(0, 2, 1):
            first = velocity(sample, one)
            ahead = sample + float(two - one) * first
            # At the very end there is nothing left to correct with: the network isn't asked at level 0.
            slope = first if float(two) == 0 else (first + velocity(ahead, two)) / 2
            sample = sample + float(two - one) * slope
        path.append(sample)
    return torch.stack(path)  # (S + 1, B, ...)
