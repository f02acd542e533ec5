"""A curriculum of sizes: the first steps see small images that hold the low frequencies only (EfficientTrain).

Networks learn low frequencies first (arXiv 2211.09703), so early steps lose little if they see nothing else, and images
of fewer pixels are fewer tokens. An image isn't scaled by a filter but its spectrum is cropped: what the small image
can hold is there unchanged, everything else is gone.

Positions. Tokens of a small image keep the distance of one token to their neighbours, as rotary positions count them,
and where they stand in the image is told by their coordinates as fractions of it (`TextDiT.coordinate_embed`), which
span the same extent at every size. So the network is called as a pipeline calls it at other sizes and nothing in it
depends on the curriculum: what is learned about neighbouring tokens and about places holds at the full size, where
only distances of many tokens are new. Stretching rotary positions instead would make neighbours look less than a token
apart, which they never are when the model is used.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from apps.training.data.base import Examples

Curriculum = Sequence[tuple[float, int]]
"""Parts of a run: the share of its steps at which one ends, and the side of its images."""


def check_curriculum(curriculum: Curriculum, resolution: int) -> None:
    """Check what can be checked without a model.

    Raises:
        ValueError: Shares don't ascend to 1, or sides don't ascend to the resolution.
    """
    if not curriculum:
        return
    shares, sides = ([part[number] for part in curriculum] for number in (0, 1))
    if shares != sorted(set(shares)) or shares[0] <= 0 or shares[-1] != 1:
        raise ValueError(
            f"data.curriculum ends its parts at shares {shares} of the steps: expected ascending ones above 0, the "
            "last one 1"
        )
    if sides != sorted(sides) or sides[0] < 1 or sides[-1] != resolution:
        raise ValueError(
            f"data.curriculum has images of sides {sides}: expected ascending ones, the last data.resolution = "
            f"{resolution}"
        )


def side_at(curriculum: Curriculum, step: int, steps: int, resolution: int) -> int:
    """Return the side of the images of an optimizer step.

    Args:
        curriculum: Empty is none.
        step: From 0.
        steps: Of the whole run.
        resolution: Without a curriculum.
    """
    return next((side for share, side in curriculum if step < share * steps), resolution)


def crop_spectrum(images: Tensor, side: int) -> Tensor:
    """Make images smaller by leaving out all frequencies that don't fit.

    Frequencies of less than `side / 2` periods an image stay exactly what they are, at the centres of the new pixels;
    those of `side / 2`, of which the small image couldn't hold the phase, are left out too. Where stripes end, a small
    image may overshoot the range of the large one, as every sharp low-pass does.

    Args:
        images: (B, C, R, R).
        side: S, at most R.

    Returns:
        (B, C, S, S) float32.
    """
    size = images.shape[-1]
    if side == size:
        return images.float()
    reach = (side - 1) // 2  # the highest frequency that stays
    frequencies = torch.arange(-reach, reach + 1, device=images.device)  # (F,)
    spectrum = torch.fft.fft2(images.float())[..., frequencies % size, :][..., frequencies % size]  # (B, C, F, F)
    # Pixels are samples at their centres, (i + 1/2) / R: the first one of the small image lies a little further inside.
    shift = torch.exp(2j * np.pi * frequencies * (0.5 / side - 0.5 / size))  # (F,)
    small = torch.zeros(*images.shape[:-2], side, side, dtype=spectrum.dtype, device=images.device)  # (B, C, S, S)
    rows, columns = (frequencies % side)[:, None], (frequencies % side)[None]
    small[..., rows, columns] = spectrum * shift[:, None] * shift[None]
    return torch.fft.ifft2(small).real * (side / size) ** 2


class LowFrequencyExamples:
    """Examples whose images are made smaller by `crop_spectrum`. See `apps.training.data.base.Examples`.

    Args:
        examples: Of the full size.
        side: Of the images.
    """

    def __init__(self, examples: Examples, side: int) -> None:
        self.examples, self.side = examples, side

    def __len__(self) -> int:
        return len(self.examples)

    def images(self, rows: Sequence[int]) -> Tensor:
        """Return small images, (B, 3, S, S)."""
        return crop_spectrum(self.examples.images(rows), self.side)

    def regions(self, rows: Sequence[int]) -> Tensor | None:
        """Return None: regions are marked at the full size."""
        return None

    def caption(self, row: int, rng: np.random.Generator) -> str:
        """Draw a caption of a row."""
        return self.examples.caption(row, rng)

    def fingerprint(self) -> str:
        """Return the hash of the examples and the side."""
        return f"{self.examples.fingerprint()}|spectrum {self.side}"
