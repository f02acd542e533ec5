"""Training of a small CLIP (arXiv 2103.00020) on images and captions of the sticker world, as a reward for searches.

Each image must find its caption among those of the batch and among hard negatives: captions of scenes that differ from
its own in one thing, such as the opposite relation. Each caption must find its image, also among corrupted ones: those
that lack a sticker or hold tokens of other images. And images may be coarse: a search judges them half generated.

The towers are SigLIP's (arXiv 2303.15343). CLIP's text tower reads forwards only, and learned "a left of b" no better
than by guessing in 2,000 steps: where it reads "a" it cannot know that a relation follows.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import SiglipConfig, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from apps.training.attention_init import init_siglip_attention
from apps.training.autoencoders import load_autoencoder
from apps.training.config import Section, TaskSection, TrainConfig
from apps.training.data.config import CaptionedData
from apps.training.data.stickers import Scene, StickerData, StickerSettings
from apps.training.export import save_component
from apps.training.hard_negatives import drop_object, hard_negative, hard_negative_sets, retrieval_accuracy
from apps.training.image_grid import save_grid
from apps.training.scene_labels import ATTRIBUTES, SLOTS, probe_loss, scene_labels
from apps.training.scene_probe import SceneProbe
from apps.training.task import TaskContext
from apps.training.text_encoder import TextModel, caption_tokenizer, tokenize
from dit.layers.scales import Grid
from dit.tokenizers import MultiScaleVQ

MIN_SCALES = 3  # of a coarse image
TEMPERATURE = 0.07  # of the contrastive loss at the start
PROBE_SCALE = 8.0  # of the unit vectors that the probe sees


class ContrastiveSection(TaskSection):
    """The `[task]` section.

    Attributes:
        hard_negatives: Whether the captions of hard negatives compete too.
        probe_weight: Weight of auxiliary losses: small heads, thrown away afterwards, predict what stands where, how
            often, on what. One predicts it from the embedding of an image and from that of a caption alike, two from
            the states of patches and words below. They reward early what the contrast rewards late: which sticker is
            where.
        text_only_steps: Steps at the start in which only captions are seen: they cost a fraction of those with images,
            and images then find captions that are understood. Needs the auxiliary losses.
    """

    renamed: ClassVar[dict[str, str]] = {
        "near_misses": "hard_negatives",
        "reading_weight": "probe_weight",
        "reading_first": "text_only_steps",
    }
    kind: Literal["contrastive"]
    hard_negatives: bool = True
    probe_weight: float = Field(default=0.5, ge=0)
    text_only_steps: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.text_only_steps and not self.probe_weight:
            raise ValueError(
                f"task.text_only_steps is {self.text_only_steps}, so task.probe_weight must be more than 0"
            )
        return self


class ContrastiveData(CaptionedData):
    """The `[data]` section; the task needs scenes whose truth is known.

    Attributes:
        tokenizer: Folder of the tokenizer of captions; unset trains one.
        vae: Folder of a multi-scale tokenizer; some images are then decoded from its first few scales.
        coarse_fraction: Share of these images.
        corrupted_fraction: Share of the images that are shown corrupted too.
        resolution: Side of the images in pixels.
        tokenizer_captions: Captions that a new tokenizer is trained on.
        validation_examples: Held-out scenes of each kind.
    """

    renamed: ClassVar[dict[str, str]] = CaptionedData.renamed | {
        "half_painted": "coarse_fraction",
        "botched": "corrupted_fraction",
    }
    kind: Literal["stickers"] = "stickers"
    tokenizer: Path | None = None
    vae: Path | None = None
    coarse_fraction: float = Field(default=0.5, ge=0, le=1)
    corrupted_fraction: float = Field(default=0.25, ge=0, le=1)
    resolution: int = Field(default=128, ge=16)
    single: float = Field(default=0.35, ge=0)
    pair: float = Field(default=0.45, ge=0)
    tokenizer_captions: int = Field(default=20_000, ge=2)
    validation_examples: int = Field(default=64, ge=1)


class TowerModel(Section):
    """One of the two transformers."""

    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = Field(default=3, ge=1)
    num_attention_heads: int = Field(default=2, ge=1)


class ContrastiveModel(Section):
    """The `[model]` section; see `transformers.SiglipModel`.

    Attributes:
        patch_size: Side of an image's patches in pixels.
        max_length: Tokens of a caption; shorter ones are padded, longer ones cut.
        vision, language: The towers; embeddings have the width of the vision tower.
        text: The tokenizer, if a new one is trained.
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
    """Train a CLIP-like scorer. See `apps.training.task.Task`."""

    config_class: ClassVar[type[TrainConfig]] = ContrastiveConfig
    smoke: ClassVar[tuple[str, ...]] = ("data.tokenizer_captions=200", "data.validation_examples=4")

    def __init__(self, config: ContrastiveConfig, context: TaskContext) -> None:
        self.config, self.context = config, context
        data = config.data
        self.data = StickerData(StickerSettings.of(data), data.resolution)
        self.vae: Any = None if data.vae is None else load_autoencoder(data.vae)
        if self.vae is not None and not isinstance(self.vae, MultiScaleVQ):
            raise ValueError(f"data.vae = {str(data.vae)!r} is no multi-scale tokenizer; unset it or give one")
        with context.main_process_first():
            self.tokenizer = caption_tokenizer(
                data.tokenizer or config.run.folder / "tokenizer",
                config.model.text,
                lambda: self.data.corpus(data.tokenizer_captions, config.run.seed),
            )
        self.tokenizer.model_max_length = config.model.max_length
        self.clip = self._network()
        names = len(self.data.vocabulary)
        language, vision = config.model.language, config.model.vision
        self.word_probe = SceneProbe(language.hidden_size, names, language.num_attention_heads)
        self.patch_probe = SceneProbe(vision.hidden_size, names, vision.num_attention_heads)
        self.embedding_probe = nn.Linear(vision.hidden_size, len(SLOTS) * (1 + names) + sum(ATTRIBUTES.values()))
        self.hard_negatives = hard_negative_sets(self.data, data.validation_examples)

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
        init_siglip_attention(clip)
        return clip

    def modules(self) -> dict[str, nn.Module]:
        """Return the CLIP and the heads of the auxiliary losses, under the names that checkpoints have."""
        if not self.config.task.probe_weight:
            return {"clip": self.clip}
        return {
            "clip": self.clip,
            "reader": self.embedding_probe,
            "reader_of_words": self.word_probe,
            "reader_of_patches": self.patch_probe,
        }

    def batch(self, index: int) -> dict[str, Any]:
        """Return images of new scenes, their captions, captions of hard negatives behind them, and labels."""
        address = self.context.address(self.config.run, index)
        rng = address.rng()
        scenes = self.data.scenes(address)
        negatives = [hard_negative(scene, rng, self.data.sampler) for scene in scenes]
        captioned = [*scenes, *negatives] if self.config.task.hard_negatives else scenes
        labels = {f"label_{name}": one for name, one in scene_labels(captioned, self.data.entries).items()}
        if index < self.config.task.text_only_steps:
            return {**self._captions(captioned, rng), **labels}
        return {"pixel_values": self._images(scenes, rng), **self._captions(captioned, rng), **labels}

    @torch.no_grad()
    def _images(self, scenes: list[Scene], rng: np.random.Generator) -> Tensor:
        """Return images of scenes as a search sees them.

        Args:
            scenes: B scenes.
            rng: Source of the random numbers.

        Returns:
            Images in [-1, 1], the first ones decoded from the first scales of their tokens; behind them corrupted
            images of the very first scenes: a third lacks a sticker, a third has a box and a third single tokens of
            other images; (B + corrupted, 3, H, W).
        """
        data = self.config.data
        images = self.data.render(scenes)  # (B, 3, H, W)
        coarse, wrong = round(data.coarse_fraction * len(images)), round(data.corrupted_fraction * len(images))
        if self.vae is None or not (coarse or wrong):
            return images
        # Encode what is shown coarse or corrupted, and the scenes that lack a sticker, up to some scale.
        grids, encoded = self.vae.grids, max(coarse, wrong)
        scales = int(rng.integers(min(MIN_SCALES, len(grids)), len(grids) + 1))
        lacking = [drop_object(scene, rng) for scene in scenes[: wrong // 3]]
        shown = [images[:encoded], *([self.data.render(lacking)] if lacking else [])]
        codes = self.vae.quantize(torch.cat(shown)).indices[:scales]  # S x (b, N)
        true, lacking_codes = ([one[part] for one in codes] for part in (slice(0, wrong), slice(encoded, None)))
        # Corrupt the tokens, and decode everything together.
        boxes, single = corrupt_box(true, grids, rng), corrupt_tokens(true, rng)
        half = len(lacking) + (wrong - len(lacking)) // 2
        tokens = [
            torch.cat([one[:coarse], without, box[len(lacking) : half], few[half:]])
            for one, without, box, few in zip(codes, lacking_codes, boxes, single, strict=True)
        ]
        decoded = self.vae.decode(self.vae.indices_to_latents(tokens)).sample.clamp(-1, 1)  # (b, 3, H, W)
        return torch.cat([decoded[:coarse], images[coarse:], decoded[coarse:]])

    def _captions(self, scenes: list[Scene], rng: np.random.Generator) -> dict[str, Tensor]:
        """Return `input_ids` of captions of scenes, (B, L)."""
        captions = [self.data.caption(scene, rng) for scene in scenes]
        tokens = tokenize(self.tokenizer, captions, length=self.config.model.max_length)
        return {"input_ids": tokens["input_ids"]}

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return InfoNCE both ways (arXiv 2103.00020, figure 3).

        Hard negatives compete for the images only, corrupted images for the captions only.
        """
        inputs = {name: one for name, one in batch.items() if name in ("pixel_values", "input_ids")}
        labels = {name.removeprefix("label_"): one for name, one in batch.items() if name not in inputs}
        if "pixel_values" not in batch:
            return self._text_only_loss(batch, labels)
        out = self.clip(**inputs, output_hidden_states=True)
        scores = out.logits_per_image.float()  # (B + corrupted, B) or (B + corrupted, 2B)
        size = self.config.run.batch_size
        true = torch.arange(size, device=scores.device)  # (B,)
        images, captions = scores[:size], scores[:, :size].T  # a row each
        loss = (F.cross_entropy(images, true) + F.cross_entropy(captions, true)) / 2
        values = {
            "accuracy_images": (images.argmax(1) == true).float().mean(),
            "accuracy_captions": (captions.argmax(1) == true).float().mean(),
        }
        if self.config.task.probe_weight:
            own = {name: one[:size] for name, one in labels.items()}
            words, patches = out.text_model_output.hidden_states[-2], out.vision_model_output.hidden_states[-2][:size]
            probes = {
                "probe_text": self._embedding_loss(out.text_embeds, labels),
                "probe_image": self._embedding_loss(out.image_embeds[:size], own),
                "probe_words": self._states_loss(self.word_probe, words, self._is_word(batch["input_ids"]), labels),
                "probe_patches": self._states_loss(self.patch_probe, patches, None, own),
            }
            loss = loss + self.config.task.probe_weight * torch.stack(list(probes.values())).sum()
            values |= {name: one.detach() for name, one in probes.items()}
        return loss, values

    def _text_only_loss(self, batch: dict[str, Any], labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch without images."""
        out = self.clip.text_model(batch["input_ids"], output_hidden_states=True)
        words = self._states_loss(self.word_probe, out.hidden_states[-2], self._is_word(batch["input_ids"]), labels)
        embedding = self._embedding_loss(F.normalize(out.pooler_output, dim=-1), labels)
        unused = [self.clip.logit_scale, self.clip.logit_bias, *self.clip.vision_model.parameters()]
        unused += self.patch_probe.parameters()
        idle = torch.stack([weight.sum() for weight in unused]).sum()  # DDP wants a gradient of every weight
        return words + embedding + 0 * idle, {"probe_text": embedding.detach(), "probe_words": words.detach()}

    def _is_word(self, tokens: Tensor) -> Tensor:
        padding: Any = self.tokenizer.pad_token_id
        return tokens != padding  # (B, L)

    def _embedding_loss(self, vectors: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Return the loss of the probe of unit vectors (B, F)."""
        logits = self.embedding_probe(PROBE_SCALE * vectors).float()  # (B, R)
        count = len(SLOTS) * (1 + len(self.data.vocabulary))
        names = logits[:, :count].unflatten(1, (len(SLOTS), -1))  # (B, 6, 1 + names)
        rest = dict(zip(ATTRIBUTES, logits[:, count:].split(list(ATTRIBUTES.values()), dim=1), strict=True))
        return probe_loss({"names": names, **rest}, labels)

    def _states_loss(self, probe: SceneProbe, states: Tensor, mask: Tensor | None, labels: dict[str, Tensor]) -> Tensor:
        """Return the loss of a probe of states (B, L, D)."""
        everywhere = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask
        return probe_loss(probe(states, everywhere), labels)

    def validate(self) -> dict[str, float]:
        """Return shares of held-out images that find their caption, see `apps.training.hard_negatives`."""
        values, device = {}, self.context.device
        for kind, each in self.hard_negatives.items():
            tokens = tokenize(self.tokenizer, each.captions, length=self.config.model.max_length)["input_ids"]
            out = self.clip(input_ids=tokens.to(device), pixel_values=each.images.to(device))
            values |= {f"{name}_{kind}": share for name, share in retrieval_accuracy(out.logits_per_image).items()}
        return values

    def preview(self, path: Path) -> None:
        """Write held-out images; there is nothing to generate."""
        save_grid(torch.cat([each.images[:8] for each in self.hard_negatives.values()]), path, 8)

    def export(self, folder: Path) -> None:
        """Write the model with its tokenizer and image processor, as transformers' Auto classes load it."""
        save_component(self.clip, folder)
        self.tokenizer.save_pretrained(folder)
        side = self.config.data.resolution
        CLIPImageProcessorPil(
            size={"height": side, "width": side},
            do_center_crop=False,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ).save_pretrained(folder)


def corrupt_box(codes: list[Tensor], grids: Sequence[Grid], rng: np.random.Generator) -> list[Tensor]:
    """Replace the tokens in a box, from some scale on, by those of the next image of the batch.

    Args:
        codes: Tokens of the first scales, (B, N) each; they stay as they are.
        grids: Rows and columns of the scales.
        rng: Picks box and scale.
    """
    start = int(rng.integers(1, max(len(codes) - 1, 2)))
    side = rng.uniform(0.3, 0.6, size=2)
    top, left = rng.uniform(0, 1 - side)
    corrupted = []
    for scale, one in enumerate(codes):
        height, width = grids[scale]
        down, across = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
        rows, columns = (down > top) & (down < top + side[0]), (across > left) & (across < left + side[1])
        inside = (rows[:, None] & columns).flatten() & (scale >= start)  # (N,)
        corrupted.append(torch.where(inside.to(one.device), one.roll(1, 0), one))  # (B, N)
    return corrupted


def corrupt_tokens(codes: list[Tensor], rng: np.random.Generator) -> list[Tensor]:
    """Replace single tokens by those of other images of the batch, as sampling at a high temperature does.

    Args:
        codes: Tokens of the first scales, (B, N) each; they stay as they are.
        rng: Picks images and positions.
    """
    corrupted = []
    for scale, one in enumerate(codes):
        share = rng.uniform(0.02, 0.2, size=(len(one), 1)) * (scale > 0)  # (B, 1)
        swapped = torch.from_numpy(rng.random(one.shape) < share).to(one.device)  # (B, N)
        others = torch.from_numpy(rng.permuted(one.cpu().numpy().reshape(-1)).reshape(one.shape)).to(one.device)
        corrupted.append(torch.where(swapped, others, one))  # (B, N)
    return corrupted
