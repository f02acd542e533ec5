"""Pretraining of a small T5 on captions of the moving sticker world; see `text_encoder_pretraining`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from apps.training.clip_labels import ATTRIBUTES, SLOTS, clip_labels, draw_labels
from apps.training.config import TaskSection, TrainConfig
from apps.training.data.config import ClipSection
from apps.training.data.moving_stickers import MovingStickerData, MovingStickerSettings
from apps.training.image_grid import save_grid
from apps.training.scene_probe import SceneProbe
from apps.training.tasks.text_encoder_pretraining import TextEncoderPretrainingModel, TextEncoderPretrainingTask

PREVIEW_SIDE, PREVIEW_CLIPS = 96, 16


class ClipTextPretrainingSection(TaskSection):
    """The `[task]` section."""

    kind: Literal["clip_text_pretraining"]


class ClipTextPretrainingData(ClipSection):
    """The `[data]` section; the task needs clips whose truth is known.

    Attributes:
        init_from: Folder with `text_encoder/` and `tokenizer/` that the run starts from; `[model]` is then not used.
        tokenizer_captions: Captions that the tokenizer is trained on.
        validation_examples: Held-out clips of each kind.
    """

    kind: Literal["moving_stickers"] = "moving_stickers"
    init_from: Path | None = None
    passing: float = Field(default=0.4, ge=0, le=1)
    tokenizer_captions: int = Field(default=20_000, ge=2)
    validation_examples: int = Field(default=256, ge=1)


class ClipTextPretrainingConfig(TrainConfig):
    """A whole configuration of this task."""

    task: ClipTextPretrainingSection
    data: ClipTextPretrainingData = ClipTextPretrainingData()
    model: TextEncoderPretrainingModel = TextEncoderPretrainingModel()


class ClipTextPretrainingTask(TextEncoderPretrainingTask):
    """Train a text encoder to hold what captions of clips say. See `apps.training.task.Task`."""

    config: ClipTextPretrainingConfig  # type: ignore[assignment]
    config_class: ClassVar[type[TrainConfig]] = ClipTextPretrainingConfig

    def _open(self) -> Any:
        """Return the data."""
        data = MovingStickerData(MovingStickerSettings.of(self.config.data), PREVIEW_SIDE)
        self.entries = {data.sheet.index(name): entry for entry, name in enumerate(data.vocabulary, 1)}
        return data

    def _probe(self, settings: Any) -> SceneProbe:
        """Return the head, for an encoder with these settings."""
        return SceneProbe(settings.d_model, len(self.entries), settings.num_heads, len(SLOTS), ATTRIBUTES)

    def _labels(self, scenes: Sequence[Any]) -> dict[str, Tensor]:
        """Return what the head is to predict of clips."""
        return clip_labels(scenes, self.entries)

    def _scenes(self, examples: Any) -> list[Any]:
        """Return the scenes of held-out clips."""
        return [excerpt.scene for excerpt in examples.excerpts]

    def preview(self, path: Path) -> None:
        """Draw the first and the last frame of the predicted clips; write captions to `prompts.txt`."""
        drawn, lines = [], []
        for examples in self.data.held_out_groups(PREVIEW_CLIPS).values():
            batch, captions = self._held_out_batch(examples)
            logits = {name: one.cpu() for name, one in self._predict(batch).items()}
            drawn += list(draw_labels(logits, self.entries, self.data.sheet, PREVIEW_SIDE))
            lines += captions
        (path.parent / "prompts.txt").write_text("".join(line + "\n" for line in lines))
        frames = [frame for clip in drawn for frame in clip.split(PREVIEW_SIDE, dim=-1)]  # each (3, R, R)
        save_grid(torch.stack(frames), path, 8)
