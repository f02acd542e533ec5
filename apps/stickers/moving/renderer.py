"""Draws clips: the frames of all moving stickers of a scene at once, with exact sub-pixel places and no aliasing."""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

from apps.stickers.moving.clips import LENGTH, ClipSheet
from apps.stickers.moving.playback import source_frames
from apps.stickers.moving.scene import ClipScene, MovingSticker, Pose
from apps.stickers.renderer import background_colours, premultiplied, resampling_weights


@functools.lru_cache(maxsize=4)
def _pixels_on(sheet: ClipSheet, device: torch.device) -> Tensor:
    return sheet.pixels.to(device)


def poses(sticker: MovingSticker, num_frames: int) -> list[Pose]:
    """Return where a sticker is in each of T frames; a single frame shows the start."""
    start, end = sticker.start, sticker.end
    moments = [frame / max(num_frames - 1, 1) for frame in range(num_frames)]
    return [
        Pose(
            start.x + (end.x - start.x) * moment,
            start.y + (end.y - start.y) * moment,
            start.size * (end.size / start.size) ** moment,
            start.angle + (end.angle - start.angle) * moment,
        )
        for moment in moments
    ]


def draw_frames(pictures: Tensor, places: Tensor, resolution: int) -> Tensor:
    """Draw images, each on its own transparent canvas.

    Images that aren't turned are resampled like still stickers, by a triangle filter along rows and columns. If any
    is turned, all are sampled bilinearly at points twice as dense as the pixels, four of which are averaged.

    Args:
        pictures: `(N, 4, S, S)` premultiplied RGBA in [0, 1].
        places: `(N, 4)` x, y, size (as fractions of the canvas' side) and angle (degrees, clockwise).
        resolution: side R of the canvases, in pixels.

    Returns:
        `(N, 4, R, R)` float32, premultiplied RGBA in [0, 1].
    """
    largest, side = float(places[:, 2].max()) * resolution, pictures.shape[-1]
    # Halve while that keeps at least one sample a pixel: the filter's reach stays short, and the products small.
    while side >= 2 * largest and side % 2 == 0:
        pictures, side = functional.avg_pool2d(pictures, 2), side // 2  # (N, 4, S, S)
    if bool((places[:, 3] != 0).any()):
        return _draw_turned(pictures, places, resolution)
    x, y, size, _ = (places * resolution).unbind(1)  # (N,) pixels
    across = resampling_weights(x - size / 2, size, side, resolution)  # (N, R, S)
    down = resampling_weights(y - size / 2, size, side, resolution)  # (N, R, S)
    return (down[:, None] @ pictures) @ across[:, None].mT  # (N, 4, R, R)


def _draw_turned(pictures: Tensor, places: Tensor, resolution: int) -> Tensor:
    x, y, size, angle = places.unbind(1)  # (N,)
    cos, sin = torch.cos(angle * (math.pi / 180)), torch.sin(angle * (math.pi / 180))
    # From a point of the canvas to one of the image, both in [-1, 1]: less the centre, turned back, divided by size.
    right, down = 2 * x - 1, 2 * y - 1
    across_row = torch.stack([cos, sin, -(cos * right + sin * down)], dim=1) / size[:, None]  # (N, 3)
    down_row = torch.stack([-sin, cos, sin * right - cos * down], dim=1) / size[:, None]  # (N, 3)
    matrix = torch.stack([across_row, down_row], dim=1)  # (N, 2, 3)
    shape = [len(pictures), 4, 2 * resolution, 2 * resolution]
    grid = functional.affine_grid(matrix, shape, align_corners=False)  # (N, 2 R, 2 R, 2)
    return functional.avg_pool2d(functional.grid_sample(pictures, grid, align_corners=False), 2)  # (N, 4, R, R)


def render_clip(
    scene: ClipScene,
    sheet: ClipSheet,
    num_frames: int = LENGTH,
    resolution: int = 96,
    period: int = LENGTH,
    device: torch.device | str = "cpu",
    part: tuple[int, int] | None = None,
) -> Tensor:
    """Render a scene.

    Args:
        scene: what to draw.
        sheet: the moving stickers.
        num_frames: T. The scene motion spans all of them; an own motion begins anew, or turns round, when its clip is
            at its end.
        resolution: side of the square frames, in pixels.
        period: frames in which an own motion is played once at its own speed (`playback.source_frames`).
        device: where to draw; the sheet is copied there once.
        part: draw only the frames from the first number to below the second; None draws all.

    Returns:
        `(T, 3, resolution, resolution)` float32 in [-1, 1].

    Raises:
        ValueError: a number is too small.
    """
    if resolution < 1:
        raise ValueError(f"resolution is {resolution}: give the side of the frames in pixels, 1 or more")
    start, stop = part or (0, num_frames)
    if part is not None and not 0 <= start < stop <= num_frames:
        raise ValueError(f"part is {part} of {num_frames} frames: give a first frame and a later one to stop before")
    device = torch.device(device)
    pixels = _pixels_on(sheet, device)
    canvas = background_colours(device)[scene.background]  # (3,)
    canvas = canvas[None, :, None, None].repeat(stop - start, 1, resolution, resolution)  # (T, 3, R, R)
    for sticker in scene.stickers:
        frames = source_frames(sticker.own, sheet.loops[sticker.clip], num_frames, period)[start:stop]
        pictures = premultiplied(pixels[sticker.clip, frames])  # (T, 4, 72, 72)
        places = torch.tensor(poses(sticker, num_frames)[start:stop], dtype=torch.float32, device=device)  # (T, 4)
        drawn = draw_frames(pictures, places, resolution)  # (T, 4, R, R)
        canvas = drawn[:, :3] + canvas * (1 - drawn[:, 3:])
    return canvas.mul_(2).sub_(1)
