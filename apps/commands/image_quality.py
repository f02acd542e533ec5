"""How well images of the sticker world are drawn: fidelity, and distances by networks that the project did not train.

The exact judge of `apps.stickers.judge` asks whether an image holds what was asked for. Here images are compared with
the best-fitting rendering of what was asked for (`apps.stickers.fidelity`), pixel by pixel and as people see them.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from PIL import Image
from torch import Tensor

from apps.perceptual import ShiftTolerantLPIPS
from apps.stickers import Scene, SpriteSheet, render
from apps.stickers.contact_sheet import contact_sheet
from apps.stickers.fidelity import measure_fidelity

WORST_SHOWN = 32
WORST_SHARE = 0.1
CHUNK = 8  # images that the perceptual network sees at once


@dataclass
class ImageQuality:
    """Collects how well images are drawn, batch by batch.

    Attributes:
        sheet: The stickers.
        network: Measures the perceptual distance; None leaves it out.
        psnr, ssim: Of each image, to its best-fitting rendering; see `Fidelity`.
        distances: ST-LPIPS of each image to it.
        worst: The worst images so far with their renderings, a heap by falling PSNR.
    """

    sheet: SpriteSheet
    network: ShiftTolerantLPIPS | None = None
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
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
        if self.network is not None:
            for some, others in zip(images.split(CHUNK), drawn.split(CHUNK), strict=True):
                self.distances += self.network(some.clamp(-1, 1), others.clamp(-1, 1)).tolist()

    def fidelity(self) -> dict[str, float]:
        """Return the mean `psnr` (dB) and `ssim`, and `psnr_worst_tenth`, the mean of the worst tenth of the images."""
        count = max(1, round(WORST_SHARE * len(self.psnr)))
        return {
            "psnr": fmean(self.psnr),
            "ssim": fmean(self.ssim),
            "psnr_worst_tenth": fmean(sorted(self.psnr)[:count]),
        }

    def perceptual(self) -> dict[str, float]:
        """Return the mean `st_lpips` distance, 0 for equal images; empty without a network."""
        return {"st_lpips": fmean(self.distances)} if self.distances else {}

    def worst_sheet(self, title: str) -> Image.Image:
        """Draw the worst images, worst first, each beside its best-fitting rendering.

        Raises:
            ValueError: No image was kept.
        """
        ranked = sorted(self.worst, key=lambda entry: -entry[0])
        tiles = [tile for _, _, _, image, drawn in ranked for tile in (image, drawn)]
        captions = [text for dB, _, prompt, *_ in ranked for text in (prompt, f"best rendering, {-dB:.1f} dB")]
        return contact_sheet(torch.stack(tiles) if tiles else torch.empty(0), captions, title, "worst first")
