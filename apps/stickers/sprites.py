"""The sprite sheet: every sticker's image, name and keywords, shipped with the package."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

DATA = Path(__file__).parent / "data"
SIDE = 128  # pixels of a sprite
COLUMNS = 40  # sprites in a row of the sheet


class NamedSheet:
    """What sheets of stickers share: each has a name of its own.

    Attributes:
        what: what the sheet holds, for messages.
        table: file of its names.
    """

    what: ClassVar[str]
    table: ClassVar[str]
    names: tuple[str, ...]

    @functools.cached_property
    def _position(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """Return the number of what is called `name`.

        Raises:
            KeyError: there is no such name; the message offers some that contain one of its words.
        """
        if name not in self._position:
            words = [word for word in name.split() if len(word) > 2]
            near = [other for other in self.names if any(word in other.split() for word in words)][:5]
            raise KeyError(f"no {self.what} is called {name!r}; names near it: {near}; all are in {DATA / self.table}")
        return self._position[name]


@dataclass(frozen=True, eq=False)
class SpriteSheet(NamedSheet):
    """All stickers.

    Attributes:
        names: S names, lower case, unique.
        keywords: for each sticker the words that CLDR lists for it (they may be shared by several stickers).
        pixels: `(S, 4, 128, 128)` uint8, RGBA with straight alpha. A sprite's visible box is centred and its longer
            side is 128 px.
    """

    what: ClassVar[str] = "sticker"
    table: ClassVar[str] = "names.json"
    names: tuple[str, ...]
    keywords: tuple[tuple[str, ...], ...]
    pixels: torch.Tensor


@functools.cache
def load_sprites() -> SpriteSheet:
    """Decode the shipped sheet (once a process; about 95 MB of memory)."""
    table = json.loads((DATA / "names.json").read_text(encoding="ascii"))
    with Image.open(DATA / "sprites.webp") as image:
        sheet = np.asarray(image.convert("RGBA"))  # (rows * 128, 40 * 128, 4)
    rows = sheet.shape[0] // SIDE
    tiles = sheet.reshape(rows, SIDE, COLUMNS, SIDE, 4).transpose(0, 2, 4, 1, 3)  # (rows, 40, 4, 128, 128)
    pixels = torch.from_numpy(tiles.reshape(rows * COLUMNS, 4, SIDE, SIDE)[: len(table)].copy())  # (S, 4, 128, 128)
    names = tuple(row["name"] for row in table)
    return SpriteSheet(names, tuple(tuple(row["keywords"]) for row in table), pixels)
