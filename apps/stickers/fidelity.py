"""How near an image comes to the best-fitting rendering of what was asked for: PSNR and SSIM, over places and sizes.

A prompt leaves the exact place and size of a sticker open, so an image can't be compared with one rendering. Every
sticker of the scene is drawn where and as large as it explains the image best, and the image is compared with that.
Unlike the judge, which asks what an image holds, this asks how well it is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from apps.stickers.renderer import background_colours, draw_at, render
from apps.stickers.scene import CENTRES, PART_SIZE, Placement, Scene
from apps.stickers.sprites import SpriteSheet
from dit.runtime.metrics import psnr, ssim

CANVAS = 64  # side at which images are compared
COARSE_SIZES = 12  # sizes that the first search tries
REACH = 8  # pixels of the canvas that the first search looks away from a sticker's regular place
STEPS = 6  # Gauss-Newton steps on place and size
SINGLE_SIZES = (0.36, 1.0)  # of stickers that stand alone, as fractions of the side
PART_SIZES = (PART_SIZE[0] - 0.1, PART_SIZE[1] + 0.1)
PROBE = 0.25 / CANVAS  # by which a derivative moves or enlarges a sticker, as a fraction of the side
FARTHEST_MOVE = 0.05  # of a step, as a fraction of the side
FIRST_DAMPING = 1e-3  # as a share of the mean squared slope


@dataclass(frozen=True)
class Fidelity:
    """How near images come to their best-fitting renderings.

    Attributes:
        psnr: dB of each image, of all its pixels, at `CANVAS` x `CANVAS`.
        ssim: Structural similarity of each image there (Wang et al. 2004).
        scenes: The scenes that fit best.
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    scenes: tuple[Scene, ...]


@torch.inference_mode()
def measure_fidelity(images: Tensor, scenes: Sequence[Scene], sheet: SpriteSheet, batch_size: int = 32) -> Fidelity:
    """Compare images with the best-fitting renderings of their scenes.

    Args:
        images: (B, 3, H, H) in [-1, 1].
        scenes: What was asked for; places and sizes in them don't count.
        sheet: The stickers.
        batch_size: Images that are fitted at once.
    """
    psnrs: list[float] = []
    similarities: list[float] = []
    fitted: list[Scene] = []
    for start in range(0, len(scenes), batch_size):
        part = scenes[start : start + batch_size]
        pictures = images[start : start + batch_size].float()  # (b, 3, H, H)
        best = fit_scenes(pictures, part, sheet)
        seen, drawn = (shrink(x) for x in (pictures, render(best, sheet, pictures.shape[-1])))  # (b, 3, 64, 64)
        psnrs += [psnr(a, b) for a, b in zip(seen, drawn, strict=True)]
        similarities += [ssim(a[None], b[None]) for a, b in zip(seen, drawn, strict=True)]
        fitted += best
    return Fidelity(tuple(psnrs), tuple(similarities), tuple(fitted))


def shrink(images: Tensor) -> Tensor:
    """Bring images (B, 3, H, H) in [-1, 1] to (B, 3, 64, 64) in [0, 1]."""
    side = (CANVAS, CANVAS)
    small = functional.interpolate(images, size=side, mode="bilinear", antialias=True, align_corners=False)
    return (small.clamp(-1, 1) + 1) / 2


def fit_scenes(images: Tensor, scenes: Sequence[Scene], sheet: SpriteSheet) -> list[Scene]:
    """Place every sticker of each scene where it explains the image best.

    Each is searched for around its regular place, over integer shifts and some sizes, then moved by Gauss-Newton
    steps (Lucas and Kanade, 1981), damped. Stickers of one scene hardly overlap, so each is fitted by itself.

    Args:
        images: (B, 3, H, H) in [-1, 1].
        scenes: B scenes.
        sheet: The stickers.
    """
    colours = background_colours()[torch.tensor([scene.background for scene in scenes])]  # (B, 3)
    difference = shrink(images) - colours[:, :, None, None]  # (B, 3, 64, 64)
    rows = [row for row, scene in enumerate(scenes) for _ in stickers_of(scene)]  # P stickers in all
    sprites = torch.tensor([sprite for scene in scenes for sprite in stickers_of(scene)])  # (P,)
    centres = torch.tensor([centre for scene in scenes for centre in _centres(scene)])  # (P, 2)
    limits = torch.tensor([_sizes(scene) for scene in scenes for _ in stickers_of(scene)])  # (P, 2)
    places = _coarse(difference[rows], sprites, colours[rows], centres, limits, sheet)  # (P, 3)
    places = _refine(difference[rows], sprites, colours[rows], places, sheet)  # (P, 3)
    found: list[list[Placement]] = [[] for _ in scenes]
    for row, sprite, place in zip(rows, sprites.tolist(), places.tolist(), strict=True):
        found[row].append(Placement(sprite, *place))
    return [replace(scene, placements=tuple(part)) for scene, part in zip(scenes, found, strict=True)]


def stickers_of(scene: Scene) -> tuple[int, ...]:
    """Return the number of every sticker of a scene, those of a count repeatedly."""
    return scene.sprites * scene.count if scene.kind == "count" else scene.sprites


def _centres(scene: Scene) -> tuple[tuple[float, float], ...]:
    return CENTRES[scene.relation if scene.kind == "pair" and scene.relation is not None else scene.count]


def _sizes(scene: Scene) -> tuple[float, float]:
    return SINGLE_SIZES if scene.kind == "single" else PART_SIZES


def _drawn(sprites: Tensor, colours: Tensor, places: Tensor, sheet: SpriteSheet) -> Tensor:
    """Draw stickers on their backgrounds, less these.

    Args:
        sprites: (P,).
        colours: (P, 3) in [0, 1].
        places: x, y, size, (P, 3).
        sheet: The stickers.

    Returns:
        (P, 3, 64, 64).
    """
    drawn = draw_at(sprites, places, sheet, CANVAS)  # (P, 4, 64, 64)
    return drawn[:, :3] - drawn[:, 3:] * colours[:, :, None, None]


def _coarse(
    seen: Tensor, sprites: Tensor, colours: Tensor, centres: Tensor, limits: Tensor, sheet: SpriteSheet
) -> Tensor:
    """Return x, y, size (P, 3) of the largest gain 2 <D, T> - |T|^2 among integer shifts and some sizes."""
    best = torch.full((len(sprites),), -torch.inf)  # (P,)
    places = torch.cat([centres, limits.mean(1, keepdim=True)], dim=1)  # (P, 3)
    spectrum = torch.fft.rfft2(seen)  # (P, 3, 64, 33)
    shifts = torch.arange(-REACH, REACH + 1)  # (S,)
    for step in range(COARSE_SIZES):
        size = limits[:, 0] + (limits[:, 1] - limits[:, 0]) * step / (COARSE_SIZES - 1)  # (P,)
        tried = torch.cat([centres, size[:, None]], dim=1)  # (P, 3)
        drawn = _drawn(sprites, colours, tried, sheet)  # (P, 3, 64, 64)
        product = torch.fft.irfft2(spectrum * torch.fft.rfft2(drawn).conj(), s=(CANVAS, CANVAS)).sum(1)  # (P, 64, 64)
        gains = 2 * product[:, shifts][:, :, shifts] - drawn.square().sum((1, 2, 3))[:, None, None]  # (P, S, S)
        gain, where = gains.flatten(1).max(1)  # (P,)
        down, across = shifts[where // len(shifts)], shifts[where % len(shifts)]  # (P,)
        moved = torch.stack([centres[:, 0] + across / CANVAS, centres[:, 1] + down / CANVAS, size], dim=1)  # (P, 3)
        better = gain > best  # (P,)
        best, places = torch.where(better, gain, best), torch.where(better[:, None], moved, places)
    return places


def _refine(seen: Tensor, sprites: Tensor, colours: Tensor, places: Tensor, sheet: SpriteSheet) -> Tensor:
    """Move stickers (P, 3) by damped Gauss-Newton steps; a step that makes the fit worse is taken back and damped more.

    The error of a sticker is -(2 <D, T> - |T|^2), the gain of the judge: other stickers of the image don't count.
    """
    drawn = _drawn(sprites, colours, places, sheet)  # (P, 3, 64, 64)
    error = _error(seen, drawn)  # (P,)
    damping = torch.full_like(error, FIRST_DAMPING)  # (P,)
    for _ in range(STEPS):
        slopes = torch.stack(
            [(_drawn(sprites, colours, places + PROBE * axis, sheet) - drawn).flatten(1) for axis in torch.eye(3)],
            dim=1,
        )  # (P, 3, 12288) a probe
        support = (drawn != 0).any(1, keepdim=True)  # (P, 1, 64, 64)
        rest = ((seen - drawn) * support).flatten(1)  # (P, 12288)
        normal = slopes @ slopes.mT  # (P, 3, 3)
        scale = normal.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-6)  # (P,)
        damped = normal + (damping * scale)[:, None, None] * torch.eye(3)
        move = torch.linalg.solve(damped, slopes @ rest[..., None])[..., 0] * PROBE  # (P, 3)
        tried = places + move.clamp(-FARTHEST_MOVE, FARTHEST_MOVE)
        tried[:, 2].clamp_(0.1, 1.2)
        tried_drawn = _drawn(sprites, colours, tried, sheet)  # (P, 3, 64, 64)
        tried_error = _error(seen, tried_drawn)  # (P,)
        better = tried_error < error  # (P,)
        places = torch.where(better[:, None], tried, places)
        drawn = torch.where(better[:, None, None, None], tried_drawn, drawn)
        error = torch.where(better, tried_error, error)
        damping = torch.where(better, damping / 4, damping * 8)
    return places


def _error(seen: Tensor, drawn: Tensor) -> Tensor:
    """Return |T|^2 - 2 <D, T> of differences D from the background and templates T, (P, 3, 64, 64) each: (P,)."""
    return drawn.square().sum((1, 2, 3)) - 2 * (seen * drawn).sum((1, 2, 3))
