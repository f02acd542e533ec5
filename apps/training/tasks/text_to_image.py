"""Training of `TextDiT` and its T5 text encoder by flow matching.

Images are encoded ahead; each time one is drawn it gets a fresh caption. Of the sticker world, stages say which kinds
of scenes are drawn when, so that single centred stickers can be learned first.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

import diffusers
import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from apps.training.autoencoders import load_autoencoder
from apps.training.config import ConfigError, Section, TaskSection, TrainConfig
from apps.training.data import open_data
from apps.training.data.base import VALIDATION_SEED, Examples
from apps.training.data.config import CaptionedData, Stage
from apps.training.data.low_frequency import LowFrequencyExamples, check_curriculum, side_at
from apps.training.export import half_precision
from apps.training.image_grid import save_grid
from apps.training.latent_cache import Encode, cached_latents, encode_latents
from apps.training.representation_alignment import AlignmentSection, RepresentationAlignment, make_alignment
from apps.training.task import TaskContext
from apps.training.text_encoder import TextModel, caption_tokenizer, load_text_encoder, new_text_encoder, tokenize
from dit.attention.trainable import replacement
from dit.models.text_dit import TextDiT
from dit.tokenizers import as_visual_tokenizer
from sampling.objectives import flow_matching_loss, interpolate, logit_normal_grid, logit_normal_sigmas

PREVIEW_ROWS, PREVIEW_COLUMNS = 4, 8


class FlowSection(TaskSection):
    """What the `[task]` sections of generators that are trained by flow matching share.

    Attributes:
        sigma_mean, sigma_std: Of the logit of the noise levels.
        sigma_shift: Moves the noise levels towards noise if above 1.
        caption_dropout: Share of the captions replaced by the empty one, for guidance.
        scheduler_shift: Shift of the exported scheduler.
        preview_steps, preview_guidance: How previews are sampled; exported as the defaults of the pipeline.
    """

    sigma_mean: float = 0.0
    sigma_std: float = Field(default=1.0, gt=0)
    sigma_shift: float = Field(default=1.0, gt=0)
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    scheduler_shift: float = Field(default=3.0, gt=0)
    preview_steps: int = Field(default=20, ge=1)
    preview_guidance: float = Field(default=4.0, ge=0)


class TextToImageSection(FlowSection):
    """The `[task]` section; see `FlowSection`.

    Attributes:
        alignment: Of hidden tokens with a frozen teacher (REPA); unset is none.
    """

    kind: Literal["text_to_image"]
    alignment: AlignmentSection | None = None


class GeneratorData(Section):
    """What the `[data]` sections of generators share.

    Attributes:
        vae: Folder of the frozen autoencoder; may be left out with `init_from`, whose one is taken then.
        init_from: Pipeline folder whose weights and tokenizer the run starts from; `[model]` is then not used.
        text_from: Folder with `text_encoder/` and `tokenizer/` to use instead of new ones (or of those of
            `init_from`), e.g. the export of a `text_encoder_pretraining` run; the encoder then stays as it is.
        pool_size: Stickers: scenes encoded ahead. Of files, all are.
        stages: The curriculum.
        tokenizer_captions: Captions that the tokenizer is trained on.
        validation_examples: Held-out examples of each kind that the loss is measured on.
    """

    vae: Path | None = None
    init_from: Path | None = None
    text_from: Path | None = None
    pool_size: int = Field(default=60_000, ge=8)
    stages: list[Any] = []
    tokenizer_captions: int = Field(default=20_000, ge=2)
    validation_examples: int = Field(default=128, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "GeneratorData":
        if self.vae is None and self.init_from is None:
            raise ValueError(
                "data.vae is missing: give the folder of a trained autoencoder, e.g. export/vae of its run"
            )
        steps = [stage.until_step for stage in self.stages]
        if steps != sorted(set(steps)):
            raise ValueError(f"data.stages end at steps {steps}: put them in ascending order")
        return self


class TextToImageData(GeneratorData, CaptionedData):
    """The `[data]` section; see `GeneratorData`.

    Attributes:
        resolution: Side of the images in pixels.
    """

    world_fields: ClassVar[frozenset[str]] = CaptionedData.world_fields | {"pool_size"}
    resolution: int = Field(default=128, ge=16)
    single: float = Field(default=0.4, ge=0)
    pair: float = Field(default=0.4, ge=0)
    stages: list[Stage] = Field(default=[Stage(until_step=1)], min_length=1)


class FlowImageData(TextToImageData):
    """The `[data]` section of this task; see `TextToImageData`.

    Attributes:
        curriculum: Pairs of a share of the steps and a side: until then images are so small, see
            `apps.training.data.low_frequency`. The last pair is 1 and the resolution; empty is all of the run.
    """

    curriculum: list[tuple[float, int]] = []

    @model_validator(mode="after")
    def _check_curriculum(self) -> "FlowImageData":
        check_curriculum(self.curriculum, self.resolution)
        return self


class TextToImageModel(Section):
    """The `[model]` section; see `TextDiT`. Channels and sizes follow from the autoencoder and the text encoder.

    Attributes:
        attention: How tokens attend: dense, or a name of `dit.attention.trainable`.
        attention_params: Parameters of the latter.
    """

    patch_size: int = 2
    num_layers: int = 6
    num_attention_heads: int = 4
    attention_head_dim: int = 64
    ff_ratio: float = 8 / 3
    attention: str = "dense"
    attention_params: dict[str, Any] | None = None
    text: TextModel = TextModel()

    @model_validator(mode="after")
    def _check_attention(self) -> "TextToImageModel":
        if self.attention != "dense":
            replacement(self.attention, **(self.attention_params or {}))
        elif self.attention_params:
            raise ValueError("model.attention_params is set, but model.attention is dense: name what takes them")
        return self


class TextToImageConfig(TrainConfig):
    """A whole configuration of this task."""

    task: TextToImageSection
    data: FlowImageData
    model: TextToImageModel = TextToImageModel()


class TextToImageTask:
    """Train a text-to-image diffusion transformer. See `apps.training.task.Task`."""

    config_class: ClassVar[type[TrainConfig]] = TextToImageConfig
    encode: ClassVar[Encode] = staticmethod(encode_latents)
    caption_multiple: ClassVar[int] = 8  # of which the lengths of captions are, where blocks are compiled
    smoke: ClassVar[tuple[str, ...]] = (
        "data.pool_size=64",
        "data.tokenizer_captions=200",
        "data.validation_examples=2",
        "task.preview_steps=1",
    )

    def __init__(self, config: TextToImageConfig, context: TaskContext) -> None:
        self.config, self.context = config, context
        data, run = config.data, config.run
        own = data.vae or (data.init_from and data.init_from / "vae")
        assert own is not None, "the configuration has checked that one of both is there"
        self.vae: Any = load_autoencoder(own).to(context.device)
        self._check_autoencoder()
        with context.main_process_first():  # the first process writes the files that the others read
            self.data = open_data(data, data.resolution, run.folder, quiet=context.rank > 0)
            self.pool = self.data.pool(data.pool_size, data.stages, run.seed)
            self.latents = cached_latents(self.pool, self.vae, context.device, run.output, self.encode)  # (P, ...)
        self.text_encoder, self.tokenizer = self._text()
        self.transformer = self._transformer()
        self.small_latents = self._small_latents()
        self.alignment = self._alignment()
        self._validation = {
            name: self._validation_batch(number, examples)
            for number, (name, examples) in enumerate(self.data.held_out_groups(data.validation_examples).items())
        }

    def _check_autoencoder(self) -> None:
        """Refuse an autoencoder that the task can't use, before anything is encoded."""

    def modules(self) -> dict[str, nn.Module]:
        """Return the transformer and its text encoder, and what is trained beside them."""
        beside = {} if self.alignment is None else {"alignment": self.alignment}
        return {"transformer": self.transformer, "text_encoder": self.text_encoder, **beside}

    def batch(self, index: int) -> dict[str, Any]:
        """Return latents of examples with fresh captions, noise and noise levels."""
        task = self.config.task
        rng, rows, captions = self._draw(index)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        side = self._side(self.context.address(self.config.run, index).step)
        latents = self.small_latents.get(side, self.latents)[rows].float()  # (B, C, h, w)
        return {
            **self._clean_images(rows, side),
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),  # (B, C, h, w)
            "sigmas": logit_normal_sigmas(
                len(latents), task.sigma_mean, task.sigma_std, task.sigma_shift, generator
            ),  # (B,)
            **self._tokenize(captions),
        }

    def _tokenize(self, captions: list[str]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, both (B, L); of few lengths if blocks are compiled for each."""
        return tokenize(self.tokenizer, captions, multiple=self.caption_multiple if self.config.run.compile else 4)

    def _draw(self, index: int) -> tuple[np.random.Generator, Tensor, list[str]]:
        """Draw batch `index`: the generator to go on with, rows of the pool (B,), and a caption for each."""
        address = self.context.address(self.config.run, index)
        rng = address.rng()
        rows = self.pool.draw(address, rng, self._stage(address.step))  # (B,)
        dropped = rng.random(len(rows)) < self.config.task.caption_dropout  # (B,)
        captions = ["" if drop else self.pool.caption(int(row), rng) for row, drop in zip(rows, dropped, strict=True)]
        return rng, torch.from_numpy(rows), captions

    def _stage(self, step: int) -> Any:
        """Return the part of the curriculum that an optimizer step belongs to."""
        stages = self.config.data.stages
        return next((stage for stage in stages if step < stage.until_step), stages[-1])

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean squared error of the velocity, and the alignment with its weight, if there is one."""
        losses = self._losses(batch)  # (B,)
        if self.alignment is None:
            return losses.mean(), {}
        alignment, weight = self.alignment(self.transformer, batch).mean(), self.alignment.section.weight
        return losses.mean() + weight * alignment, {"flow": losses.detach().mean(), "alignment": alignment.detach()}

    def validate(self) -> dict[str, float]:
        """Return the loss of held-out examples, by kind, on fixed noise and evenly spread noise levels."""
        values = {}
        for kind, batch in self._validation.items():
            moved = {name: tensor.to(self.context.device) for name, tensor in batch.items()}
            values[f"loss_{kind}"] = float(self._losses(moved).mean())
        return {"loss": sum(values.values()) / len(values), **values}

    def preview(self, path: Path) -> None:
        """Generate held-out captions, those of the first kind on the most rows; write them to `prompts.txt`."""
        images = self._previewed(path).images  # (B, 3, H, W) in [0, 1]
        save_grid(images.float() * 2 - 1, path, PREVIEW_COLUMNS)

    def _previewed(self, path: Path) -> Any:
        """Generate the prompts of a preview, and write them beside it."""
        pipe = self._pipeline(self.transformer, self.text_encoder, self.vae)
        pipe.set_progress_bar_config(disable=True)
        prompts = self._preview_prompts()
        (path.parent / "prompts.txt").write_text("".join(text + "\n" for text in prompts))
        noise = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        return pipe(prompts, **self._preview_settings(), generator=noise, output_type="pt")

    def _preview_prompts(self) -> list[str]:
        """Return held-out captions for a grid: a row of each kind, and as many rows more of the first."""
        groups = self.data.held_out_groups(PREVIEW_COLUMNS * PREVIEW_ROWS)
        prompts = []
        for number, examples in enumerate(groups.values()):
            rows = 1 if number else PREVIEW_ROWS - len(groups) + 1
            prompts += captions_of(examples, rows * PREVIEW_COLUMNS)
        return prompts

    def _preview_settings(self) -> dict[str, Any]:
        """Return arguments of the pipeline's call."""
        task, side = self.config.task, self.config.data.resolution
        steps = {"num_inference_steps": task.preview_steps, "guidance_scale": task.preview_guidance}
        return {**steps, "height": side, "width": side}

    def export(self, folder: Path) -> None:
        """Write a complete pipeline folder, and the words of the captions beside it."""
        networks = [half_precision(network) for network in (self.transformer, self.text_encoder, self.vae)]
        self._pipeline(*networks).save_pretrained(str(folder), safe_serialization=True)
        self.data.write_vocabulary(folder)

    def _losses(self, batch: dict[str, Any]) -> Tensor:
        """Return the loss of each sample, (B,)."""
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

    def _side(self, step: int) -> int:
        """Return the side of the images of an optimizer step."""
        data = self.config.data
        return side_at(data.curriculum, step, self.config.run.steps, data.resolution)

    def _small_latents(self) -> dict[int, Tensor]:
        """Return the latents of the smaller images of the curriculum, (P, C, h, w), by their side.

        Raises:
            ConfigError: The network can't take a side.
        """
        data = self.config.data
        if not isinstance(data, FlowImageData):
            return {}
        step = as_visual_tokenizer(self.vae).spatial_compression_ratio * self.transformer.config.patch_size
        found = {}
        for side in sorted({side for _, side in data.curriculum} - {data.resolution}):
            if side % step:
                raise ConfigError(
                    f"data.curriculum has the side {side}: expected multiples of {step} for these networks"
                )
            with self.context.main_process_first():
                small = LowFrequencyExamples(self.pool, side)
                found[side] = cached_latents(small, self.vae, self.context.device, self.config.run.output, self.encode)
        return found

    def _alignment(self) -> RepresentationAlignment | None:
        """Return the alignment with a teacher, if there is one."""
        section = getattr(self.config.task, "alignment", None)
        if section is None:
            return None
        sides = (*self.small_latents, self.config.data.resolution)
        alignment = make_alignment(section, self.transformer, self.vae, sides, self.context.device)
        return alignment.to(self.context.device)

    def _clean_images(self, rows: Tensor, side: int) -> dict[str, Tensor]:
        """Return `images` (B, 3, H, W) for a teacher that looks at them."""
        if self.alignment is None or not self.alignment.needs_images:
            return {}
        return {"images": LowFrequencyExamples(self.pool, side).images(rows.tolist())}

    def _validation_batch(self, number: int, examples: Examples) -> dict[str, Tensor]:
        """Return the fixed batch of the held-out examples of kind `number`."""
        task = self.config.task
        latents = self.encode(examples, self.vae, self.context.device).float()  # (B, C, h, w)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(number))  # (B, C, h, w)
        sigmas = logit_normal_grid(len(latents), task.sigma_mean, task.sigma_std, task.sigma_shift)  # (B,)
        captions = captions_of(examples, len(examples))
        return {"latents": latents, "noise": noise, "sigmas": sigmas, **tokenize(self.tokenizer, captions)}

    def _text(self) -> tuple[T5EncoderModel, PreTrainedTokenizerBase]:
        """Return the text encoder, frozen if it comes from `text_from`, and its tokenizer."""
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
                lambda: self.data.corpus(data.tokenizer_captions, run.seed),
            )
        return new_text_encoder(text, tokenizer), tokenizer

    def _transformer(self) -> TextDiT:
        """Return a new transformer, or the one of `init_from`, in float32."""
        start = self.config.data.init_from
        if start is not None:
            return TextDiT.from_pretrained(start / "transformer", torch_dtype=torch.float32)
        channels, side = self.latents.shape[1], self.latents.shape[-1]
        size = self.config.model.model_dump(exclude={"text"})
        return TextDiT(in_channels=channels, sample_size=side, text_dim=self.text_encoder.config.d_model, **size)

    def _pipeline(self, transformer: Any, text_encoder: Any, vae: Any) -> Any:
        from pipelines.text_to_image import TextToImagePipeline

        return self._assembled(TextToImagePipeline, transformer, text_encoder, vae)

    def _assembled(self, kind: Any, transformer: Any, text_encoder: Any, vae: Any, **defaults: Any) -> Any:
        """Return a pipeline of flow matching of a class, with the defaults of previews and further ones."""
        task = self.config.task
        return kind(
            transformer=transformer,
            text_encoder=text_encoder,
            tokenizer=self.tokenizer,
            vae=vae,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=task.scheduler_shift),
            defaults={"num_inference_steps": task.preview_steps, "guidance_scale": task.preview_guidance, **defaults},
        )


def captions_of(examples: Examples, count: int) -> list[str]:
    """Return a caption of each of the first examples, at most `count`; the same at every call."""
    rng = np.random.default_rng(VALIDATION_SEED)
    return [examples.caption(row, rng) for row in range(min(count, len(examples)))]
