"""LVSA: every frame sees the frames around it, and a few anchor frames of the whole clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap, make_block_map
from dit.attention.grid import TokenGrid
from dit.attention.layout import chunk_sizes, make_layout
from dit.attention.patterns import STEP, register_pattern


@register_pattern("lvsa", paper="arXiv 2605.31057", turns=lambda grid: grid.frames)
def lvsa(
    grid: TokenGrid,
    window: int = 3,
    first: int = 1,
    interval: int | None = None,
    reference: int = 21,
    scale: float = 1.0,
    offset: int | Literal["step"] = 0,
    anchors: Sequence[int] = (),
    block: int = 128,
    step: int | None = None,
) -> BlockMap:
    """Let every frame see a window of frames and the anchor frames of the clip (LVSA); all tokens of them.

    Anchors are the first frames, and every `interval`-th from `offset` on, modulo T. The window of frame f has 2 window
    + 1 frames, moved inwards at the ends of the clip, and grows to the left and right in turn until it has that many
    frames that aren't anchors. The same for all heads. All lengths are in latent frames.

    Args:
        grid: the tokens.
        window: frames before and behind that are seen; 0: anchors only.
        first: first frames that are anchors.
        interval: distance of the other anchors; None means `anchor_interval`.
        reference: frames that the model was trained on: Wan 21, HunyuanVideo 33, Cosmos 48, CogVideoX 13.
        scale: how many frames are seen, of the reference.
        offset: where the anchors begin; "step" is the number of the step, so that they rotate during a run.
        anchors: further anchor frames, such as conditions.
        block: most tokens of a block; blocks don't cross frames.
        step: number of the step, for the offset "step"; plans tell it.

    Raises:
        ValueError: a length out of range, an anchor outside the clip, or an offset that follows an unknown step.
    """
    if isinstance(offset, str):
        if offset != STEP or step is None:
            raise ValueError(
                f"offset is {offset!r} and step {step}; use a number, or 'step' in a plan where steps are known"
            )
        offset = step
    if window < 0 or first < 0 or reference < 1 or scale <= 0 or (interval is not None and interval < 1):
        raise ValueError(
            f"window {window} and first {first} must be at least 0, reference {reference} and interval {interval} at "
            f"least 1, scale {scale} above 0"
        )
    if anchors and not 0 <= min(anchors) <= max(anchors) < grid.frames:
        raise ValueError(f"anchors is {anchors}; give frames from 0 to {grid.frames - 1}")
    if interval is None:
        interval = anchor_interval(grid.frames, window, first, reference, scale)
    seen = frames_seen(grid.frames, window, {*anchors, *anchor_frames(grid.frames, first, interval, offset)})
    sizes = chunk_sizes(grid.height * grid.width, block)  # (n / T,)
    layout = make_layout(grid, torch.arange(grid.visual_length), sizes.repeat(grid.frames), exact_block=block)
    return make_block_map(layout, seen.repeat_interleave(len(sizes), 0).repeat_interleave(len(sizes), 1))


def anchor_interval(frames: int, window: int, first: int, reference: int, scale: float = 1.0) -> int:
    """Return the distance of anchor frames for which a query sees about scale * reference frames.

    Args:
        frames: T.
        window: frames before and behind that are seen.
        first: first frames that are anchors.
        reference: frames that the model was trained on.
        scale: factor of them.

    Returns:
        1 for clips that are not longer; otherwise the larger one of the largest distance that leaves enough anchors and
        of a ratio of what is left beside the window, for lengths just above the reference.
    """
    seen = max(first + 1, int(reference * scale))
    if frames <= seen:
        return 1
    wanted = max(first, seen - min(2 * window + 1, frames))
    enough = next(one for one in range(frames, 0, -1) if len(anchor_frames(frames, first, one)) >= min(wanted, frames))
    always = 2 * window + first
    return max(enough, math.ceil(max(frames - always, seen - always) / max(seen - always, 1)))


def anchor_frames(frames: int, first: int, interval: int, offset: int = 0) -> set[int]:
    """Return the anchor frames: the first ones, and ceil(T / interval) others from `offset` on, modulo T."""
    regular = ((offset + index * interval) % frames for index in range(-(-frames // interval)))
    return {*range(min(first, frames)), *regular}


def frames_seen(frames: int, window: int, anchors: set[int]) -> Tensor:
    """Return which frames see which, bool (T, T)."""
    seen = torch.zeros(frames, frames, dtype=torch.bool)
    seen[:, sorted(anchors)] = True
    for frame in range(frames if window else 0):
        low, high = _window(frame, frames, window, anchors)
        seen[frame, low : high + 1] = True
    return seen


def _window(frame: int, frames: int, window: int, anchors: set[int]) -> tuple[int, int]:
    """Return the first and last frame of a frame's window."""
    low = max(0, min(frame - window, frames - 1 - 2 * window))
    high = min(frames - 1, max(frame + window, 2 * window))
    wanted = min(2 * window + 1, frames - len(anchors))
    count = sum(one not in anchors for one in range(low, high + 1))
    while count < wanted and (low > 0 or high < frames - 1):
        if low > 0:
            low -= 1
            count += low not in anchors
        if count < wanted and high < frames - 1:
            high += 1
            count += high not in anchors
    return low, high
