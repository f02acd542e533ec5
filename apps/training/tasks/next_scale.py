"""Training of `NextScaleTransformer` (and, if it is new, its T5 text encoder) on the tokens of images.

Like `TextToImageTask`, whose data and captions it shares, but images are tokens: the network sees the true image of
all coarser scales and is asked for every token of every scale at once (teacher forcing, arXiv 2404.02905). Stages may
train on the first few scales only: they decide what stands where, and cost a fraction.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from apps.training.config import Section, TaskSection, TrainConfig
from apps.training.data.base import Examples
from apps.training.data.config import Stage
from apps.training.latent_cache import Encode, encode_tokens
from apps.training.next_scale_targets import disturb, teacher_batch, weigh_scales
from apps.training.tasks.text_to_image import TextToImageData, TextToImageTask, captions_of
from apps.training.text_encoder import TextModel, tokenize
from dit.layers.positions import fourier_positions
from dit.layers.scales import token_counts
from dit.models.next_scale import NextScaleTransformer
from sampling.objectives import next_scale_loss

WAVES = 3  # frequencies an axis that the positions of a new network start from


class NextScaleSection(TaskSection):
    """The `[task]` section.

    Attributes:
        caption_dropout: Share of the captions replaced by the empty one.
        text_dropout: Share of the texts replaced by the network's own 'no text', for guidance.
        token_noise: Share of the tokens that the network sees replaced by random ones, so that it learns to go on
            after a mistake; drawn anew for each image, between 0 and this.
        scale_weight: A scale of N tokens weighs N to this power in the loss: 1 is the plain mean over tokens, 0.5 lets
            the few coarse tokens count for more, as Infinity does (arXiv 2412.04431, code).
        guidance_scale, temperature, top_k, top_p: How previews are sampled; exported as the pipeline's defaults.
    """

    kind: Literal["next_scale"]
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    text_dropout: float = Field(default=0.1, ge=0, le=1)
    token_noise: float = Field(default=0.0, ge=0, le=1)
    scale_weight: float = Field(default=0.5, ge=0, le=1)
    guidance_scale: float = Field(default=3.0, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=0.9, ge=0, le=1)


class NextScaleStage(Stage):
    """One part of the curriculum.

    Attributes:
        scales: Train on so many scales, from the coarsest; unset is all of them.
    """

    scales: int | None = Field(default=None, ge=1)


class NextScaleData(TextToImageData):
    """The `[data]` section; `vae` is the folder of a trained multi-scale tokenizer."""

    stages: list[NextScaleStage] = Field(default=[NextScaleStage(until_step=1)], min_length=1)


class NextScaleModel(Section):
    """The `[model]` section; see `NextScaleTransformer`. Scales and codes follow from the tokenizer."""

    num_layers: int = 5
    num_attention_heads: int = 5
    attention_head_dim: int = 32
    ff_ratio: float = 3.0
    shared_modulation: bool = True
    text_pool_heads: int = 5
    positions: Literal["learned", "rotary"] = "learned"
    text: TextModel = TextModel()


class NextScaleConfig(TrainConfig):
    """A whole configuration of this task."""

    task: NextScaleSection
    data: NextScaleData
    model: NextScaleModel = NextScaleModel()

    @model_validator(mode="after")
    def _check(self) -> "NextScaleConfig":
        partial = [stage.scales for stage in self.data.stages if stage.scales is not None]
        if partial and self.model.positions == "rotary":
            raise ValueError(
                f"data.stages train on {partial} scales only, but rotary positions are those of the whole schedule: "
                'use model.positions = "learned", or all scales'
            )
        return self


class NextScaleTask(TextToImageTask):
    """Train a next-scale transformer. See `apps.training.task.Task`."""

    config: NextScaleConfig  # type: ignore[assignment]
    config_class: ClassVar[type[TrainConfig]] = NextScaleConfig
    encode: ClassVar[Encode] = staticmethod(encode_tokens)
    smoke: ClassVar[tuple[str, ...]] = TextToImageTask.smoke[:-1]

    def batch(self, index: int) -> dict[str, Any]:
        """Return tokens of examples, what the network may see of them, and fresh captions."""
        rng, rows, captions = self._draw(index)
        step = self.context.address(self.config.run, index).step
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        batch = self._teach(self.latents[rows].long(), self._stage(step).scales, generator)
        return {**batch, **self._tokenize(captions)}

    def _teach(self, tokens: Tensor, scales: int | None, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Return targets and inputs of the first scales, see `teacher_batch`.

        Args:
            tokens: Of all scales, (B, L) or (B, L, d).
            scales: How many scales to train on; None is all.
            generator: Draws the mistakes in the inputs; None makes none.
        """
        noise = self.config.task.token_noise
        seen = tokens if generator is None else disturb(self.vae, tokens, noise, generator)
        return teacher_batch(self.vae, tokens, seen, self.context.device, scales)

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted cross-entropy over the scales; log the plain one of the first and the last scale."""
        each = self._cross_entropies(batch)  # (B, S)
        ends = each.detach().mean(0)  # (S,)
        return self._weigh(each).mean(), {"first": ends[0], "last": ends[-1]}

    def validate(self) -> dict[str, float]:
        """Return the loss of held-out examples by kind, and the cross-entropy of each scale (nats a token)."""
        values, every = {}, []
        for kind, batch in self._validation.items():
            each = self._cross_entropies({name: one.to(self.context.device) for name, one in batch.items()})  # (B, S)
            values[f"loss_{kind}"] = float(self._weigh(each).mean())
            every.append(each.mean(0))
        scales = {f"scale_{number + 1}": float(value) for number, value in enumerate(torch.stack(every).mean(0))}
        return {"loss": sum(values.values()) / len(values), **values, **scales}

    def _losses(self, batch: dict[str, Any]) -> Tensor:
        """Return the loss of each sample, (B,)."""
        return self._weigh(self._cross_entropies(batch))

    def _cross_entropies(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean cross-entropy of each sample's tokens at each scale, (B, S)."""
        counts, length = token_counts(self.vae.grids), batch["tokens"].shape[1]
        scales = next(number for number in range(1, len(counts) + 1) if sum(counts[:number]) == length)
        states = self.text_encoder(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state  # (B, M, Dt)
        logits = self.transformer(
            batch["inputs"],
            encoder_hidden_states=states,
            encoder_attention_mask=batch["attention_mask"].bool(),
            grids=self.vae.grids[:scales],
        ).sample  # (B, L, V) or (B, L, d, 2)
        return next_scale_loss(logits, batch["tokens"], counts[:scales])

    def _weigh(self, each: Tensor) -> Tensor:
        """Return the weighted mean of the scales' losses (B, S) for each sample, (B,)."""
        return weigh_scales(each, token_counts(self.vae.grids), self.config.task.scale_weight)

    def _validation_batch(self, number: int, examples: Examples) -> dict[str, Tensor]:
        """Return the fixed batch of the held-out examples of kind `number`."""
        captions = captions_of(examples, len(examples))
        batch = self._teach(self.encode(examples, self.vae, self.context.device).long(), None, None)
        return {**batch, **tokenize(self.tokenizer, captions)}

    def _transformer(self) -> NextScaleTransformer:  # type: ignore[override]
        """Return a new transformer, or the one of `init_from`, in float32."""
        start, vae = self.config.data.init_from, self.vae
        if start is not None:
            return NextScaleTransformer.from_pretrained(start / "transformer", torch_dtype=torch.float32)
        if "vocab_size" in vae.config:
            head: dict[str, Any] = {"vocab_size": vae.config.vocab_size}
        else:
            head = {"bitwise": True, "patchify": vae.config.patchify}
        transformer = NextScaleTransformer(
            scales=tuple(vae.config.scales),
            latent_channels=vae.latent_channels,
            **head,
            text_dim=self.text_encoder.config.d_model,
            text_max_length=self.tokenizer.model_max_length,
            class_dropout_prob=self.config.task.text_dropout,
            **self.config.model.model_dump(exclude={"text"}),
        )
        if transformer.pos_embed is not None:
            _init_positions(transformer)
        return transformer

    def _preview_settings(self) -> dict[str, Any]:
        """Return arguments of the pipeline's call."""
        return self._defaults()

    def _defaults(self) -> dict[str, Any]:
        """Return how the trained pipeline samples tokens."""
        return self.config.task.model_dump(include={"guidance_scale", "temperature", "top_k", "top_p"})

    def _pipeline(self, transformer: Any, text_encoder: Any, vae: Any) -> Any:
        from pipelines.next_scale.text_to_image import NextScaleTextToImagePipeline

        return NextScaleTextToImagePipeline(
            transformer=transformer,
            text_encoder=text_encoder,
            tokenizer=self.tokenizer,
            vae=vae,
            defaults=self._defaults(),
        )


@torch.no_grad()
def _init_positions(transformer: NextScaleTransformer) -> None:
    """Initialize learned positions as random mixtures of waves of the coordinates, which all scales share."""
    waves = torch.cat([fourier_positions(grid, WAVES) for grid in transformer.grids])  # (L, 4 W)
    mix = torch.randn(waves.shape[1], transformer.hidden_size) / waves.shape[1] ** 0.5  # (4 W, D)
    transformer.pos_embed.copy_(waves @ mix * transformer.pos_embed.std() * 2)  # type: ignore[union-attr]
