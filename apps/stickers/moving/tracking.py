"""Where a known clip is in each frame: fits of place, size and angle, by Gauss-Newton steps (Lucas and Kanade, 1981).

First an even track is fitted to all frames together (`fit_even_tracks`): place, angle and logarithm of the size change
by the same amount from frame to frame, as in every scene. So a wrong way to play the clip can't hide its error by
jumping from place to place. Then each frame's sticker is moved on its own (`fit_freely`) to read the track as it is.
"""

import math

import torch
from torch import Tensor

from apps.stickers.moving.renderer import draw_frames

DAMPING = 1e-3
LARGEST_STEP = (0.06, 0.06, 0.15, 12.0)  # of x, y (fractions of the side), the logarithm of the size, degrees
SIZES = (0.08, 1.3)


def draw_differences(pictures: Tensor, places: Tensor, colour: Tensor, side: int) -> Tensor:
    """Draw images on a background and subtract it.

    Args:
        pictures: `(..., 4, S, S)` premultiplied RGBA.
        places: `(..., 4)` x, y, logarithm of the size, degrees.
        colour: `(3,)` of the background.
        side: R of the canvas.

    Returns:
        `(..., 3, R, R)`.
    """
    flat = places.flatten(0, -2)
    linear = torch.cat([flat[:, :2], flat[:, 2:3].exp(), flat[:, 3:]], dim=1)
    drawn = draw_frames(pictures.flatten(0, -4), linear, side)  # (N, 4, R, R)
    return (drawn[:, :3] - drawn[:, 3:] * colour[:, None, None]).unflatten(0, places.shape[:-1])


def slopes(drawn: Tensor, places: Tensor) -> Tensor:
    """Return how drawn images `(N, 3, R, R)` change with x, y, log size and degrees of `places`: `(N, 4, 3 R R)`."""
    side = drawn.shape[-1]
    down, across = torch.gradient(drawn, dim=(2, 3))  # a pixel
    point = (torch.arange(side, device=drawn.device) + 0.5) / side
    x = (point - places[:, :1])[:, None, None, :]  # (N, 1, 1, R) from the sticker's centre
    y = (point - places[:, 1:2])[:, None, :, None]  # (N, 1, R, 1)
    turned = (across * y - down * x) * (math.pi / 180)
    return torch.stack([-across, -down, -(across * x + down * y), turned], dim=1).flatten(2) * side


def _move(normal: Tensor, gradient: Tensor, limits: Tensor) -> Tensor:
    """Solve damped normal equations, and bound the step."""
    scale = normal.diagonal(dim1=-2, dim2=-1)
    damped = normal + torch.diag_embed(DAMPING * scale + 1e-6)
    step = torch.linalg.solve(damped, gradient[..., None])[..., 0]
    return torch.maximum(torch.minimum(step, limits), -limits)


def _bounded(places: Tensor) -> Tensor:
    size = places[..., 2:3].clamp(math.log(SIZES[0]), math.log(SIZES[1]))
    return torch.cat([places[..., :2].clamp(-0.2, 1.2), size, places[..., 3:]], dim=-1)


def fit_even_tracks(
    pictures: Tensor, start: Tensor, difference: Tensor, colour: Tensor, turnable: bool, steps: int = 6
) -> tuple[Tensor, Tensor]:
    """Fit even tracks to several ways to play a clip.

    Args:
        pictures: `(M, T, 4, S, S)` the frames that each of M ways shows, premultiplied RGBA.
        start: `(M, T, 4)` first guesses: x, y, logarithm of the size, degrees.
        difference: `(T, 3, R, R)` the clip less its background.
        colour: `(3,)` of the background.
        turnable: whether the angle is fitted; else it stays.
        steps: Gauss-Newton steps.

    Returns:
        Tracks `(M, T, 4)` and the squared errors that they leave, `(M,)`.
    """
    ways, frames = pictures.shape[:2]
    moment = torch.linspace(0, 1, frames, device=difference.device)
    basis = torch.stack([1 - moment, moment], dim=1)  # (T, 2)
    ends = _bounded(torch.linalg.pinv(basis) @ start)  # (M, 2, 4): the line nearest to the guesses
    limits = torch.tensor(LARGEST_STEP, device=difference.device)
    best_error, best = torch.full((ways,), torch.inf, device=difference.device), basis @ ends
    for step in range(steps + 1):
        places = basis @ ends  # (M, T, 4)
        drawn = draw_differences(pictures, places, colour, difference.shape[-1])  # (M, T, 3, R, R)
        rest = difference - drawn
        error = rest.square().sum((1, 2, 3, 4))  # (M,)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better[:, None, None], places, best)
        if step == steps:
            break
        slope = slopes(drawn.flatten(0, 1), places.flatten(0, 1)).unflatten(0, (ways, frames))  # (M, T, 4, 3 R R)
        if not turnable:
            slope[:, :, 3] = 0
        normal = slope @ slope.mT  # (M, T, 4, 4)
        gradient = (slope @ rest.flatten(2)[..., None])[..., 0]  # (M, T, 4)
        together = torch.einsum("te,tf,mtij->meifj", basis, basis, normal).reshape(ways, 8, 8)
        move = _move(together, torch.einsum("te,mti->mei", basis, gradient).reshape(ways, 8), limits.repeat(2))
        ends = _bounded(ends + move.view(ways, 2, 4))
    return best, best_error


def fit_freely(
    pictures: Tensor, start: Tensor, difference: Tensor, colour: Tensor, turnable: bool, steps: int = 3
) -> Tensor:
    """Fit each frame by itself; arguments as of `fit_even_tracks`, for one way to play the clip.

    Returns:
        `(T, 4)` x, y, logarithm of the size, degrees. Where nothing can be seen, the guess stays.
    """
    places, limits = start, torch.tensor(LARGEST_STEP, device=start.device)
    best_error, best = torch.full((len(start),), torch.inf, device=start.device), start
    for step in range(steps + 1):
        drawn = draw_differences(pictures, places, colour, difference.shape[-1])  # (T, 3, R, R)
        rest = difference - drawn
        error = rest.square().sum((1, 2, 3))  # (T,)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better[:, None], places, best)
        if step == steps:
            break
        slope = slopes(drawn, places)  # (T, 4, 3 R R)
        if not turnable:
            slope[:, 3] = 0
        move = _move(slope @ slope.mT, (slope @ rest.flatten(1)[..., None])[..., 0], limits)  # (T, 4)
        places = _bounded(places + move)
    return best
