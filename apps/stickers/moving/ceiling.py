"""What the judge of clips says about fresh renderings: how much of a score is the judge's own error."""

from collections import Counter

import torch
from torch import Tensor
from torch.nn import functional

from apps.stickers.moving.clips import LENGTH, ClipSheet, load_clips
from apps.stickers.moving.judge import ClipJudge, score_clip
from apps.stickers.moving.renderer import render_clip
from apps.stickers.moving.scene import ClipMix, ClipSceneSampler

CEILING_SERIES = 2**42  # series of the scenes: nothing else draws from it


def clip_ceiling(
    num_prompts: int = 200,
    resolution: int = 96,
    *,
    noise: float = 0.0,
    blur: int = 1,
    num_frames: int = LENGTH,
    seed: int = 0,
    mix: ClipMix | None = None,
    sheet: ClipSheet | None = None,
    judge: ClipJudge | None = None,
) -> dict[str, float]:
    """Judge renderings of what was asked for.

    Args:
        num_prompts: number of scenes.
        resolution: side of the frames, in pixels.
        noise: standard deviation of independent noise on each pixel, of colours in [-1, 1].
        blur: factor by which frames are first reduced and enlarged again.
        num_frames: frames of each clip.
        seed: of scenes and noise.
        mix: frequencies of the motions.
        sheet: the moving stickers; None takes the shipped ones.
        judge: one that has been made; None makes one.

    Returns:
        Shares of the scenes that are right by each key of `score_clip`.

    Raises:
        ValueError: a number is out of its range.
    """
    if num_prompts < 1:
        raise ValueError(f"num_prompts is {num_prompts}: give a whole number of 1 or more")
    if noise < 0 or not 1 <= blur <= resolution:
        raise ValueError(f"noise is {noise}, blur is {blur}: give noise >= 0 and a blur from 1 to {resolution}")
    sheet = sheet or load_clips()
    judge = judge or ClipJudge(sheet)
    sampler = ClipSceneSampler(sheet, split="all", mix=mix)
    generator = torch.Generator().manual_seed(seed)
    right: Counter[str] = Counter()
    for index in range(num_prompts):
        scene = sampler.scene(CEILING_SERIES + seed, index)
        clip = render_clip(scene, sheet, num_frames, resolution)  # (T, 3, R, R)
        clip = spoiled(clip, noise, blur, generator)
        scores = score_clip(scene, judge.read(clip[None])[0])
        right.update({name: int(value) for name, value in scores.items()})
    return {name: count / num_prompts for name, count in right.items()}


def spoiled(clip: Tensor, noise: float, blur: int, generator: torch.Generator) -> Tensor:
    """Blur frames `(T, 3, R, R)` and add noise to them."""
    side = clip.shape[-1]
    if blur > 1:
        small = functional.interpolate(clip, size=max(1, side // blur), mode="bilinear", antialias=True)
        clip = functional.interpolate(small, size=side, mode="bilinear")
    if noise > 0:
        clip = clip + noise * torch.randn(clip.shape, generator=generator)
    return clip.clamp(-1, 1)
