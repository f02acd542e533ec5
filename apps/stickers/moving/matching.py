"""Which frame of which clip an image shows, at any place, size and angle: compared with all of them at once.

An image is brought to a standard place and size by its centre of mass and its spread, as the judge of still stickers
does it, and sampled on circles around that centre. There a turn is a shift along the circles, by steps of 15 degrees,
so that one product of matrices compares many images at the angles where they may stand with all stored frames.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from apps.stickers.judge import COARSE, REACH, crop, moments, visible
from apps.stickers.moving.clips import LENGTH, SIDE, ClipSheet
from apps.stickers.moving.measure import polar
from apps.stickers.renderer import background_colours, premultiplied

RADII = 10
ANGLES = 24
CELLS = 36  # samples across a stored frame when its standard form is made
MARGIN = 4
FAINT_SPREAD = 0.01  # of what can't be seen


@dataclass(frozen=True)
class Seen:
    """Images on circles.

    Attributes:
        circles: `(N, 30, 24)` the circles of all radii and channels, clockwise from the right.
        energy: `(N,)` squared colour differences summed over the circles; infinite where there is nothing to be seen.
        place: `(N, 3)` centre x, y and spread of what is seen, as fractions of the image's side.
    """

    circles: Tensor
    energy: Tensor
    place: Tensor


def see(difference: Tensor) -> Seen:
    """Bring images, less their background, `(N, 3, H, H)`, to circles."""
    x, y, spread = moments(visible(difference))  # (N,)
    reach = (2 * REACH * spread).clamp(min=0.05)
    frames = crop(difference, x[:, None], y[:, None], reach[:, None], COARSE)[:, 0]  # (N, 3, 24, 24)
    circles = polar(frames, RADII, ANGLES)  # (N, 3, 10, 24)
    length = (torch.arange(RADII, device=circles.device) + 0.5)[:, None] / RADII  # of a circle, (10, 1)
    circles = (circles * length.sqrt()).flatten(1, 2)  # (N, 30, 24)
    energy = circles.square().sum((1, 2))  # (N,)
    energy = torch.where(spread < FAINT_SPREAD, torch.inf, energy)
    return Seen(circles, energy, torch.stack([x, y, spread], dim=1))


class FrameMatcher:
    """Compares images with all frames of all clips.

    Args:
        sheet: the moving stickers.
        device: where to work.
    """

    def __init__(self, sheet: ClipSheet, device: torch.device | str = "cpu") -> None:
        self.sheet = sheet
        self.device = torch.device(device)
        self.colours = background_colours(self.device)  # (20, 3)
        pictures = premultiplied(sheet.pixels.to(self.device).flatten(0, 1))  # (C * 16, 4, 72, 72)
        self._pictures = functional.pad(functional.avg_pool2d(pictures, SIDE // CELLS), (MARGIN,) * 4)
        self._stored: dict[int, Seen] = {}

    def stored(self, background: int) -> Seen:
        """Return all C * 16 stored frames on a background; places are fractions of the clip's side, from its corner."""
        if background not in self._stored:
            colour = self.colours[background][:, None, None]
            seen = see(self._pictures[:, :3] - self._pictures[:, 3:] * colour)
            frame = (CELLS + 2 * MARGIN) / CELLS
            place = seen.place * frame
            place[:, :2] -= (frame - 1) / 2
            self._stored[background] = Seen(seen.circles, seen.energy, place)
        return self._stored[background]

    def errors(self, seen: Seen, background: int, angles: Tensor) -> Tensor:
        """Compare images with all stored frames at expected angles, each give or take one of the 24 steps.

        Args:
            seen: N images.
            background: index into `BACKGROUNDS`.
            angles: `(N, K)` degrees, clockwise, at which each image may be turned.

        Returns:
            `(N, K, C, 16)` squared differences, as shares of the image's energy.
        """
        stored = self.stored(background)
        step = (angles * (ANGLES / 360)).round().long()  # (N, K)
        near = (step[..., None] + torch.arange(-1, 2, device=step.device)).flatten(1)  # (N, 3 K)
        point = (near[..., None] + torch.arange(ANGLES, device=step.device)) % ANGLES  # (N, 3 K, 24) turned back
        upright = (
            seen.circles[:, None]
            .expand(-1, near.shape[1], -1, -1)
            .gather(3, point[:, :, None].expand(-1, -1, seen.circles.shape[1], -1))
        )  # (N, 3 K, 30, 24)
        likeness = upright.flatten(2) @ stored.circles.flatten(1).T  # (N, 3 K, C * 16)
        best = likeness.unflatten(1, (-1, 3)).amax(2)  # (N, K, C * 16)
        own = torch.where(seen.energy.isinf(), 1.0, seen.energy)[:, None, None]
        error = (own + stored.energy - 2 * best) / own.clamp(min=1e-6)  # (N, K, C * 16)
        return error.unflatten(2, (len(self.sheet), LENGTH))
