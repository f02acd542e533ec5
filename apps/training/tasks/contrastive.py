"""Trains a tiny CLIP (arXiv 2103.00020) on pictures and captions of the sticker world, as a reward for searches.

Each picture must find its caption among those of the batch and among near misses: captions of scenes that differ from
its own in one thing, as a relation turned round. Each caption must find its picture, also among botched ones: those
that lack a sticker or hold tokens of other pictures. And pictures may be coarse: a search judges them half painted.

The towers are SigLIP's (arXiv 2303.15343). CLIP's text tower reads forwards only, and learned "a left of b" no better
than by guessing in 2,000 steps: where it reads "a" it cannot know that a relation follows.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import SiglipConfig, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from apps.stickers.captions import caption
from apps.training.autoencoders import load_autoencoder
from apps.training.config import Section, TaskSection, TrainConfig
from apps.training.export import save_component
from apps.training.look_around import look_around
from apps.training.near_misses import near_miss, riddles, solved
from apps.training.scene_facts import QUESTIONS, SPOTS, answers, misreading
from apps.training.scene_reader import SceneReader
from apps.training.scenes import (
    Scene,
    SceneMix,
    SceneSampler,
    load_sprites,
    read_vocabulary,
    render,
    save_grid,
    scene_series,
)
from apps.training.task import TaskContext
from apps.training.text_encoder import TextModel, caption_corpus, caption_tokenizer, tokenize
from dit.layers.scales import Grid
from dit.tokenizers import MultiScaleVQ

MIN_SCALES = 3  # of a half-painted picture
TEMPERATURE = 0.07  # of the contrast at the start
READER_SCALE = 8.0  # of the unit vectors that the reader sees


class ContrastiveSection(TaskSection):
    """The `[task]` section.

    Attributes:
        near_misses: Whether the captions of near misses compete too.
        reading_weight: Weight of extra losses: light heads, thrown away afterwards, must tell what stands where, how
            often, on what. One asks the vector of a picture and that of a caption alike, two the states of patches and
            words below. They say directly what the contrast rewards late: which sticker is where.
        reading_first: Steps in which only captions are read: they cost a fraction of those with pictures, and pictures
            then find captions that are understood. Without extra losses there can be none.
    """

    kind: Literal["contrastive"]
    near_misses: bool = True
    reading_weight: float = Field(default=0.5, ge=0)
    reading_first: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _can_read(self) -> Self:
        if self.reading_first and not self.reading_weight:
            raise ValueError(f"reading_first is {self.reading_first}, so reading_weight must be more than 0")
        return self


class ContrastiveData(Section):
    """The `[data]` section.

    Attributes:
        tokenizer: Folder of the tokenizer of captions; unset trains one.
        vae: Folder of a multi-scale tokenizer; some pictures are then painted by its first few scales.
        half_painted: Share of these pictures.
        botched: Share of the pictures that are shown spoilt too.
        resolution: Side of the pictures in pixels.
        vocabulary: `starter`, `all`, or a text file with one sticker name a line.
        single, pair, count: Relative frequencies of the kinds of scenes.
        size_words: Share of the single stickers drawn small or large.
        synonyms: Probability that a caption calls a sticker by one of its keywords.
        tokenizer_captions: Captions that a new tokenizer is trained on.
        validation_scenes: Held-out scenes of each kind.
    """

    tokenizer: Path | None = None
    vae: Path | None = None
    half_painted: float = Field(default=0.5, ge=0, le=1)
    botched: float = Field(default=0.25, ge=0, le=1)
    resolution: int = Field(default=128, ge=16)
    vocabulary: str = "starter"
    single: float = Field(default=0.35, ge=0)
    pair: float = Field(default=0.45, ge=0)
    count: float = Field(default=0.2, ge=0)
    size_words: float = Field(default=0.4, ge=0, le=1)
    synonyms: float = Field(default=0.15, ge=0, le=1)
    tokenizer_captions: int = Field(default=20_000, ge=2)
    validation_scenes: int = Field(default=64, ge=1)


class TowerModel(Section):
    """One of the two transformers."""

    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = Field(default=3, ge=1)
    num_attention_heads: int = Field(default=2, ge=1)


class ContrastiveModel(Section):
    """The `[model]` section; see `transformers.SiglipModel`.

    Attributes:
        patch_size: side of a picture's patches in pixels.
        max_length: tokens of a caption; shorter ones are padded, longer ones cut.
        vision, language: the towers; vectors are as wide as that of pictures.
        text: the tokenizer, if a new one is trained.
    """

    patch_size: int = 16
    max_length: int = Field(default=40, ge=8)
    vision: TowerModel = TowerModel()
    language: TowerModel = TowerModel(num_hidden_layers=2)
    text: TextModel = TextModel()


class ContrastiveConfig(TrainConfig):
    """A whole configuration of this task."""

    task: ContrastiveSection
    data: ContrastiveData = ContrastiveData()
    model: ContrastiveModel = ContrastiveModel()


class ContrastiveTask:
    """Learns which caption belongs to which picture. See `apps.training.task.Task`."""

    config_class: ClassVar[type[TrainConfig]] = ContrastiveConfig
    smoke: ClassVar[tuple[str, ...]] = ("data.tokenizer_captions=200", "data.validation_scenes=4")

    def __init__(self, config: ContrastiveConfig, context: TaskContext) -> None:
        self.config, self.context = config, context
        data = config.data
        self.sheet = load_sprites()
        self.vocabulary = read_vocabulary(data.vocabulary)
        self.mix = SceneMix(single=data.single, pair=data.pair, count=data.count, size_words=data.size_words)
        self.sampler = SceneSampler(self.sheet, self.vocabulary, mix=self.mix)
        self.painter: Any = None if data.vae is None else load_autoencoder(data.vae)
        if self.painter is not None and not isinstance(self.painter, MultiScaleVQ):
            raise ValueError(f"data.vae = {str(data.vae)!r} is no multi-scale tokenizer; unset it or give one")
        with context.main_process_first():
            self.tokenizer = caption_tokenizer(
                data.tokenizer or config.run.folder / "tokenizer",
                config.model.text,
                lambda: caption_corpus(self.vocabulary, self.mix, data.tokenizer_captions, config.run.seed),
            )
        self.tokenizer.model_max_length = config.model.max_length
        self.clip = self._network()
        self.entries = {self.sheet.index(name): entry for entry, name in enumerate(self.vocabulary, 1)}
        names = len(SPOTS) * (1 + len(self.vocabulary))
        language = config.model.language
        self.reader_of_words = SceneReader(language.hidden_size, len(self.vocabulary), language.num_attention_heads)
        vision = config.model.vision
        self.reader_of_patches = SceneReader(vision.hidden_size, len(self.vocabulary), vision.num_attention_heads)
        self.reader = nn.Linear(config.model.vision.hidden_size, names + sum(QUESTIONS.values()))
        self.riddles = riddles(
            self.sheet, self.vocabulary, data.size_words, data.synonyms, data.validation_scenes, data.resolution
        )

    def _network(self) -> SiglipModel:
        model, tokenizer = self.config.model, self.tokenizer
        text = {
            **model.language.model_dump(),
            "vocab_size": len(tokenizer),
            "max_position_embeddings": model.max_length,
            "projection_size": model.vision.hidden_size,
            "bos_token_id": tokenizer.eos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        vision = {
            **model.vision.model_dump(),
            "image_size": self.config.data.resolution,
            "patch_size": model.patch_size,
        }
        clip = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        clip.logit_scale.data.fill_(math.log(1 / TEMPERATURE))
        look_around(clip)
        return clip

    def modules(self) -> dict[str, nn.Module]:
        """The CLIP, and the heads of the extra losses."""
        if not self.config.task.reading_weight:
            return {"clip": self.clip}
        return {
            "clip": self.clip,
            "reader": self.reader,
            "reader_of_words": self.reader_of_words,
            "reader_of_patches": self.reader_of_patches,
        }

    def batch(self, index: int) -> dict[str, Any]:
        """Pictures of fresh scenes, their captions, and captions of near misses behind them."""
        run = self.config.run
        number = index * self.context.world_size + self.context.rank
        rng = np.random.default_rng((run.seed, index, self.context.rank))
        scenes = scene_series([(self.sampler, run.batch_size)], run.seed, number)
        told = [*scenes, *(near_miss(scene, rng, self.sampler.sprites) for scene in scenes)]
        if not self.config.task.near_misses:
            told = scenes
        facts = {f"true_{name}": one for name, one in answers(told, self.entries).items()}
        if index < self.config.task.reading_first:
            return {**self._tell(told, rng), **facts}
        return {"pixel_values": self._paint(scenes, rng), **self._tell(told, rng), **facts}

    @torch.no_grad()
    def _paint(self, scenes: list[Scene], rng: np.random.Generator) -> Tensor:
        """Shows scenes as a search sees them.

        Args:
            scenes: B scenes.
            rng: picks.

        Returns:
            Their pictures in [-1, 1], the first ones painted by the first scales of their tokens; behind them botched
            pictures of the very first scenes: a third lacks a sticker, see `botch` and `blotch` for the others;
            (B + botched, 3, H, W).
        """
        data = self.config.data
        images = render(scenes, self.sheet, data.resolution)  # (B, 3, H, W)
        count, wrong = round(data.half_painted * len(images)), round(data.botched * len(images))
        if self.painter is None or not (count or wrong):
            return images
        grids = self.painter.grids
        scales = int(rng.integers(min(MIN_SCALES, len(grids)), len(grids) + 1))
        lacking = [without_one(scene, rng) for scene in scenes[: wrong // 3]]
        shown = [images[: max(count, wrong)], *([render(lacking, self.sheet, data.resolution)] if lacking else [])]
        codes = self.painter.quantize(torch.cat(shown)).indices[:scales]  # S x (b, N)
        true, lacking_codes = (
            [one[part] for one in codes] for part in (slice(0, wrong), slice(max(count, wrong), None))
        )
        boxes, spots = botch(true, grids, rng), blotch(true, rng)
        half = len(lacking) + (wrong - len(lacking)) // 2
        painted = [
            torch.cat([one[:count], none, box[len(lacking) : half], spot[half:]])
            for one, none, box, spot in zip(codes, lacking_codes, boxes, spots, strict=True)
        ]
        pictures = self.painter.decode(self.painter.indices_to_latents(painted)).sample.clamp(-1, 1)  # (b, 3, H, W)
        return torch.cat([pictures[:count], images[count:], pictures[count:]])

    def _tell(self, scenes: list[Scene], rng: np.random.Generator) -> dict[str, Tensor]:
        synonyms = self.config.data.synonyms
        captions = [caption(one, self.sheet, rng, synonyms=synonyms, vocabulary=self.vocabulary) for one in scenes]
        tokens = tokenize(self.tokenizer, captions, length=self.config.model.max_length)
        return {"input_ids": tokens["input_ids"]}

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """InfoNCE both ways (arXiv 2103.00020, figure 3).

        Near misses compete for the pictures only, botched pictures for the captions only.
        """
        shown = {name: one for name, one in batch.items() if name in ("pixel_values", "input_ids")}
        facts = {name.removeprefix("true_"): one for name, one in batch.items() if name not in shown}
        if "pixel_values" not in batch:
            return self._read(batch, facts)
        out = self.clip(**shown, output_hidden_states=True)
        scores = out.logits_per_image.float()  # (B + botched, B) or (B + botched, 2B)
        size = self.config.run.batch_size
        true = torch.arange(size, device=scores.device)  # (B,)
        pictures, captions = scores[:size], scores[:, :size].T  # a row each
        loss = (F.cross_entropy(pictures, true) + F.cross_entropy(captions, true)) / 2
        values = {
            "right": (pictures.argmax(1) == true).float().mean(),
            "right_captions": (captions.argmax(1) == true).float().mean(),
        }
        if self.config.task.reading_weight:
            own = {name: one[:size] for name, one in facts.items()}
            words, patches = out.text_model_output.hidden_states[-2], out.vision_model_output.hidden_states[-2][:size]
            read = {
                "misread_text": self._misread(out.text_embeds, facts),
                "misread_picture": self._misread(out.image_embeds[:size], own),
                "unclear_text": self._unclear(self.reader_of_words, words, self._is_word(batch["input_ids"]), facts),
                "unclear_picture": self._unclear(self.reader_of_patches, patches, None, own),
            }
            loss = loss + self.config.task.reading_weight * torch.stack(list(read.values())).sum()
            values |= {name: one.detach() for name, one in read.items()}
        return loss, values

    def _read(self, batch: dict[str, Any], facts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch without pictures."""
        told = self.clip.text_model(batch["input_ids"], output_hidden_states=True)
        words = self._unclear(self.reader_of_words, told.hidden_states[-2], self._is_word(batch["input_ids"]), facts)
        misread = self._misread(F.normalize(told.pooler_output, dim=-1), facts)
        resting = [self.clip.logit_scale, self.clip.logit_bias, *self.clip.vision_model.parameters()]
        resting += self.reader_of_patches.parameters()
        idle = torch.stack([weight.sum() for weight in resting]).sum()  # processes want all weights to take part
        return words + misread + 0 * idle, {"misread_text": misread.detach(), "unclear_text": words.detach()}

    def _is_word(self, tokens: Tensor) -> Tensor:
        padding: Any = self.tokenizer.pad_token_id
        return tokens != padding  # (B, L)

    def _misread(self, vectors: Tensor, facts: dict[str, Tensor]) -> Tensor:
        """Cross-entropies of what the head tells from unit vectors (B, F), summed over its questions."""
        logits = self.reader(READER_SCALE * vectors).float()  # (B, R)
        count = len(SPOTS) * (1 + len(self.vocabulary))
        names = logits[:, :count].unflatten(1, (len(SPOTS), -1))  # (B, 6, 1 + names)
        rest = dict(zip(QUESTIONS, logits[:, count:].split(list(QUESTIONS.values()), dim=1), strict=True))
        return misreading({"names": names, **rest}, facts)

    def _unclear(self, reader: SceneReader, states: Tensor, mask: Tensor | None, facts: dict[str, Tensor]) -> Tensor:
        """Cross-entropies of what a head tells from states (B, L, D), summed over its questions."""
        everywhere = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask
        return misreading(reader(states, everywhere), facts)

    def validate(self) -> dict[str, float]:
        """Shares of held-out pictures that find their caption, see `apps.training.near_misses`."""
        values = {}
        for kind, riddle in self.riddles.items():
            tokens = tokenize(self.tokenizer, riddle.captions, length=self.config.model.max_length)["input_ids"]
            device = self.context.device
            told = self.clip(input_ids=tokens.to(device), pixel_values=riddle.pictures.to(device))
            values |= {f"{name}_{kind}": share for name, share in solved(told.logits_per_image).items()}
        return values

    def preview(self, path: Path) -> None:
        """Shows held-out pictures; there is nothing to paint."""
        save_grid(torch.cat([riddle.pictures[:8] for riddle in self.riddles.values()]), path, 8)

    def export(self, folder: Path) -> None:
        """Writes the model with its tokenizer and image processor, as transformers' Auto classes load it."""
        save_component(self.clip, folder)
        self.tokenizer.save_pretrained(folder)
        side = self.config.data.resolution
        CLIPImageProcessorPil(
            size={"height": side, "width": side},
            do_center_crop=False,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ).save_pretrained(folder)


def botch(codes: list[Tensor], grids: Sequence[Grid], rng: np.random.Generator) -> list[Tensor]:
    """Swaps the tokens in a box, from some scale on, with those of the next picture of the batch.

    Args:
        codes: tokens of the first scales, (B, N) each; they stay as they are.
        grids: rows and columns of the scales.
        rng: picks box and scale.
    """
    start = int(rng.integers(1, max(len(codes) - 1, 2)))
    side = rng.uniform(0.3, 0.6, size=2)
    top, left = rng.uniform(0, 1 - side)
    spoilt = []
    for scale, one in enumerate(codes):
        height, width = grids[scale]
        down, across = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
        rows, columns = (down > top) & (down < top + side[0]), (across > left) & (across < left + side[1])
        inside = (rows[:, None] & columns).flatten() & (scale >= start)  # (N,)
        spoilt.append(torch.where(inside.to(one.device), one.roll(1, 0), one))  # (B, N)
    return spoilt


def blotch(codes: list[Tensor], rng: np.random.Generator) -> list[Tensor]:
    """Swaps single tokens, here and there, with those of other pictures of the batch: what drawing hot looks like.

    Args:
        codes: tokens of the first scales, (B, N) each; they stay as they are.
        rng: picks pictures and places.
    """
    spoilt = []
    for scale, one in enumerate(codes):
        share = rng.uniform(0.02, 0.2, size=(len(one), 1)) * (scale > 0)  # (B, 1)
        swapped = torch.from_numpy(rng.random(one.shape) < share).to(one.device)  # (B, N)
        others = torch.from_numpy(rng.permuted(one.cpu().numpy().reshape(-1)).reshape(one.shape)).to(one.device)
        spoilt.append(torch.where(swapped, others, one))  # (B, N)
    return spoilt


def without_one(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene lacking one of its stickers; what it says stays."""
    lost = int(rng.integers(len(scene.placements)))
    return replace(scene, placements=(*scene.placements[:lost], *scene.placements[lost + 1 :]))
