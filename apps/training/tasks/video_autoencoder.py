"""Training of `CausalVideoAutoencoder` on clips; see `apps.training.tasks.autoencoder`, whose losses it shares."""

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from apps.training.config import ConfigError, Section, TrainConfig
from apps.training.data.config import ClipSection
from apps.training.export import save_component
from apps.training.image_grid import save_grid
from apps.training.tasks.autoencoder import AutoencoderSection, AutoencoderTask
from dit.tokenizers import CausalVideoAutoencoder, ViTAutoencoder, from_image_autoencoder
from dit.tokenizers.base import fit_linear_preview
from dit.tokenizers.inflation import lighter_decoder
from pipelines.inputs.known_latents import group_frames

PREVIEW_CLIPS, PREVIEW_FRAMES = 6, 8


class VideoAutoencoderSection(AutoencoderSection):
    """The `[task]` section; see `AutoencoderSection`.

    Attributes:
        perceptual_frames: So many frames a clip, at random among those of a batch, are compared by ST-LPIPS.
    """

    perceptual_frames: int = Field(default=4, ge=1)


class VideoAutoencoderData(ClipSection):
    """The `[data]` section.

    Attributes:
        init_from: Folder of an exported autoencoder that the run starts from: of clips, of which only the layers of the
            decoder may be fewer, see `lighter_decoder`; or of images (`ViTAutoencoder`), with whose weights `[model]`
            has to agree, see `from_image_autoencoder`.
        resolution: Side of the frames in pixels.
        validation_examples: Held-out clips that are measured.
        calibration_images: Clips that the statistics of the code and the preview map are fitted to.
    """

    init_from: Path | None = None
    resolution: int = Field(default=96, ge=16)
    validation_examples: int = Field(default=32, ge=1)
    calibration_images: int = Field(default=96, ge=2)


class VideoAutoencoderModel(Section):
    """The `[model]` section; see `CausalVideoAutoencoder`."""

    latent_channels: int = 16
    patch_size: int = 16
    temporal_patch_size: int = 4
    encoder_dim: int = 96
    encoder_layers: int = 2
    encoder_window: int = 1
    decoder_dim: int = 160
    decoder_layers: int = 4
    decoder_window: int = 2
    attention_head_dim: int = 32
    ff_ratio: float = 8 / 3
    refiner_channels: int = 32
    refiner_layers: int = 2
    refiner_patch: int = 4
    frame_codes: bool = False


class VideoAutoencoderConfig(TrainConfig):
    """A whole configuration of this task."""

    task: VideoAutoencoderSection
    data: VideoAutoencoderData = VideoAutoencoderData()
    model: VideoAutoencoderModel = VideoAutoencoderModel()

    @model_validator(mode="after")
    def _check(self) -> "VideoAutoencoderConfig":
        if self.task.train == "decoder" and self.data.init_from is None:
            raise ValueError('task.train = "decoder" needs an encoder to fit: give data.init_from')
        return self


class VideoAutoencoderTask(AutoencoderTask):
    """Train an autoencoder of clips. See `apps.training.task.Task`."""

    config: VideoAutoencoderConfig  # type: ignore[assignment]
    config_class: ClassVar[type[TrainConfig]] = VideoAutoencoderConfig
    smoke: ClassVar[tuple[str, ...]] = ("data.validation_examples=4", "data.calibration_images=4")

    def _generated_pairs(self) -> None:
        """Return None: decoders of clips learn from real clips only."""

    def _network(self) -> Any:
        """Return a new autoencoder or that of `init_from`; its encoder is frozen if only the decoder is trained."""
        start = self.config.data.init_from
        if start is None:
            vae = CausalVideoAutoencoder(**self.config.model.model_dump(), sample_size=self.config.data.resolution)
        else:
            vae = self._started(start)
        if self.config.task.train == "decoder":
            for part in (vae.patch_embed, vae.encoder_blocks, vae.encoder_norm, vae.to_latent):
                part.requires_grad_(False)
        return vae

    def _started(self, start: Path) -> CausalVideoAutoencoder:
        """Return the autoencoder that a run starts from.

        Raises:
            ConfigError: It is neither of clips nor of images.
        """
        settings: Any = ViTAutoencoder.load_config(start)
        kind = settings["_class_name"]
        if kind == "CausalVideoAutoencoder":
            trained = CausalVideoAutoencoder.from_pretrained(start, torch_dtype=torch.float32)
            layers = self.config.model.model_dump(include={"decoder_layers", "refiner_layers"})
            try:
                return lighter_decoder(trained, **layers)
            except ValueError as error:
                raise ConfigError(f"data.init_from = {str(start)!r}: {error}") from error
        if kind == "ViTAutoencoder":
            image = ViTAutoencoder.from_pretrained(start, torch_dtype=torch.float32)
            try:
                return from_image_autoencoder(image, **self.config.model.model_dump())
            except ValueError as error:
                raise ConfigError(f"data.init_from = {str(start)!r}: {error}") from error
        raise ConfigError(
            f"data.init_from = {str(start)!r} holds a {kind}: expected a CausalVideoAutoencoder or a ViTAutoencoder"
        )

    def _decode(self, vae: Any, latent: Tensor, images: Tensor) -> Tensor:
        """Decode latents to clips as long as `images`, (B, 3, T, H, W)."""
        return vae.decode(latent, num_frames=images.shape[2], return_dict=False)[0]

    def _image_loss(self, decoded: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of decoded clips (B, 3, T, H, W) and its parts for the log."""
        return super()._image_loss(*(clip.transpose(1, 2).flatten(0, 1) for clip in (decoded, images)))

    def _perceptual_distance(self, decoded: Tensor, images: Tensor) -> Tensor:
        """Return the mean ST-LPIPS of some frames of decoded clips (B T, 3, H, W)."""
        count = self.config.task.perceptual_frames * (len(images) // self.config.data.num_frames)
        rows = torch.randperm(len(images), device=images.device)[:count]
        return super()._perceptual_distance(decoded[rows], images[rows])

    def preview(self, path: Path) -> None:
        """Write held-out clips, one a row, some of their frames, each above its reconstruction."""
        vae: Any = self._calibrated()
        clips = self.held_out.images(range(min(PREVIEW_CLIPS, len(self.held_out)))).to(self.context.device)
        decoded = vae.decode(vae.encode(clips).latent, num_frames=clips.shape[2]).sample.float()  # (B, 3, T, H, W)
        shown = torch.linspace(0, clips.shape[2] - 1, PREVIEW_FRAMES).long()  # frames
        rows = torch.stack([clips, decoded], dim=1)[:, :, :, shown]  # (B, 2, 3, t, H, W)
        save_grid(rows.permute(0, 1, 3, 2, 4, 5).flatten(0, 2), path, columns=PREVIEW_FRAMES)

    def export(self, folder: Path) -> None:
        """Write `vae/`, its code statistics and preview map fitted to calibration clips."""
        vae: Any = self._calibrated()
        latents, frames = [], []
        for clips in self._calibration():  # (B, 3, T, H, W)
            latents.append(vae.encode(clips).latent.transpose(1, 2).flatten(0, 1))  # (B T', C, h, w)
            last = group_frames(clips, vae.temporal_compression_ratio)[:, :, :, -1]  # each latent frame's last frame
            frames.append(last.transpose(1, 2).flatten(0, 1))  # (B T', 3, H, W)
        cell = math.isqrt(vae.preview_factors.shape[0] // 3)
        vae.preview_factors.copy_(fit_linear_preview(torch.cat(latents), torch.cat(frames), cell))
        save_component(vae, folder / "vae")
