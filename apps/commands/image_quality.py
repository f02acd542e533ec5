"""How well images of the sticker world are drawn: fidelity, and distances by networks that the project did not train.

The exact judge of `apps.stickers.judge` asks whether an image holds what was asked for. Here images are compared with
the best-fitting rendering of what was asked for (`apps.stickers.fidelity`), pixel by pixel and by the features of
pretrained networks.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean

import torch
from PIL import Image
from torch import Tensor

from apps.perceptual import (
    EfficientNetLite0,
    NearestStickerJudge,
    ShiftTolerantLPIPS,
    frechet_distance,
    image_features,
    load_efficientnet_lite0,
    load_st_lpips,
    perceptual_distance,
)
from apps.stickers import Scene, SpriteSheet, render
from apps.stickers.contact_sheet import contact_sheet
from apps.stickers.fidelity import measure_fidelity

WORST_SHOWN = 32
WORST_SHARE = 0.1
CHUNK = 8  # images that a network sees at once


class PretrainedNetworks:
    """The networks that measure images; each is loaded when it is first asked for.

    Args:
        sheet: The stickers that the second judge knows.
    """

    def __init__(self, sheet: SpriteSheet) -> None:
        self.sheet = sheet

    @cached_property
    def distance(self) -> ShiftTolerantLPIPS:
        """Measures how different two images look."""
        return load_st_lpips()

    @cached_property
    def features(self) -> EfficientNetLite0:
        """Describes images."""
        return load_efficientnet_lite0()

    @cached_property
    def judge(self) -> NearestStickerJudge:
        """Reads which sticker a single one is."""
        return NearestStickerJudge(self.sheet)


@dataclass
class ImageQuality:
    """Collects how well images are drawn, batch by batch.

    Attributes:
        sheet: The stickers.
        networks: Measure the images; None leaves out what needs them.
        psnr, ssim: Of each image, to its best-fitting rendering; see `Fidelity`.
        distances: ST-LPIPS of each image to it.
        features: Of EfficientNet-lite0, of all images and of their renderings, batch by batch.
        recognised: Whether the second judge takes each single sticker for the right one.
        worst: The worst images so far with their renderings, a heap by falling PSNR.
    """

    sheet: SpriteSheet
    networks: PretrainedNetworks | None = None
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    features: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    recognised: list[bool] = field(default_factory=list)
    worst: list[tuple[float, int, str, Tensor, Tensor]] = field(default_factory=list)

    @torch.inference_mode()
    def add(self, images: Tensor, scenes: Sequence[Scene], prompts: Sequence[str] | None = None) -> None:
        """Measure images.

        Args:
            images: (B, 3, H, H) in [-1, 1].
            scenes: What was asked for.
            prompts: What they are called on the sheet of the worst; None keeps no image.
        """
        images = images.float().cpu()
        found = measure_fidelity(images, scenes, self.sheet)
        drawn = render(found.scenes, self.sheet, images.shape[-1])  # (B, 3, H, H)
        if prompts is not None:
            for dB, prompt, image, rendering in zip(found.psnr, prompts, images, drawn, strict=True):
                heapq.heappush(self.worst, (-dB, len(self.psnr), prompt, image, rendering))
                self.psnr.append(dB)
                if len(self.worst) > WORST_SHOWN:
                    heapq.heappop(self.worst)
        else:
            self.psnr += found.psnr
        self.ssim += found.ssim
        if self.networks is not None:
            self._measure(self.networks, images.clamp(-1, 1), drawn.clamp(-1, 1), scenes)

    def _measure(self, networks: PretrainedNetworks, images: Tensor, drawn: Tensor, scenes: Sequence[Scene]) -> None:
        """Compare images with their best-fitting renderings by the networks, (B, 3, H, H) each."""
        self.distances += perceptual_distance(images, drawn, CHUNK, networks.distance).tolist()
        for found, some in zip(self.features, (images, drawn), strict=True):
            found.append(image_features(some, CHUNK, networks.features))  # (B, 152)
        if scenes[0].kind == "single":
            sprites = networks.judge.read(images).sprites.tolist()
            self.recognised += [scene.sprites == (sprite,) for scene, sprite in zip(scenes, sprites, strict=True)]

    def fidelity(self) -> dict[str, float]:
        """Return the mean `psnr` (dB) and `ssim`, and `psnr_worst_tenth`, the mean of the worst tenth of the images."""
        count = max(1, round(WORST_SHARE * len(self.psnr)))
        return {
            "psnr": fmean(self.psnr),
            "ssim": fmean(self.ssim),
            "psnr_worst_tenth": fmean(sorted(self.psnr)[:count]),
        }

    def perceptual(self) -> dict[str, float]:
        """Return what the networks measure; empty without them.

        Returns:
            `st_lpips`, the mean distance to the best-fitting renderings (0 for equal images); `frechet_lite0`, the
            Frechet distance of the images' features from those of the renderings (from two images on); of single
            stickers `nearest_recall`, the share that the second judge takes for the right one.
        """
        if not self.distances:
            return {}
        values = {"st_lpips": fmean(self.distances)}
        if len(self.distances) > 1:
            values["frechet_lite0"] = frechet_distance(*(torch.cat(found) for found in self.features))
        return values | ({"nearest_recall": fmean(self.recognised)} if self.recognised else {})

    def worst_sheet(self, title: str) -> Image.Image:
        """Draw the worst images, worst first, each beside its best-fitting rendering.

        Raises:
            ValueError: No image was kept.
        """
        ranked = sorted(self.worst, key=lambda entry: -entry[0])
        tiles = [tile for _, _, _, image, drawn in ranked for tile in (image, drawn)]
        captions = [text for dB, _, prompt, *_ in ranked for text in (prompt, f"best rendering, {-dB:.1f} dB")]
        return contact_sheet(torch.stack(tiles) if tiles else torch.empty(0), captions, title, "worst first")
