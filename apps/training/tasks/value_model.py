"""Training of a scorer that predicts from unfinished images what they will become, as a reward for searches.

A search judges images of which only the coarse scales are generated: blurs, whose scores say little (TTS-VAR, arXiv
2507.18537, section 3). So a generator samples each caption several times, with a temperature at which its images
differ; the scorer as it was scores the finished ones; and from an image's first scales it learns to predict that
score. In terms of reinforcement learning this is the value of a state, learned from rollouts. What counts is how images
of one caption compare, as in a search. Only the image tower is trained: captions are understood already.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from apps.training.config import ConfigError, TaskSection, TrainConfig
from apps.training.data import open_data
from apps.training.data.base import VALIDATION_SEED
from apps.training.data.config import CaptionedData
from apps.training.data.stickers import StickerData
from apps.training.export import save_component
from apps.training.hard_negatives import hard_negative_sets, retrieval_accuracy
from apps.training.image_grid import save_grid
from apps.training.rollouts import RolloutPlan, cached_rollouts, hot_all_scales, hot_coarse_scales
from apps.training.task import TaskContext
from apps.training.text_encoder import forget_last_call
from pipelines import NextScaleTextToImagePipeline, load_pipeline
from pipelines.next_scale.text_to_image import DEFAULTS
from sampling.rewards import ClipReward, unit_vectors

MIN_SCALES = 3  # generated at least; fewer tell nothing


class ValueModelSection(TaskSection):
    """The `[task]` section.

    Attributes:
        embedding_weight: Weight of a second loss: the whole embedding should be that of the finished image, so that
            captions which were not generated are told apart as before. Too much of it displaces the first loss.
    """

    renamed: ClassVar[dict[str, str]] = {"likeness": "embedding_weight"}
    kind: Literal["value_model"]
    embedding_weight: float = Field(default=0.25, ge=0)


class ValueModelData(CaptionedData):
    """The `[data]` section; of folders and files only the captions are used.

    Attributes:
        scorer: Folder of the CLIP-like model that the run starts from, which also scores the finished images.
        generator: Name of a built-in model, or folder, of a next-scale text pipeline.
        captions: How many are generated before the training.
        candidates: Images of each.
        temperatures: Of the coarse scales, sampled without guidance; captions take turns.
        hot_fraction: Share of the captions of which all scales are sampled at a high temperature.
        validation_captions: Further captions, generated with the first of the temperatures.
    """

    renamed: ClassVar[dict[str, str]] = CaptionedData.renamed | {
        "painter": "generator",
        "hot_everywhere": "hot_fraction",
    }
    scorer: Path
    generator: str = "stickers-var"
    captions: int = Field(default=1400, ge=2)
    candidates: int = Field(default=8, ge=2)
    temperatures: list[float] = Field(default=[2.0, 1.5, 2.5], min_length=1)
    hot_fraction: float = Field(default=0.33, ge=0, le=1)
    single: float = Field(default=0.2, ge=0)
    pair: float = Field(default=0.65, ge=0)
    count: float = Field(default=0.15, ge=0)
    synonyms: float = Field(default=0.1, ge=0, le=1)
    validation_captions: int = Field(default=64, ge=2)


class ValueModelConfig(TrainConfig):
    """A whole configuration of this task; `run.batch_size` counts captions."""

    task: ValueModelSection
    data: ValueModelData


class ValueModelTask:
    """Train a scorer of unfinished images. See `apps.training.task.Task`."""

    config_class: ClassVar[type[TrainConfig]] = ValueModelConfig
    smoke: ClassVar[tuple[str, ...]] = ("data.captions=4", "data.candidates=2", "data.validation_captions=2")

    def __init__(self, config: ValueModelConfig, context: TaskContext) -> None:
        self.config, self.context = config, context
        data, run = config.data, config.run
        if not (data.scorer / "config.json").is_file():
            raise ConfigError(
                f"data.scorer = {str(data.scorer)!r} holds no model; train one first (stickers_clip.toml) or "
                "give the folder of a CLIP-like one, such as pipelines/pretrained/stickers-var-scorer"
            )
        self.scorer = ClipReward(data.scorer, context.device)
        self.pipe = self._generator()
        self.scales = len(self.pipe.transformer.grids)
        self.min_scales = min(MIN_SCALES, self.scales)
        side = self.pipe.transformer.grids[-1][0] * self.pipe.vae_scale_factor
        with context.main_process_first():  # the first process writes the files that the others read
            self.data = open_data(data, side, run.folder, quiet=context.rank > 0)
            captions = self.data.captions(data.captions, run.seed)
            held_out = self.data.captions(data.validation_captions, VALIDATION_SEED)
            validated = (hot_coarse_scales(self.scales, data.temperatures[0], self._defaults()),) * len(held_out)
            plans = (
                RolloutPlan(captions, self._settings(len(captions)), data.candidates, run.seed),
                RolloutPlan(held_out, validated, data.candidates, run.seed + 1),
            )
            self.rollouts, self.held_out = (cached_rollouts(self.pipe, plan, self.scorer, run.output) for plan in plans)
        self.hard_negatives = {}
        if isinstance(self.data, StickerData):  # hard negatives need scenes whose truth is known
            self.hard_negatives = hard_negative_sets(self.data, data.validation_captions)
        self.texts = self._embed(captions)  # (P, F)
        self.held_out_texts = self._embed(held_out)
        self.clip: Any = copy.deepcopy(self.scorer.model).float()  # the scorer may compute in half precision
        self.clip.requires_grad_(False)
        self.clip.vision_model.requires_grad_(True)

    def _generator(self) -> Any:
        """Load the pipeline whose images are scored.

        Raises:
            ConfigError: If it does not generate scale by scale from texts.
        """
        name = self.config.data.generator
        pipe: Any = load_pipeline(name, device=self.context.device)
        if not isinstance(pipe, NextScaleTextToImagePipeline):
            raise ConfigError(
                f"data.generator = {name!r} is a {type(pipe).__name__}; this task needs a next-scale pipeline for "
                "texts, such as stickers-var"
            )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def modules(self) -> dict[str, nn.Module]:
        """Return the scorer, whose image tower is trained."""
        return {"clip": self.clip}

    @torch.no_grad()
    def batch(self, index: int) -> dict[str, Any]:
        """Return images of a few captions, each caption's up to a scale of its own, and embeddings of the finished."""
        run, rollouts = self.config.run, self.rollouts
        rng = self.context.address(run, index).rng()
        rows = torch.from_numpy(rng.choice(len(rollouts.vectors), run.batch_size))  # (B,)
        scales = torch.from_numpy(rng.integers(self.min_scales - 1, self.scales, run.batch_size))  # (B,)
        return {
            "pixel_values": self._pixels(rollouts.latents[rows, :, scales]),  # (B, C, 3, h, w)
            "texts": self.texts[rows],
            "vectors": rollouts.vectors[rows],
        }

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the squared error of the candidates' centred scores, in units of the reward, and the embeddings'."""
        vectors, texts = self._embed_images(batch["pixel_values"]), batch["texts"]
        scores, rewards = similarity(vectors, texts), similarity(batch["vectors"], texts)  # (B, C)
        error = ((centred(scores) - centred(rewards)) / self.scorer.unit).square().mean()
        distance = 1 - (vectors * batch["vectors"]).sum(-1).mean()
        best = (scores.argmax(1) == rewards.argmax(1)).float().mean()
        values = {"error": error.detach(), "embedding_distance": distance.detach(), "best_found": best}
        return error + self.config.task.embedding_weight * distance, values

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return how well scores of coarse images rank the finished ones, for each number of scales.

        `correlation_K` is the mean correlation, over captions, of scores after K scales with the rewards in the end;
        `error_K` is the loss there. For the other measures see `apps.training.hard_negatives`.
        """
        texts, final = self.held_out_texts, centred(similarity(self.held_out.vectors, self.held_out_texts))  # (P, C)
        values = {}
        for scale in range(self.min_scales - 1, self.scales):
            seen = [
                self._embed_images(self._pixels(some[:, :, scale])).cpu() for some in self.held_out.latents.split(16)
            ]
            scores = centred(similarity(torch.cat(seen), texts))  # (P, C)
            values[f"correlation_{scale + 1}"] = float(F.cosine_similarity(scores, final).mean())
            values[f"error_{scale + 1}"] = float(((scores - final) / self.scorer.unit).square().mean())
        for kind, each in self.hard_negatives.items():
            pixels = self.scorer.pixels(each.images / 2 + 0.5)[None]  # (1, S, 3, h, w)
            scores = self._embed_images(pixels)[0].cpu() @ self._embed(each.captions).T  # (S, S + M S)
            values |= {f"{name}_{kind}": share for name, share in retrieval_accuracy(scores).items()}
        return values

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        """Write the candidates of a held-out caption after each number of scales, a row each."""
        rows = [self._decode(self.held_out.latents[0, :, scale]) for scale in range(self.min_scales - 1, self.scales)]
        save_grid(torch.cat(rows) * 2 - 1, path, self.config.data.candidates)

    def export(self, folder: Path) -> None:
        """Write the model with its tokenizer and image processor, as transformers' Auto classes load it."""
        save_component(self.clip, folder)
        forget_last_call(self.scorer.tokenizer)
        self.scorer.tokenizer.save_pretrained(folder)
        self.scorer.processor.save_pretrained(folder)

    def _settings(self, count: int) -> tuple[dict[str, Any], ...]:
        """Return how each caption is sampled: a share hot at all scales, the others at the coarse ones."""
        data, everywhere = self.config.data, round(self.config.data.hot_fraction * count)
        temperatures = (data.temperatures[index % len(data.temperatures)] for index in range(count - everywhere))
        return (
            *((hot_all_scales(),) * everywhere),
            *(hot_coarse_scales(self.scales, temperature, self._defaults()) for temperature in temperatures),
        )

    def _defaults(self) -> dict[str, Any]:
        settings: Any = self.pipe.config
        return {**DEFAULTS, **settings.defaults}

    @torch.no_grad()
    def _embed(self, captions: Sequence[str]) -> Tensor:
        """Return unit vectors of captions, (P, F)."""
        parts = (list(captions[start : start + 64]) for start in range(0, len(captions), 64))
        return torch.cat([self.scorer.read(part) for part in parts]).cpu()

    def _decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, c, h, w) to images (B, 3, H, W) in [0, 1]."""
        images = self.pipe.decode_latents(latents.to(self.context.device, torch.float32))
        return images.clamp(-1, 1) / 2 + 0.5

    def _pixels(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, c, h, w) to the inputs of the scorer, (B, C, 3, h, w)."""
        return self.scorer.pixels(self._decode(latents.flatten(0, 1))).unflatten(0, latents.shape[:2])

    def _embed_images(self, pixels: Tensor) -> Tensor:
        """Return unit vectors (B, C, F) of inputs of the scorer, (B, C, 3, h, w)."""
        shown = pixels.flatten(0, 1).to(self.context.device)
        return unit_vectors(self.clip.get_image_features(pixel_values=shown)).unflatten(0, pixels.shape[:2])


def similarity(vectors: Tensor, texts: Tensor) -> Tensor:
    """Return cosine similarities (B, C) of images, unit vectors (B, C, F), and their captions, (B, F)."""
    return (vectors * texts[:, None]).sum(-1)


def centred(values: Tensor) -> Tensor:
    """Return values (B, C) less the mean of each row."""
    return values - values.mean(1, keepdim=True)
