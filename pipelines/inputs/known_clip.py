"""What is known of a clip: pixels that stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.inputs.inpaint import fill_in
from pipelines.inputs.video_mask import VideoMask

VideoInput = Sequence[Image.Image] | np.ndarray | Tensor | Mapping[int, Image.Image]
"""A clip: PIL images, an array (T, H, W, 3) or a tensor (T, 3, H, W) in [0, 1]; or single frames by index."""


@dataclass(frozen=True, slots=True)
class KnownClip:
    """The known part of a clip, or of a window of one.

    Attributes:
        pixels: (B, 3, T, H, W) in [-1, 1]; anything where nothing is known.
        mask: where to generate, (T, 1, H, W), bool.
    """

    pixels: Tensor
    mask: Tensor

    @classmethod
    def nothing(cls, count: int, num_frames: int, height: int, width: int) -> KnownClip:
        """Return a clip of which nothing is known."""
        return cls(torch.zeros(count, 3, num_frames, height, width), torch.ones(num_frames, 1, height, width).bool())

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known."""
        return bool(self.mask.all())

    def part(self, start: int, stop: int) -> KnownClip:
        """Return what is known of the frames from `start` to below `stop`."""
        return KnownClip(self.pixels[:, :, start:stop], self.mask[start:stop])

    def with_beginning(self, frames: Tensor) -> KnownClip:
        """Return the clip with its first frames known, (B, 3, K, H, W) in [-1, 1]."""
        known = frames.shape[2]
        pixels = torch.cat([frames.to(self.pixels), self.pixels[:, :, known:]], dim=2)  # (B, 3, T, H, W)
        mask = torch.cat([torch.zeros_like(self.mask[:known]), self.mask[known:]])  # (T, 1, H, W)
        return KnownClip(pixels, mask)

    def filled(self) -> Tensor:
        """Return the pixels (B, 3, T, H, W) with the unknown ones filled in smoothly, by the nearest frames that know.

        A frame of which nothing is known becomes the nearest one of which something is; unknown parts of a frame are
        filled from around them. What was there leaves no trace.
        """
        known = ~self.mask.flatten(1).all(dim=1)  # (T,)
        if not known.any():
            return torch.zeros_like(self.pixels)
        where = known.nonzero().flatten()  # (K,)
        frames = torch.arange(len(known))
        nearest = where[(frames[:, None] - where[None]).abs().argmin(dim=1)]  # (T,)
        pixels = self.pixels[:, :, nearest]  # (B, 3, T, H, W)
        mask = self.mask[nearest].to(pixels.device)  # (T, 1, H, W)
        flat = pixels.transpose(1, 2).flatten(0, 1)  # (B T, 3, H, W)
        spread = mask.repeat(len(pixels), 1, 1, 1)  # (B T, 1, H, W)
        return fill_in(flat, spread).unflatten(0, (len(pixels), -1)).transpose(1, 2)  # (B, 3, T, H, W)

    def composite(self, pixels: Tensor) -> Tensor:
        """Replace the known pixels of a decoded clip (B, 3, T, H, W) by the given ones."""
        mask = self.mask.transpose(0, 1)[None].to(pixels.device)  # (1, 1, T, H, W)
        return torch.where(mask, pixels, self.pixels.to(pixels))


def read_known_clip(
    video: VideoInput,
    mask: VideoMask,
    num_frames: int,
    height: int,
    width: int,
    read_frames: Callable[[list[Any]], Tensor],
) -> KnownClip:
    """Read the known part of a clip.

    Args:
        video: all frames, or single ones by index (negative ones from the end), which then are known.
        mask: where to generate.
        num_frames: of the clip.
        height: pixels to which frames are resized.
        width: pixels.
        read_frames: frames to pixels (T, 3, H, W) in [-1, 1].

    Returns:
        The clip, of batch size 1.

    Raises:
        ValueError: the video has another number of frames, or an index is out of range.
    """
    if isinstance(video, Mapping):
        indices = [_index(frame, num_frames) for frame in video]
        pixels = torch.zeros(num_frames, 3, height, width)  # (T, 3, H, W)
        known = torch.ones(num_frames, 1, height, width, dtype=torch.bool)
        if indices:
            pixels[indices] = read_frames(list(video.values())).cpu()
            known[indices] = False
        region = mask.resolve(num_frames, height, width) & known
    else:
        frames = list(video)
        if len(frames) != num_frames:
            raise ValueError(f"the video has {len(frames)} frames and num_frames is {num_frames}: they must be equal.")
        pixels = read_frames(frames).cpu()  # (T, 3, H, W)
        region = mask.resolve(num_frames, height, width)  # (T, 1, H, W)
    return KnownClip(pixels.transpose(0, 1)[None], region)


def _index(frame: object, num_frames: int) -> int:
    """Check the index of a frame, and count it from the beginning."""
    if isinstance(frame, bool) or not isinstance(frame, int) or not -num_frames <= frame < num_frames:
        raise ValueError(
            f"the video names frame {frame!r} of a clip of {num_frames}: expected {-num_frames} to {num_frames - 1}."
        )
    return frame % num_frames
