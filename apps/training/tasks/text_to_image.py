"""Trains `TextDiT` and its T5 text encoder to generate captions of the sticker world, by flow matching.

Latents of a pool of scenes are encoded ahead; each time a scene is seen it gets a fresh caption. Stages say which
kinds of scenes are seen when, so that single centred stickers can be learned first.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

import diffusers
import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from apps.stickers.captions import caption
from apps.stickers.known_words import known_words
from apps.training.autoencoders import load_autoencoder
from apps.training.config import Section, TaskSection, TrainConfig
from apps.training.export import half_precision
from apps.training.latent_pool import KINDS, Encode, LatentPool, cached_latents, encode_scenes, pool_scenes
from apps.training.scenes import (
    VALIDATION_SEED,
    Scene,
    SceneMix,
    SceneSampler,
    load_sprites,
    read_vocabulary,
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
from dit.models.text_dit import TextDiT
from pipelines.words import write_words
from sampling.objectives import flow_matching_loss, interpolate, logit_normal_grid, logit_normal_sigmas


class TextToImageSection(TaskSection):
    """The `[task]` section.

    Attributes:
        sigma_mean, sigma_std: Of the logit of the noise levels.
        sigma_shift: Moves the noise levels towards noise if above 1.
        caption_dropout: Share of the captions replaced by the empty one, for guidance.
        scheduler_shift: Shift of the exported scheduler.
        preview_steps, preview_guidance: How previews are sampled.
    """

    kind: Literal["text_to_image"]
    sigma_mean: float = 0.0
    sigma_std: float = Field(default=1.0, gt=0)
    sigma_shift: float = Field(default=1.0, gt=0)
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    scheduler_shift: float = Field(default=3.0, gt=0)
    preview_steps: int = Field(default=20, ge=1)
    preview_guidance: float = Field(default=4.0, ge=0)


class Stage(Section):
    """One part of the curriculum.

    Attributes:
        until_step: The optimizer step at which the next stage begins; the last stage goes on for ever.
        single, pair, count: Relative frequencies of the kinds of scenes.
        jitter: Largest jitter of the scenes that are seen.
    """

    until_step: int = Field(ge=1)
    single: float = Field(default=0.5, ge=0)
    pair: float = Field(default=0.3, ge=0)
    count: float = Field(default=0.2, ge=0)
    jitter: float = Field(default=1.0, ge=0, le=1)


class TextToImageData(Section):
    """The `[data]` section.

    Attributes:
        vae: Folder of the frozen autoencoder; may be left out with `init_from`, whose one is taken then.
        init_from: Pipeline folder whose weights and tokenizer the run starts from; `[model]` is then not used.
        text_from: Folder with `text_encoder/` and `tokenizer/` to use instead of new ones (or of those of
            `init_from`), e.g. the export of a `text_reading` run; the encoder then stays as it is.
        resolution: Side of the images in pixels.
        vocabulary: `starter`, `all`, or a text file with one sticker name a line.
        pool_size: Scenes encoded ahead.
        single, pair, count: Relative frequencies of the kinds of scenes in the pool.
        size_words: Share of the single stickers drawn small or large.
        synonyms: Probability that a caption calls a sticker by one of its keywords.
        stages: The curriculum.
        tokenizer_captions: Captions that the tokenizer is trained on.
        validation_scenes: Held-out scenes of each kind that the loss is measured on.
    """

    vae: Path | None = None
    init_from: Path | None = None
    text_from: Path | None = None
    resolution: int = Field(default=128, ge=16)
    vocabulary: str = "starter"
    pool_size: int = Field(default=60_000, ge=8)
    single: float = Field(default=0.4, ge=0)
    pair: float = Field(default=0.4, ge=0)
    count: float = Field(default=0.2, ge=0)
    size_words: float = Field(default=0.4, ge=0, le=1)
    synonyms: float = Field(default=0.15, ge=0, le=1)
    stages: list[Stage] = Field(default=[Stage(until_step=1)], min_length=1)
    tokenizer_captions: int = Field(default=20_000, ge=2)
    validation_scenes: int = Field(default=128, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "TextToImageData":
        if self.vae is None and self.init_from is None:
            raise ValueError(
                "data.vae is missing: give the folder of a trained autoencoder, e.g. export/vae of its run"
            )
        steps = [stage.until_step for stage in self.stages]
        if steps != sorted(set(steps)):
            raise ValueError(f"data.stages end at steps {steps}: put them in ascending order")
        return self


class TextToImageModel(Section):
    """The `[model]` section; see `TextDiT`. Channels and sizes follow from the autoencoder and the text encoder."""

    patch_size: int = 2
    num_layers: int = 6
    num_attention_heads: int = 4
    attention_head_dim: int = 64
    ff_ratio: float = 8 / 3
    text: TextModel = TextModel()


class TextToImageConfig(TrainConfig):
    """A whole configuration of this task."""

    task: TextToImageSection
    data: TextToImageData
    model: TextToImageModel = TextToImageModel()


class TextToImageTask:
    """Learns to generate captions. See `apps.training.task.Task`."""

    config_class: ClassVar[type[TrainConfig]] = TextToImageConfig
    encode: ClassVar[Encode] = staticmethod(encode_scenes)
    smoke: ClassVar[tuple[str, ...]] = (
        "data.pool_size=64",
        "data.tokenizer_captions=200",
        "data.validation_scenes=2",
        "task.preview_steps=1",
    )

    def __init__(self, config: TextToImageConfig, context: TaskContext) -> None:
        self.config, self.context = config, context
        data = config.data
        self.sheet = load_sprites()
        self.vocabulary = read_vocabulary(data.vocabulary)
        self.mix = SceneMix(single=data.single, pair=data.pair, count=data.count, size_words=data.size_words)
        own = data.vae or (data.init_from and data.init_from / "vae")
        assert own is not None, "the configuration has checked that one of both is there"
        self.vae: Any = load_autoencoder(own).to(context.device)
        scenes, levels = pool_scenes(
            self.sheet,
            self.vocabulary,
            self.mix,
            sorted({stage.jitter for stage in data.stages}),
            data.pool_size,
            config.run.seed,
        )
        with context.main_process_first():  # the first process writes the file that the others read
            latents = cached_latents(
                scenes, self.sheet, self.vae, data.resolution, context.device, config.run.output, self.encode
            )
        self.pool = LatentPool(scenes, levels, latents)
        self.text_encoder, self.tokenizer = self._text()
        self.transformer = self._transformer()
        self._validation = [self._validation_batch(number) for number in range(len(KINDS))]

    def modules(self) -> dict[str, nn.Module]:
        """The transformer and its text encoder."""
        return {"transformer": self.transformer, "text_encoder": self.text_encoder}

    def batch(self, index: int) -> dict[str, Any]:
        """Latents of scenes of the present stage with fresh captions, noise and noise levels."""
        task = self.config.task
        rng, rows, captions = self._draw(index)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        latents = self.pool.latents[rows].float()  # (B, C, h, w)
        return {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),  # (B, C, h, w)
            "sigmas": logit_normal_sigmas(
                len(latents), task.sigma_mean, task.sigma_std, task.sigma_shift, generator
            ),  # (B,)
            **tokenize(self.tokenizer, captions),
        }

    def _draw(self, index: int) -> tuple[np.random.Generator, Tensor, list[str]]:
        """Batch `index` as rows of the pool (B,) with a caption each, and the generator to go on with."""
        run = self.config.run
        stage = self._stage(index)
        rng = np.random.default_rng((run.seed, index, self.context.rank))
        rows = self.pool.draw(rng, run.batch_size, (stage.single, stage.pair, stage.count), stage.jitter)  # (B,)
        dropped = rng.random(run.batch_size) < self.config.task.caption_dropout  # (B,)
        captions = [
            "" if drop else self._caption(self.pool.scenes[row], rng) for row, drop in zip(rows, dropped, strict=True)
        ]
        return rng, torch.from_numpy(rows), captions

    def _stage(self, index: int) -> Any:
        """The part of the curriculum that batch `index` belongs to."""
        step, stages = index // self.config.run.gradient_accumulation_steps, self.config.data.stages
        return next((stage for stage in stages if step < stage.until_step), stages[-1])

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the velocity."""
        return self._losses(batch).mean(), {}

    def validate(self) -> dict[str, float]:
        """The loss of held-out scenes, by kind, on fixed noise and evenly spread noise levels."""
        values = {}
        for kind, batch in zip(KINDS, self._validation, strict=True):
            moved = {name: tensor.to(self.context.device) for name, tensor in batch.items()}
            values[f"loss_{kind}"] = float(self._losses(moved).mean())
        return {"loss": sum(values.values()) / len(values), **values}

    def preview(self, path: Path) -> None:
        """Generates held-out scenes: two rows of singles, one of pairs, one of counts; prompts in `prompts.txt`."""
        pipe = self._pipeline(self.transformer, self.text_encoder, self.vae)
        pipe.set_progress_bar_config(disable=True)
        counts = zip(KINDS, (16, 8, 8), strict=True)
        prompts = [text for kind, count in counts for text in self._validation_captions(kind, count)]
        (path.parent / "prompts.txt").write_text("".join(text + "\n" for text in prompts))
        pictures = pipe(
            prompts,
            **self._preview_settings(),
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
            output_type="pt",
        ).images  # (B, 3, H, W) in [0, 1]
        save_grid(pictures.float() * 2 - 1, path, 8)

    def _preview_settings(self) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        task, side = self.config.task, self.config.data.resolution
        steps = {"num_inference_steps": task.preview_steps, "guidance_scale": task.preview_guidance}
        return {**steps, "height": side, "width": side}

    def export(self, folder: Path) -> None:
        """Writes a complete pipeline folder, the stickers it has learned as `vocabulary.txt`, and all their words."""
        networks = [half_precision(network) for network in (self.transformer, self.text_encoder, self.vae)]
        self._pipeline(*networks).save_pretrained(str(folder), safe_serialization=True)
        (folder / "vocabulary.txt").write_text("".join(name + "\n" for name in self.vocabulary))
        write_words(known_words(self.sheet, self.vocabulary), folder)

    def _losses(self, batch: dict[str, Any]) -> Tensor:
        """Loss of each sample, (B,)."""
        states = self.text_encoder(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state  # (B, L, Dt)
        predicted = self.transformer(
            interpolate(batch["latents"], batch["noise"], batch["sigmas"]),
            encoder_hidden_states=states,
            timestep=1000 * batch["sigmas"],
            encoder_attention_mask=batch["attention_mask"].bool(),
        ).sample  # (B, C, h, w)
        return flow_matching_loss(predicted, batch["latents"], batch["noise"])

    def _caption(self, scene: Scene, rng: np.random.Generator) -> str:
        return caption(scene, self.sheet, rng, synonyms=self.config.data.synonyms, vocabulary=self.vocabulary)

    def _held_out_scenes(self, kind: str, count: int) -> list[Scene]:
        mix = SceneMix(**{name: float(name == kind) for name in KINDS}, size_words=self.mix.size_words)
        sampler = SceneSampler(self.sheet, self.vocabulary, split="heldout_combination", mix=mix)
        return [sampler.scene(VALIDATION_SEED, index) for index in range(count)]

    def _validation_captions(self, kind: str, count: int) -> list[str]:
        rng = np.random.default_rng(VALIDATION_SEED)
        return [self._caption(scene, rng) for scene in self._held_out_scenes(kind, count)]

    def _validation_batch(self, number: int) -> dict[str, Tensor]:
        """The fixed batch of kind `number`."""
        data, task = self.config.data, self.config.task
        latents = self._held_out_latents(number).float()  # (B, C, h, w)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(number))  # (B, C, h, w)
        sigmas = logit_normal_grid(len(latents), task.sigma_mean, task.sigma_std, task.sigma_shift)  # (B,)
        captions = self._validation_captions(KINDS[number], data.validation_scenes)
        return {"latents": latents, "noise": noise, "sigmas": sigmas, **tokenize(self.tokenizer, captions)}

    def _held_out_latents(self, number: int) -> Tensor:
        """The validation scenes of kind `number`, encoded as those of the pool."""
        scenes = self._held_out_scenes(KINDS[number], self.config.data.validation_scenes)
        return self.encode(scenes, self.sheet, self.vae, self.config.data.resolution, self.context.device)

    def _text(self) -> tuple[T5EncoderModel, PreTrainedTokenizerBase]:
        """The text encoder, frozen if it comes from `text_from`, and its tokenizer."""
        data, run, text = self.config.data, self.config.run, self.config.model.text
        if data.text_from is not None:
            encoder, tokenizer = load_text_encoder(data.text_from)
            return encoder.requires_grad_(False), tokenizer
        if data.init_from is not None:
            return load_text_encoder(data.init_from)
        with self.context.main_process_first():  # the first process writes the files that the others read
            tokenizer = caption_tokenizer(
                run.folder / "tokenizer",
                text,
                lambda: caption_corpus(self.vocabulary, self.mix, data.tokenizer_captions, run.seed),
            )
        return new_text_encoder(text, tokenizer), tokenizer

    def _transformer(self) -> TextDiT:
        """A new transformer, or the one of `init_from`, in float32."""
        start = self.config.data.init_from
        if start is not None:
            return TextDiT.from_pretrained(start / "transformer", torch_dtype=torch.float32)
        channels, side = self.pool.latents.shape[1], self.pool.latents.shape[-1]
        size = self.config.model.model_dump(exclude={"text"})
        return TextDiT(in_channels=channels, sample_size=side, text_dim=self.text_encoder.config.d_model, **size)

    def _pipeline(self, transformer: Any, text_encoder: Any, vae: Any) -> Any:
        from pipelines.text_to_image import TextToImagePipeline

        return TextToImagePipeline(
            transformer=transformer,
            text_encoder=text_encoder,
            tokenizer=self.tokenizer,
            vae=vae,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=self.config.task.scheduler_shift),
        )
