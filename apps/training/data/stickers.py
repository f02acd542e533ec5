"""The sticker world as training data: scenes, their images and captions."""

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.stickers import renderer
from apps.stickers.captions import caption
from apps.stickers.known_words import known_words
from apps.stickers.renderer import render
from apps.stickers.scene import BASIC_COLOURS, COLOURS, Scene, SceneMix, SceneSampler
from apps.stickers.sprites import NamedSheet, SpriteSheet, load_sprites
from apps.stickers.vocabulary import COMMON, STARTER
from apps.training.config import ConfigError, Section
from apps.training.data.base import VALIDATION_SEED, BatchAddress
from pipelines.inputs.words import write_words

KINDS = ("single", "pair", "count")
CHUNK = 64  # images that are rendered at once


@dataclass(frozen=True)
class StickerSettings:
    """The settings of a `[data]` section that choose scenes and captions; see `apps.training.data.config`.

    Attributes:
        vocabulary: `starter`, `common`, `all`, or a text file with one sticker name a line.
        colours: `basic` is ten backgrounds, `all` is every one, by other words too.
        single, pair, count: Relative frequencies of the kinds of scenes.
        size_words: Share of the single stickers drawn small or large.
        synonyms: Probability that a caption calls a sticker by one of its keywords.
        vocabulary_fraction: Share of a batch drawn from the vocabulary; the rest comes from all stickers.
    """

    vocabulary: str = "starter"
    colours: str = "basic"
    single: float = 0.5
    pair: float = 0.3
    count: float = 0.2
    size_words: float = 0.4
    synonyms: float = 0.0
    vocabulary_fraction: float = 1.0

    @classmethod
    def of(cls, section: Section) -> "StickerSettings":
        """Take from a section what is a setting of the stickers."""
        return cls(**section.model_dump(include=set(cls.__dataclass_fields__)))

    def mix(self, kind: str | None = None, jitter: float = 1.0) -> SceneMix:
        """Return how often each kind of scene is drawn; only scenes of one kind if it is named."""
        weights = {name: getattr(self, name) if kind is None else float(name == kind) for name in KINDS}
        return SceneMix(**weights, size_words=self.size_words, jitter=jitter)


class SceneExamples:
    """Scenes with their images and captions. See `apps.training.data.base.Examples`.

    Args:
        scenes: P scenes.
        data: Renders and captions them.
    """

    def __init__(self, scenes: Sequence[Scene], data: "StickerData") -> None:
        self.scenes = scenes
        self.data = data

    def __len__(self) -> int:
        return len(self.scenes)

    def images(self, rows: Sequence[int]) -> Tensor:
        """Render some of the scenes, (B, 3, R, R)."""
        return self.data.render([self.scenes[row] for row in rows])

    def regions(self, rows: Sequence[int]) -> Tensor:
        """Mark the pixels that lie in a sticker's box, (B, 1, R, R)."""
        return box_mask([self.scenes[row] for row in rows], self.data.resolution)

    def caption(self, row: int, rng: np.random.Generator) -> str:
        """Draw a caption of a scene."""
        return self.data.caption(self.scenes[row], rng)

    def fingerprint(self) -> str:
        """Hash the scenes, the sticker images and the code that renders them."""
        digest = hashlib.sha256(repr((list(self.scenes), self.data.resolution)).encode())
        digest.update(inspect.getsource(renderer).encode())
        digest.update(self.data.sheet.pixels.numpy().tobytes())
        return digest.hexdigest()


class ScenePool(SceneExamples):
    """Scenes to be drawn by kind and jitter. See `apps.training.data.base.ExamplePool`.

    Args:
        scenes: P scenes.
        levels: Jitter that each scene was drawn with, (P,).
        data: Renders and captions them.
    """

    def __init__(self, scenes: Sequence[Scene], levels: np.ndarray, data: "StickerData") -> None:
        super().__init__(scenes, data)
        self.members, self.levels = {}, {}
        for kind in KINDS:
            chosen = np.array([i for i, scene in enumerate(scenes) if scene.kind == kind], dtype=np.int64)
            chosen = chosen[np.argsort(levels[chosen], kind="stable")]  # little jitter first
            self.members[kind], self.levels[kind] = chosen, levels[chosen]

    def draw(self, address: BatchAddress, rng: np.random.Generator, stage: Any) -> np.ndarray:
        """Draw scenes of the stage's kinds and at most its jitter.

        Args:
            address: Which batch; its size counts.
            rng: Source of the random numbers.
            stage: Gives `single`, `pair`, `count` and `jitter`.

        Returns:
            Row numbers, (B,).

        Raises:
            ValueError: If the pool has no such scene of a kind with a positive weight.
        """
        weights = (stage.single, stage.pair, stage.count)
        kinds = rng.choice(len(KINDS), address.size, p=np.asarray(weights) / np.sum(weights))  # (B,)
        position = rng.random(address.size)  # (B,) in [0, 1)
        drawn = np.empty(address.size, dtype=np.int64)
        for number, kind in enumerate(KINDS):
            rows = kinds == number
            allowed = int(np.searchsorted(self.levels[kind], stage.jitter, side="right"))
            if rows.any() and not allowed:
                raise ValueError(
                    f"the pool has no {kind} scene with jitter <= {stage.jitter}; raise data.{kind} or data.pool_size"
                )
            drawn[rows] = self.members[kind][(position[rows] * allowed).astype(np.int64)]
        return drawn


class StickerData:
    """The sticker world. See `apps.training.data.base.TrainingData`; further methods give scenes, whose truth is known.

    Args:
        settings: Which scenes and captions.
        resolution: Side R of the images in pixels.

    Attributes:
        entries: Class of each sticker of the vocabulary in labels, from 1; class 0 is no sticker.

    Raises:
        ConfigError: If the vocabulary cannot be read.
    """

    def __init__(self, settings: StickerSettings, resolution: int) -> None:
        self.settings = settings
        self.resolution = resolution
        self.sheet = load_sprites()
        self.vocabulary = read_vocabulary(settings.vocabulary)
        self.colour_words = settings.colours == "all"
        self.colours = COLOURS if self.colour_words else BASIC_COLOURS
        self.sampler = SceneSampler(self.sheet, self.vocabulary, mix=settings.mix(), colours=self.colours)
        self.every_sticker = SceneSampler(self.sheet, mix=settings.mix(), colours=self.colours)
        self.entries = {self.sheet.index(name): entry for entry, name in enumerate(self.vocabulary, 1)}

    def images(self, address: BatchAddress) -> Tensor:
        """Render new scenes, (B, 3, R, R)."""
        return self.render(self.scenes(address))

    def calibration_images(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """Yield images that are in no batch, `CHUNK` at a time."""
        numbers = range(-(-count // batch_size))
        addresses = (BatchAddress(VALIDATION_SEED + 1, number, batch_size) for number in numbers)
        scenes = [scene for address in addresses for scene in self.scenes(address)]
        for start in range(0, count, CHUNK):
            yield self.render(scenes[start : min(start + CHUNK, count)])

    def pool(self, size: int, stages: Sequence[Any], seed: int) -> ScenePool:
        """Draw the scenes of a pool; the jitter levels of the stages take turns."""
        jitters = sorted({stage.jitter for stage in stages})
        samplers = [
            SceneSampler(self.sheet, self.vocabulary, mix=self.settings.mix(jitter=each), colours=self.colours)
            for each in jitters
        ]
        scenes = [samplers[index % len(jitters)].scene(seed, index) for index in range(size)]
        return ScenePool(scenes, np.array([jitters[index % len(jitters)] for index in range(size)]), self)

    def held_out(self, count: int) -> SceneExamples:
        """Return scenes with held-out combinations of a sticker, a colour and a position."""
        return self._held_out(self.settings.mix(), count)

    def held_out_groups(self, count: int) -> dict[str, SceneExamples]:
        """Return held-out scenes of each kind."""
        return {kind: self._held_out(self.settings.mix(kind), count) for kind in KINDS}

    def corpus(self, count: int, seed: int) -> list[str]:
        """Return captions to train a tokenizer on; half of them name any sticker, so that a vocabulary can grow."""
        rng = np.random.default_rng((seed, VALIDATION_SEED))
        samplers = self.sampler, self.every_sticker
        scenes = (samplers[index % 2].scene(VALIDATION_SEED + 2, index) for index in range(count))
        return [caption(scene, self.sheet, rng, synonyms=0.3, colour_words=self.colour_words) for scene in scenes]

    def captions(self, count: int, seed: int) -> tuple[str, ...]:
        """Draw captions of new scenes."""
        rng = np.random.default_rng((seed, VALIDATION_SEED))
        return tuple(self.caption(self.sampler.scene(seed, index), rng) for index in range(count))

    def write_vocabulary(self, folder: Path) -> None:
        """Write the names of the stickers to `vocabulary.txt`, and all words of their captions to `words.txt`."""
        (folder / "vocabulary.txt").write_text("".join(name + "\n" for name in self.vocabulary))
        write_words(known_words(self.sheet, self.vocabulary, self.colours), folder)

    # What only data whose truth is known has.

    def scenes(self, address: BatchAddress) -> list[Scene]:
        """Draw the scenes of a batch: a share from the vocabulary, the rest from all stickers.

        Scene numbers of different batches differ, also between processes.
        """
        own = round(self.settings.vocabulary_fraction * address.size)
        numbers = range(address.number * address.size, (address.number + 1) * address.size)
        samplers = (self.sampler if position < own else self.every_sticker for position in range(address.size))
        return [sampler.scene(address.seed, number) for sampler, number in zip(samplers, numbers, strict=True)]

    def render(self, scenes: Sequence[Scene]) -> Tensor:
        """Render scenes, (B, 3, R, R)."""
        return render(scenes, self.sheet, self.resolution)

    def caption(self, scene: Scene, rng: np.random.Generator) -> str:
        """Draw a caption of a scene."""
        return caption(
            scene,
            self.sheet,
            rng,
            synonyms=self.settings.synonyms,
            vocabulary=self.vocabulary,
            colour_words=self.colour_words,
        )

    def _held_out(self, mix: SceneMix, count: int) -> SceneExamples:
        sampler = SceneSampler(self.sheet, self.vocabulary, split="heldout_combination", mix=mix, colours=self.colours)
        return SceneExamples([sampler.scene(VALIDATION_SEED, index) for index in range(count)], self)


def read_vocabulary(name: str) -> tuple[str, ...]:
    """Return the sticker names that `data.vocabulary` means.

    Args:
        name: `starter`, `common`, `all`, or the path of a text file with one name a line.

    Raises:
        ConfigError: If it is neither a known word nor a file, or names a sticker that does not exist.
    """
    sheet: SpriteSheet = load_sprites()
    if name == "starter":
        return STARTER
    if name == "common":
        return COMMON
    if name == "all":
        return sheet.names
    return read_names(name, sheet, "starter, common, all")


def read_names(name: str, sheet: NamedSheet, words: str) -> tuple[str, ...]:
    """Return the names of a file that `data.vocabulary` means.

    Args:
        name: Path of a text file with one name a line.
        sheet: What the names have to be in.
        words: What might stand there instead, for the message.

    Raises:
        ConfigError: There is no such file, or it names what is not in the sheet.
    """
    if not Path(name).is_file():
        raise ConfigError(f"data.vocabulary = {name!r}: expected {words}, or a text file with one name a line")
    names = tuple(line.strip() for line in Path(name).read_text().splitlines() if line.strip())
    try:
        for each in names:
            sheet.index(each)
    except KeyError as error:
        raise ConfigError(f"data.vocabulary = {name!r}: {error.args[0]}") from error
    return names


def box_mask(scenes: Sequence[Scene], resolution: int) -> Tensor:
    """Mark the pixels that lie in a sticker's box.

    Returns:
        Bool, (B, 1, resolution, resolution).
    """
    centre = (torch.arange(resolution) + 0.5) / resolution  # (R,)
    mask = torch.zeros(len(scenes), 1, resolution, resolution, dtype=torch.bool)
    for image, scene in zip(mask, scenes, strict=True):
        for placement in scene.placements:
            column = (centre - placement.x).abs() <= placement.size / 2  # (R,)
            row = (centre - placement.y).abs() <= placement.size / 2  # (R,)
            image |= row[:, None] & column[None]
    return mask
