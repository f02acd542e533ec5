"""Draws scenes: batches of images from stickers, with exact sub-pixel places and no aliasing."""

import functools
from collections.abc import Sequence

import torch
from torch.nn import functional

from apps.stickers.scene import BACKGROUNDS, Placement, Scene
from apps.stickers.sprites import SIDE, SpriteSheet


@functools.lru_cache(maxsize=4)
def _pixels_on(sheet: SpriteSheet, device: torch.device) -> torch.Tensor:
    return sheet.pixels.to(device)


@functools.lru_cache(maxsize=4)
def background_colours(device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the colours of `BACKGROUNDS`, `(10, 3)` float32 in [0, 1]."""
    return torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32, device=device) / 255


def premultiplied(pixels: torch.Tensor) -> torch.Tensor:
    """Turn uint8 RGBA with straight alpha, `(N, 4, H, W)`, into float32 with premultiplied alpha in [0, 1]."""
    values = pixels.float() / 255
    values[:, :3] *= values[:, 3:]
    return values


def resampling_weights(start: torch.Tensor, length: torch.Tensor, source: int, target: int) -> torch.Tensor:
    """Build the matrices that draw `source` samples over a stretch of a line of `target` pixels.

    Each is a triangle filter: linear interpolation when enlarging, widened to the source's step when reducing, so
    that nothing aliases. Beyond the stretch the source counts as zero, so edges fade out over one pixel.

    Args:
        start: `(N,)` where the stretch begins, in pixels.
        length: `(N,)` how long it is, in pixels.
        source: number of source samples S.
        target: number of pixels R.

    Returns:
        `(N, R, S)` weights.
    """
    pixel = torch.arange(target, device=start.device) + 0.5  # (R,)
    sample = torch.arange(-2, source + 2, device=start.device) + 0.5  # (S + 4,): two beyond each end
    scale = (source / length)[:, None]  # (N, 1) source samples a pixel
    position = (pixel - start[:, None]) * scale  # (N, R)
    radius = scale.clamp(min=1.0)[..., None]  # (N, 1, 1)
    weights = (1 - (position[..., None] - sample).abs() / radius).clamp(min=0)  # (N, R, S + 4)
    total = weights.sum(-1, keepdim=True).clamp(min=1e-6)  # (N, R, 1)
    return weights[..., 2:-2] / total  # (N, R, S)


def draw_sprites(
    placements: Sequence[Placement], sheet: SpriteSheet, resolution: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Draws each placement on its own transparent canvas.

    Returns:
        `(N, 4, R, R)` float32, premultiplied RGBA in [0, 1].
    """
    places = torch.tensor([(p.x, p.y, p.size) for p in placements], dtype=torch.float32, device=device)  # (N, 3)
    return draw_at(torch.tensor([p.sprite for p in placements], device=device), places, sheet, resolution)


def draw_at(sprites: torch.Tensor, places: torch.Tensor, sheet: SpriteSheet, resolution: int) -> torch.Tensor:
    """Draw stickers, each on its own transparent canvas.

    Args:
        sprites: `(N,)` numbers in the sheet.
        places: `(N, 3)` x, y and size, as fractions of the image's side.
        sheet: the stickers.
        resolution: side R of the canvases, in pixels.

    Returns:
        `(N, 4, R, R)` float32, premultiplied RGBA in [0, 1].
    """
    x, y, size = (places * resolution).unbind(1)  # (N,) pixels
    picture = premultiplied(_pixels_on(sheet, sprites.device)[sprites])  # (N, 4, 128, 128)
    # Halve while that keeps at least one sample a pixel: the filter's reach stays short, and the products small.
    largest, side = float(size.max()), SIDE
    while side >= 2 * largest and side % 2 == 0:
        picture, side = functional.avg_pool2d(picture, 2), side // 2  # (N, 4, S, S)
    across = resampling_weights(x - size / 2, size, side, resolution)  # (N, R, S)
    down = resampling_weights(y - size / 2, size, side, resolution)  # (N, R, S)
    rows = down[:, None] @ picture  # (N, 4, R, S)
    return rows @ across[:, None].mT  # (N, 4, R, R)


def render(
    scenes: Sequence[Scene], sheet: SpriteSheet, resolution: int = 128, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Render scenes.

    Args:
        scenes: B scenes.
        sheet: the stickers.
        resolution: side of the square images, in pixels.
        device: where to draw; the sheet is copied there once.

    Returns:
        `(B, 3, resolution, resolution)` float32 in [-1, 1].
    """
    background = torch.tensor([scene.background for scene in scenes], device=device)
    canvas = background_colours(device)[background]  # (B, 3)
    canvas = canvas[..., None, None].repeat(1, 1, resolution, resolution)  # (B, 3, R, R)
    # Singles and parts apart, since they are drawn from sprites of different sizes; each layer has one of a scene.
    for layer in range(max(len(scene.placements) for scene in scenes)):
        for alone in (True, False):
            rows = [i for i, s in enumerate(scenes) if len(s.placements) > layer and (len(s.placements) == 1) == alone]
            for start in range(0, len(rows), 32):  # small enough to stay in a CPU's cache
                part = rows[start : start + 32]
                drawn = draw_sprites([scenes[i].placements[layer] for i in part], sheet, resolution, device)
                canvas[part] = drawn[:, :3] + canvas[part] * (1 - drawn[:, 3:])  # (b, 3, R, R)
    return canvas.mul_(2).sub_(1)
