"""Trains a small T5 to read captions: what stands where, how often, how large, on what colour.

A generator learns from its text encoder's states only what the image's loss rewards at once, and the order of words
is rewarded late. So the encoder first learns to read: a light head, thrown away afterwards, asks its states for the
scene, which is cheap because no image is made. For the shipped model it took five minutes on one core, and relations
were right after 1,000 steps of the generator; one trained together with its encoder had needed 6,500. Everything a
generator needs must then be in the states, and the encoder can be frozen (as those of most text-to-image models are).
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from apps.stickers.captions import caption
from apps.stickers.scene import CENTRES, PART_SIZE, PLACES, RELATIONS, SIZES, Placement
from apps.training.config import Section, TaskSection, TrainConfig
from apps.training.export import save_component
from apps.training.scene_facts import QUESTIONS, SPOTS, answers, misreading
from apps.training.scene_reader import SceneReader
from apps.training.scenes import (
    VALIDATION_SEED,
    Scene,
    SceneMix,
    SceneSampler,
    load_sprites,
    read_vocabulary,
    render,
    save_grid,
)
from apps.training.task import TaskContext
from apps.training.text_encoder import (
    TextModel,
    caption_corpus,
    caption_tokenizer,
    load_text_encoder,
    new_text_encoder,
    tokenize,
)


class TextReadingSection(TaskSection):
    """The `[task]` section."""

    kind: Literal["text_reading"]


class TextReadingData(Section):
    """The `[data]` section.

    Attributes:
        init_from: Folder with `text_encoder/` and `tokenizer/` that the run starts from; `[model]` is then not used.
        vocabulary: `starter`, `all`, or a text file with one sticker name a line.
        single, pair, count: Relative frequencies of the kinds of scenes.
        size_words: Share of the single stickers drawn small or large.
        synonyms: Probability that a caption calls a sticker by one of its keywords.
        tokenizer_captions: Captions that the tokenizer is trained on.
        validation_scenes: Held-out scenes of each kind that are read.
    """

    init_from: Path | None = None
    vocabulary: str = "starter"
    single: float = Field(default=0.25, ge=0)
    pair: float = Field(default=0.6, ge=0)
    count: float = Field(default=0.15, ge=0)
    size_words: float = Field(default=0.4, ge=0, le=1)
    synonyms: float = Field(default=0.15, ge=0, le=1)
    tokenizer_captions: int = Field(default=20_000, ge=2)
    validation_scenes: int = Field(default=256, ge=1)


class TextReadingModel(Section):
    """The `[model]` section."""

    text: TextModel = TextModel()


class TextReadingConfig(TrainConfig):
    """A whole configuration of this task."""

    task: TextReadingSection
    data: TextReadingData = TextReadingData()
    model: TextReadingModel = TextReadingModel()


class TextReadingTask:
    """Learns to read captions. See `apps.training.task.Task`."""

    config_class: ClassVar[type[TrainConfig]] = TextReadingConfig
    smoke: ClassVar[tuple[str, ...]] = ("data.tokenizer_captions=200", "data.validation_scenes=4")

    def __init__(self, config: TextReadingConfig, context: TaskContext) -> None:
        self.config, self.context = config, context
        data = config.data
        self.sheet = load_sprites()
        self.vocabulary = read_vocabulary(data.vocabulary)
        self.entries = {self.sheet.index(name): entry for entry, name in enumerate(self.vocabulary, 1)}
        self.sampler = SceneSampler(self.sheet, self.vocabulary, mix=self._mix())
        if data.init_from is not None:
            self.text_encoder, self.tokenizer = load_text_encoder(data.init_from)
        else:
            with context.main_process_first():
                self.tokenizer = caption_tokenizer(
                    config.run.folder / "tokenizer",
                    config.model.text,
                    lambda: caption_corpus(self.vocabulary, self._mix(), data.tokenizer_captions, config.run.seed),
                )
            self.text_encoder = new_text_encoder(config.model.text, self.tokenizer)
        settings = self.text_encoder.config
        self.reader = SceneReader(settings.d_model, len(self.vocabulary), settings.num_heads)

    def modules(self) -> dict[str, nn.Module]:
        """The encoder, and the head that asks it."""
        return {"text_encoder": self.text_encoder, "reader": self.reader}

    def batch(self, index: int) -> dict[str, Any]:
        """Captions of new scenes, and the answers."""
        rng = np.random.default_rng((self.config.run.seed, index, self.context.rank))
        scenes = [self.sampler.draw(rng) for _ in range(self.config.run.batch_size)]
        return self._encode(scenes, [self._caption(scene, rng) for scene in scenes])

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the cross-entropies of all spots and questions."""
        logits = self._read(batch)
        spots = F.cross_entropy(logits["names"].flatten(0, 1), batch["names"].flatten())
        values = {"loss_names": spots.detach(), "right": _right(logits, batch).float().mean()}
        return misreading(logits, batch), values

    def validate(self) -> dict[str, float]:
        """Share of the scenes with held-out combinations that are read without a mistake, by kind."""
        values = {}
        for kind in ("single", "pair", "count"):
            scenes, captions = self._held_out(kind, self.config.data.validation_scenes)
            batch = {name: tensor.to(self.context.device) for name, tensor in self._encode(scenes, captions).items()}
            values[f"right_{kind}"] = float(_right(self._read(batch), batch).float().mean())
        return values

    def preview(self, path: Path) -> None:
        """Draws the scenes as they were read: two rows each of pairs, singles and counts; captions in `prompts.txt`."""
        drawn, lines = [], []
        for kind in ("pair", "single", "count"):
            scenes, captions = self._held_out(kind, 16)
            batch = {name: tensor.to(self.context.device) for name, tensor in self._encode(scenes, captions).items()}
            drawn += self._scenes_read(self._read(batch))
            lines += captions
        (path.parent / "prompts.txt").write_text("".join(line + "\n" for line in lines))
        save_grid(render(drawn, self.sheet, 128), path, 8)

    def export(self, folder: Path) -> None:
        """Writes `text_encoder/` and `tokenizer/`; the head is of no further use."""
        save_component(self.text_encoder, folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")

    def _mix(self) -> SceneMix:
        data = self.config.data
        return SceneMix(single=data.single, pair=data.pair, count=data.count, size_words=data.size_words)

    def _caption(self, scene: Scene, rng: np.random.Generator) -> str:
        return caption(scene, self.sheet, rng, synonyms=self.config.data.synonyms, vocabulary=self.vocabulary)

    def _encode(self, scenes: list[Scene], captions: list[str]) -> dict[str, Tensor]:
        return {**tokenize(self.tokenizer, captions), **answers(scenes, self.entries)}

    def _read(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        states = self.text_encoder(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state  # (B, L, D)
        logits = self.reader(states, batch["attention_mask"].bool())
        return {name: tensor.float() for name, tensor in logits.items()}

    def _held_out(self, kind: str, count: int) -> tuple[list[Scene], list[str]]:
        mix = SceneMix(
            **{each: float(each == kind) for each in ("single", "pair", "count")}, size_words=self._mix().size_words
        )
        sampler = SceneSampler(self.sheet, self.vocabulary, split="heldout_combination", mix=mix)
        rng = np.random.default_rng(VALIDATION_SEED)
        scenes = [sampler.scene(VALIDATION_SEED, index) for index in range(count)]
        return scenes, [self._caption(scene, rng) for scene in scenes]

    def _scenes_read(self, logits: dict[str, Tensor]) -> list[Scene]:
        """Scenes that show what was read: each spot's sticker at its place."""
        middle, sprites = sum(PART_SIZE) / 2, {entry: sprite for sprite, entry in self.entries.items()}
        centres = {"alone": CENTRES[1]}
        for relation in RELATIONS:
            centres |= {spot: (c,) for spot, c in zip(PLACES[relation], CENTRES[relation], strict=True)}
        scenes = []
        for row in range(len(logits["count"])):
            found: dict[str, Any] = {name: logits[name][row].argmax(-1).tolist() for name in logits}
            centres["several"] = CENTRES[min(max(found["count"], 1), 4)]
            size = sum(SIZES[list(SIZES)[found["size"]]]) / 2
            placements = tuple(
                Placement(sprites[entry], x, y, size if spot == "alone" else middle)
                for spot, entry in zip(SPOTS, found["names"], strict=True)
                if entry
                for x, y in centres[spot]
            ) or (Placement(0, 0.5, 0.5, 0.05),)  # nothing was found: a speck shows it
            scenes.append(Scene("single", placements, found["background"], (placements[0].sprite,)))
        return scenes


def _right(logits: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Whether everything about a scene was read rightly, (B,)."""
    right = (logits["names"].argmax(-1) == batch["names"]).all(1)  # (B,)
    for name in QUESTIONS:
        right = right & (logits[name].argmax(-1) == batch[name])
    return right
