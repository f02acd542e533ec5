"""LoRA fine-tuning of any pipeline with a transformer that denoises: ours and those of diffusers.

The pipeline itself says how its network is called (`pipelines.network_calls`), its scheduler what the network predicts
(`sampling.diffusion_targets`). What is left is short: noise on latents, a prediction, its squared error.
"""

import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from apps.perceptual.efficientnet_lite import load_efficientnet_lite0
from apps.perceptual.measures import image_features
from apps.training.checkpoint_choice import choose, plot_scores, read_scores, write_choice
from apps.training.class_images import make_class_images
from apps.training.config import ConfigError, TrainConfig
from apps.training.data.file_rows import Bucket, FileRows
from apps.training.data.fine_tuning import FineTuningSet, open_fine_tuning
from apps.training.image_grid import save_grid
from apps.training.task import TaskContext
from apps.training.tasks.adapters import AdapterTask
from apps.training.tasks.lora_config import LoraConfig, LoraTaskSection
from pipelines.network_calls import prompt_argument, size_arguments
from sampling.diffusion_targets import mean_squared_error

LEVELS = 4  # noise levels at which each held-out file is measured
PREVIEW_FRAMES = 8  # of a clip, in a preview


class LoraTask(AdapterTask):
    """Train adapters on images or clips. See `apps.training.task.Task`."""

    config: LoraConfig
    config_class: ClassVar[type[TrainConfig]] = LoraConfig
    smoke: ClassVar[tuple[str, ...]] = ("task.validation_examples=2", "task.preview_steps=2", "task.preview_images=2")

    def __init__(self, config: LoraConfig, context: TaskContext) -> None:
        super().__init__(config, context)
        with context.main_process_first():
            make_class_images(self.pipe, config, console=Console(stderr=True, quiet=context.rank > 0))
        self.data = self._open_data()
        with context.main_process_first():  # the first process writes what the others read
            self._prepare()
        self.adapted = self.add_adapters(next(iter(self.data.histogram())))
        self._validation = self._fixed_batches(self.data.held_out)
        self._training = self._fixed_batches(self.data, len(self._validation))

    # ------------------------------------------------------------------ parts

    def make_inputs(self, cache: Path) -> Any:
        """Return what the network is shown; see `AdapterTask.make_inputs`."""
        inputs = super().make_inputs(cache)
        fields, values = LoraTaskSection.model_fields, self.config.task
        given = [name for name in ("sigma_mean", "sigma_std") if getattr(values, name) != fields[name].default]
        if given and not self.process.is_flow:
            shown = ", ".join(f"task.{name} = {getattr(values, name)}" for name in given)
            raise ConfigError(
                f"{shown} does nothing for {self.config.model.pretrained}: the timesteps of its "
                f"{type(self.pipe.scheduler).__name__} are drawn evenly, only those of flows aren't; remove it"
            )
        return inputs

    def _open_data(self) -> FineTuningSet:
        info, section = self.inputs.info, self.config.data
        resolution = section.resolution or round((info.height * info.width) ** 0.5)
        if info.sizes and section.aspect_ratio_buckets:  # it makes squares of one size and no other
            if section.max_aspect_ratio != type(section).model_fields["max_aspect_ratio"].default:
                raise ConfigError(
                    f"data.max_aspect_ratio = {section.max_aspect_ratio}: {self.config.model.pretrained} makes squares "
                    "only; remove it"
                )
            section = section.model_copy(update={"aspect_ratio_buckets": False})
        if section.num_frames > 1 and info.frames is None:
            raise ConfigError(
                f"data.num_frames = {section.num_frames}, but {self.config.model.pretrained} makes images: set it to 1"
            )
        run = self.config.run.folder
        listed = {"data.folder": section.folder if section.kind == "images" else None}
        listed["data.class_folder"] = section.class_folder
        for name, source in listed.items():
            if source is not None and run.resolve().is_relative_to(source.resolve()):
                raise ConfigError(
                    f"run.output = {str(self.config.run.output)!r} lies in {name} = {str(source)!r}, so previews "
                    "would be trained on: choose a folder outside"
                )
        return open_fine_tuning(section, resolution, self.inputs.size_step(), run, quiet=self.context.rank > 0)

    def _prepare(self) -> None:
        """Encode files and captions that no earlier run has encoded."""
        quiet = self.context.rank > 0

        def progress(items: Any) -> Any:
            return track(items, "encoding files and captions", console=Console(stderr=True), disable=quiet)

        for rows in (self.data, self.data.held_out, self.data.class_images):
            if rows is not None:
                self.inputs.prepare(rows, progress)

    # ---------------------------------------------------------------- batches

    def batch(self, index: int) -> dict[str, Any]:
        """Return latents, noise, timesteps and the network's arguments; with class images, a second group of them."""
        address = self.context.address(self.config.run, index)
        groups = [self._group(self.data, address, 1.0, 0)]
        if self.data.class_images is not None:
            groups.append(self._group(self.data.class_images, address, self.config.task.prior_loss_weight, 1))
        return {"groups": groups}

    def _group(self, rows: FileRows, address: Any, weight: float, series: int) -> dict[str, Any]:
        """Draw rows of one bucket, their captions, noise and timesteps: a function of the address alone."""
        rng = np.random.default_rng((address.seed, address.number, series, 3))
        numbers = rows.draw(address).tolist()
        captions = [rows.caption(number, rng) for number in numbers]
        return self._weighted(rows, numbers, captions, int(rng.integers(2**62)), weight)

    def _weighted(
        self, rows: FileRows, numbers: list[int], captions: list[str], seed: int, weight: float
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        return {**self._drawn(rows, numbers, captions, generator), "bucket": rows.bucket(numbers[0]), "weight": weight}

    def sizes(self) -> dict[Bucket, int]:
        """Return how many files are trained on of each size."""
        return self.data.histogram()

    def largest_batch(self) -> dict[str, Any]:
        """Return a batch of the largest files and their longest captions, with as large class images beside them."""
        groups = []
        for rows in filter(None, (self.data, self.data.class_images)):
            largest = max(rows.histogram(), key=math.prod)
            number = next(row for row in range(len(rows)) if rows.bucket(row) == largest)
            caption, count = max(rows.captions_in(largest), key=len), self.config.run.batch_size
            groups.append(self._weighted(rows, [number] * count, [caption] * count, 0, 1.0))
        return {"groups": groups}

    def _drawn(
        self, rows: FileRows, numbers: list[int], captions: list[str], generator: torch.Generator
    ) -> dict[str, Any]:
        """Return what the loss of rows of one bucket is computed from."""
        latents, task = self.inputs.latents(rows, numbers), self.config.task  # (B, ...)
        return {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),  # (B, ...)
            "timesteps": self.process.draw_timesteps(len(numbers), task.sigma_mean, task.sigma_std, generator),  # (B,)
            "arguments": self.inputs.arguments(rows.bucket(numbers[0]), captions),
        }

    def _fixed_batches(self, rows: FileRows, count: int | None = None) -> list[dict[str, Any]]:
        """Return rows of the first files as they are measured, each in a group of its own; none is mirrored."""
        found, most = [], count or self.config.task.validation_examples
        for number in range(0, len(rows), rows.variants)[:most]:
            caption = rows.caption(number, np.random.default_rng(0), drop=False)
            found.append({**self._fixed(rows, number, caption), "bucket": rows.bucket(number), "weight": 1.0})
        return found

    def _fixed(self, rows: FileRows, number: int, caption: str) -> dict[str, Any]:
        """Return a row with fixed noise at evenly spread noise levels."""
        latents = self.inputs.latents(rows, [number]).repeat_interleave(LEVELS, dim=0)  # (K, ...)
        return {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=torch.Generator().manual_seed(number)),  # (K, ...)
            "timesteps": self.process.grid(LEVELS),  # (K,)
            "arguments": self.inputs.arguments(rows.bucket(number), [caption]) * LEVELS,
        }

    # ------------------------------------------------------------------- loss

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean squared error of the prediction; that of class images is added with its weight."""
        losses = [group["weight"] * self._losses(group).mean() for group in batch["groups"]]
        values = {"class_loss": losses[1].detach()} if len(losses) > 1 else {}
        return torch.stack(losses).sum(), values

    def _losses(self, group: dict[str, Any]) -> Tensor:
        """Return the loss of each sample, (B,)."""
        latents, noise, timesteps = group["latents"], group["noise"], group["timesteps"]
        noisy = self.process.add_noise(latents, noise, timesteps)  # (B, ...)
        predicted = self.predict(tuple(group["bucket"]), noisy, timesteps, group["arguments"])  # (B, ...)
        return mean_squared_error(predicted, self.process.target(latents, noise, timesteps))

    # ------------------------------------------------------- validate, preview

    def validate(self) -> dict[str, float]:
        """Return the mean loss of held-out files on fixed noise and timesteps."""
        return {"loss": self._fixed_loss(self._validation)}

    def _fixed_loss(self, groups: list[dict[str, Any]]) -> float:
        losses = [self._losses(self.to_device(group)).mean() for group in groups]
        return torch.stack(losses).mean().item()

    @torch.no_grad()
    def score(self, step: int) -> dict[str, float]:
        """Keep the adapters of a step as a file of their own and measure them, see `checkpoint_choice.Score`."""
        self.save_adapter(self.adapter_path(step))
        values = {"loss": self._fixed_loss(self._validation), "training_loss": self._fixed_loss(self._training)}
        if self.config.task.score_images:
            values["distance"] = self._distance()
        return values

    def adapter_path(self, step: int) -> Path:
        """Return where the adapters of a step are kept."""
        return self.config.run.folder / "loras" / f"step-{step:06d}.safetensors"

    def choose(self, log: Path) -> str:
        """Mark the best adapters: `best.json`, and a plot of all scores."""
        scores, folder = read_scores(log), self.config.run.folder
        choice = choose(scores, self.data.is_validated_on_training)
        kept = self.adapter_path(choice.best.step)
        kept = kept if kept.is_file() else kept.with_suffix("")  # loha, lokr
        write_choice(choice, kept.relative_to(folder).as_posix(), folder / "best.json")
        plot_scores(scores, choice.best.step, folder / "loss.png")
        return f"best so far: {kept} ({choice.advice})"

    def _distance(self) -> float:
        """Return the mean distance of features of generated images to those of held-out images of the same captions."""
        rows, found = self.data.held_out, []
        network = load_efficientnet_lite0(self.context.device)
        for number in range(min(len(rows), self.config.task.score_images)):
            caption = rows.caption(number, np.random.default_rng(0), drop=False)
            seed = self.config.task.preview_seed + number
            made = self.generate(caption, seed, rows.bucket(number)) * 2 - 1  # ([T,] 3, H, W)
            true = rows.pixels([number])[0]  # (3, [T,] H, W)
            pair = [_middle(made), _middle(true.transpose(0, 1) if true.ndim == 4 else true)]  # (3, H, W) each
            same = [nn.functional.interpolate(one[None].cpu(), (128, 128), mode="area") for one in pair]
            one, other = image_features(torch.cat(same), network=network)  # (F,) each
            found.append(1 - nn.functional.cosine_similarity(one, other, dim=0))
        return float(torch.stack(found).mean())

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        """Generate the preview prompts with fixed seeds, one image each (clips: one row of frames each)."""
        prompts = self.preview_prompts()
        images = [
            self.generate(prompt, self.config.task.preview_seed + number) for number, prompt in enumerate(prompts)
        ]
        is_clip = images[0].ndim == 4
        rows = [_frames(one) if is_clip else one[None] for one in images]
        side = max(row.shape[-1] for row in rows)
        same = [nn.functional.interpolate(row, (side, side), mode="area") for row in rows]
        save_grid(torch.cat(same) * 2 - 1, path, PREVIEW_FRAMES if is_clip else min(len(rows), 4))
        (path.parent / "prompts.txt").write_text("\n".join(prompts) + "\n")

    def preview_prompts(self) -> list[str]:
        """Return the prompts of previews: those of the configuration, or captions of held-out files."""
        task, rows = self.config.task, self.data.held_out
        if task.preview_prompts:
            return list(task.preview_prompts)
        count = min(task.preview_images, len(rows))
        return [rows.caption(number, np.random.default_rng(0), drop=False) for number in range(count)]

    @torch.no_grad()
    def generate(self, prompt: str, seed: int, bucket: Bucket | None = None) -> Tensor:
        """Generate one image (3, H, W), or clip (T, 3, H, W), in [0, 1] with the present adapters.

        Args:
            prompt: What it shows.
            seed: Of its noise.
            bucket: Its size; None is the one that most files have.
        """
        info, task = self.inputs.info, self.config.task
        frames, height, width = bucket or max(self.data.histogram().items(), key=lambda pair: pair[1])[0]
        name, value = prompt_argument(info, prompt)
        call = {**size_arguments(info, height, width, frames), **info.fixed, **self.config.model.options, name: value}
        if task.preview_steps is not None and "num_inference_steps" in info.parameters:
            call["num_inference_steps"] = task.preview_steps
        if task.preview_guidance is not None:
            call[info.guidance_argument] = task.preview_guidance
        generator = torch.Generator().manual_seed(seed)
        output = self.pipe(**call, generator=generator, output_type="np")
        made = torch.as_tensor(np.asarray(getattr(output, info.output)[0]))  # ([T,] H, W, 3)
        return made.movedim(-1, -3).float()


def _middle(image: Tensor) -> Tensor:
    """Return an image (3, H, W), or the frame in the middle of a clip (T, 3, H, W)."""
    return image if image.ndim == 3 else image[len(image) // 2]


def _frames(clip: Tensor) -> Tensor:
    """Return some frames of a clip (T, 3, H, W), evenly spread."""
    return clip[torch.linspace(0, len(clip) - 1, PREVIEW_FRAMES).long()]
