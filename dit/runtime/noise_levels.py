"""What an error that is made at a noise level is worth at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SIGMA_DATA = 0.5
"""Standard deviation of the data for `remaining_error`, as in EDM (arXiv 2206.00364, sigma_data)."""


def remaining_error(sigmas: Sequence[float]) -> np.ndarray:
    """Return the factor by which the rest of a run multiplies an error made at each noise level.

    Later steps see the error and correct part of it, so late errors count more. Latents are `k data + sigma noise`; for
    Gaussian data of deviation s the flow shrinks all distances as the deviation of the latents, hence
    `s / sqrt((k s)^2 + sigma^2)`.

    Args:
        sigmas: noise levels, (N,); k is 1 - sigma, or 1 where one exceeds 1 (models of the noise).

    Returns:
        (N,).
    """
    levels = np.asarray(sigmas, np.float64)
    share = np.ones_like(levels) if levels.max() > 1 else 1 - levels  # (N,): k
    return SIGMA_DATA / np.hypot(share * SIGMA_DATA, levels)
