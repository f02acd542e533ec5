"""The sheet of Fluent 3D stickers, and scenes that are drawn from one sheet or the other."""

import functools
import json
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from apps.stickers.scene import CENTRES, COLOURS, SIZES, Placement, Scene
from apps.stickers.sprites import DATA, SIDE, SpriteSheet

COLUMNS = 16  # sprites in a row of the sheet
SHEET_FILE, TABLE_FILE = "fluent_3d.webp", "fluent_3d.json"
REGULAR_SIZE = sum(SIZES[None]) / 2  # the middle of the sizes that a sticker of no named size has


@dataclass(frozen=True, eq=False)
class FluentSheet(SpriteSheet):
    """The starter stickers in Fluent 3D style, in the order of `STARTER`; see `SpriteSheet`."""

    what: ClassVar[str] = "Fluent 3D sticker"
    table: ClassVar[str] = TABLE_FILE


@functools.cache
def load_fluent() -> FluentSheet:
    """Decode the shipped sheet (once a process; 8 MB of memory)."""
    names: list[str] = json.loads((DATA / TABLE_FILE).read_text(encoding="ascii"))
    flat = {row["name"]: row for row in json.loads((DATA / SpriteSheet.table).read_text(encoding="ascii"))}
    with Image.open(DATA / SHEET_FILE) as image:
        sheet = np.asarray(image.convert("RGBA"))  # (rows * 128, 16 * 128, 4)
    rows = sheet.shape[0] // SIDE
    tiles = sheet.reshape(rows, SIDE, COLUMNS, SIDE, 4).transpose(0, 2, 4, 1, 3)  # (rows, 16, 4, 128, 128)
    pixels = torch.from_numpy(tiles.reshape(rows * COLUMNS, 4, SIDE, SIDE)[: len(names)].copy())  # (S, 4, 128, 128)
    return FluentSheet(tuple(names), tuple(tuple(flat[name]["keywords"]) for name in names), pixels)


def in_style(scene: Scene, source: SpriteSheet, target: SpriteSheet) -> Scene:
    """Return a scene of one sheet as the same scene of another: the same names at the same places and sizes.

    Args:
        scene: its numbers are those of `source`.
        source: the sheet that the scene was drawn for.
        target: the sheet that it shall be rendered with.

    Raises:
        KeyError: the other sheet lacks a sticker of the scene.
    """

    def number(sprite: int) -> int:
        return target.index(source.names[sprite])

    placements = tuple(replace(place, sprite=number(place.sprite)) for place in scene.placements)
    return replace(scene, placements=placements, sprites=tuple(number(sprite) for sprite in scene.sprites))


def single_scene(
    name: str,
    colour: str,
    sheet: SpriteSheet,
    *,
    x: float = CENTRES[1][0][0],
    y: float = CENTRES[1][0][1],
    size: float = REGULAR_SIZE,
) -> Scene:
    """Describe one sticker on a background, to be drawn by `render` with the same sheet.

    Args:
        name: of the sticker.
        colour: of the background, a name of `BACKGROUNDS`.
        sheet: the stickers.
        x: centre of its visible box from the left, as a fraction of the image's side.
        y: the same from the top.
        size: longer side of its visible box, as a fraction of the image's side.

    Raises:
        KeyError: there is no such sticker.
        ValueError: there is no such background.
    """
    if colour not in COLOURS:
        raise ValueError(f"colour is {colour!r}: give one of {', '.join(COLOURS)}")
    sprite = sheet.index(name)
    return Scene("single", (Placement(sprite, x, y, size),), COLOURS.index(colour), (sprite,))
