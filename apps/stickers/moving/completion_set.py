"""Tasks of completing clips, and how far a completed clip's sticker is from where it should be."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apps.stickers.moving.clips import LENGTH, ClipSheet
from apps.stickers.moving.judge import CANVAS, ClipJudge
from apps.stickers.moving.prompt_sets import CLIP_SETS, ClipRequest, draw_clip_requests
from apps.stickers.moving.renderer import poses, render_clip
from pipelines.inputs.video_mask import VideoMask

Complete = Callable[[Sequence[str], Tensor, str, Sequence[int]], Tensor]
"""Prompts, clips (B, T, 3, R, R) in [-1, 1], the text of a mask, and a seed for each, to clips of the same shape."""
COMPLETION_MASKS = {"predict": "predict(5)", "interpolate": "keyframes(0, 4, 8, 12, -1)"}
"""What is known of each clip, as `pipelines.VideoMask` reads it."""


@dataclass(frozen=True)
class Completed:
    """How one clip was completed.

    Attributes:
        track_error: mean distance of the sticker's centre in generated frames from where it should be, in pixels of
            64 x 64 frames; half a side if another sticker or none was read.
        kept: whether all known frames have the bits that were given.
    """

    track_error: float
    kept: bool


def evaluate_completion(
    kind: str,
    count: int,
    sheet: ClipSheet,
    vocabulary: Sequence[str],
    judge: ClipJudge,
    complete: Complete,
    *,
    num_frames: int,
    resolution: int,
    seed: int = 0,
    batch_size: int = 8,
    colours: Sequence[str],
    period: int = LENGTH,
) -> Iterator[Completed]:
    """Complete rendered clips of single stickers, and measure each.

    Args:
        kind: a key of `COMPLETION_MASKS`.
        count: clips.
        sheet: the moving stickers.
        vocabulary: names of those that are asked for.
        judge: reads where stickers are.
        complete: the model.
        num_frames: T.
        resolution: side R of the frames in pixels.
        seed: of scenes and noise.
        batch_size: clips completed at once.
        colours: names of the backgrounds.
        period: frames in which an own motion is played once.
    """
    text = COMPLETION_MASKS[kind]
    generated = VideoMask.parse(text).resolve(num_frames, 1, 1).flatten()  # (T,)
    requests = draw_clip_requests(CLIP_SETS["moving"], count, sheet, vocabulary, seed, colours)
    for start in range(0, count, batch_size):
        part = requests[start : start + batch_size]
        drawn = [render_clip(one.scene, sheet, num_frames, resolution, period) for one in part]
        clips = torch.stack(drawn)  # (B, T, 3, R, R)
        given = ((clips.clamp(-1, 1) + 1) * 127.5).round()  # what a person would give: whole levels
        clips = given / 127.5 - 1
        seeds = [seed + start + row for row in range(len(part))]
        made = complete([one.prompt for one in part], clips, text, seeds)  # (B, T, 3, R, R)
        levels = ((made.clamp(-1, 1) + 1) * 127.5).round()
        for request, clip, level, known in zip(part, made, levels, given, strict=True):
            kept = bool(torch.equal(level[~generated], known[~generated]))
            yield Completed(_track_error(request, clip, generated, judge, period), kept)


def _track_error(request: ClipRequest, clip: Tensor, generated: Tensor, judge: ClipJudge, period: int) -> float:
    """Return the mean distance of the read track of a clip (T, 3, R, R) from the true one, in generated frames."""
    reading = judge.read(clip[None], period)[0]
    sticker = request.scene.stickers[0]
    if [one.clip for one in reading.stickers] != [sticker.clip]:
        return CANVAS / 2
    scale = CANVAS / clip.shape[-1]
    truth = poses(sticker, len(clip))
    track = reading.stickers[0].track
    errors = [
        math.hypot(track[frame].x * scale - truth[frame].x * CANVAS, track[frame].y * scale - truth[frame].y * CANVAS)
        for frame in generated.nonzero().flatten().tolist()
    ]
    return sum(errors) / len(errors)
