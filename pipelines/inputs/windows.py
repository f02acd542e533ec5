"""Windows of a long clip: each is generated with the last frames of the one before it as its known beginning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Window:
    """Frames that one run of the denoising loop makes.

    Attributes:
        index: number of the window.
        start: index of its first frame in the clip.
        stop: index behind its last one.
        known: how many of its first frames the window before it has made.
    """

    index: int
    start: int
    stop: int
    known: int

    @property
    def length(self) -> int:
        """Frames of the window, the known ones included."""
        return self.stop - self.start


def plan_windows(num_frames: int, length: int, overlap: int) -> list[Window]:
    """Divide a clip into windows.

    Args:
        num_frames: of the clip.
        length: frames of a window, those that a model was trained on.
        overlap: frames that a window shares with the one before it, below `length`.

    Returns:
        The windows in order. All have the same length, which models know best, so the last one may share more frames
        with the one before it; only of a clip shorter than a window it is shorter.

    Raises:
        ValueError: `overlap` is not below `length`, or below 1.
    """
    if not 1 <= overlap < length:
        raise ValueError(f"window_overlap={overlap} is out of range: expected 1 to {length - 1} (window_frames - 1).")
    windows = [Window(0, 0, min(length, num_frames), 0)]
    while windows[-1].stop < num_frames:
        start = min(windows[-1].stop - overlap, num_frames - length)
        windows.append(Window(len(windows), start, start + length, windows[-1].stop - start))
    return windows


def reuse_noise(noise: Tensor, window: Window, latent_frames: int) -> Tensor:
    """Return the noise of a window: that of the first one with its frames in another order.

    Windows of related noise keep the look of the clip (FreeNoise, arXiv 2310.15169, section 3.2).

    Args:
        noise: of the first window, (B, C, T', h, w).
        window: whose noise is wanted.
        latent_frames: of that window, at most T'.

    Returns:
        (B, C, latent_frames, h, w).
    """
    if window.index == 0:
        return noise[:, :, :latent_frames]
    order = torch.randperm(noise.shape[2], generator=torch.Generator().manual_seed(window.index))
    return noise[:, :, order[:latent_frames].to(noise.device)]


@dataclass(frozen=True, slots=True)
class PromptSchedule:
    """Prompts that follow each other in one clip.

    Attributes:
        entries: (index of the first frame, prompt), by rising index, the first one 0.
    """

    entries: tuple[tuple[int, str], ...]

    def at(self, window: Window) -> str:
        """Return the prompt in force at the middle of a window's new frames."""
        return self.entries[self._index(window)][1]

    def check(self, windows: Sequence[Window]) -> None:
        """Check that each prompt is in force in some window: a window has one prompt.

        Raises:
            ValueError: a prompt never is; the message says at which frames another prompt may begin.
        """
        used = {self._index(window) for window in windows}
        for number, (frame, prompt) in enumerate(self.entries):
            if number not in used:
                begin = [window.start + window.known for window in windows]
                raise ValueError(
                    f"The prompt {prompt[:40]!r} from frame {frame} on would never be seen: this clip is generated in "
                    f"parts that begin at the frames {begin}, each with one prompt. Let one prompt begin at each of "
                    "them at most, or make the clip longer."
                )

    def _index(self, window: Window) -> int:
        """Return the number of the prompt in force at the middle of a window's new frames."""
        middle = (window.start + window.known + window.stop - 1) / 2
        return max(number for number, (frame, _) in enumerate(self.entries) if frame <= middle)


def read_schedule(entries: Sequence[tuple[int, str]], num_frames: int) -> PromptSchedule:
    """Check the prompts of a clip.

    Args:
        entries: (index of the first frame, prompt), the first one from frame 0.
        num_frames: of the clip.

    Raises:
        ValueError: an index is out of range, or they don't rise from 0.
        TypeError: an entry is no pair of a whole number and a string.
    """
    for entry in entries:
        fits = isinstance(entry, list | tuple) and len(entry) == 2
        if not fits or isinstance(entry[0], bool) or not isinstance(entry[0], int) or not isinstance(entry[1], str):
            raise TypeError(f"prompt_schedule holds {entry!r:.80}: expected pairs (frame, prompt).")
    frames = [frame for frame, _ in entries]
    if not frames or frames[0] != 0 or any(a >= b for a, b in pairwise(frames)):
        raise ValueError(f"prompt_schedule begins at frames {frames}: expected rising indices, the first one 0.")
    if frames[-1] >= num_frames:
        raise ValueError(
            f"prompt_schedule names frame {frames[-1]} of a clip of {num_frames}: at most {num_frames - 1}."
        )
    return PromptSchedule(tuple((frame, prompt) for frame, prompt in entries))
