"""How well a style was learned: images of single stickers beside the true ones of two styles, by pretrained networks.

Every name exists in the style to be learned ("styled": Fluent 3D) and in that of before ("plain": flat). A generated
image is compared with both, drawn on the same background. In all three the object is cut out and scaled to one size
(`apps.perceptual.nearest.cut_out`), so where it stands and how large it is doesn't count. Asked are

- the distance by ST-LPIPS to the true styled image, beside that of the true plain image, which gives the scale;
- what the image shows: the nearest of all styled stickers, by the judge of `apps.perceptual.nearest`;
- how far it went from plain to styled, whatever it shows: its place on the axis that tells the styles apart.

The last is needed because the two drawings of a thing differ in more than their style: nobody could guess the pose of
the one from the other. That part of the distance stays, however well the style was learned. But damage moves an image
along the axis too: flat ones that are reduced eight times and enlarged again come about half of the way (0.4 to 0.7,
by the background), while they get further from the truth. So it says something only where things are recognised and
the distance doesn't grow.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from apps.perceptual.measures import perceptual_distance
from apps.perceptual.nearest import NearestStickerJudge, cut_out, embed
from apps.perceptual.st_lpips import load_st_lpips
from apps.stickers import SpriteSheet, render
from apps.stickers.fluent import single_scene

SIDE = 128  # pixels at which true images are drawn
AXIS_COLOURS = ("white", "gray", "blue", "yellow", "green")  # backgrounds that the axis is found on
AXIS_BLURS = (1, 2, 4)  # reductions that images of both styles went through there, so that blur says little about style
RIDGE = 1.0  # in units of the mean squared length of the centred features


@dataclass(frozen=True, eq=False)
class StyleReading:
    """What was measured on B images.

    Attributes:
        distance: (B,) ST-LPIPS to the true styled image of the name.
        scale: (B,) ST-LPIPS from the true plain image to the true styled one.
        plain_distance: (B,) ST-LPIPS to the true plain image.
        style: (B,) place on the axis: 0 is the mean of true plain images, 1 that of true styled ones. A single image
            scatters by 0.5.
        sprites: (B,) number of the nearest styled sticker; -1 where nothing differs from the border.
        right: (B,) whether that is the one asked for.
    """

    distance: Tensor
    scale: Tensor
    plain_distance: Tensor
    style: Tensor
    sprites: Tensor
    right: Tensor

    def __len__(self) -> int:
        return len(self.distance)

    def part(self, rows: Tensor) -> "StyleReading":
        """Return the reading of some of the images, by a mask (B,) or by their numbers."""
        return StyleReading(*(getattr(self, field.name)[rows] for field in fields(self)))

    def figures(self) -> dict[str, float]:
        """Return means over the images.

        Returns:
            `distance` and `scale` (ST-LPIPS), `fallen` (share of the scale by which the distance is smaller than it),
            `style` (0 plain, 1 styled), `identity` (share of images whose nearest styled sticker is the right one),
            `nearer` (share of images that are so and nearer to the true styled image than to the true plain one).
        """
        distance, scale = float(self.distance.mean()), float(self.scale.mean())
        return {
            "distance": distance,
            "scale": scale,
            "fallen": 1 - distance / scale,
            "style": float(self.style.mean()),
            "identity": float(self.right.float().mean()),
            "nearer": float((self.right & (self.distance < self.plain_distance)).float().mean()),
        }


@dataclass(frozen=True, eq=False)
class StyleAxis:
    """A direction in a space of features along which two styles differ.

    Attributes:
        weight: (D,).
        plain, styled: where the means of both styles lie on it.
    """

    weight: Tensor
    plain: float
    styled: float

    def place(self, features: Tensor) -> Tensor:
        """Return where features (B, D) lie: 0 at the mean of plain ones, 1 at that of styled ones, (B,)."""
        return (features @ self.weight - self.plain) / (self.styled - self.plain)


def find_direction(plain: Tensor, styled: Tensor, ridge: float = RIDGE) -> Tensor:
    """Find the direction that tells two sets of features apart: ridge regression of -1 and 1 on them.

    Solved for the images rather than for the features, of which there are many more.

    Args:
        plain: (N, D).
        styled: (M, D).
        ridge: how much large weights cost, in units of the mean squared length of the centred features.

    Returns:
        (D,).
    """
    features = torch.cat([plain, styled])  # (N + M, D)
    centred = features - features.mean(0)
    target = torch.cat([-torch.ones(len(plain)), torch.ones(len(styled))]).to(features)  # (N + M,)
    products = centred @ centred.T  # (N + M, N + M)
    cost = ridge * products.diagonal().mean() * torch.eye(len(products)).to(products)
    return torch.linalg.solve(products + cost, target) @ centred  # (D,)


def blurred(images: Tensor, factor: int) -> Tensor:
    """Reduce images (B, C, H, W) by a whole factor, and enlarge them again; 1 leaves them as they are."""
    if factor == 1:
        return images
    side = (images.shape[-2] // factor, images.shape[-1] // factor)
    small = functional.interpolate(images, size=side, mode="bilinear", antialias=True)  # (B, C, H / f, W / f)
    return functional.interpolate(small, size=images.shape[-2:], mode="bilinear")


class StyleJudge:
    """Measures how far images of single stickers went from one style to another.

    Args:
        plain: the stickers in the style of before.
        styled: the stickers in the style to be learned; all of them compete for what an image shows.
        learned: names that the axis of styles is found on, those that the style was learned from; the others say where
            on it both styles lie, so images of these are judged by an axis that never saw their drawings.
        device: where to work.

    Raises:
        KeyError: a sheet lacks a name.
        ValueError: no name is learned, or none is left over.
    """

    def __init__(
        self, plain: SpriteSheet, styled: SpriteSheet, learned: Sequence[str], device: torch.device | str = "cpu"
    ) -> None:
        others = [name for name in styled.names if name not in learned]
        if not learned or not others:
            raise ValueError(f"{len(learned)} names are learned and {len(others)} are left: give some, but not all")
        self.plain, self.styled = plain, styled
        self.judge = NearestStickerJudge(styled, device)
        self.device = self.judge.device
        self.network = load_st_lpips(self.device)
        self.axis = self._find_axis(learned, others)

    @torch.inference_mode()
    def measure(
        self, images: Tensor, names: Sequence[str], colours: Sequence[str], batch_size: int = 32
    ) -> StyleReading:
        """Measure images.

        Args:
            images: (B, 3, H, H) in [-1, 1].
            names: what each should show.
            colours: the background of each, names of `BACKGROUNDS`.
            batch_size: images measured at once (memory only).

        Raises:
            KeyError: a name isn't in both sheets.
            ValueError: the shapes don't fit, a colour is unknown, or there are no images.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3] or not len(images):
            raise ValueError(f"images have shape {tuple(images.shape)}: give (B, 3, H, H) in [-1, 1], B at least 1")
        if not len(images) == len(names) == len(colours):
            raise ValueError(f"{len(images)} images, {len(names)} names, {len(colours)} colours: give as many of each")
        readings = []
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            readings.append(self._measure(images[rows].to(self.device, torch.float32), names[rows], colours[rows]))
        return StyleReading(
            *(torch.cat([getattr(one, field.name) for one in readings]) for field in fields(StyleReading))
        )

    def _measure(self, images: Tensor, names: Sequence[str], colours: Sequence[str]) -> StyleReading:
        seen = cut_out(images)[0]  # (b, 3, 64, 64)
        plain, styled = (cut_out(self._drawn(sheet, names, colours))[0] for sheet in (self.plain, self.styled))
        distance, scale, plain_distance = (
            perceptual_distance(a.clamp(-1, 1), b.clamp(-1, 1), network=self.network)  # (b,)
            for a, b in ((seen, styled), (plain, styled), (seen, plain))
        )
        sprites = self.judge.read(images).sprites  # (b,)
        truth = torch.tensor([self.styled.index(name) for name in names], device=sprites.device)  # (b,)
        place = self.axis.place(embed(self.judge.network, seen))  # (b,)
        return StyleReading(distance, scale, plain_distance, place, sprites, sprites == truth)

    def _drawn(self, sheet: SpriteSheet, names: Sequence[str], colours: Sequence[str]) -> Tensor:
        """Draw true images, (B, 3, 128, 128) in [-1, 1]."""
        scenes = [single_scene(name, colour, sheet) for name, colour in zip(names, colours, strict=True)]
        return render(scenes, sheet, SIDE, self.device)

    @torch.inference_mode()
    def _find_axis(self, learned: Sequence[str], others: Sequence[str]) -> StyleAxis:
        def features(sheet: SpriteSheet, names: Sequence[str], blurs: Sequence[int]) -> Tensor:
            drawn = [self._drawn(sheet, names, [colour] * len(names)) for colour in AXIS_COLOURS]  # 5 x (N, 3, R, R)
            spoiled = [blurred(images, factor) for images in drawn for factor in blurs]
            return torch.cat([embed(self.judge.network, cut_out(images)[0]) for images in spoiled])  # (N', D)

        known = [features(sheet, learned, AXIS_BLURS) for sheet in (self.plain, self.styled)]  # 2 x (N', D)
        weight = find_direction(known[0], known[1])  # (D,)
        plain, styled = (float((features(sheet, others, (1,)) @ weight).mean()) for sheet in (self.plain, self.styled))
        return StyleAxis(weight, plain, styled)
