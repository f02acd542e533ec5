"""Similarity of two tensors: PSNR, SSIM, relative error."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(result: Tensor, reference: Tensor, data_range: float = 1.0) -> float:
    """Compute the peak signal-to-noise ratio in decibels; infinite for equal tensors.

    Args:
        result: any shape.
        reference: the same shape.
        data_range: largest minus smallest possible value (1 for images in [0, 1]).

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(result, reference)
    error = (result.double() - reference.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)


def ssim(result: Tensor, reference: Tensor, data_range: float = 1.0) -> float:
    """Compute the structural similarity in [-1, 1] (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5.

    The mean over all pixels whose window lies inside the image, as in the paper.

    Args:
        result: (B, C, H, W), sides of at least 11.
        reference: the same shape.
        data_range: largest minus smallest possible value.

    Raises:
        ValueError: the shapes differ, or a side is below 11 pixels.
    """
    _check_shapes(result, reference)
    if result.ndim != 4 or min(result.shape[-2:]) < 11:
        raise ValueError(f"ssim needs images (B, C, H, W) of at least 11 x 11 pixels, got {tuple(result.shape)}")
    ramp = torch.arange(-5, 6, dtype=torch.float64, device=result.device)  # (11,)
    window = torch.exp(-(ramp**2) / (2 * 1.5**2))
    window = window / window.sum()  # (11,)

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, window.view(1, 1, 11, 1))
        return F.conv2d(x, window.view(1, 1, 1, 11))

    x, y = (tensor.double().flatten(0, 1)[:, None] for tensor in (result, reference))  # (B C, 1, H, W)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    scale = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return (likeness / scale).mean().item()


def relative_error(result: Tensor, reference: Tensor, order: float = 2) -> float:
    """Compute the norm of the difference over the norm of the reference.

    Args:
        result: any shape.
        reference: the same shape.
        order: of the norm: 1, 2 or infinity.

    Returns:
        0 for equal tensors; infinite if only the reference is zero.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(result, reference)
    difference = torch.linalg.vector_norm((result.double() - reference.double()).flatten(), order).item()
    size = torch.linalg.vector_norm(reference.double().flatten(), order).item()
    return 0.0 if difference == 0 else difference / size if size else math.inf


def _check_shapes(result: Tensor, reference: Tensor) -> None:
    if result.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(result.shape)} against {tuple(reference.shape)}")
