"""Training of `ViTAutoencoder` on images.

The loss is Charbonnier plus structural similarity; Gaussian noise of random strength on the code makes the decoder
forgive the small errors that a generator will make (arXiv:2009.14794 does it for compression; most latent diffusion
uses a KL term to the same end).
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from apps.perceptual.st_lpips import load_st_lpips
from apps.training.config import Section, TaskSection, TrainConfig
from apps.training.data import open_data
from apps.training.data.config import CaptionedData
from apps.training.export import save_component
from apps.training.generated_pairs import GeneratedPairs, cached_pairs, check_encoder, load_generator
from apps.training.image_grid import save_grid
from apps.training.image_losses import perceptual_loss, psnr, reconstruction_loss
from apps.training.task import TaskContext
from dit.tokenizers import ViTAutoencoder
from dit.tokenizers.base import fit_linear_preview


class AutoencoderSection(TaskSection):
    """The `[task]` section.

    Attributes:
        latent_noise: Largest standard deviation of the noise on the code, which has unit variance.
        ssim_weight: Weight of `1 - SSIM` beside the Charbonnier loss.
        squared_weight: Weight of the mean squared error beside it: higher PSNR, softer images.
        perceptual_weight: Weight of ST-LPIPS (arXiv:2207.13686) beside it: sharper images. It costs more than the
            network itself, so only a part of each image is compared.
        perceptual_crop: Side in pixels of the square, at a random place, that ST-LPIPS compares.
        generated_fraction: Share of a batch that is decoded from latents of `data.generated_from`.
        train: `all`, or `decoder`: the encoder and its statistics stay as they are (the second stage of ViTok,
            arXiv:2501.09755), so that a generator trained on its codes still fits.
    """

    train: Literal["all", "decoder"] = "all"
    latent_noise: float = Field(default=0.1, ge=0)
    ssim_weight: float = Field(default=0.1, ge=0)
    squared_weight: float = Field(default=0.0, ge=0)
    perceptual_weight: float = Field(default=0.0, ge=0)
    perceptual_crop: int = Field(default=64, ge=32)
    generated_fraction: float = Field(default=0.5, ge=0, lt=1)


class AutoencoderData(CaptionedData):
    """The `[data]` section.

    Attributes:
        init_from: Folder of an exported autoencoder that the run starts from; `[model]` is then not used.
        resolution: Side of the images in pixels.
        vocabulary_fraction: Stickers: share of the scenes drawn from the vocabulary; the rest comes from all stickers.
        validation_examples: Held-out images that are measured.
        calibration_images: Images that the statistics of the code and the preview map are fitted to.
        generated_from: Stickers: folder of a pipeline with this autoencoder's encoder. A decoder that is trained alone
            then also learns to show what the pipeline generates as it was meant; see
            `apps.training.generated_pairs`.
        generated_images: Stickers: how many images are generated for that.
        size_words, synonyms: Stickers: see `CaptionedData`; of the captions of generated images.
    """

    world_fields: ClassVar[frozenset[str]] = CaptionedData.world_fields | {
        "vocabulary_fraction",
        "generated_from",
        "generated_images",
    }
    init_from: Path | None = None
    resolution: int = Field(default=128, ge=16)
    vocabulary_fraction: float = Field(default=1.0, ge=0, le=1)
    validation_examples: int = Field(default=128, ge=1)
    calibration_images: int = Field(default=512, ge=2)
    generated_from: Path | None = None
    generated_images: int = Field(default=6000, ge=1)


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
        if self.task.train != "decoder" and self.data.generated_from is not None:
            raise ValueError('data.generated_from needs task.train = "decoder": its latents fit one encoder only')
        return self


class AutoencoderTask:
    """Train an autoencoder. See `apps.training.task.Task`."""

    config_class: ClassVar[type[TrainConfig]] = AutoencoderConfig
    smoke: ClassVar[tuple[str, ...]] = (
        "data.validation_examples=24",
        "data.calibration_images=16",
        "data.generated_images=8",
    )

    def __init__(self, config: AutoencoderConfig, context: TaskContext) -> None:
        self.config, self.context = config, context
        with context.main_process_first():  # the first process checks the files and lists them for the others
            self.data = open_data(config.data, config.data.resolution, config.run.folder, quiet=context.rank > 0)
        self.vae: Any = self._network()
        self.perceptual = load_st_lpips(context.device) if config.task.perceptual_weight else None
        self.held_out = self.data.held_out(config.data.validation_examples)
        with context.main_process_first():
            self.pairs = self._generated_pairs()

    def _generated_pairs(self) -> GeneratedPairs | None:
        """Return what the pipeline of `generated_from` makes, if there is one."""
        data, run = self.config.data, self.config.run
        if data.generated_from is None:
            return None
        pipe = load_generator(data.generated_from, self.context.device)
        check_encoder(pipe, self.vae, self.held_out.images(range(min(4, len(self.held_out)))).to(self.context.device))
        return cached_pairs(pipe, self.data, data.generated_images, run.seed, run.output)

    def _network(self) -> ViTAutoencoder:
        """Return a new autoencoder, or that of `init_from`, with the encoder frozen if only the decoder is trained."""
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
        """Return the autoencoder."""
        return {"vae": self.vae}

    def batch(self, index: int) -> dict[str, Any]:
        """Return `images` (B, 3, H, W) in [-1, 1]; with generated pairs also `generated` latents of the first ones."""
        address = self.context.address(self.config.run, index)
        if self.pairs is None:
            return {"images": self.data.images(address)}
        count = min(round(self.config.task.generated_fraction * address.size), address.size - 1)
        rows = address.rng().integers(len(self.pairs), size=count).tolist()
        others = self.data.images(replace(address, size=address.size - count))  # (B - G, 3, H, W)
        if count == 0:
            return {"images": others}
        targets = self.pairs.images(rows)  # (G, 3, H, W)
        return {"images": torch.cat([targets, others]), "generated": self.pairs.latents[rows].float()}

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return Charbonnier plus weighted `1 - SSIM` of the images decoded from noisy codes."""
        images = batch["images"]  # (B, 3, H, W)
        if self.config.task.train == "decoder":
            self.vae.latent_norm.eval()
        generated = batch.get("generated", images.new_empty(0))  # (G, C, h, w)
        latent = self.vae.encode(images[len(generated) :], return_dict=False)[0]  # (B - G, C, h, w)
        decoded = self._decode(self.vae, self._disturbed(latent, generated), images)  # (B, 3, H, W)
        return self._image_loss(decoded, images)

    def _decode(self, vae: Any, latent: Tensor, images: Tensor) -> Tensor:
        """Decode latents to the shape of `images`."""
        del images
        return vae.decode(latent, return_dict=False)[0]

    def _disturbed(self, latent: Tensor, generated: Tensor) -> Tensor:
        """Add noise of random strength to the latents of images, and put generated ones before them."""
        shape = (len(latent), *[1] * (latent.ndim - 1))
        scale = self.config.task.latent_noise * torch.rand(shape, device=latent.device)
        noisy = latent + scale * torch.randn_like(latent)  # (B - G, C, h, w)
        return torch.cat([generated.to(noisy.dtype), noisy]) if len(generated) else noisy

    def _image_loss(self, decoded: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of decoded images (B, 3, H, W) and its parts for the log."""
        task = self.config.task
        with torch.autocast(images.device.type, enabled=False):
            loss, parts = reconstruction_loss(decoded.float(), images, task.ssim_weight, task.squared_weight)
        if self.perceptual is None:
            return loss, parts
        distance = self._perceptual_distance(decoded, images)
        return loss + task.perceptual_weight * distance, {**parts, "perceptual": distance.detach()}

    def _perceptual_distance(self, decoded: Tensor, images: Tensor) -> Tensor:
        """Return the mean ST-LPIPS of decoded images (B, 3, H, W)."""
        assert self.perceptual is not None, "asked for with a weight only"
        return perceptual_loss(self.perceptual, decoded, images, self.config.task.perceptual_crop)

    def validate(self) -> dict[str, float]:
        """Return the PSNR of held-out images (peak 2, since images span [-1, 1])."""
        return self.measure(self._calibrated())

    def measure(self, vae: Any) -> dict[str, float]:
        """Return `psnr` of an autoencoder on the held-out images, and `psnr_boxes` inside the boxes of stickers."""
        whole, boxes, pixels, box_pixels = 0.0, 0.0, 0, 0
        for start in range(0, len(self.held_out), 32):
            rows = range(start, min(start + 32, len(self.held_out)))
            images = self.held_out.images(rows).to(self.context.device)  # (B, 3, H, W)
            decoded = self._decode(vae, vae.encode(images).latent, images).float().clamp(-1, 1)  # (B, 3, H, W)
            error = (decoded - images).square().mean(dim=1, keepdim=True)  # (B, 1, H, W)
            whole, pixels = whole + float(error.sum()), pixels + error.numel()
            mask = self.held_out.regions(rows)  # (B, 1, H, W)
            if mask is not None:
                mask = mask.to(error.device)
                boxes, box_pixels = boxes + float(error[mask].sum()), box_pixels + int(mask.sum())
        values = {"psnr": psnr(whole / pixels)}
        return values | {"psnr_boxes": psnr(boxes / box_pixels)} if box_pixels else values

    def preview(self, path: Path) -> None:
        """Write rows of held-out images, each above its reconstruction."""
        vae: Any = self._calibrated()
        images = self.held_out.images(range(min(24, len(self.held_out)))).to(self.context.device)
        decoded = vae.decode(vae.encode(images).latent).sample.float()  # (B, 3, H, W)
        rows = zip(images.split(8), decoded.split(8), strict=True)
        save_grid(torch.cat([part for pair in rows for part in pair]), path, columns=min(8, len(images)))

    def export(self, folder: Path) -> None:
        """Write `vae/`, its code statistics and preview map fitted to calibration images."""
        vae: Any = self._calibrated()
        pairs = [(vae.normalize_latents(vae.encode(images).latent).float(), images) for images in self._calibration()]
        latents, images = (torch.cat(parts) for parts in zip(*pairs, strict=True))  # (S, C, h, w), (S, 3, H, W)
        cell = math.isqrt(vae.preview_factors.shape[0] // 3)
        vae.preview_factors.copy_(fit_linear_preview(latents, images, cell))
        save_component(vae, folder / "vae")

    def _calibration(self) -> Iterator[Tensor]:
        """Yield the calibration images on the device, at most 64 at a time."""
        count, size = self.config.data.calibration_images, self.config.run.batch_size
        for images in self.data.calibration_images(count, size):
            yield images.to(self.context.device)

    def _calibrated(self) -> ViTAutoencoder:
        """Return a copy whose code statistics are measured anew: those of training lag behind the weights."""
        vae = copy.deepcopy(self.vae).eval()
        if self.config.task.train == "decoder":
            return vae
        norm = self._latent_norm(vae)
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
        for images in self._calibration():
            vae.encode(images)
        norm.eval()
        return vae

    def _latent_norm(self, vae: Any) -> nn.BatchNorm1d:
        """Return the layer that holds the statistics of the code."""
        return vae.latent_norm
