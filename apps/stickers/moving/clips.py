"""The clip sheet: every moving sticker's frames, its words, and how it may be played, shipped with the package."""

import functools
import json
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image

from apps.stickers.sprites import DATA, NamedSheet

SIDE = 72  # pixels of a frame
LENGTH = 16  # frames of a clip
OwnMotion = Literal["animated", "still", "slow", "fast", "backwards"]  # how a clip is played


@dataclass(frozen=True, eq=False)
class ClipSheet(NamedSheet):
    """All moving stickers.

    Attributes:
        names: C names, lower case, unique; each is also the name of a still sticker.
        also: for each clip other names for it, which stand for no other; many have none.
        nouns: who or what moves, where the name already says how ("person" for "person running"); else the name.
        verbs: what it does, in one to four words with a present participle ("flapping its wings").
        loops: whether the clip closes: its first frame may follow its last.
        motions: for each clip the ways to play it that can be told apart (`playback.OWN_MOTIONS`).
        turnable: whether the clip can be seen to turn: it isn't round, and doesn't turn by itself.
        pixels: `(C, 16, 4, 72, 72)` uint8, RGBA with straight alpha, the frames evenly over one loop. The box around
            what is visible in any of a clip's frames is centred, and its longer side is 72 px.
    """

    what: ClassVar[str] = "clip"
    table: ClassVar[str] = "clips.json"
    names: tuple[str, ...]
    also: tuple[tuple[str, ...], ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    loops: tuple[bool, ...]
    motions: tuple[tuple[OwnMotion, ...], ...]
    turnable: tuple[bool, ...]
    pixels: torch.Tensor


@functools.cache
def load_clips() -> ClipSheet:
    """Decode the shipped sheet, one clip a row (once a process; about 42 MB of memory)."""
    table = json.loads((DATA / "clips.json").read_text(encoding="ascii"))
    with Image.open(DATA / "clips.webp") as image:
        sheet = np.asarray(image.convert("RGBA"))  # (C * 72, 16 * 72, 4)
    tiles = sheet.reshape(len(table), SIDE, LENGTH, SIDE, 4).transpose(0, 2, 4, 1, 3)  # (C, 16, 4, 72, 72)
    return ClipSheet(
        names=tuple(row["name"] for row in table),
        also=tuple(tuple(row["also"]) for row in table),
        nouns=tuple(row["noun"] for row in table),
        verbs=tuple(row["verb"] for row in table),
        loops=tuple(row["loops"] for row in table),
        motions=tuple(tuple(row["motions"]) for row in table),
        turnable=tuple(row["turnable"] for row in table),
        pixels=torch.from_numpy(np.ascontiguousarray(tiles)),
    )
