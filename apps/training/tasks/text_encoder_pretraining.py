"""Pretraining of a small T5 on captions of the sticker world: what stands where, how often, how large, on what colour.

A generator learns from its text encoder's states only what the image's loss rewards at once, and the order of words
is rewarded late. So the encoder is trained first: a small head, thrown away afterwards, predicts the scene from its
states, which is cheap because no image is made. For the shipped model it took five minutes on one core, and relations
were right after 1,000 steps of the generator; one trained together with its encoder had needed 6,500. Everything a
generator needs must then be in the states, and the encoder can be frozen (as those of most text-to-image models are).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from apps.training.config import Section, TaskSection, TrainConfig
from apps.training.data.base import VALIDATION_SEED
from apps.training.data.config import CaptionedData
from apps.training.data.stickers import StickerData, StickerSettings
from apps.training.export import save_component
from apps.training.image_grid import save_grid
from apps.training.scene_labels import all_correct, predicted_scenes, probe_loss, scene_labels
from apps.training.scene_probe import SceneProbe
from apps.training.task import TaskContext
from apps.training.text_encoder import TextModel, caption_tokenizer, load_text_encoder, new_text_encoder, tokenize

PREVIEW_SIDE = 128  # pixels of a scene in the preview


class TextEncoderPretrainingSection(TaskSection):
    """The `[task]` section."""

    kind: Literal["text_encoder_pretraining"]


class TextEncoderPretrainingData(CaptionedData):
    """The `[data]` section; the task needs scenes whose truth is known.

    Attributes:
        init_from: Folder with `text_encoder/` and `tokenizer/` that the run starts from; `[model]` is then not used.
        tokenizer_captions: Captions that the tokenizer is trained on.
        validation_examples: Held-out scenes of each kind.
    """

    kind: Literal["stickers"] = "stickers"
    init_from: Path | None = None
    single: float = Field(default=0.25, ge=0)
    pair: float = Field(default=0.6, ge=0)
    count: float = Field(default=0.15, ge=0)
    tokenizer_captions: int = Field(default=20_000, ge=2)
    validation_examples: int = Field(default=256, ge=1)


class TextEncoderPretrainingModel(Section):
    """The `[model]` section."""

    text: TextModel = TextModel()


class TextEncoderPretrainingConfig(TrainConfig):
    """A whole configuration of this task."""

    task: TextEncoderPretrainingSection
    data: TextEncoderPretrainingData = TextEncoderPretrainingData()
    model: TextEncoderPretrainingModel = TextEncoderPretrainingModel()


class TextEncoderPretrainingTask:
    """Train a text encoder to hold what captions say. See `apps.training.task.Task`."""

    config_class: ClassVar[type[TrainConfig]] = TextEncoderPretrainingConfig
    smoke: ClassVar[tuple[str, ...]] = ("data.tokenizer_captions=200", "data.validation_examples=4")

    def __init__(self, config: TextEncoderPretrainingConfig, context: TaskContext) -> None:
        self.config, self.context = config, context
        data = config.data
        self.data: Any = self._open()
        if data.init_from is not None:
            self.text_encoder, self.tokenizer = load_text_encoder(data.init_from)
        else:
            with context.main_process_first():
                self.tokenizer = caption_tokenizer(
                    config.run.folder / "tokenizer",
                    config.model.text,
                    lambda: self.data.corpus(data.tokenizer_captions, config.run.seed),
                )
            self.text_encoder = new_text_encoder(config.model.text, self.tokenizer)
        self.probe = self._probe(self.text_encoder.config)

    def _open(self) -> Any:
        """Return the data."""
        return StickerData(StickerSettings.of(self.config.data), PREVIEW_SIDE)

    def _probe(self, settings: Any) -> SceneProbe:
        """Return the head, for an encoder with these settings."""
        return SceneProbe(settings.d_model, len(self.data.vocabulary), settings.num_heads)

    def _labels(self, scenes: Sequence[Any]) -> dict[str, Tensor]:
        """Return what the head is to predict of scenes."""
        return scene_labels(list(scenes), self.data.entries)

    def _scenes(self, examples: Any) -> list[Any]:
        """Return the scenes of held-out examples."""
        return list(examples.scenes)

    def modules(self) -> dict[str, nn.Module]:
        """Return the encoder and the head that probes it, under the names that checkpoints have."""
        return {"text_encoder": self.text_encoder, "reader": self.probe}

    def batch(self, index: int) -> dict[str, Any]:
        """Return captions of new scenes, and the labels."""
        rng = self.context.address(self.config.run, index).rng()
        scenes = [self.data.sampler.draw(rng) for _ in range(self.config.run.batch_size)]
        return self._encode(scenes, [self.data.caption(scene, rng) for scene in scenes])

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the cross-entropies of all slots and attributes."""
        logits = self._predict(batch)
        names = F.cross_entropy(logits["names"].flatten(0, 1), batch["names"].flatten())
        values = {"loss_names": names.detach(), "accuracy": all_correct(logits, batch).float().mean()}
        return probe_loss(logits, batch), values

    def validate(self) -> dict[str, float]:
        """Return the share of held-out scenes of which everything is predicted correctly, by kind."""
        values = {}
        for kind, examples in self.data.held_out_groups(self.config.data.validation_examples).items():
            batch, _ = self._held_out_batch(examples)
            values[f"accuracy_{kind}"] = float(all_correct(self._predict(batch), batch).float().mean())
        return values

    def preview(self, path: Path) -> None:
        """Render the predicted scenes: two rows each of pairs, singles and counts; write captions to `prompts.txt`."""
        groups, predicted, lines = self.data.held_out_groups(16), [], []
        for kind in ("pair", "single", "count"):
            batch, captions = self._held_out_batch(groups[kind])
            predicted += predicted_scenes(self._predict(batch), self.data.entries)
            lines += captions
        (path.parent / "prompts.txt").write_text("".join(line + "\n" for line in lines))
        save_grid(self.data.render(predicted), path, 8)

    def export(self, folder: Path) -> None:
        """Write `text_encoder/` and `tokenizer/`; the head is of no further use."""
        save_component(self.text_encoder, folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")

    def _encode(self, scenes: Sequence[Any], captions: list[str]) -> dict[str, Tensor]:
        """Return a batch: tokens, their mask, and what the head is to predict."""
        return {**tokenize(self.tokenizer, captions), **self._labels(scenes)}

    def _predict(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        states = self.text_encoder(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state  # (B, L, D)
        logits = self.probe(states, batch["attention_mask"].bool())
        return {name: tensor.float() for name, tensor in logits.items()}

    def _held_out_batch(self, examples: Any) -> tuple[dict[str, Tensor], list[str]]:
        """Return held-out scenes as a batch on the device, and their captions."""
        rng = np.random.default_rng(VALIDATION_SEED)
        captions = [examples.caption(row, rng) for row in range(len(examples))]
        batch = self._encode(self._scenes(examples), captions)
        return {name: tensor.to(self.context.device) for name, tensor in batch.items()}, captions
