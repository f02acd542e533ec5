"""A sticker that the built-in model has never drawn: images to learn it from, and prompts to ask for it.

The object is called by its own name, a word that the model doesn't know. Images show it alone on half of the
backgrounds and beside a few known stickers; the prompts ask for it on the other backgrounds, beside other stickers and
several times as well, which was never shown.
"""

from collections.abc import Sequence

import numpy as np

from apps.lora_examples.captioned_folder import Captioned
from apps.stickers.captions import caption
from apps.stickers.prompt_sets import Request
from apps.stickers.renderer import render
from apps.stickers.scene import (
    CENTRES,
    COLOURS,
    PART_SIZE,
    RELATIONS,
    SIZES,
    Kind,
    Placement,
    Scene,
    generator,
)
from apps.stickers.sprites import SpriteSheet
from apps.stickers.vocabulary import COMMON

OBJECT = "dodo"
SERIES = 2**44  # of the scenes: no training, validation or evaluation of the world draws from it
SINGLES, PAIRS = 16, 8  # images to learn from
LEARNED_COLOURS, OTHER_COLOURS = COLOURS[::2], COLOURS[1::2]
PARTNERS = COMMON[::32]  # known stickers beside which it is seen
RESOLUTION = 128


def draw_object_examples(sheet: SpriteSheet, name: str = OBJECT, phrasings: int = 3, seed: int = 0) -> list[Captioned]:
    """Draw images of a sticker to learn it from; the same ones for the same arguments.

    Args:
        sheet: the stickers.
        name: of the sticker.
        phrasings: captions of an image.
        seed: of places, sizes and phrasings.

    Raises:
        KeyError: there is no such sticker.
        ValueError: the built-in model knows it already.
    """
    _check_new(name)
    sprite, rows = sheet.index(name), []
    for number in range(SINGLES + PAIRS):
        rng = generator(SERIES + seed, number)
        kind: Kind = "single" if number < SINGLES else "pair"
        partner = sheet.index(PARTNERS[number % len(PARTNERS)])
        scene = _scene(kind, sprite, partner, COLOURS.index(LEARNED_COLOURS[number % len(LEARNED_COLOURS)]), rng)
        said = tuple(dict.fromkeys(caption(scene, sheet, rng, synonyms=0) for _ in range(phrasings)))
        pixels = render([scene], sheet, RESOLUTION)[0]  # (3, H, W)
        rows.append(Captioned(f"{name.replace(' ', '_')}_{number:02}", pixels, said))
    return rows


def object_requests(
    sheet: SpriteSheet, name: str, kind: Kind, colours: Sequence[str], count: int, seed: int = 1
) -> list[Request]:
    """Draw what to ask for: the object alone, beside known stickers, or several times, in held-out phrasings.

    Args:
        sheet: the stickers.
        name: of the object.
        kind: "single", "pair" or "count".
        colours: of the backgrounds, in turn.
        count: how many.
        seed: of the scenes and phrasings.
    """
    others = [partner for partner in COMMON if partner not in PARTNERS]
    requests = []
    for number in range(count):
        rng = generator(SERIES + 1000 + seed, number)
        partner = sheet.index(others[int(rng.integers(len(others)))])
        scene = _scene(kind, sheet.index(name), partner, COLOURS.index(colours[number % len(colours)]), rng)
        requests.append(Request(scene, caption(scene, sheet, rng, "heldout", synonyms=0)))
    return requests


def _scene(kind: Kind, sprite: int, partner: int, background: int, draw: np.random.Generator) -> Scene:
    """Draw a scene of the object: alone, beside a partner, or two to four times."""

    def place(which: int, centre: tuple[float, float], sizes: tuple[float, float], spread: float) -> Placement:
        low, high = sizes
        x, y = (middle + spread * (2 * float(u) - 1) for middle, u in zip(centre, draw.random(2), strict=True))
        return Placement(which, x, y, low + (high - low) * float(draw.random()))

    if kind == "single":
        return Scene("single", (place(sprite, CENTRES[1][0], SIZES[None], 0.04),), background, (sprite,))
    if kind == "count":
        count = int(draw.integers(2, 5))
        places = tuple(place(sprite, centre, PART_SIZE, 0.01) for centre in CENTRES[count])
        return Scene("count", places, background, (sprite,), count=count)
    relation = RELATIONS[int(draw.integers(4))]
    both = (sprite, partner) if draw.random() < 0.5 else (partner, sprite)
    places = tuple(place(which, centre, PART_SIZE, 0.01) for which, centre in zip(both, CENTRES[relation], strict=True))
    return Scene("pair", places, background, both, relation, count=2)


def _check_new(name: str) -> None:
    if name in COMMON:
        raise ValueError(
            f"the built-in model draws {name!r} already: give a sticker that it doesn't know, e.g. {OBJECT}"
        )
