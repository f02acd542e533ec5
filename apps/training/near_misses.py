"""Captions that are nearly right: scenes that differ in one thing, and whether a CLIP-like model tells them apart."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from apps.stickers.captions import caption
from apps.stickers.scene import COLOURS, INVERSE
from apps.training.latent_pool import KINDS
from apps.training.scenes import VALIDATION_SEED, Scene, SceneMix, SceneSampler, SpriteSheet, render

NEAR_MISSES = 3  # of each held-out scene


def near_miss(scene: Scene, rng: np.random.Generator, sprites: tuple[int, ...]) -> Scene:
    """Changes one thing in what a scene says: a relation, a number, a sticker or the background.

    Args:
        scene: stays as it is; the placements of the copy are those of the original and mean nothing.
        rng: picks what to change.
        sprites: numbers of the stickers to choose others from.
    """
    if scene.kind == "pair" and scene.relation is not None and rng.random() < 0.6:
        return replace(scene, relation=INVERSE[scene.relation])
    if scene.kind == "count" and rng.random() < 0.5:
        return replace(scene, count=int(rng.choice([count for count in (2, 3, 4) if count != scene.count])))
    if rng.random() < 0.3:
        step = int(rng.integers(1, len(COLOURS)))
        return replace(scene, background=(scene.background + step) % len(COLOURS))
    place = int(rng.integers(len(scene.sprites)))
    others = [sprite for sprite in sprites if sprite not in scene.sprites]
    changed = [*scene.sprites]
    changed[place] = int(rng.choice(others))
    return replace(scene, sprites=tuple(changed))


@dataclass(frozen=True)
class Riddle:
    """Held-out scenes of one kind: which caption is whose?

    Attributes:
        pictures: (S, 3, R, R) in [-1, 1].
        captions: of the S images, then of the first near miss of each, of the second ...
    """

    pictures: Tensor
    captions: list[str]


def riddles(
    sheet: SpriteSheet, vocabulary: Sequence[str], size_words: float, synonyms: float, count: int, resolution: int
) -> dict[str, Riddle]:
    """A riddle of each kind of scene, the same for every run.

    Args:
        sheet: the stickers.
        vocabulary: names that captions use.
        size_words: share of the single stickers drawn small or large.
        synonyms: probability that a caption calls a sticker by one of its keywords.
        count: scenes S of each kind.
        resolution: side R of the images in pixels.
    """
    made = {}
    for kind in KINDS:
        mix = SceneMix(**{name: float(name == kind) for name in KINDS}, size_words=size_words)
        sampler = SceneSampler(sheet, vocabulary, split="heldout_combination", mix=mix)
        scenes = [sampler.scene(VALIDATION_SEED, index) for index in range(count)]
        rng = np.random.default_rng(VALIDATION_SEED)
        told = [*scenes, *(near_miss(scene, rng, sampler.sprites) for _ in range(NEAR_MISSES) for scene in scenes)]
        captions = [caption(one, sheet, rng, synonyms=synonyms, vocabulary=vocabulary) for one in told]
        made[kind] = Riddle(render(scenes, sheet, resolution), captions)
    return made


def solved(scores: Tensor) -> dict[str, float]:
    """Shares of images that find their caption: `retrieved` among those of all images, `near` among near misses.

    Args:
        scores: of each image with each caption of a riddle, (S, S + M S).
    """
    count = len(scores)
    true = scores[:, :count]  # (S, S)
    misses = scores[:, count:].unflatten(1, (-1, count)).diagonal(dim1=0, dim2=2)  # (M, S)
    found = true.argmax(1) == torch.arange(count, device=scores.device)  # (S,)
    return {
        "retrieved": float(found.float().mean()),
        "near": float((true.diagonal() > misses.amax(0)).float().mean()),
    }
