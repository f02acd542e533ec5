"""Teaches a scorer what unfinished images will become, as a reward for searches.

A search judges images of which only the coarse scales are generated: blurs, whose scores say little (TTS-VAR, arXiv
2507.18537, section 3). So a generator samples captions several times, hot enough that its images differ, the scorer as
it was judges the finished ones, and from an image's first scales it learns to say the same: the value of a state in
the sense of reinforcement learning, from rollouts. What counts is how images of one caption compare, as in a search.
Captions are understood already; the text tower rests.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from apps.stickers.captions import caption
from apps.training.config import ConfigError, Section, TaskSection, TrainConfig
from apps.training.export import save_component
from apps.training.near_misses import riddles, solved
from apps.training.rollouts import RolloutPlan, cached_rollouts, hot_everywhere, hot_way
from apps.training.scenes import VALIDATION_SEED, SceneMix, SceneSampler, load_sprites, read_vocabulary, save_grid
from apps.training.task import TaskContext
from apps.training.text_encoder import forget_last_call
from pipelines import NextScaleTextToImagePipeline, load_pipeline
from pipelines.next_scale.text_to_image import DEFAULTS
from sampling.rewards import ClipReward, unit_vectors

MIN_SCALES = 3  # generated at least; of fewer nothing can be said


class ForesightSection(TaskSection):
    """The `[task]` section.

    Attributes:
        likeness: Weight of a second loss: the whole vector should be that of the finished image, so that captions
            which were not generated are told apart as before. Too much of it takes the place of what searches ask.
    """

    kind: Literal["foresight"]
    likeness: float = Field(default=0.25, ge=0)


class ForesightData(Section):
    """The `[data]` section.

    Attributes:
        scorer: Folder of the CLIP-like model that the run starts from, which also judges what is finished.
        painter: The generator: name of a built-in model, or folder, of a next-scale text pipeline.
        captions: How many are generated before the training.
        candidates: Images of each.
        temperatures: Of the coarse scales, drawn unguided; captions take turns.
        hot_everywhere: Share of the captions of which all scales are drawn hot.
        vocabulary: `starter`, `all`, or a text file with one sticker name a line.
        single, pair, count: Relative frequencies of the kinds of scenes.
        size_words: Share of the single stickers drawn small or large.
        synonyms: Probability that a caption calls a sticker by one of its keywords.
        validation_captions: Further captions, generated with the first of the temperatures.
    """

    scorer: Path
    painter: str = "stickers-var"
    captions: int = Field(default=1400, ge=2)
    candidates: int = Field(default=8, ge=2)
    temperatures: list[float] = Field(default=[2.0, 1.5, 2.5], min_length=1)
    hot_everywhere: float = Field(default=0.33, ge=0, le=1)
    vocabulary: str = "starter"
    single: float = Field(default=0.2, ge=0)
    pair: float = Field(default=0.65, ge=0)
    count: float = Field(default=0.15, ge=0)
    size_words: float = Field(default=0.4, ge=0, le=1)
    synonyms: float = Field(default=0.1, ge=0, le=1)
    validation_captions: int = Field(default=64, ge=2)


class ForesightConfig(TrainConfig):
    """A whole configuration of this task; `run.batch_size` counts captions."""

    task: ForesightSection
    data: ForesightData


class ForesightTask:
    """Learns where coarse images lead. See `apps.training.task.Task`."""

    config_class: ClassVar[type[TrainConfig]] = ForesightConfig
    smoke: ClassVar[tuple[str, ...]] = ("data.captions=4", "data.candidates=2", "data.validation_captions=2")

    def __init__(self, config: ForesightConfig, context: TaskContext) -> None:
        self.config, self.context = config, context
        if not (config.data.scorer / "config.json").is_file():
            raise ConfigError(
                f"data.scorer = {str(config.data.scorer)!r} holds no model; train one first (stickers_clip.toml) or "
                "give the folder of a CLIP-like one, such as pipelines/pretrained/stickers-var-scorer"
            )
        self.judge = ClipReward(config.data.scorer, context.device)
        pipe: Any = load_pipeline(config.data.painter, device=context.device)
        if not isinstance(pipe, NextScaleTextToImagePipeline):
            raise ConfigError(
                f"data.painter = {config.data.painter!r} is a {type(pipe).__name__}; this task needs a next-scale "
                "pipeline for texts, such as stickers-var"
            )
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe
        self.scales = len(pipe.transformer.grids)
        self.least = min(MIN_SCALES, self.scales)
        data = config.data
        captions, held_out = (
            self._captions(count, seed)
            for count, seed in ((data.captions, config.run.seed), (data.validation_captions, VALIDATION_SEED))
        )
        validated = (hot_way(self.scales, data.temperatures[0], self._defaults()),) * len(held_out)
        plans = (
            RolloutPlan(captions, self._ways(len(captions)), data.candidates, config.run.seed),
            RolloutPlan(held_out, validated, data.candidates, config.run.seed + 1),
        )
        with context.main_process_first():
            self.rollouts, self.held_out = (
                cached_rollouts(pipe, plan, self.judge, config.run.output) for plan in plans
            )
        side = pipe.transformer.grids[-1][0] * pipe.vae_scale_factor
        words = read_vocabulary(data.vocabulary)
        self.riddles = riddles(load_sprites(), words, data.size_words, data.synonyms, data.validation_captions, side)
        self.texts = self._read(captions)  # (P, F)
        self.held_out_texts = self._read(held_out)
        self.clip: Any = copy.deepcopy(self.judge.model).float()  # the judge may compute in half precision
        self.clip.requires_grad_(False)
        self.clip.vision_model.requires_grad_(True)

    def modules(self) -> dict[str, nn.Module]:
        """The scorer, of which the tower of images learns."""
        return {"clip": self.clip}

    @torch.no_grad()
    def batch(self, index: int) -> dict[str, Any]:
        """Images of a few captions, each caption's generated up to a scale of its own, and what became of them."""
        run, rollouts = self.config.run, self.rollouts
        rng = np.random.default_rng((run.seed, index, self.context.rank))
        rows = torch.from_numpy(rng.choice(len(rollouts.vectors), run.batch_size))  # (B,)
        scales = torch.from_numpy(rng.integers(self.least - 1, self.scales, run.batch_size))  # (B,)
        return {
            "pixel_values": self._show(rollouts.latents[rows, :, scales]),  # (B, C, 3, h, w)
            "texts": self.texts[rows],
            "vectors": rollouts.vectors[rows],
        }

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the candidates' scores about their mean, in units of the reward; and of their vectors."""
        vectors, texts = self._look(batch["pixel_values"]), batch["texts"]
        scores, rewards = fit(vectors, texts), fit(batch["vectors"], texts)  # (B, C)
        error = ((centred(scores) - centred(rewards)) / self.judge.unit).square().mean()
        unlike = 1 - (vectors * batch["vectors"]).sum(-1).mean()
        best = (scores.argmax(1) == rewards.argmax(1)).float().mean()
        values = {"error": error.detach(), "unlike": unlike.detach(), "best_found": best}
        return error + self.config.task.likeness * unlike, values

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """How well scores of coarse images order what became of them, for each number of scales.

        `foresight_K` is the mean correlation, over captions, of scores after K scales with the rewards in the end;
        `error_K` is the loss there. What else a scorer must know is asked too, see `apps.training.near_misses`.
        """
        texts, became = self.held_out_texts, centred(fit(self.held_out.vectors, self.held_out_texts))  # (P, C)
        values = {}
        for scale in range(self.least - 1, self.scales):
            seen = [self._look(self._show(some[:, :, scale])).cpu() for some in self.held_out.latents.split(16)]
            told = centred(fit(torch.cat(seen), texts))  # (P, C)
            values[f"foresight_{scale + 1}"] = float(F.cosine_similarity(told, became).mean())
            values[f"error_{scale + 1}"] = float(((told - became) / self.judge.unit).square().mean())
        for kind, riddle in self.riddles.items():
            pixels = self.judge.pixels(riddle.pictures / 2 + 0.5)[None]  # (1, S, 3, h, w)
            scores = self._look(pixels)[0].cpu() @ self._read(riddle.captions).T  # (S, S + M S)
            values |= {f"{name}_{kind}": share for name, share in solved(scores).items()}
        return values

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        """Shows the candidates of a held-out caption after each number of scales, a row each."""
        rows = [self._decode(self.held_out.latents[0, :, scale]) for scale in range(self.least - 1, self.scales)]
        save_grid(torch.cat(rows) * 2 - 1, path, self.config.data.candidates)

    def export(self, folder: Path) -> None:
        """Writes the model with its tokenizer and image processor, as transformers' Auto classes load it."""
        save_component(self.clip, folder)
        forget_last_call(self.judge.tokenizer)
        self.judge.tokenizer.save_pretrained(folder)
        self.judge.processor.save_pretrained(folder)

    def _captions(self, count: int, seed: int) -> tuple[str, ...]:
        data, sheet = self.config.data, load_sprites()
        vocabulary = read_vocabulary(data.vocabulary)
        mix = SceneMix(single=data.single, pair=data.pair, count=data.count, size_words=data.size_words)
        sampler, rng = SceneSampler(sheet, vocabulary, mix=mix), np.random.default_rng((seed, VALIDATION_SEED))
        scenes = (sampler.scene(seed, index) for index in range(count))
        return tuple(caption(one, sheet, rng, synonyms=data.synonyms, vocabulary=vocabulary) for one in scenes)

    def _ways(self, count: int) -> tuple[dict[str, Any], ...]:
        """How each caption is generated: a share hot everywhere, the others hot in the coarse scales."""
        data, everywhere = self.config.data, round(self.config.data.hot_everywhere * count)
        temperatures = (data.temperatures[index % len(data.temperatures)] for index in range(count - everywhere))
        return (
            *((hot_everywhere(),) * everywhere),
            *(hot_way(self.scales, temperature, self._defaults()) for temperature in temperatures),
        )

    def _defaults(self) -> dict[str, Any]:
        settings: Any = self.pipe.config
        return {**DEFAULTS, **settings.defaults}

    @torch.no_grad()
    def _read(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors of captions, (P, F)."""
        parts = (list(captions[start : start + 64]) for start in range(0, len(captions), 64))
        return torch.cat([self.judge.read(part) for part in parts]).cpu()

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) as images (B, 3, H, W) in [0, 1]."""
        pictures = self.pipe.decode_latents(latents.to(self.context.device, torch.float32))
        return pictures.clamp(-1, 1) / 2 + 0.5

    def _show(self, latents: Tensor) -> Tensor:
        """Latents (B, C, c, h, w) as the scorer sees their images, (B, C, 3, h, w)."""
        return self.judge.pixels(self._decode(latents.flatten(0, 1))).unflatten(0, latents.shape[:2])

    def _look(self, pixels: Tensor) -> Tensor:
        """Unit vectors (B, C, F) of images as the scorer sees them, (B, C, 3, h, w)."""
        shown = pixels.flatten(0, 1).to(self.context.device)
        return unit_vectors(self.clip.get_image_features(pixel_values=shown)).unflatten(0, pixels.shape[:2])


def fit(vectors: Tensor, texts: Tensor) -> Tensor:
    """How well images, unit vectors (B, C, F), fit their captions, (B, F): cosine similarities (B, C)."""
    return (vectors * texts[:, None]).sum(-1)


def centred(values: Tensor) -> Tensor:
    """Values (B, C) less the mean of each row."""
    return values - values.mean(1, keepdim=True)
