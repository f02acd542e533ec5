"""Timesteps of one run: set on the scheduler, truncated for image-to-image."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def uniform_sigmas(num_steps: int) -> list[float]:
    """Return `num_steps` evenly spaced flow times from 1 (noise) down to `1 / num_steps`; the end 0 is implied.

    With them every Euler step covers the same flow time (before the scheduler's shift). The default of
    `FlowMatchEulerDiscreteScheduler` ends at the smallest training sigma instead and wastes its last step.

    Args:
        num_steps: number of steps, at least 1.

    Returns:
        The sigmas, decreasing.
    """
    return [1.0 - step / num_steps for step in range(num_steps)]


def dynamic_shift(num_tokens: int, scheduler: Any) -> float:
    """Return the shift exponent `mu` for an image of `num_tokens` tokens: linear between two anchors.

    Larger images need more noise to lose their structure (arXiv 2403.03206, section 5.3.2; the linear rule is that
    of the FLUX.1 code).

    Args:
        num_tokens: tokens of one image.
        scheduler: its config holds the anchors `base_image_seq_len`, `max_image_seq_len`, `base_shift`, `max_shift`.

    Returns:
        mu, to be passed to `scheduler.set_timesteps`.
    """
    config = scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base + (num_tokens - low) * (top - base) / (high - low)


def set_timesteps(
    scheduler: Any,
    num_steps: int,
    *,
    num_tokens: int,
    device: torch.device | str,
    sigmas: Sequence[float] | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Set the scheduler's timesteps for a run and return those to visit.

    Args:
        scheduler: a flow-matching scheduler of diffusers.
        num_steps: number of steps; ignored when `sigmas` are given.
        num_tokens: tokens of one image, for schedulers with a size-dependent shift.
        device: where the timesteps live.
        sigmas: custom noise levels, decreasing, in (0, 1], before the scheduler's own shift.
        strength: fraction of the run that is done; below 1 the first steps are left out (image-to-image).

    Returns:
        Timesteps, (S,), at least one.

    Raises:
        ValueError: `sigmas` are given and the scheduler does not take any, or it is no flow-matching scheduler.
    """
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    if sigmas is not None and "sigmas" not in accepted:
        raise ValueError(
            f"{type(scheduler).__name__} takes no custom sigmas: leave them out, or use a scheduler that does, "
            "such as FlowMatchEulerDiscreteScheduler."
        )
    if not hasattr(scheduler, "set_begin_index"):
        raise ValueError(
            f"{type(scheduler).__name__} can't begin within a schedule: use a flow-matching scheduler, "
            "such as FlowMatchEulerDiscreteScheduler."
        )
    extra: dict[str, object] = {}
    if "sigmas" in accepted:
        extra["sigmas"] = np.asarray(uniform_sigmas(num_steps) if sigmas is None else sigmas)
    if "mu" in accepted and scheduler.config.get("use_dynamic_shifting"):
        extra["mu"] = dynamic_shift(num_tokens, scheduler)
    steps = num_steps if sigmas is None else len(sigmas)
    scheduler.set_timesteps(steps, device=device, **extra)

    kept = min(max(round(steps * strength), 1), steps)
    first = (steps - kept) * scheduler.order
    scheduler.set_begin_index(first)
    return scheduler.timesteps[first:]  # (S,)
