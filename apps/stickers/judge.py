"""The exact judge: reads what an image of the sticker world holds, by known shapes and no learned model.

The judge never sees the prompt. It reads

1. the background: which of the ten colours most pixels of the border are nearest to;
2. the difference D of the image from that background, cut into parts in every way that scenes are laid out (one
   sticker, two beside or above each other, three, four), at the emptiest lines near the middle;
3. for each part the stickers that may be there: the part is brought to a standard place and size by its centre of mass
   and its spread, where it is compared with all stickers brought there in the same way;
4. for the best of those their exact place and size, by Gauss-Newton steps (Lucas and Kanade, 1981) on the error;
5. the way of cutting whose stickers explain most of D, each sticker beyond the first at a small price.

Every sticker is tried sharp and blurred, because a blurred zebra is nearer to a gray rock than to a sharp zebra.

A sticker drawn as T (premultiplied colour minus alpha times background) leaves the error |D - T|^2. Far from the
sticker T is zero, so all that counts is the gain |D|^2 - |D - T|^2 = 2 <D, T> - |T|^2, which needs only the pixels
under it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from apps.stickers.renderer import background_colours, premultiplied, resampling_weights
from apps.stickers.scene import Scene
from apps.stickers.sprites import SIDE, SpriteSheet

CANVAS = 64  # side at which images are read
CELLS = 32  # samples across a sticker
MARGIN = 4  # further samples on each side, which show what sticks out
FRAME = CELLS + 2 * MARGIN
SIZES = (0.1, 1.2)  # sizes that a sticker may be read at, as fractions of the image's side
COARSE = 24  # samples across the standard frame of the first comparison
REACH = 1.9  # half the standard frame, in units of the spread
# Standard deviations of the blur in samples. The first is that of a clean image, brought to the canvas and cut out.
BLURS = (0.6, 1.25)
CLOSER = ((8, 1), (3, 2))  # (how many stickers of a part are looked at more closely, Gauss-Newton steps on them)
PRICE = 0.02  # of each sticker beyond the first, as a share of the energy of D
FAINT = 0.0003  # mean square of D below which there is nothing to be seen
PARTS = ("whole", "left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right")
# Each way of cutting, as indices of its parts. None at all is right where no sticker explains anything.
LAYOUTS = ((), (0,), (1, 2), (3, 4), (3, 7, 8), (5, 6, 4), (5, 6, 7, 8))


@dataclass(frozen=True)
class Found:
    """A sticker that was read: its number, its place and size as in `Placement`, and the share left unexplained."""

    sprite: int
    x: float
    y: float
    size: float
    error: float


@dataclass(frozen=True)
class Reading:
    """What an image holds: an index into `BACKGROUNDS`, the stickers, and the share of the image unexplained."""

    background: int
    objects: tuple[Found, ...]
    error: float


def moments(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return centres x, y and spreads of masks `(N, H, W)`, as fractions of the side; 0 where a mask is empty."""
    side = mask.shape[-1]
    place = (torch.arange(side, device=mask.device) + 0.5) / side  # (W,)
    mass = mask.sum((1, 2)).clamp(min=1e-6)  # (N,)
    x = (mask.sum(1) @ place) / mass  # (N,)
    y = (mask.sum(2) @ place) / mass  # (N,)
    variance = (mask.sum(1) @ place**2 + mask.sum(2) @ place**2) / mass - x**2 - y**2  # (N,)
    return x, y, variance.clamp(min=0).sqrt()


def visible(difference: torch.Tensor) -> torch.Tensor:
    """Return how clearly each pixel differs from the background, in [0, 1]: `(N, 3, H, W)` to `(N, H, W)`."""
    return ((difference.square().sum(1).sqrt() - 0.08) / 0.25).clamp(0, 1)


def crop(pictures: torch.Tensor, x: torch.Tensor, y: torch.Tensor, size: torch.Tensor, cells: int) -> torch.Tensor:
    """Cuts K squares out of each image, resampled without aliasing; what lies beyond an image is zero.

    Args:
        pictures: `(N, C, H, W)`, H == W.
        x: `(N, K)` centre of each square from the left, as a fraction of the image's side.
        y: the same from the top.
        size: `(N, K)` side of each square, as a fraction of the image's side.
        cells: samples across a square.

    Returns:
        `(N, K, C, cells, cells)`.
    """
    count, side = x.shape[1], pictures.shape[-1]
    length = cells / size  # (N, K) side of the image in samples
    left, top = -(x - size / 2) * length, -(y - size / 2) * length  # (N, K) where the image begins
    across = resampling_weights(left.flatten(), length.flatten(), side, cells).view(-1, count, cells, side)
    down = resampling_weights(top.flatten(), length.flatten(), side, cells).view(-1, count * cells, side)
    rows = down[:, None] @ pictures  # (N, C, K * cells, W)
    rows = rows.unflatten(2, (count, cells)).transpose(1, 2)  # (N, K, C, cells, W)
    return rows @ across[:, :, None].mT  # (N, K, C, cells, cells)


def blurred(pictures: torch.Tensor, deviation: float) -> torch.Tensor:
    """Blurs `(..., H, W)` images, H == W, by a Gaussian of the given standard deviation in pixels."""
    place = torch.arange(pictures.shape[-1], device=pictures.device)
    weights = torch.exp(-0.5 * ((place[:, None] - place) / deviation) ** 2)  # (H, H)
    weights = weights / weights.sum(0).max()
    return weights @ pictures @ weights.mT


def emptiest_line(profile: torch.Tensor) -> torch.Tensor:
    """Find where to cut: `(N, side)` amounts on each line to `(N,)` the first line behind the cut."""
    side = profile.shape[1]
    padded = functional.pad(profile, (1, 0))
    between = padded[:, 1:] + padded[:, :-1]  # (N, side): what lies on both sides of the line before each index
    offset = (torch.arange(side, device=profile.device) - side / 2).abs() / side
    price = between + profile.sum(1, keepdim=True) * (0.02 * offset + torch.where(offset > 0.11, torch.inf, 0.0))
    return price.argmin(1)


def cut(difference: torch.Tensor) -> torch.Tensor:
    """Cuts images into the parts of all layouts.

    Args:
        difference: `(N, 3, H, W)` the image minus its background.

    Returns:
        `(N, 9, H, W)` boolean masks in the order of `PARTS`.
    """
    mask = visible(difference)  # (N, H, W)
    count, side, _ = mask.shape
    line = torch.arange(side, device=mask.device)
    top = (line < emptiest_line(mask.sum(2))[:, None])[:, :, None]  # (N, H, 1)

    def left_of(rows: torch.Tensor) -> torch.Tensor:  # (N, H, W) to (N, 1, W)
        return (line < emptiest_line(rows.sum(1))[:, None])[:, None, :]

    left, top_left, bottom_left = left_of(mask), left_of(mask * top), left_of(mask * ~top)
    whole = torch.ones(1, 1, 1, dtype=torch.bool, device=mask.device)
    quarters = (top & top_left, top & ~top_left, ~top & bottom_left, ~top & ~bottom_left)
    parts = (whole, left, ~left, top, ~top, *quarters)
    return torch.stack([part.expand(count, side, side) for part in parts], dim=1)


def template_slopes(drawn: torch.Tensor) -> torch.Tensor:
    """Return how templates `(N, K, 3, h, w)` change along x, y and the logarithm of the size, `(N, K, 3, 3 h w)`."""
    down, across = torch.gradient(drawn, dim=(3, 4))  # (N, K, 3, h, w) a sample
    height, width = drawn.shape[-2:]
    x = torch.arange(width, device=drawn.device) - (width - 1) / 2  # (w,)
    y = torch.arange(height, device=drawn.device) - (height - 1) / 2  # (h,)
    return torch.stack([across, down, across * x + down * y[:, None]], dim=2).flatten(3)


class Judge:
    """Reads images.

    Args:
        sheet: the stickers that may be there, all of which compete for each part of an image.
        device: where to work.
    """

    def __init__(self, sheet: SpriteSheet, device: torch.device | str = "cpu") -> None:
        self.sheet = sheet
        self.device = torch.device(device)
        self.colours = background_colours(self.device)  # (10, 3)
        samples = functional.avg_pool2d(premultiplied(sheet.pixels.to(self.device)), SIDE // CELLS)  # (S, 4, 32, 32)
        padded = functional.pad(samples, (MARGIN,) * 4)  # (S, 4, 40, 40)
        self._templates = torch.cat([blurred(padded, deviation) for deviation in BLURS])  # (2 S, 4, 40, 40)
        self._standard: dict[int, tuple[torch.Tensor, ...]] = {}

    @torch.inference_mode()
    def read(self, images: torch.Tensor | Sequence[Image.Image], batch_size: int = 8) -> list[Reading]:
        """Read images of any square size.

        Args:
            images: `(B, 3, H, W)` in [-1, 1], or B Pillow images.
            batch_size: how many are read at once (memory only).

        Raises:
            ValueError: the tensor has another shape, or images aren't square.
        """
        readings = []
        for start in range(0, len(images), batch_size):
            readings += self._read(self._canvas(images[start : start + batch_size]))
        return readings

    def _canvas(self, images: torch.Tensor | Sequence[Image.Image]) -> torch.Tensor:
        """Brings images to `(B, 3, 64, 64)` in [0, 1]."""
        if not isinstance(images, torch.Tensor):
            arrays = [np.array(image.convert("RGB"), dtype=np.float32) for image in images]
            images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ValueError(f"images have shape {tuple(images.shape)}: give (B, 3, H, H) in [-1, 1]")
        images = images.to(self.device, torch.float32)
        side = (CANVAS, CANVAS)
        small = functional.interpolate(images, size=side, mode="bilinear", antialias=True, align_corners=False)
        return (small.clamp(-1, 1) + 1) / 2

    def background(self, canvas: torch.Tensor) -> torch.Tensor:
        """Read the background colours of `(B, 3, H, W)` images in [0, 1]: `(B,)` indices."""
        edges = (canvas[..., 0], canvas[..., -1], canvas[..., 0, :], canvas[..., -1, :])
        border = torch.cat(edges, dim=-1).mT  # (B, 4 * side, 3)
        nearest = torch.cdist(border, self.colours.expand(len(border), -1, -1)).argmin(-1)  # (B, 4 * side)
        return functional.one_hot(nearest, len(self.colours)).sum(1).argmax(1)  # (B,)

    def _drawn(self, templates: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
        """Put `(..., 4, 40, 40)` templates on the colours of `background` `(...)`, less these: `(..., 3, 40, 40)`."""
        return templates[..., :3, :, :] - templates[..., 3:, :, :] * self.colours[background][..., None, None]

    def _standard_frame(self, background: int) -> tuple[torch.Tensor, ...]:
        """Brings all templates on a background to the standard frame, once.

        Returns:
            Frames `(2 S, 3 * 24 * 24)`, their energies `(2 S,)`, and the visible x, y and spread of each `(3, 2 S)`,
            as fractions of the sticker's side, from its corner.
        """
        if background not in self._standard:
            seen = self._drawn(self._templates, torch.tensor(background, device=self.device))  # (2 S, 3, 40, 40)
            x, y, spread = moments(visible(seen))  # (2 S,)
            reach = (2 * REACH * spread).clamp(min=0.05)
            frames = crop(seen, x[:, None], y[:, None], reach[:, None], COARSE).flatten(1)  # (2 S, 3 * 24 * 24)
            energy = frames.square().sum(1)  # (2 S,)
            energy[spread < 0.01] = torch.inf  # can't be seen on this colour
            frame = FRAME / CELLS
            where = torch.stack([x * frame - (frame - 1) / 2, y * frame - (frame - 1) / 2, spread * frame])
            self._standard[background] = (frames, energy, where)
        return self._standard[background]

    def _candidates(self, parts: torch.Tensor, background: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find for each part the stickers that look most like it, and where they'd have to stand.

        Args:
            parts: `(N, 3, 64, 64)` differences from the background, zero outside the part.
            background: `(N,)`.

        Returns:
            Templates `(N, K)` (number of the sticker, plus S if it is blurred) and their x, y, size `(N, K, 3)`.
        """
        x, y, spread = moments(visible(parts))  # (N,)
        reach = (2 * REACH * spread).clamp(min=0.05)
        frames = crop(parts, x[:, None], y[:, None], reach[:, None], COARSE).flatten(1)  # (N, 3 * 24 * 24)
        count, total = CLOSER[0][0], len(self.sheet)
        chosen = torch.zeros(len(parts), count, dtype=torch.long, device=self.device)
        places = torch.zeros(len(parts), count, 3, device=self.device)
        for colour in background.unique().tolist():
            rows = background == colour
            templates, energy, where = self._standard_frame(colour)
            errors = (energy - 2 * frames[rows] @ templates.T).view(-1, len(BLURS), total)  # (n, 2, S)
            least, blur = errors.min(1)  # (n, S)
            best = least.topk(count, largest=False).indices  # (n, K)
            best = best + total * blur.gather(1, best)  # (n, K)
            dx, dy, own = where[:, best]  # (n, K)
            size = (spread[rows, None] / own.clamp(min=0.01)).clamp(*SIZES)  # (n, K)
            chosen[rows] = best
            centre = (x[rows, None] - (dx - 0.5) * size, y[rows, None] - (dy - 0.5) * size)
            places[rows] = torch.stack([*centre, size], dim=-1)
        return chosen, places

    def _refine(
        self, parts: torch.Tensor, background: torch.Tensor, chosen: torch.Tensor, places: torch.Tensor, steps: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Move stickers to where they explain most, by Gauss-Newton steps on x, y and the logarithm of the size.

        Args:
            parts: `(N, 3, 64, 64)`.
            background: `(N,)`.
            chosen: `(N, K)` templates.
            places: `(N, K, 3)` x, y, size.
            steps: number of steps.

        Returns:
            Gains `(N, K)`, in squared colour values summed over the canvas' pixels, and places `(N, K, 3)`.
        """
        drawn = self._drawn(self._templates[chosen], background[:, None])  # (N, K, 3, 40, 40)
        energy = drawn.square().sum((2, 3, 4))  # (N, K)
        slopes = template_slopes(drawn)  # (N, K, 3, 4800)
        normal = slopes @ slopes.mT  # (N, K, 3, 3)
        damping = 1e-3 * (1 + normal.diagonal(dim1=2, dim2=3).mean(2))  # (N, K)
        inverse = torch.linalg.inv(normal + damping[..., None, None] * torch.eye(3, device=self.device))
        best, best_places = torch.full_like(energy, -torch.inf), places
        for step in range(steps + 1):
            x, y, size = places.unbind(2)  # (N, K)
            seen = crop(parts, x, y, size * FRAME / CELLS, FRAME)  # (N, K, 3, 40, 40)
            gain = (2 * (seen * drawn).sum((2, 3, 4)) - energy) * (size * CANVAS / CELLS) ** 2  # (N, K)
            better = gain > best
            best = torch.where(better, gain, best)
            best_places = torch.where(better[..., None], places, best_places)
            if step < steps:
                rest = (seen - drawn).flatten(2)  # (N, K, 4800)
                move = -(inverse @ (slopes @ rest[..., None]))[..., 0]  # (N, K, 3): cells, cells, logarithm
                shift = move[..., :2].clamp(-2, 2) * (size / CELLS)[..., None]
                size = (size * move[..., 2].clamp(-0.1, 0.1).exp()).clamp(*SIZES)
                places = torch.cat([places[..., :2] + shift, size[..., None]], dim=-1)
        return best, best_places

    def _read(self, canvas: torch.Tensor) -> list[Reading]:
        background = self.background(canvas)  # (B,)
        difference = canvas - self.colours[background][:, :, None, None]  # (B, 3, 64, 64)
        parts = (difference[:, None] * cut(difference)[:, :, None]).flatten(0, 1)  # (B * 9, 3, 64, 64)
        colours = background.repeat_interleave(len(PARTS))  # (B * 9,)
        chosen, places = self._candidates(parts, colours)  # (B * 9, K), (B * 9, K, 3)
        gains = torch.zeros(chosen.shape, device=self.device)
        for i, (count, steps) in enumerate(CLOSER):
            if i > 0:
                best = gains.topk(count, dim=1).indices  # (B * 9, count)
                chosen, places = chosen.gather(1, best), places.gather(1, best[..., None].expand(-1, -1, 3))
            gains, places = self._refine(parts, colours, chosen, places, steps)
        gain, best = gains.max(1)  # (B * 9,)
        row = torch.arange(len(parts), device=self.device)
        sprites = (chosen[row, best] % len(self.sheet)).tolist()
        columns = (sprites, places[row, best].tolist(), gain.tolist(), parts.square().sum((1, 2, 3)).tolist())
        return [self._choose(colour, i * len(PARTS), *columns) for i, colour in enumerate(background.tolist())]

    @staticmethod
    def _choose(
        background: int,
        first: int,
        sprites: list[int],
        places: list[list[float]],
        gains: list[float],
        energies: list[float],
    ) -> Reading:
        """Take the layout that explains most, each sticker beyond the first at its price."""
        total = energies[first]
        if total < FAINT * 3 * CANVAS**2:
            return Reading(background, (), 0.0)

        def left_over(layout: tuple[int, ...]) -> float:
            return 1 - sum(gains[first + part] for part in layout) / total

        layout = min(LAYOUTS, key=lambda layout: left_over(layout) + PRICE * max(len(layout) - 1, 0))
        rows = [first + part for part in layout]
        objects = (Found(sprites[i], *places[i], error=1 - gains[i] / max(energies[i], 1e-6)) for i in rows)
        return Reading(background, tuple(objects), left_over(layout))


def score(scene: Scene, reading: Reading) -> dict[str, bool]:
    """Compare what was read with what was asked for.

    Returns:
        "colour" (the background), and by the kind of scene
        "recall" (single: exactly one sticker, the right one),
        "relation" (pair: exactly two, both right and placed right),
        "count" (as many stickers as asked for) and "count_strict" (and all of them right).
    """
    results = {"colour": reading.background == scene.background}
    found = reading.objects
    sprites = [one.sprite for one in found]
    if scene.kind == "single":
        results["recall"] = sprites == list(scene.sprites)
    elif scene.kind == "pair":
        results["relation"] = sorted(sprites) == sorted(scene.sprites) and _stands(scene, found)
    else:
        results["count"] = len(found) == scene.count
        results["count_strict"] = sprites == list(scene.sprites) * scene.count
    return results


def _stands(scene: Scene, found: Sequence[Found]) -> bool:
    """Tells whether the two stickers of a pair stand as they should, clearly and mostly on the right axis."""
    first, second = sorted(found, key=lambda one: scene.sprites.index(one.sprite))
    right, down = second.x - first.x, second.y - first.y
    relation = (
        ("left of" if right > 0 else "right of") if abs(right) > abs(down) else ("above" if down > 0 else "below")
    )
    return relation == scene.relation
