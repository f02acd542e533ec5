"""Captions that are nearly right: scenes that differ in one thing, and whether a CLIP-like model tells them apart."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from apps.stickers.scene import INVERSE, Scene, SceneSampler
from apps.training.data.base import VALIDATION_SEED
from apps.training.data.stickers import StickerData

NEGATIVES_PER_SCENE = 3  # of each held-out scene


def hard_negative(scene: Scene, rng: np.random.Generator, sampler: SceneSampler) -> Scene:
    """Change one thing in what a scene says: a relation, a number, a sticker or the background.

    Args:
        scene: Stays as it is; the placements of the copy are those of the original and mean nothing.
        rng: Picks what to change.
        sampler: Has the stickers and the backgrounds to choose others from.
    """
    if scene.kind == "pair" and scene.relation is not None and rng.random() < 0.6:
        return replace(scene, relation=INVERSE[scene.relation])
    if scene.kind == "count" and rng.random() < 0.5:
        return replace(scene, count=int(rng.choice([count for count in (2, 3, 4) if count != scene.count])))
    if rng.random() < 0.3:
        step = int(rng.integers(1, len(sampler.backgrounds)))
        place = sampler.backgrounds.index(scene.background) + step
        return replace(scene, background=sampler.backgrounds[place % len(sampler.backgrounds)])
    position = int(rng.integers(len(scene.sprites)))
    others = [sprite for sprite in sampler.sprites if sprite not in scene.sprites]
    changed = [*scene.sprites]
    changed[position] = int(rng.choice(others))
    return replace(scene, sprites=tuple(changed))


def drop_object(scene: Scene, rng: np.random.Generator) -> Scene:
    """Remove one of a scene's stickers from the image; what the caption says stays."""
    lost = int(rng.integers(len(scene.placements)))
    return replace(scene, placements=(*scene.placements[:lost], *scene.placements[lost + 1 :]))


@dataclass(frozen=True)
class HardNegativeSet:
    """Held-out scenes of one kind: which caption belongs to which image?

    Attributes:
        images: (S, 3, R, R) in [-1, 1].
        captions: Of the S images, then the first hard negative of each, the second one of each ...
    """

    images: Tensor
    captions: list[str]


def hard_negative_sets(data: StickerData, count: int) -> dict[str, HardNegativeSet]:
    """Return a set of each kind of scene, the same for every run.

    Args:
        data: Renders and captions scenes.
        count: Scenes S of each kind.
    """
    made = {}
    for kind, examples in data.held_out_groups(count).items():
        rng, scenes = np.random.default_rng(VALIDATION_SEED), examples.scenes
        negatives = [hard_negative(scene, rng, data.sampler) for _ in range(NEGATIVES_PER_SCENE) for scene in scenes]
        captions = [data.caption(scene, rng) for scene in (*scenes, *negatives)]
        made[kind] = HardNegativeSet(data.render(scenes), captions)
    return made


def retrieval_accuracy(scores: Tensor) -> dict[str, float]:
    """Return the shares of images that find their caption.

    Args:
        scores: Of each image with each caption of a set, (S, S + M S).

    Returns:
        `retrieval`: among the captions of all images; `hard_negatives`: among its own hard negatives.
    """
    count = len(scores)
    true = scores[:, :count]  # (S, S)
    negatives = scores[:, count:].unflatten(1, (-1, count)).diagonal(dim1=0, dim2=2)  # (M, S)
    found = true.argmax(1) == torch.arange(count, device=scores.device)  # (S,)
    return {
        "retrieval": float(found.float().mean()),
        "hard_negatives": float((true.diagonal() > negatives.amax(0)).float().mean()),
    }
