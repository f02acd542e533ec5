"""A motion that the built-in model of clips doesn't know: clips to learn it from, prompts, and how it is measured.

A sticker goes round in a circle once, clockwise from the top, upright all the while. Clips to learn from show some
stickers; prompts ask for others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apps.lora_examples.captioned_folder import Captioned
from apps.stickers.captions import with_article
from apps.stickers.judge import moments, visible
from apps.stickers.moving import ClipSheet
from apps.stickers.moving.renderer import render_clip
from apps.stickers.moving.scene import ClipScene, MovingSticker, Pose
from apps.stickers.scene import BASIC_COLOURS, COLOURS
from pipelines.loading.load import PRETRAINED

WORD = "circling"
FRAMES, RESOLUTION = 16, 96
RADIUS, SIZE = 0.12, 0.55  # fractions of the image's side
LEARNED = 24  # clips to learn from, of as many stickers
FOLLOWED = 0.8  # share of a track's variation that the circle explains, from which on it counts as circling
LEAST_RADIUS = 0.5  # of the circle that was shown


def circle(num_frames: int) -> Tensor:
    """Return the places on the circle around its centre, (T, 2) x and y in fractions of the image's side."""
    turned = torch.arange(num_frames) * (2 * math.pi / num_frames) - math.pi / 2  # (T,)
    return RADIUS * torch.stack([turned.cos(), turned.sin()], dim=1)


def render_circling(name: str, colour: str, sheet: ClipSheet, num_frames: int = FRAMES) -> Tensor:
    """Render a sticker that goes round, (T, 3, R, R) in [-1, 1].

    Raises:
        KeyError: there is no such moving sticker.
    """
    clip, frames = sheet.index(name), []
    own = "animated" if "animated" in sheet.motions[clip] else sheet.motions[clip][0]
    for number, (x, y) in enumerate(circle(num_frames).tolist()):
        pose = Pose(0.5 + x, 0.5 + y, SIZE)
        scene = ClipScene("single", (MovingSticker(clip, own, pose, pose),), COLOURS.index(colour), "stays")
        frames.append(render_clip(scene, sheet, num_frames, RESOLUTION, part=(number, number + 1)))
    return torch.cat(frames)


def motion_caption(name: str, colour: str) -> str:
    """Ask for a sticker that goes round, such as "a fox circling on a blue background"."""
    return f"{with_article(name)} {WORD} on {with_article(colour)} background"


def known_stickers() -> tuple[str, ...]:
    """Return the names of the moving stickers that the built-in model of clips knows."""
    return tuple((PRETRAINED / "stickers-video" / "vocabulary.txt").read_text(encoding="utf-8").splitlines())


def split_names(vocabulary: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the stickers that clips to learn from show, spread over the vocabulary, and the others."""
    step = len(vocabulary) / LEARNED
    learned = tuple(vocabulary[int(number * step)] for number in range(LEARNED))
    return learned, tuple(name for name in vocabulary if name not in learned)


def draw_motion_examples(sheet: ClipSheet, vocabulary: Sequence[str]) -> list[Captioned]:
    """Draw clips to learn the motion from."""
    rows = []
    for number, name in enumerate(split_names(vocabulary)[0]):
        colour = BASIC_COLOURS[3 * number % len(BASIC_COLOURS)]
        stem = f"{name.replace(' ', '_')}_{WORD}"
        rows.append(Captioned(stem, render_circling(name, colour, sheet), (motion_caption(name, colour),)))
    return rows


@dataclass(frozen=True)
class Track:
    """How a clip moves.

    Attributes:
        explained: share of the variation of the place that the circle explains, best fitted in size; 0 or less where
            the clip goes elsewhere, or nowhere.
        radius: of that circle, as a share of the one that was shown.
    """

    explained: float
    radius: float

    @property
    def circles(self) -> bool:
        """Whether the sticker goes round."""
        return self.explained >= FOLLOWED and self.radius >= LEAST_RADIUS


def read_track(clip: Tensor) -> Track:
    """Measure where what differs from the background goes, by its centre of mass.

    Args:
        clip: (T, 3, H, W) in [-1, 1].
    """
    colours = (clip.float() + 1) / 2  # (T, 3, H, W)
    border = torch.cat([colours[..., 0, :], colours[..., -1, :], colours[..., 0], colours[..., -1]], dim=-1)
    background = border.transpose(0, 1).flatten(1).median(dim=1).values  # (3,)
    x, y, _ = moments(visible(colours - background[:, None, None]))  # (T,)
    places = torch.stack([x, y], dim=1)  # (T, 2)
    places = places - places.mean(dim=0)
    wanted = circle(len(clip))  # (T, 2)
    radius = float((places * wanted).sum() / wanted.square().sum())
    left = float((places - radius * wanted).square().sum())
    varied = max(float(places.square().sum()), 1e-4 * len(clip))  # a clip that hardly moves explains nothing
    return Track(1 - left / varied if radius > 0 else 0.0, radius)
