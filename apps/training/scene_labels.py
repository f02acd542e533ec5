"""What a caption says about a scene, as classes: which sticker is in which slot, how many, how large, on what.

A probe that predicts these labels shows whether an embedding or the states of a text hold the whole scene.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.stickers.scene import BACKGROUNDS, CENTRES, PART_SIZE, PLACES, RELATIONS, SIZES, Placement, Scene

SLOTS = ("left", "right", "top", "bottom", "alone", "several")  # where a caption can put a sticker
ATTRIBUTES: Mapping[str, int] = {"background": len(BACKGROUNDS), "count": 5, "size": len(SIZES)}


def scene_labels(scenes: list[Scene], entries: dict[int, int]) -> dict[str, Tensor]:
    """Return the labels of scenes: "names" (B, 6), the attributes (B,).

    Args:
        scenes: B scenes.
        entries: Class of each sticker in "names", from 1.
    """
    names = torch.zeros(len(scenes), len(SLOTS), dtype=torch.long)
    for row, scene in zip(names, scenes, strict=True):
        slots = PLACES[scene.relation] if scene.relation else ("alone" if scene.kind == "single" else "several",)
        for sprite, slot in zip(scene.sprites, slots, strict=True):
            row[SLOTS.index(slot)] = entries[sprite]
    sizes = list(SIZES)
    return {
        "names": names,
        "background": torch.tensor([scene.background for scene in scenes]),
        "count": torch.tensor([scene.count for scene in scenes]),
        "size": torch.tensor([sizes.index(scene.size_word) for scene in scenes]),
    }


def probe_loss(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
    """Sum the cross-entropies of a probe over slots and attributes.

    Args:
        logits: "names" (B, S, 1 + names), the attributes (B, classes).
        labels: See `scene_labels`.
    """
    names = F.cross_entropy(logits["names"].float().flatten(0, 1), labels["names"].flatten())
    rest = [F.cross_entropy(one.float(), labels[name]) for name, one in logits.items() if name != "names"]
    return labels["names"].shape[1] * names + torch.stack(rest).sum()


def all_correct(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
    """Tell for each scene whether all labels are predicted correctly, (B,)."""
    correct = (logits["names"].argmax(-1) == labels["names"]).all(1)  # (B,)
    for name in logits.keys() - {"names"}:
        correct = correct & (logits[name].argmax(-1) == labels[name])
    return correct


def predicted_scenes(logits: Mapping[str, Tensor], entries: dict[int, int]) -> list[Scene]:
    """Return scenes that show what a probe predicts: the sticker of each slot at its position.

    Args:
        logits: See `probe_loss`.
        entries: Class of each sticker in "names", from 1.
    """
    middle, sprites = sum(PART_SIZE) / 2, {entry: sprite for sprite, entry in entries.items()}
    centres = {"alone": CENTRES[1]}
    for relation in RELATIONS:
        centres |= {slot: (c,) for slot, c in zip(PLACES[relation], CENTRES[relation], strict=True)}
    scenes = []
    for row in range(len(logits["count"])):
        found: dict[str, Any] = {name: logits[name][row].argmax(-1).tolist() for name in logits}
        centres["several"] = CENTRES[min(max(found["count"], 1), 4)]
        size = sum(SIZES[list(SIZES)[found["size"]]]) / 2
        placements = tuple(
            Placement(sprites[entry], x, y, size if slot == "alone" else middle)
            for slot, entry in zip(SLOTS, found["names"], strict=True)
            if entry
            for x, y in centres[slot]
        ) or (Placement(0, 0.5, 0.5, 0.05),)  # nothing was predicted: a speck shows it
        scenes.append(Scene("single", placements, found["background"], (placements[0].sprite,)))
    return scenes
