"""What an image of the sticker world holds, apart from how it is drawn and how it is said.

A scene is one of three kinds: a single sticker (small, large or of no named size), a pair of different stickers in a
relation, or two to four copies of one sticker. Each stands on a plain background.

Some combinations of a sticker, a colour and a place are held out: a stable hash of their names picks about 5 % of
them, training scenes never contain one, and scenes of the split "heldout_combination" contain at least one.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from apps.stickers.sprites import SpriteSheet

# Plain sRGB values, at least 60 (Euclidean, of 255) apart from one another; the first ten, at least 75.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "red": (215, 35, 35),
    "blue": (40, 90, 220),
    "green": (40, 160, 70),
    "yellow": (250, 225, 50),
    "pink": (255, 165, 205),
    "gray": (128, 128, 128),
    "purple": (130, 45, 170),
    "orange": (245, 135, 25),
    "teal": (0, 130, 130),
    "navy": (15, 25, 90),
    "brown": (135, 85, 45),
    "cyan": (70, 205, 230),
    "lime": (160, 225, 60),
    "maroon": (110, 10, 35),
    "beige": (225, 205, 160),
    "lavender": (185, 165, 240),
    "magenta": (230, 45, 150),
    "mint": (165, 235, 195),
}
COLOURS = tuple(BACKGROUNDS)
BASIC_COLOURS = COLOURS[:10]
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SIZES: dict[str | None, tuple[float, float]] = {"small": (0.45, 0.60), None: (0.60, 0.80), "large": (0.80, 0.95)}
PART_SIZE = (0.42, 0.48)  # the size of a sticker that shares its image with others
HELD_OUT_SHARE = 0.05

# Where the stickers of a relation or of a count stand. The first sticker of a pair comes first.
CENTRES: dict[str | int, tuple[tuple[float, float], ...]] = {
    "left of": ((0.25, 0.5), (0.75, 0.5)),
    "right of": ((0.75, 0.5), (0.25, 0.5)),
    "above": ((0.5, 0.25), (0.5, 0.75)),
    "below": ((0.5, 0.75), (0.5, 0.25)),
    1: ((0.5, 0.5),),
    2: ((0.25, 0.5), (0.75, 0.5)),
    3: ((0.5, 0.25), (0.25, 0.75), (0.75, 0.75)),
    4: ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)),
}
# The place of each sticker of a pair, as it counts for held-out combinations: the same whichever way it is said.
PLACES = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
Kind = Literal["single", "pair", "count"]
Split = Literal["train", "heldout_combination", "all"]


@dataclass(frozen=True)
class Placement:
    """One sticker on the canvas.

    Attributes:
        sprite: its number in the sprite sheet.
        x, y: centre of its visible box, as fractions of the image's side, from the left and from the top.
        size: longer side of its visible box, as a fraction of the image's side.
    """

    sprite: int
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """An image's content.

    Attributes:
        kind: "single", "pair" or "count".
        placements: what stands where.
        background: index into `BACKGROUNDS`.
        sprites: the stickers meant: one, or the two of a pair in the order of `relation`.
        relation: for a pair, how the first sticker stands to the second.
        count: how many stickers there are.
        size_word: "small", "large" or None (singles only).
    """

    kind: Kind
    placements: tuple[Placement, ...]
    background: int
    sprites: tuple[int, ...]
    relation: str | None = None
    count: int = 1
    size_word: str | None = None


@dataclass(frozen=True)
class SceneMix:
    """How often each kind of scene is drawn, and how much scenes vary.

    Attributes:
        single, pair, count: relative frequencies of the kinds.
        size_words: share of the singles that are drawn small or large.
        jitter: scales the spread of positions and sizes; 0 gives centred stickers of one size per size word.
    """

    single: float = 0.5
    pair: float = 0.3
    count: float = 0.2
    size_words: float = 0.4
    jitter: float = 1.0

    def __post_init__(self) -> None:
        weights = (self.single, self.pair, self.count)
        if min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"single, pair, count are {weights}: give frequencies >= 0 that are not all zero")
        for name, value in (("size_words", self.size_words), ("jitter", self.jitter)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}: give a number from 0 to 1")


@functools.lru_cache(maxsize=200_000)
def is_held_out(name: str, colour: str, place: str) -> bool:
    """Tells whether a sticker on a colour at a place is held out (a stable hash of the three words).

    Args:
        name: the sticker's name.
        colour: a name from `BACKGROUNDS`.
        place: "single", "left", "right", "top", "bottom", "2", "3" or "4".
    """
    digest = hashlib.blake2b(f"{name}|{colour}|{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64


def combinations(scene: Scene, sheet: SpriteSheet) -> list[tuple[str, str, str]]:
    """List the (name, colour, place) combinations that a scene holds."""
    colour = COLOURS[scene.background]
    if scene.kind == "pair" and scene.relation is not None:
        places: tuple[str, ...] = PLACES[scene.relation]
    else:
        places = ("single" if scene.kind == "single" else str(scene.count),)
    return [(sheet.names[sprite], colour, place) for sprite, place in zip(scene.sprites, places, strict=True)]


def generator(seed: int, index: int) -> np.random.Generator:
    """Return the random generator of scene `index` of the endless series `seed`: a pure function of both."""
    return np.random.default_rng((seed, index))


def check_drawn(names: Sequence[str], split: str, colours: Sequence[str]) -> None:
    """Check what scenes are drawn from.

    Args:
        names: of stickers.
        split: of the combinations.
        colours: of backgrounds.

    Raises:
        ValueError: there are fewer than two names, or one twice; the split or a colour is unknown.
    """
    if len(names) < 2 or len(set(names)) < len(names):
        different = len(set(names))
        raise ValueError(f"the vocabulary has {len(names)} names, {different} different: give 2 or more, once each")
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}: give 'train', 'heldout_combination' or 'all'")
    if not colours or not BACKGROUNDS.keys() >= set(colours):
        raise ValueError(f"colours are {tuple(colours)}: give one or more of {', '.join(COLOURS)}")


class SceneSampler:
    """Draws scenes.

    Args:
        sheet: the stickers.
        vocabulary: names of the stickers to draw from; None takes all.
        split: "train" never holds a held-out combination, "heldout_combination" always does, "all" doesn't care.
        mix: frequencies of the kinds of scenes.
        colours: names of the backgrounds to draw from.

    Raises:
        KeyError: a name of the vocabulary isn't in the sheet.
        ValueError: the vocabulary is too small for pairs, or has repeated names, or the split or a colour is unknown.
    """

    def __init__(
        self,
        sheet: SpriteSheet,
        vocabulary: Sequence[str] | None = None,
        *,
        split: Split = "train",
        mix: SceneMix | None = None,
        colours: Sequence[str] = BASIC_COLOURS,
    ) -> None:
        names = sheet.names if vocabulary is None else tuple(vocabulary)
        check_drawn(names, split, colours)
        self.sheet = sheet
        self.sprites = tuple(sheet.index(name) for name in names)
        self.backgrounds = tuple(COLOURS.index(colour) for colour in colours)
        self.split = split
        self.mix = mix or SceneMix()

    def scene(self, seed: int, index: int) -> Scene:
        """Return scene `index` of the series `seed`; the same whatever was drawn before."""
        return self.draw(generator(seed, index))

    def draw(self, rng: int | np.random.Generator) -> Scene:
        """Draws one scene from a generator, or from a fresh one of the given seed."""
        rng = np.random.default_rng(rng)
        weights = np.array([self.mix.single, self.mix.pair, self.mix.count])
        # The kind is drawn before anything is rejected, so that rejections don't change the mix.
        kind = ("single", "pair", "count")[rng.choice(3, p=weights / weights.sum())]
        draw = {"single": self._single, "pair": self._pair, "count": self._count}[kind]
        for _ in range(10_000):
            scene = draw(rng)
            if self.split == "all" or self._held_out(scene) == (self.split == "heldout_combination"):
                return scene
        raise RuntimeError(f"no {kind} scene of split {self.split!r} with these {len(self.sprites)} stickers: add some")

    def _held_out(self, scene: Scene) -> bool:
        return any(is_held_out(*combination) for combination in combinations(scene, self.sheet))

    def _single(self, rng: np.random.Generator) -> Scene:
        word = ("small", "large")[rng.integers(2)] if rng.random() < self.mix.size_words else None
        sprite = int(rng.choice(self.sprites))
        placement = self._place(rng, sprite, CENTRES[1][0], SIZES[word], 0.04)
        return Scene("single", (placement,), self._background(rng), (sprite,), size_word=word)

    def _pair(self, rng: np.random.Generator) -> Scene:
        first, second = (int(sprite) for sprite in rng.choice(self.sprites, 2, replace=False))
        relation = RELATIONS[rng.integers(4)]
        placements = tuple(
            self._place(rng, sprite, centre, PART_SIZE, 0.02)
            for sprite, centre in zip((first, second), CENTRES[relation], strict=True)
        )
        return Scene("pair", placements, self._background(rng), (first, second), relation, count=2)

    def _count(self, rng: np.random.Generator) -> Scene:
        count = int(rng.integers(2, 5))
        sprite = int(rng.choice(self.sprites))
        placements = tuple(self._place(rng, sprite, centre, PART_SIZE, 0.02) for centre in CENTRES[count])
        return Scene("count", placements, self._background(rng), (sprite,), count=count)

    def _background(self, rng: np.random.Generator) -> int:
        return self.backgrounds[int(rng.integers(len(self.backgrounds)))]

    def _place(
        self,
        rng: np.random.Generator,
        sprite: int,
        centre: tuple[float, float],
        sizes: tuple[float, float],
        spread: float,
    ) -> Placement:
        """Jitters size and centre; the sticker leaves neither the canvas nor the cell it has to itself."""
        jitter = self.mix.jitter
        low, high = sizes
        size = (low + high) / 2 + (high - low) * (float(rng.random()) - 0.5) * jitter
        # A centre at 0.5 has the whole side to itself, one at 0.25 or 0.75 half of it.
        slack = [min(c, 1 - c) - size / 2 for c in centre]
        x, y = (
            c + min(spread * jitter, s) * (2 * float(u) - 1)
            for c, s, u in zip(centre, slack, rng.random(2), strict=True)
        )
        return Placement(sprite, x, y, size)
