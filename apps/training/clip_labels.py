"""What a caption says about a clip, as classes: who is where, how it is played, and how it moves, on what."""

from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor

from apps.stickers.moving.clips import ClipSheet, OwnMotion
from apps.stickers.moving.renderer import render_clip
from apps.stickers.moving.scene import (
    OPPOSITE,
    SCENE_MOTIONS,
    STEP,
    ClipScene,
    MovingSticker,
    Pose,
    SceneMotion,
)
from apps.stickers.scene import BACKGROUNDS, INVERSE

SLOTS = ("alone", "above", "below", "left of", "right of")
"""Where a caption can put a sticker: by itself, or on a side of the one that it passes."""
OWN: tuple[OwnMotion, ...] = get_args(OwnMotion)
ATTRIBUTES: Mapping[str, int] = {"background": len(BACKGROUNDS), "motion": len(SCENE_MOTIONS), "own": len(OWN)}
CENTRES = {"alone": (0.5, 0.5), "above": (0.5, 0.26), "below": (0.5, 0.74), "left of": (0.26, 0.5)}
CENTRES["right of"] = (0.74, 0.5)
SIZES = {"grows": (0.4, 0.8), "shrinks": (0.8, 0.4)}
ANGLES = {"clockwise": 120.0, "anticlockwise": -120.0}
REACH = 0.18  # from the middle to either end of a path


def clip_labels(scenes: Sequence[ClipScene], entries: Mapping[int, int]) -> dict[str, Tensor]:
    """Return the labels of scenes: "names" (B, 5), the attributes (B,).

    Of two that pass each other, the motion is that of the one that stands above or to the left.

    Args:
        scenes: B scenes.
        entries: Class of each clip in "names", from 1.
    """
    names = torch.zeros(len(scenes), len(SLOTS), dtype=torch.long)
    motions = []
    for row, scene in zip(names, scenes, strict=True):
        slots, motion = ("alone",), scene.motion
        if scene.side is not None:
            slots = (scene.side, INVERSE[scene.side])
            motion = motion if scene.side == _first(scene.side) else OPPOSITE[motion]
        for sticker, slot in zip(scene.stickers, slots, strict=True):
            row[SLOTS.index(slot)] = entries[sticker.clip]
        motions.append(SCENE_MOTIONS.index(motion))
    return {
        "names": names,
        "background": torch.tensor([scene.background for scene in scenes]),
        "motion": torch.tensor(motions),
        "own": torch.tensor([OWN.index(scene.stickers[0].own) for scene in scenes]),
    }


def draw_labels(logits: Mapping[str, Tensor], entries: Mapping[int, int], sheet: ClipSheet, resolution: int) -> Tensor:
    """Draw what a probe predicts: each clip's first and last frame side by side.

    Args:
        logits: "names" (B, 5, 1 + names), the attributes (B, classes).
        entries: Class of each clip in "names", from 1.
        sheet: The moving stickers.
        resolution: Side R of the frames in pixels.

    Returns:
        (B, 3, R, 2 R) in [-1, 1].
    """
    clips = {entry: clip for clip, entry in entries.items()}
    found = {name: one.argmax(-1).tolist() for name, one in logits.items()}
    drawn = []
    for row, names in enumerate(found["names"]):
        motion, own = SCENE_MOTIONS[found["motion"][row]], OWN[found["own"][row]]
        stickers = tuple(
            _sticker(clips[entry], slot, motion if slot == _first(slot) else _opposite(motion), own)
            for slot, entry in zip(SLOTS, names, strict=True)
            if entry
        )
        scene = ClipScene("single", stickers, found["background"][row], motion)
        frames = render_clip(scene, sheet, 16, resolution)  # (T, 3, R, R)
        drawn.append(torch.cat([frames[0], frames[-1]], dim=-1))
    return torch.stack(drawn)


def _opposite(motion: SceneMotion) -> SceneMotion:
    """Return the motion of the other one of a pair; what isn't a direction stays as it is."""
    other: SceneMotion | None = OPPOSITE.get(motion)
    return other or motion


def _first(slot: str) -> str:
    """Return the slot whose motion is the label: the upper one, or the left one."""
    return {"below": "above", "right of": "left of"}.get(slot, slot)


def _sticker(clip: int, slot: str, motion: SceneMotion, own: OwnMotion) -> MovingSticker:
    """Return a sticker that moves as a probe says."""
    dx, dy = (REACH * step for step in STEP.get(motion, (0, 0)))
    x, y = CENTRES[slot]
    start, end = SIZES.get(motion, (0.44, 0.44))
    return MovingSticker(clip, own, Pose(x - dx, y - dy, start), Pose(x + dx, y + dy, end, ANGLES.get(motion, 0.0)))
