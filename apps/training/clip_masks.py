"""What a generator of clips is shown while it is trained: the mix of tasks of VDT (arXiv 2305.13311, section 3.3)."""

import numpy as np
import torch
from torch import Tensor

from pipelines.flow_video import DEFAULT_OVERLAP

SPATIAL = 0.2  # share of the masks that hide a region of all frames


def draw_known(count: int, frames: int, side: int, start: int, rng: np.random.Generator, fraction: float) -> Tensor:
    """Draw what is known of clips.

    Args:
        count: B clips.
        frames: T of each.
        side: Cells along a side of a latent frame.
        start: Where the clips begin in longer ones: if not at their start, their first frames are always known.
        rng: Source of the random numbers.
        fraction: Share of the other clips of which anything is known.

    Returns:
        Bool, (B, T, side, side).
    """
    known = torch.zeros(count, frames, side, side, dtype=torch.bool)
    for clip in known:
        if start > 0:
            clip[: _overlap(frames) if rng.random() < 0.8 else int(rng.integers(1, frames))] = True
        elif rng.random() < fraction:
            if frames == 1 or rng.random() < SPATIAL:
                _show_around(clip, rng)
            else:
                clip[_known_frames(frames, rng)] = True
    return known


def is_spatial(known: Tensor) -> Tensor:
    """Tell of which clips (B, T, h, w) regions are known, and not whole frames: bool, (B,)."""
    some, whole = known.any(dim=(2, 3)), known.all(dim=(2, 3))  # (B, T)
    return (some != whole).any(dim=1)


def _overlap(frames: int) -> int:
    """Return how many frames a window of a long clip takes over from the one before it."""
    return min(DEFAULT_OVERLAP, frames - 1)


def _show_around(clip: Tensor, rng: np.random.Generator) -> None:
    """Show all but a rectangle of at least a quarter of each side, in all frames."""
    side = clip.shape[-1]
    height, width = (int(size) for size in rng.integers(max(side // 4, 1), side + 1, size=2))
    top, left = int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1))
    clip[:] = True
    clip[:, top : top + height, left : left + width] = False


def _known_frames(frames: int, rng: np.random.Generator) -> list[int]:
    """Draw the frames that are known: the first, the last, every n-th, both ends, one, or some."""
    task = ("predict", "backward", "interpolate", "ends", "first", "one", "some")[rng.integers(7)]
    if task in ("predict", "backward"):
        count = _overlap(frames) if rng.random() < 0.5 else int(rng.integers(1, frames))
        return list(range(frames))[:count] if task == "predict" else list(range(frames))[-count:]
    if task == "interpolate":
        return list(range(0, frames, int(rng.integers(2, 9))))
    if task == "ends":
        return [0, frames - 1]
    if task == "some":
        return np.flatnonzero(rng.random(frames) < 0.2).tolist()
    return [0 if task == "first" else int(rng.integers(frames))]
