"""Losses between decoded images and their targets, and how near they are."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.perceptual.st_lpips import ShiftTolerantLPIPS


def perceptual_loss(network: ShiftTolerantLPIPS, decoded: Tensor, images: Tensor, side: int) -> Tensor:
    """Return the mean ST-LPIPS distance of one random square of all images.

    Args:
        network: Frozen.
        decoded: (B, 3, H, W) in [-1, 1].
        images: Targets, the same shape.
        side: Of the square in pixels; cut down to that of the images.
    """
    height, width = images.shape[-2:]
    top = int(torch.randint(max(height - side, 0) + 1, ()))
    left = int(torch.randint(max(width - side, 0) + 1, ()))
    window = (..., slice(top, top + side), slice(left, left + side))
    with torch.no_grad():
        target = network.features(images[window])
    return network.distance(network.features(decoded[window]), target).mean()


def reconstruction_loss(
    decoded: Tensor, images: Tensor, ssim_weight: float, squared_weight: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute Charbonnier (a smooth L1, eps 1e-3) plus `ssim_weight * (1 - SSIM)` plus `squared_weight * MSE`.

    Args:
        decoded: (B, 3, H, W) float32.
        images: Targets in [-1, 1], the same shape.
        ssim_weight: 0 leaves the second term out.
        squared_weight: 0 leaves the third term out.

    Returns:
        The loss and its parts for the log.
    """
    squared = (decoded - images).square()  # (B, 3, H, W)
    loss = (squared + 1e-6).sqrt().mean()
    parts = {"charbonnier": loss.detach()}
    if ssim_weight:
        similarity = ssim(decoded, images, stride=4)  # every window would cost as much as the network
        loss, parts["ssim"] = loss + ssim_weight * (1 - similarity), similarity.detach()
    if squared_weight:
        mean = squared.mean()
        loss, parts["squared"] = loss + squared_weight * mean, mean.detach()
    return loss, parts


def ssim(first: Tensor, second: Tensor, window: int = 7, stride: int = 1, data_range: float = 2.0) -> Tensor:
    """Compute the mean structural similarity (Wang et al. 2004) with a uniform window, without padding.

    Args:
        first: (B, C, H, W).
        second: The same shape.
        window: Side of the window in pixels.
        stride: Pixels from one window to the next.
        data_range: Largest minus smallest possible value.

    Returns:
        A scalar, 1 for equal images.
    """
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    maps = torch.stack([first, second, first * first, second * second, first * second])  # (5, B, C, H, W)
    means = F.avg_pool2d(maps.flatten(0, 2), window, stride).unflatten(0, maps.shape[:3])  # (5, B, C, h, w)
    mean1, mean2, square1, square2, product = means.unbind(0)  # (B, C, h, w)
    variance1, variance2 = square1 - mean1**2, square2 - mean2**2
    covariance = product - mean1 * mean2
    numerator = (2 * mean1 * mean2 + c1) * (2 * covariance + c2)
    return (numerator / ((mean1**2 + mean2**2 + c1) * (variance1 + variance2 + c2))).mean()


def psnr(mean_squared_error: float) -> float:
    """Return the peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return 10 * math.log10(4 / max(mean_squared_error, 1e-10))
