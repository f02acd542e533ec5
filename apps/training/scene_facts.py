"""What a caption says about a scene, as classes: which sticker stands at which spot, how many, how large, on what.

A light head that is asked for these shows whether a vector or the states of a text hold the whole scene.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.stickers.scene import BACKGROUNDS, PLACES, SIZES, Scene

SPOTS = ("left", "right", "top", "bottom", "alone", "several")  # where a caption can put a sticker
QUESTIONS = {"background": len(BACKGROUNDS), "count": 5, "size": len(SIZES)}


def answers(scenes: list[Scene], entries: dict[int, int]) -> dict[str, Tensor]:
    """The right answers: "names" (B, 6), the others (B,).

    Args:
        scenes: B scenes.
        entries: entry of each sprite in the logits of the names, from 1.
    """
    names = torch.zeros(len(scenes), len(SPOTS), dtype=torch.long)
    for row, scene in zip(names, scenes, strict=True):
        spots = PLACES[scene.relation] if scene.relation else ("alone" if scene.kind == "single" else "several",)
        for sprite, spot in zip(scene.sprites, spots, strict=True):
            row[SPOTS.index(spot)] = entries[sprite]
    sizes = list(SIZES)
    return {
        "names": names,
        "background": torch.tensor([scene.background for scene in scenes]),
        "count": torch.tensor([scene.count for scene in scenes]),
        "size": torch.tensor([sizes.index(scene.size_word) for scene in scenes]),
    }


def misreading(logits: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Tensor:
    """How far a head's reading is from the truth: cross-entropies, summed over spots and questions.

    Args:
        logits: "names" (B, 6, 1 + names), the others (B, answers).
        truth: see `answers`.
    """
    names = F.cross_entropy(logits["names"].float().flatten(0, 1), truth["names"].flatten())
    rest = [F.cross_entropy(logits[name].float(), truth[name]) for name in QUESTIONS]
    return len(SPOTS) * names + torch.stack(rest).sum()
