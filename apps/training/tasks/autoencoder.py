"""Trains `ViTAutoencoder` on images of the sticker world.

The loss is Charbonnier plus structural similarity; Gaussian noise of random strength on the code makes the decoder
forgive the small errors that a generator will make (arXiv:2009.14794 does it for compression; most latent diffusion
uses a KL term to the same end).
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from apps.training.config import Section, TaskSection, TrainConfig
from apps.training.export import save_component
from apps.training.scenes import (
    VALIDATION_SEED,
    SceneMix,
    SceneSampler,
    box_mask,
    load_sprites,
    read_vocabulary,
    render,
    save_grid,
    scene_series,
)
from apps.training.task import TaskContext
from dit.tokenizers import ViTAutoencoder
from dit.tokenizers.base import fit_linear_preview


class AutoencoderSection(TaskSection):
    """The `[task]` section.

    Attributes:
        latent_noise: Largest standard deviation of the noise on the code, which has unit variance.
        ssim_weight: Weight of `1 - SSIM` beside the Charbonnier loss.
        squared_weight: Weight of the mean squared error beside it: higher PSNR, softer images.
        train: `all`, or `decoder`: the encoder and its statistics stay as they are (the second stage of ViTok,
            arXiv:2501.09755), so that a generator trained on its codes still fits.
    """

    train: Literal["all", "decoder"] = "all"
    latent_noise: float = Field(default=0.1, ge=0)
    ssim_weight: float = Field(default=0.1, ge=0)
    squared_weight: float = Field(default=0.0, ge=0)


class AutoencoderData(Section):
    """The `[data]` section.

    Attributes:
        init_from: Folder of an exported autoencoder that the run starts from; `[model]` is then not used.
        resolution: Side of the images in pixels.
        vocabulary: `starter`, `all`, or a text file with one sticker name a line.
        vocabulary_fraction: Share of the scenes drawn from the vocabulary; the rest comes from all stickers.
        single, pair, count: Relative frequencies of the kinds of scenes.
        validation_scenes: Held-out scenes that are measured.
        calibration_scenes: Fresh scenes that the statistics of the code and the preview map are fitted to.
    """

    init_from: Path | None = None
    resolution: int = Field(default=128, ge=16)
    vocabulary: str = "starter"
    vocabulary_fraction: float = Field(default=1.0, ge=0, le=1)
    single: float = Field(default=0.5, ge=0)
    pair: float = Field(default=0.3, ge=0)
    count: float = Field(default=0.2, ge=0)
    validation_scenes: int = Field(default=128, ge=1)
    calibration_scenes: int = Field(default=512, ge=2)


class AutoencoderModel(Section):
    """The `[model]` section; see `ViTAutoencoder`."""

    latent_channels: int = 8
    patch_size: int = 16
    encoder_dim: int = 128
    encoder_layers: int = 2
    decoder_dim: int = 192
    decoder_layers: int = 4
    attention_head_dim: int = 32
    ff_ratio: float = 8 / 3
    refiner_channels: int = 32
    refiner_layers: int = 1
    refiner_patch: int = 4


class AutoencoderConfig(TrainConfig):
    """A whole configuration of this task."""

    task: AutoencoderSection
    data: AutoencoderData = AutoencoderData()
    model: AutoencoderModel = AutoencoderModel()

    @model_validator(mode="after")
    def _check(self) -> "AutoencoderConfig":
        if self.task.train == "decoder" and self.data.init_from is None:
            raise ValueError('task.train = "decoder" needs an encoder to fit: give data.init_from')
        return self


class AutoencoderTask:
    """Learns to code and decode scenes. See `apps.training.task.Task`."""

    config_class: ClassVar[type[TrainConfig]] = AutoencoderConfig
    smoke: ClassVar[tuple[str, ...]] = ("data.validation_scenes=24", "data.calibration_scenes=16")

    def __init__(self, config: AutoencoderConfig, context: TaskContext) -> None:
        self.config, self.context = config, context
        data = config.data
        self.sheet = load_sprites()
        vocabulary = read_vocabulary(data.vocabulary)
        mix = SceneMix(single=data.single, pair=data.pair, count=data.count)
        from_vocabulary = round(data.vocabulary_fraction * config.run.batch_size)
        self.samplers = [
            (SceneSampler(self.sheet, vocabulary, mix=mix), from_vocabulary),
            (SceneSampler(self.sheet, mix=mix), config.run.batch_size - from_vocabulary),
        ]
        self.vae: Any = self._network()
        held_out = SceneSampler(self.sheet, vocabulary, split="heldout_combination", mix=mix)
        self.validation_scenes = scene_series([(held_out, data.validation_scenes)], VALIDATION_SEED, 0)

    def _network(self) -> ViTAutoencoder:
        """A new autoencoder, or that of `init_from`, with the encoder frozen if only the decoder is trained."""
        start, model = self.config.data.init_from, self.config.model
        if start is not None:
            vae = ViTAutoencoder.from_pretrained(start, torch_dtype=torch.float32)
        else:
            vae = ViTAutoencoder(**model.model_dump(), sample_size=self.config.data.resolution)
        if self.config.task.train == "decoder":
            for part in (vae.patch_embed, vae.encoder_blocks, vae.encoder_norm, vae.to_latent):
                part.requires_grad_(False)
        return vae

    def modules(self) -> dict[str, nn.Module]:
        """The autoencoder."""
        return {"vae": self.vae}

    def batch(self, index: int) -> dict[str, Any]:
        """Images of fresh scenes, `images` (B, 3, H, W) in [-1, 1]."""
        scenes = scene_series(self.samplers, self.config.run.seed, index * self.context.world_size + self.context.rank)
        return {"images": render(scenes, self.sheet, self.config.data.resolution)}

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Charbonnier plus weighted `1 - SSIM` of the images decoded from noisy codes."""
        images = batch["images"]  # (B, 3, H, W)
        if self.config.task.train == "decoder":
            self.vae.latent_norm.eval()
        latent = self.vae.encode(images, return_dict=False)[0]  # (B, C, h, w)
        scale = self.config.task.latent_noise * torch.rand(len(latent), 1, 1, 1, device=latent.device)
        decoded = self.vae.decode(latent + scale * torch.randn_like(latent), return_dict=False)[0]  # (B, 3, H, W)
        with torch.autocast(images.device.type, enabled=False):
            task = self.config.task
            return reconstruction_loss(decoded.float(), images, task.ssim_weight, task.squared_weight)

    def validate(self) -> dict[str, float]:
        """PSNR of held-out scenes (peak 2, since images span [-1, 1]): whole images, and inside sticker boxes."""
        return self.measure(self._calibrated())

    def measure(self, vae: Any) -> dict[str, float]:
        """`psnr` and `psnr_boxes` of an autoencoder on the held-out scenes."""
        resolution = self.config.data.resolution
        whole, boxes, pixels, box_pixels = 0.0, 0.0, 0, 0
        for start in range(0, len(self.validation_scenes), 32):
            scenes = self.validation_scenes[start : start + 32]
            images = render(scenes, self.sheet, resolution).to(self.context.device)  # (B, 3, H, W)
            decoded = vae.decode(vae.encode(images).latent).sample.float().clamp(-1, 1)  # (B, 3, H, W)
            error = (decoded - images).square().mean(dim=1, keepdim=True)  # (B, 1, H, W)
            mask = box_mask(scenes, resolution).to(error.device)  # (B, 1, H, W)
            whole, pixels = whole + float(error.sum()), pixels + error.numel()
            boxes, box_pixels = boxes + float(error[mask].sum()), box_pixels + int(mask.sum())
        return {"psnr": psnr(whole / pixels), "psnr_boxes": psnr(boxes / box_pixels)}

    def preview(self, path: Path) -> None:
        """Rows of held-out scenes, each above its reconstruction."""
        vae: Any = self._calibrated()
        images = render(self.validation_scenes[:24], self.sheet, self.config.data.resolution).to(self.context.device)
        decoded = vae.decode(vae.encode(images).latent).sample.float()  # (B, 3, H, W)
        rows = zip(images.split(8), decoded.split(8), strict=True)
        save_grid(torch.cat([part for pair in rows for part in pair]), path, columns=8)

    def export(self, folder: Path) -> None:
        """Writes `vae/`, its code statistics and preview map fitted to fresh scenes."""
        vae: Any = self._calibrated()
        pairs = [(vae.normalize_latents(vae.encode(images).latent).float(), images) for images in self._fresh_images()]
        latents, images = (torch.cat(parts) for parts in zip(*pairs, strict=True))  # (S, C, h, w), (S, 3, H, W)
        cell = math.isqrt(vae.preview_factors.shape[0] // 3)
        vae.preview_factors.copy_(fit_linear_preview(latents, images, cell))
        save_component(vae, folder / "vae")

    def _fresh_images(self) -> Iterator[Tensor]:
        """Images that are in no batch, 64 at a time, (64, 3, H, W)."""
        count, size = self.config.data.calibration_scenes, self.config.run.batch_size
        scenes = [
            scene for index in range(math.ceil(count / size))
            for scene in scene_series(self.samplers, VALIDATION_SEED + 1, index)
        ]  # fmt: skip
        for start in range(0, count, 64):
            part = scenes[start : min(start + 64, count)]
            yield render(part, self.sheet, self.config.data.resolution).to(self.context.device)

    def _calibrated(self) -> ViTAutoencoder:
        """A copy whose code statistics are measured anew: those of training lag behind, and belong to other weights."""
        vae = copy.deepcopy(self.vae).eval()
        if self.config.task.train == "decoder":
            return vae
        norm = self._latent_norm(vae)
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
        for images in self._fresh_images():
            vae.encode(images)
        norm.eval()
        return vae

    def _latent_norm(self, vae: Any) -> nn.BatchNorm1d:
        """Where the statistics of the code are."""
        return vae.latent_norm


def reconstruction_loss(
    decoded: Tensor, images: Tensor, ssim_weight: float, squared_weight: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Charbonnier (a smooth L1, eps 1e-3) plus `ssim_weight * (1 - SSIM)` plus `squared_weight * MSE`.

    Args:
        decoded: (B, 3, H, W) float32.
        images: Targets in [-1, 1], the same shape.
        ssim_weight: 0 leaves the second term out.
        squared_weight: 0 leaves the third term out.

    Returns:
        The loss and its parts for the log.
    """
    squared = (decoded - images).square()  # (B, 3, H, W)
    loss = (squared + 1e-6).sqrt().mean()
    parts = {"charbonnier": loss.detach()}
    if ssim_weight:
        similarity = ssim(decoded, images, stride=4)  # every window would cost as much as the network
        loss, parts["ssim"] = loss + ssim_weight * (1 - similarity), similarity.detach()
    if squared_weight:
        mean = squared.mean()
        loss, parts["squared"] = loss + squared_weight * mean, mean.detach()
    return loss, parts


def ssim(first: Tensor, second: Tensor, window: int = 7, stride: int = 1, data_range: float = 2.0) -> Tensor:
    """Mean structural similarity (Wang et al. 2004) with a uniform window, without padding.

    Args:
        first: (B, C, H, W).
        second: The same shape.
        window: Side of the window in pixels.
        stride: Pixels from one window to the next.
        data_range: Largest minus smallest possible value.

    Returns:
        A scalar, 1 for equal images.
    """
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    maps = torch.stack([first, second, first * first, second * second, first * second])  # (5, B, C, H, W)
    means = F.avg_pool2d(maps.flatten(0, 2), window, stride).unflatten(0, maps.shape[:3])  # (5, B, C, h, w)
    mean1, mean2, square1, square2, product = means.unbind(0)  # (B, C, h, w)
    variance1, variance2 = square1 - mean1**2, square2 - mean2**2
    covariance = product - mean1 * mean2
    numerator = (2 * mean1 * mean2 + c1) * (2 * covariance + c2)
    return (numerator / ((mean1**2 + mean2**2 + c1) * (variance1 + variance2 + c2))).mean()


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return 10 * math.log10(4 / max(mean_squared_error, 1e-10))
