"""Training of `TextDiT` on clips by flow matching: text to video, and the completion of clips that are known in part.

Like `TextToImageTask`, whose networks and captions it shares. A share of the batches shows single frames as images; of
a share of the clips something is known (VDT, arXiv 2305.13311), which the network sees beside the noisy latents.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from apps.training.clip_latents import check_stills, encode_clips, known_of, split_latents
from apps.training.clip_masks import draw_known, is_spatial
from apps.training.config import ConfigError, TrainConfig
from apps.training.data.base import ClipPool, Examples
from apps.training.data.config import ClipSection, ClipStage
from apps.training.image_grid import save_grid
from apps.training.latent_cache import Encode
from apps.training.net2net import clip_transformer
from apps.training.tasks.text_to_image import (
    FlowSection,
    GeneratorData,
    TextToImageModel,
    TextToImageTask,
    captions_of,
)
from apps.training.text_encoder import tokenize
from dit.layers.frame_memory import chunk_spans
from dit.models.text_dit import TextDiT
from dit.tokenizers import as_visual_tokenizer
from pipelines.flow_video import DEFAULT_OVERLAP
from pipelines.inputs.known_clip import KnownClip
from pipelines.inputs.known_latents import beside, frames_shown, known_latents
from sampling.objectives import (
    flow_matching_loss,
    frame_change_loss,
    interpolate,
    logit_normal_grid,
    logit_normal_sigmas,
    sigmas_after_clean_frames,
)

PREVIEW_CLIPS, PREVIEW_COLUMNS = 8, 8
CLEAN_SHARE = 0.5  # of the clips of causal networks, whose first chunks are clean


class TextToVideoSection(FlowSection):
    """The `[task]` section; see `FlowSection`.

    Attributes:
        known_fraction: Share of the clips of which something is known, see `apps.training.clip_masks`.
        change_weight: Of `frame_change_loss`, which is added to the loss; validation doesn't count it.
        preview_frames: Frames of previews; exported as the default of the pipeline.
        preview_negative_prompt: What previews steer away from; exported as the default of the pipeline too.
    """

    kind: Literal["text_to_video"]
    known_fraction: float = Field(default=0.35, ge=0, le=1)
    change_weight: float = Field(default=0.0, ge=0)
    preview_frames: int = Field(default=16, ge=2)
    preview_negative_prompt: str = ""


class TextToVideoData(GeneratorData, ClipSection):
    """The `[data]` section; see `GeneratorData` and `ClipSection`. `num_frames` is the longest window that is learned.

    Attributes:
        resolution: Side of the frames in pixels.
    """

    world_fields: ClassVar[frozenset[str]] = ClipSection.world_fields | {"pool_size"}
    resolution: int = Field(default=96, ge=16)
    num_frames: int = Field(default=21, ge=2)
    pool_size: int = Field(default=20_000, ge=8)
    stages: list[ClipStage] = Field(default=[ClipStage(until_step=1)], min_length=1)
    validation_examples: int = Field(default=64, ge=1)


class TextToVideoModel(TextToImageModel):
    """The `[model]` section; see `TextDiT`. With `init_from` only what says how clips attend counts."""

    patch_size: int = 1
    space_time: Literal["full", "factorised", "causal"] = "full"
    chunk_frames: int = Field(default=1, ge=1)
    window_frames: int = Field(default=8, ge=1)

    def frame_attention(self) -> dict[str, Any]:
        """Return the settings that say how the frames of clips attend."""
        return self.model_dump(include={"space_time", "chunk_frames", "window_frames"})


class TextToVideoConfig(TrainConfig):
    """A whole configuration of this task."""

    task: TextToVideoSection
    data: TextToVideoData
    model: TextToVideoModel = TextToVideoModel()

    @model_validator(mode="after")
    def _check_causal(self) -> "TextToVideoConfig":
        if self.model.space_time != "causal":
            return self
        if self.task.known_fraction:
            raise ValueError(
                f"task.known_fraction = {self.task.known_fraction}, but model.space_time is 'causal': such a "
                "network is shown nothing beside its frames, set it to 0"
            )
        if self.task.change_weight:
            raise ValueError(
                f"task.change_weight = {self.task.change_weight}, but model.space_time is 'causal': its frames have "
                "noise levels of their own, set it to 0"
            )
        longest = max(self.data.lengths, default=0)
        if longest > self.data.num_frames:
            raise ValueError(
                f"data.lengths has {longest}, more than data.num_frames = {self.data.num_frames}: a causal network "
                "learns clips from their first frame on; leave out what is longer, or raise data.num_frames"
            )
        return self


class TextToVideoTask(TextToImageTask):
    """Train a text-to-video diffusion transformer. See `apps.training.task.Task`."""

    config: TextToVideoConfig  # type: ignore[assignment]
    config_class: ClassVar[type[TrainConfig]] = TextToVideoConfig
    encode: ClassVar[Encode] = staticmethod(encode_clips)
    caption_multiple: ClassVar[int] = 16  # each comes with several lengths of clips
    smoke: ClassVar[tuple[str, ...]] = (*TextToImageTask.smoke, "data.pool_size=16")
    pool: ClipPool  # type: ignore[assignment]

    def _check_autoencoder(self) -> None:
        """Refuse an autoencoder with which what is known of clips can't be encoded ahead."""
        data = self.config.data
        if self.config.task.known_fraction or max(data.lengths, default=0) > data.num_frames:
            check_stills(self.vae)

    @property
    def ratio(self) -> int:
        """Frames of a latent frame."""
        return as_visual_tokenizer(self.vae).temporal_compression_ratio

    def batch(self, index: int) -> dict[str, Any]:
        """Return latents of clips of one length (or single frames), what is known, captions, noise and its levels."""
        address = self.context.address(self.config.run, index)
        rng, rows, captions = self._draw(index)
        shared = np.random.default_rng((address.seed, address.step, 4))  # all processes draw the same kind of batch
        is_image = shared.random() < self._stage(address.step).image_fraction
        frames = 1 if is_image else int(self.pool.lengths[rows[0]])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        clips = self._known(self.pool, rows.numpy(), self.latents[rows].float(), frames, rng)
        latents = clips["latents"]  # (B, C, T', h, w)
        return {
            **clips,
            "noise": torch.randn(latents.shape, generator=generator),  # (B, C, T', h, w)
            "sigmas": self._sigmas(len(latents), latents.shape[2], generator),  # (B,) or (B, T')
            **self._timing(self.pool, rows.numpy(), frames),
            **self._tokenize(captions),
        }

    def _known(
        self,
        clips: ClipPool,
        rows: np.ndarray,
        encoded: Tensor,
        frames: int,
        rng: np.random.Generator,
        fraction: float | None = None,
    ) -> dict[str, Tensor]:
        """Cut encoded clips to some frames and draw what is known of them.

        Args:
            clips: Where they come from.
            rows: Their numbers there, (B,).
            encoded: See `encode_clips`, (B, C, T' + T, h, w).
            frames: Of the batch; 1 takes the first frames as images.
            rng: Source of the random numbers.
            fraction: Share of the clips of which something is known; None is that of the task.

        Returns:
            `latents` and `known` (B, C, T', h, w), `shown` (B, R, T', h, w).
        """
        latents, stills = split_latents(encoded, self.config.data.num_frames, self.ratio)
        latents, stills = latents[:, :, : self._latent_frames(frames)], stills[:, :, :frames]
        side, fraction = latents.shape[-1], self.config.task.known_fraction if fraction is None else fraction
        starts = clips.starts[rows] if frames > 1 else np.zeros_like(rows)
        cells = torch.cat([draw_known(1, frames, side, int(start), rng, fraction) for start in starts])  # (B, T, h, w)
        shown = frames_shown(cells, self.ratio)  # (B, R, T', h, w)
        known = known_of(latents, stills, shown, self.ratio)
        for row in is_spatial(cells).nonzero().flatten().tolist():
            known[row] = self._encode_known(clips, int(rows[row]), cells[row], latents[row])
        return {"latents": latents, "shown": shown, "known": known}

    @torch.no_grad()
    def _encode_known(self, clips: ClipPool, row: int, cells: Tensor, latents: Tensor) -> Tensor:
        """Encode a clip of which regions are known, as pipelines do: what is hidden must leave no trace.

        Args:
            clips: Where it comes from.
            row: Its number there.
            cells: What is known, (T, h, w).
            latents: Of the clip, (C, T', h, w).
        """
        pixels = clips.images([row])[:, :, : len(cells)]  # (1, 3, T, H, W)
        size = pixels.shape[-1] // cells.shape[-1]
        known = cells.repeat_interleave(size, dim=-2).repeat_interleave(size, dim=-1)  # (T, H, W)
        tokenizer = as_visual_tokenizer(self.vae)

        def encode(filled: Tensor) -> Tensor:
            encoded = tokenizer.encode(filled.to(self.context.device), return_dict=False)[0]
            return tokenizer.normalize_latents(encoded).float().cpu()

        return known_latents(KnownClip(pixels, ~known[:, None]), latents[None], self.ratio, encode).latents[0]

    @property
    def _is_causal(self) -> bool:
        return self.transformer.config.space_time == "causal"

    def _sigmas(self, batch: int, frames: int, generator: torch.Generator) -> Tensor:
        """Draw noise levels: of clips, (B,); for causal networks of latent frames, by chunks, (B, T')."""
        task = self.config.task
        settings = (task.sigma_mean, task.sigma_std, task.sigma_shift, generator)
        if not self._is_causal:
            return logit_normal_sigmas(batch, *settings)  # (B,)
        spans = chunk_spans(frames, self.transformer.config.chunk_frames)
        levels = logit_normal_sigmas(batch * len(spans), *settings).unflatten(0, (batch, -1))  # (B, chunks)
        levels = sigmas_after_clean_frames(levels, CLEAN_SHARE, generator)
        return levels.repeat_interleave(torch.tensor([stop - start for start, stop in spans]), dim=1)  # (B, T')

    def _timing(self, examples: Any, rows: np.ndarray, frames: int) -> dict[str, Tensor]:
        """Return `frame_rate` and `clip_frames` of a batch, both (B,)."""
        rates = torch.from_numpy(examples.frame_rates[rows]).float()
        spans = [1 if frames == 1 else self._latent_frames(int(span)) for span in examples.spans[rows]]
        return {
            "frame_rate": rates if frames > 1 else torch.zeros_like(rates),
            "clip_frames": torch.tensor(spans, dtype=torch.float32),
        }

    def _latent_frames(self, frames: int) -> int:
        return 1 + -(-(frames - 1) // self.ratio)

    def _losses(self, batch: dict[str, Any]) -> Tensor:
        """Return the loss of each clip, (B,)."""
        states = self.text_encoder(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state  # (B, L, Dt)
        sigmas = batch["sigmas"]  # (B,) or (B, T')
        of_frames = sigmas[:, None, :, None, None] if sigmas.ndim == 2 else sigmas
        noisy = interpolate(batch["latents"], batch["noise"], of_frames)  # (B, C, T', h, w)
        predicted = self.transformer(
            noisy if self._is_causal else beside(noisy, batch["shown"], batch["known"]),
            encoder_hidden_states=states,
            timestep=1000 * sigmas,
            encoder_attention_mask=batch["attention_mask"].bool(),
            frame_rate=batch["frame_rate"],
            clip_frames=batch["clip_frames"],
        ).sample  # (B, C, T', h, w)
        # Clean frames hold no noise that could be predicted.
        weights = of_frames > 0 if sigmas.ndim == 2 else None
        loss = flow_matching_loss(predicted, batch["latents"], batch["noise"], weights)  # (B,)
        if self.transformer.training and self.config.task.change_weight:
            stacked = getattr(self.vae, "stacked", 1)
            change = frame_change_loss(predicted, batch["latents"], batch["noise"], stacked)  # (B,)
            loss = loss + self.config.task.change_weight * change
        if self.transformer.training and batch["latents"].shape[2] == 1:
            # Images don't pass the attention over time, and processes wait for the gradient of every parameter.
            unused = [one.sum() for name, one in self.transformer.named_parameters() if "_time." in name]
            loss = loss + 0.0 * sum(unused, loss.new_zeros(()))
        return loss

    def validate(self) -> dict[str, float]:
        """Return the loss of held-out clips, by kind, once with nothing known and once with a mask for each clip.

        Causal networks, which are shown no masks, are measured once, on clips of one noise level.
        """
        if self._is_causal:
            return super().validate()
        values = {}
        for kind, batch in self._validation.items():
            moved = {name: tensor.to(self.context.device) for name, tensor in batch.items()}
            values[f"loss_{kind}_completed"] = float(self._losses(moved).mean())
            nothing = {name: torch.zeros_like(moved[name]) for name in ("shown", "known")}
            values[f"loss_{kind}"] = float(self._losses({**moved, **nothing}).mean())
        return {"loss": sum(values.values()) / len(values), **values}

    def preview(self, path: Path) -> None:
        """Generate clips of held-out captions, one a row, some of their frames; write captions to `prompts.txt`."""
        clips = self._previewed(path).frames  # (B, T, 3, H, W) in [0, 1]
        shown = torch.linspace(0, clips.shape[1] - 1, PREVIEW_COLUMNS).long()
        save_grid(clips[:, shown].flatten(0, 1).float() * 2 - 1, path, PREVIEW_COLUMNS)

    def _preview_prompts(self) -> list[str]:
        """Return held-out captions, those of each kind in turns."""
        groups = [captions_of(each, PREVIEW_CLIPS) for each in self.data.held_out_groups(PREVIEW_CLIPS).values()]
        return [groups[row % len(groups)][row // len(groups)] for row in range(min(PREVIEW_CLIPS, len(groups[0])))]

    def _validation_batch(self, number: int, examples: Examples) -> dict[str, Tensor]:
        """Return the fixed batch of the held-out clips of kind `number`."""
        task, clips = self.config.task, cast(ClipPool, examples)
        encoded = self.encode(examples, self.vae, self.context.device).float()
        frames = int(clips.lengths[0])
        rows = np.flatnonzero(clips.lengths == frames)
        rng = np.random.default_rng(number)
        batch = self._known(clips, rows, encoded[rows], frames, rng, fraction=1.0)
        shape = batch["latents"].shape
        return {
            **batch,
            "noise": torch.randn(shape, generator=torch.Generator().manual_seed(number)),
            "sigmas": logit_normal_grid(shape[0], task.sigma_mean, task.sigma_std, task.sigma_shift),  # (B,)
            **self._timing(clips, rows, frames),
            **tokenize(self.tokenizer, captions_of(examples, len(rows))),
        }

    def _transformer(self) -> TextDiT:
        """Return a new transformer, or one of clips that starts from that of `init_from`, in float32."""
        start, model = self.config.data.init_from, self.config.model
        if start is not None:
            trained = TextDiT.from_pretrained(start / "transformer", torch_dtype=torch.float32)
            own = trained.config.space_time
            shown = 0 if model.space_time == "causal" else self._known_channels(trained.out_channels)
            same = all(trained.config[name] == value for name, value in model.frame_attention().items())
            if trained.config.in_channels == trained.out_channels + shown and same:
                return trained
            if own == "factorised" and model.space_time != own:
                raise ConfigError(
                    f"model.space_time = {model.space_time!r}, but data.init_from is factorised: set that"
                )
            settings = {"clip_conditioning": True, "sample_size": self.latents.shape[-1], **model.frame_attention()}
            return clip_transformer(trained, shown, **settings)
        channels, side = self.latents.shape[1], self.latents.shape[-1]
        return TextDiT(
            in_channels=channels + (0 if model.space_time == "causal" else self._known_channels(channels)),
            out_channels=channels,
            sample_size=side,
            text_dim=self.text_encoder.config.d_model,
            clip_conditioning=True,
            **model.model_dump(exclude={"text"}),
        )

    def _known_channels(self, channels: int) -> int:
        """Return the channels that a network sees beside C noisy ones; see `pipelines.inputs.known_latents`."""
        return channels + self.ratio

    def _pipeline(self, transformer: Any, text_encoder: Any, vae: Any) -> Any:
        from pipelines.text_to_video import TextToVideoPipeline

        data, negative = self.config.data, self.config.task.preview_negative_prompt
        return self._assembled(
            TextToVideoPipeline,
            transformer,
            text_encoder,
            vae,
            num_frames=self.config.task.preview_frames,
            frame_rate=data.frame_rates[0],
            window_frames=data.num_frames,
            window_overlap=min(DEFAULT_OVERLAP, data.num_frames - 1),
            **({"negative_prompt": negative} if negative else {}),
        )
