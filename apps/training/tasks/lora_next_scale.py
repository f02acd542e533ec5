"""LoRA fine-tuning of pipelines that generate scale by scale, from text or classes.

All but the loss is that of `LoraTask`: images become tokens instead of latents, and the network is asked for every
token of every scale at once, as when it was first trained (`apps.training.tasks.next_scale`).
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from apps.training.config import ConfigError, TrainConfig
from apps.training.data.file_rows import FileRows
from apps.training.next_scale_inputs import NextScaleInputs
from apps.training.next_scale_targets import disturb, teacher_batch, weigh_scales
from apps.training.tasks.lora import LoraTask
from apps.training.tasks.lora_config import AdapterConfig, AdapterSection
from dit.layers.scales import token_counts
from pipelines.info.inspection import info_of
from sampling.objectives import next_scale_loss


class LoraNextScaleSection(AdapterSection):
    """The `[task]` section; see `AdapterSection`. Previews have as many steps as there are scales.

    `model.options` are arguments of the calls that make previews and class images; `max_sequence_length` also says how
    much of a caption is trained on.

    Attributes:
        scale_weight: A scale of N tokens weighs N to this power in the loss, see `NextScaleSection`.
        token_noise: Share of the tokens that the network sees replaced by random ones, see `NextScaleSection`.
    """

    kind: Literal["lora_next_scale"]
    scale_weight: float = Field(default=0.5, ge=0, le=1)
    token_noise: float = Field(default=0.0, ge=0, le=1)


class LoraNextScaleConfig(AdapterConfig):
    """A whole configuration of fine-tuning a next-scale model."""

    task: LoraNextScaleSection


class LoraNextScaleTask(LoraTask):
    """Train adapters on images for a next-scale model. See `apps.training.task.Task`."""

    config: LoraNextScaleConfig  # type: ignore[assignment]
    config_class: ClassVar[type[TrainConfig]] = LoraNextScaleConfig
    smoke: ClassVar[tuple[str, ...]] = ("task.validation_examples=2", "task.preview_images=2")
    inputs: NextScaleInputs

    def make_inputs(self, cache: Path) -> NextScaleInputs:
        """Return what the network is shown.

        Raises:
            ConfigError: The pipeline generates in another way, or a setting that would do nothing is given.
        """
        model, task = self.config.model, self.config.task
        if not hasattr(self.pipe, "vae") or not hasattr(self.pipe.vae, "teacher_inputs"):
            raise ConfigError(
                f"model.pretrained = {model.pretrained!r} doesn't generate scale by scale: use task.kind = 'lora'"
            )
        unused = {
            "model.network": model.network != "transformer",
            "model.guidance": model.guidance is not None,
            "task.preview_steps": task.preview_steps is not None,
        }
        given = [name for name, is_given in unused.items() if is_given]
        if given:
            raise ConfigError(f"{', '.join(given)} does nothing for models that generate scale by scale: remove it")
        foreign = sorted(set(model.options) - info_of(self.pipe).parameters)
        if foreign:
            raise ConfigError(
                f"model.options: {', '.join(foreign)} are no arguments of {type(self.pipe).__name__}, which takes "
                f"{', '.join(sorted(info_of(self.pipe).parameters))}: remove them"
            )
        return NextScaleInputs(self.pipe, cache, model.options.get("max_sequence_length"))

    def _drawn(
        self, rows: FileRows, numbers: list[int], captions: list[str], generator: torch.Generator
    ) -> dict[str, Any]:
        """Return tokens, what the network may see of them, and the conditions of rows of one bucket."""
        tokens = self.inputs.tokens(rows, numbers)  # (B, L) or (B, L, d)
        seen = disturb(self.pipe.vae, tokens, self.config.task.token_noise, generator)
        grids = self.inputs.own_schedule(rows.bucket(numbers[0]))
        batch = teacher_batch(self.pipe.vae, tokens, seen, self.context.device, grids=grids)
        return {**batch, "conditions": self.inputs.conditions(captions)}

    def _fixed(self, rows: FileRows, number: int, caption: str) -> dict[str, Any]:
        """Return a row without mistakes in what is seen."""
        tokens = self.inputs.tokens(rows, [number])  # (1, L) or (1, L, d)
        grids = self.inputs.own_schedule(rows.bucket(number))
        batch = teacher_batch(self.pipe.vae, tokens, tokens, self.context.device, grids=grids)
        return {**batch, "conditions": self.inputs.conditions([caption])}

    def _losses(self, group: dict[str, Any]) -> Tensor:
        """Return the weighted cross-entropy of each sample, (B,)."""
        grids = self.inputs.schedule(tuple(group["bucket"]))
        logits = self.network(group["inputs"], **group["conditions"], grids=grids).sample  # (B, L, V or d, ...)
        counts = token_counts(grids)
        return weigh_scales(next_scale_loss(logits, group["tokens"], counts), counts, self.config.task.scale_weight)
