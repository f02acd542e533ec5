"""How far apart two sets of images are: the Frechet distance of two Gaussians fitted to their features.

Heusel et al. (arXiv:1706.08500, equation 6): |m - n|^2 + tr(A + B - 2 (A B)^(1/2)) for means m, n and covariances A, B.
On the features of this package it is the "Frechet distance on EfficientNet-lite0 features". It isn't FID, which is
measured on Inception's, and the two can't be compared.

Few images make it larger: compare sets of equal size, and put beside it the distance of two sets of true images.
"""

import torch
from torch import Tensor


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Measure the distance of two sets of features.

    Args:
        first: (N, D), N at least 2.
        second: (M, D), M at least 2.

    Returns:
        The distance, at least 0; in the squared unit of the features.

    Raises:
        ValueError: The shapes don't fit, or a value is infinite or no number.
    """
    for name, features in (("first", first), ("second", second)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"{name} has shape {tuple(features.shape)}: give (N, D) with N at least 2")
        if not features.isfinite().all():
            raise ValueError(f"{name} holds values that are infinite or no numbers: give finite features")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"first has {first.shape[1]} features and second {second.shape[1]}: give as many")
    means, covariances = zip(*(_gaussian(features) for features in (first, second)), strict=True)
    return gaussian_distance(means[0], covariances[0], means[1], covariances[1])


def gaussian_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Measure the distance of two Gaussians, in float64.

    (A B)^(1/2) has the trace of (A^(1/2) B A^(1/2))^(1/2), which is symmetric: two eigendecompositions of symmetric
    matrices take the place of the root of a general one, and no eigenvalue turns complex by rounding.

    Args:
        mean: (D,).
        covariance: (D, D), symmetric and positive semidefinite.
        other_mean: (D,).
        other_covariance: (D, D), the same.
    """
    root = _root(covariance.double())  # (D, D)
    product = root @ other_covariance.double() @ root  # (D, D)
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    spread = covariance.double().trace() + other_covariance.double().trace() - 2 * cross
    return max(float((mean.double() - other_mean.double()).square().sum() + spread), 0.0)


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and the covariance (D, D) of features (N, D), in float64."""
    values = features.detach().double()
    mean = values.mean(0)
    centred = values - mean  # (N, D)
    return mean, centred.T @ centred / (len(values) - 1)


def _root(matrix: Tensor) -> Tensor:
    """Return the symmetric root of a symmetric positive semidefinite matrix (D, D)."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
