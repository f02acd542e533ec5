"""The moving sticker world as training data: clips, excerpts of longer ones, and their captions."""

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.stickers import renderer as still_renderer
from apps.stickers.moving import playback, renderer
from apps.stickers.moving.captions import clip_caption
from apps.stickers.moving.clips import load_clips
from apps.stickers.moving.known_words import known_words
from apps.stickers.moving.renderer import render_clip
from apps.stickers.moving.scene import ClipMix, ClipScene, ClipSceneSampler
from apps.stickers.scene import BASIC_COLOURS, COLOURS, generator
from apps.training.config import Section
from apps.training.data.base import VALIDATION_SEED, BatchAddress
from apps.training.data.stickers import read_names
from pipelines.inputs.words import write_words

CHUNK = 16  # clips that are rendered at once
LOOP_SECONDS = 2.0  # in which an own motion is played once at its own speed
ANIMATED = 0.79  # share of those at their own speed, or still, that aren't still
BEGINNINGS = 1 / 3  # share of the excerpts that are their clips' beginnings
TIMING_SERIES = 2**43  # series of the random numbers that choose frame rates and excerpts


@dataclass(frozen=True)
class MovingStickerSettings:
    """The settings of a `[data]` section that choose clips; see `apps.training.data.config.ClipSection`."""

    num_frames: int = 17
    frame_rates: Sequence[float] = (8.0,)
    lengths: Sequence[int] = ()
    vocabulary: str = "all"
    colours: str = "basic"
    passing: float = 0.15
    paced: float = 0.24
    jitter: float = 0.3
    jitter_power: float = 1.0
    synonyms: float = 0.15

    @classmethod
    def of(cls, section: Section) -> "MovingStickerSettings":
        """Take from a section what is a setting of the moving stickers."""
        return cls(**section.model_dump(include=set(cls.__dataclass_fields__)))

    def mix(self, passing: float | None = None) -> ClipMix:
        """Return how often each kind of motion is drawn; `passing` replaces the share of two that pass each other."""
        share = self.passing if passing is None else passing
        plain, pace = 1 - self.paced, self.paced / 3
        return ClipMix(
            single=1 - share,
            passing=share,
            animated=plain * ANIMATED,
            still=plain * (1 - ANIMATED),
            slow=pace,
            fast=pace,
            backwards=pace,
            jitter=self.jitter,
            jitter_power=self.jitter_power,
        )


@dataclass(frozen=True)
class Excerpt:
    """Frames of a clip.

    Attributes:
        scene: What the clip holds.
        frame_rate: Frames a second.
        span: Frames of the whole clip, which its scene motion takes.
        start: First frame of the excerpt.
        length: Its frames.
    """

    scene: ClipScene
    frame_rate: float
    span: int
    start: int
    length: int


class ExcerptExamples:
    """Excerpts with their frames and captions. See `apps.training.data.base.Examples`.

    Args:
        excerpts: P excerpts.
        data: Renders and captions them.

    Attributes:
        lengths, starts, spans, frame_rates: See `apps.training.data.base.ClipPool`.
    """

    def __init__(self, excerpts: Sequence[Excerpt], data: "MovingStickerData") -> None:
        self.excerpts = excerpts
        self.data = data
        self.lengths = np.array([excerpt.length for excerpt in excerpts])
        self.starts = np.array([excerpt.start for excerpt in excerpts])
        self.spans = np.array([excerpt.span for excerpt in excerpts])
        self.frame_rates = np.array([excerpt.frame_rate for excerpt in excerpts])

    def __len__(self) -> int:
        return len(self.excerpts)

    def images(self, rows: Sequence[int]) -> Tensor:
        """Render some of the excerpts, (B, 3, T, R, R)."""
        return self.data.render([self.excerpts[row] for row in rows])

    def regions(self, rows: Sequence[int]) -> Tensor:
        """Mark the pixels that lie in a sticker's box, (B, 1, T, R, R)."""
        return torch.stack([self.data.box_mask(self.excerpts[row]) for row in rows])

    def caption(self, row: int, rng: np.random.Generator) -> str:
        """Draw a caption of a clip."""
        return self.data.caption(self.excerpts[row].scene, rng)

    def fingerprint(self) -> str:
        """Hash the excerpts, the stickers' frames and the code that renders them."""
        settings = (list(self.excerpts), self.data.resolution, self.data.settings.num_frames)
        digest = hashlib.sha256(repr(settings).encode())
        for module in (renderer, playback, still_renderer):
            digest.update(inspect.getsource(module).encode())
        digest.update(repr((LOOP_SECONDS, self.data.sheet.loops)).encode())
        digest.update(self.data.sheet.pixels.numpy().tobytes())
        return digest.hexdigest()


class ExcerptPool(ExcerptExamples):
    """Excerpts that a generator is trained on. See `apps.training.data.base.ClipPool`."""

    def draw(self, address: BatchAddress, rng: np.random.Generator, stage: Any) -> np.ndarray:
        """Draw rows of one length, (B,): all processes draw the same length at the same step."""
        del stage
        shared = np.random.default_rng((address.seed, address.step, 3))
        length = self.lengths[shared.integers(len(self))]
        rows = np.flatnonzero(self.lengths == length)
        return rows[rng.integers(len(rows), size=address.size)]


class MovingStickerData:
    """The moving sticker world. See `apps.training.data.base.TrainingData`.

    Args:
        settings: Which clips and captions.
        resolution: Side R of the frames in pixels.

    Raises:
        ConfigError: If the vocabulary cannot be read.
    """

    def __init__(self, settings: MovingStickerSettings, resolution: int) -> None:
        self.settings = settings
        self.resolution = resolution
        self.sheet = load_clips()
        name = settings.vocabulary
        self.vocabulary = self.sheet.names if name == "all" else read_names(name, self.sheet, "all")
        self.colours = COLOURS if settings.colours == "all" else BASIC_COLOURS
        self.lengths = tuple(settings.lengths) or (settings.num_frames,)
        self.sampler = ClipSceneSampler(self.sheet, self.vocabulary, mix=settings.mix(), colours=self.colours)

    def images(self, address: BatchAddress) -> Tensor:
        """Render new clips, (B, 3, T, R, R)."""
        first = address.number * address.size
        return self.render([self.excerpt(address.seed, first + row) for row in range(address.size)])

    def calibration_images(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """Yield clips that are in no batch, `CHUNK` at a time."""
        del batch_size
        for start in range(0, count, CHUNK):
            rows = range(start, min(start + CHUNK, count))
            yield self.render([self.excerpt(VALIDATION_SEED + 1, row) for row in rows])

    def pool(self, size: int, stages: Sequence[Any], seed: int) -> ExcerptPool:
        """Draw the excerpts of a pool."""
        del stages
        return ExcerptPool([self.excerpt(seed, index) for index in range(size)], self)

    def held_out(self, count: int) -> ExcerptExamples:
        """Return clips with held-out combinations of a sticker, a colour and a motion."""
        return self._held_out(self.settings.mix(), count)

    def held_out_groups(self, count: int) -> dict[str, ExcerptExamples]:
        """Return held-out clips of one sticker, and of two if there are any."""
        shares = {"single": 0.0, "passing": 1.0} if self.settings.passing else {"single": 0.0}
        return {kind: self._held_out(self.settings.mix(share), count) for kind, share in shares.items()}

    def corpus(self, count: int, seed: int) -> list[str]:
        """Return captions to train a tokenizer on."""
        rng = np.random.default_rng((seed, VALIDATION_SEED))
        scenes = (self.sampler.scene(VALIDATION_SEED + 2, index) for index in range(count))
        return [clip_caption(scene, self.sheet, rng, synonyms=0.3) for scene in scenes]

    def captions(self, count: int, seed: int) -> tuple[str, ...]:
        """Draw captions of new clips."""
        rng = np.random.default_rng((seed, VALIDATION_SEED))
        return tuple(self.caption(self.sampler.scene(seed, index), rng) for index in range(count))

    def write_vocabulary(self, folder: Path) -> None:
        """Write the names of the stickers to `vocabulary.txt`, and all words of their captions to `words.txt`."""
        (folder / "vocabulary.txt").write_text("".join(name + "\n" for name in self.vocabulary))
        write_words(known_words(self.sheet, self.vocabulary, self.colours), folder)

    # What only data whose truth is known has.

    def excerpt(self, seed: int, index: int) -> Excerpt:
        """Return excerpt `index` of the series `seed`; the same whatever was drawn before."""
        return self._excerpt(self.sampler.scene(seed, index), generator(seed + TIMING_SERIES, index))

    def render(self, excerpts: Sequence[Excerpt]) -> Tensor:
        """Render excerpts, (B, 3, T, R, R); shorter ones stand still at their end."""
        return torch.stack([self._render(excerpt) for excerpt in excerpts])

    def caption(self, scene: ClipScene, rng: np.random.Generator) -> str:
        """Draw a caption of a clip."""
        return clip_caption(scene, self.sheet, rng, synonyms=self.settings.synonyms)

    def box_mask(self, excerpt: Excerpt) -> Tensor:
        """Mark the pixels that lie in a sticker's box, bool, (1, T, R, R)."""
        centre = (torch.arange(self.resolution) + 0.5) / self.resolution  # (R,)
        mask = torch.zeros(self.settings.num_frames, self.resolution, self.resolution, dtype=torch.bool)
        for sticker in excerpt.scene.stickers:
            shown = renderer.poses(sticker, excerpt.span)[excerpt.start : excerpt.start + excerpt.length]
            for frame, pose in zip(mask, shown, strict=False):
                column = (centre - pose.x).abs() <= pose.size / 2  # (R,)
                row = (centre - pose.y).abs() <= pose.size / 2  # (R,)
                frame |= row[:, None] & column[None]
        return mask[None]

    def _render(self, excerpt: Excerpt) -> Tensor:
        """Render an excerpt, (3, T, R, R)."""
        frames = render_clip(
            excerpt.scene,
            self.sheet,
            excerpt.span,
            self.resolution,
            period=round(LOOP_SECONDS * excerpt.frame_rate),
            part=(excerpt.start, excerpt.start + excerpt.length),
        )  # (t, 3, R, R)
        missing = self.settings.num_frames - excerpt.length
        return torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)]).transpose(0, 1)

    def _excerpt(self, scene: ClipScene, rng: np.random.Generator) -> Excerpt:
        span = self.lengths[int(rng.integers(len(self.lengths)))]
        length = min(span, self.settings.num_frames)
        rate = self.settings.frame_rates[int(rng.integers(len(self.settings.frame_rates)))]
        begins = rng.random() < BEGINNINGS  # nothing is known of a clip's beginning, so it must be seen often enough
        start = 0 if begins else int(rng.integers(span - length + 1))
        return Excerpt(scene, rate, span, start, length)

    def _held_out(self, mix: ClipMix, count: int) -> ExcerptExamples:
        sampler = ClipSceneSampler(
            self.sheet, self.vocabulary, split="heldout_combination", mix=mix, colours=self.colours
        )
        length = min(self.lengths[0], self.settings.num_frames)
        rate = self.settings.frame_rates[0]
        scenes = [sampler.scene(VALIDATION_SEED, index) for index in range(count)]
        return ExcerptExamples([Excerpt(scene, rate, length, 0, length) for scene in scenes], self)
