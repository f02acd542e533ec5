"""Distillation to a few steps as a LoRA: each step learns to go where many guided steps of the untouched model go.

The student's steps have fixed noise levels. From noise and prompts alone the model itself makes paths to data, with
guidance and in many small steps (`apps.training.trajectories`); between two levels the student is to take one straight
step without guidance (progressive distillation, arXiv 2202.00512, and guidance distillation, 2210.03142, at once).
"""

import hashlib
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from apps.training.config import ConfigError, TaskSection, TrainConfig
from apps.training.data import open_data
from apps.training.data.config import CaptionedData
from apps.training.image_grid import save_grid
from apps.training.task import TaskContext
from apps.training.tasks.adapters import AdapterTask
from apps.training.tasks.lora_config import LoraModel, LoraOptimizer, LoraRun, LoraSection
from apps.training.trajectories import guided_path
from pipelines.network_calls import euler_levels, prompt_argument

MAKE = 32  # paths that are made at once
HELD_OUT = 0.05  # share of the paths


class FewStepSection(TaskSection):
    """The `[task]` section.

    Attributes:
        student_steps: Steps of the student.
        substeps: Steps of the model for each of them, by Heun's method: each asks it twice.
        guidance: Scale of classifier-free guidance that the student learns to do without; unset is the pipeline's
            default, and 1, none, for models that take their guidance scale as an input (`model.guidance`).
        paths: How many are made.
        preview_images: Images of a preview.
        preview_seed: Of their noise.
    """

    kind: Literal["few_step"]
    student_steps: int = Field(default=4, ge=1, le=16)
    substeps: int = Field(default=3, ge=1)
    guidance: float | None = Field(default=None, ge=0)
    paths: int = Field(default=3000, ge=2)
    preview_images: int = Field(default=8, ge=1)
    preview_seed: int = Field(default=0, ge=0)


class FewStepData(CaptionedData):
    """The `[data]` section: where the prompts come from. Images are not looked at.

    Attributes:
        resolution: Side of the images in pixels; unset is the model's own.
    """

    resolution: int | None = Field(default=None, ge=16)


class FewStepConfig(TrainConfig):
    """A whole configuration of distillation."""

    run: LoraRun
    optimizer: LoraOptimizer = LoraOptimizer()
    task: FewStepSection
    data: FewStepData
    model: LoraModel
    lora: LoraSection = LoraSection(rank=32, layers=["all"])


class FewStepTask(AdapterTask):
    """Distil a pipeline of flow matching to a few steps. See `apps.training.task.Task`."""

    config: FewStepConfig
    config_class: ClassVar[type[TrainConfig]] = FewStepConfig
    smoke: ClassVar[tuple[str, ...]] = ("task.paths=8", "task.substeps=1", "task.preview_images=2")

    def __init__(self, config: FewStepConfig, context: TaskContext) -> None:
        super().__init__(config, context)
        task, info = config.task, self.inputs.info
        if self.process.prediction != "velocity":
            raise ConfigError(
                f"{config.model.pretrained} predicts {self.process.prediction}: only models of flow matching can be "
                "distilled"
            )
        if self.process.bounds is not None:
            raise ConfigError(
                f"{config.model.pretrained} has several networks that share the noise levels: only models with one can "
                "be distilled"
            )
        side = config.data.resolution
        self.bucket = (info.frames or 1, side or info.height, side or info.width)
        self.guidance = self._guidance()
        self.levels = self._levels()  # (S + 1,)
        data = open_data(config.data, self.bucket[1], config.run.folder, quiet=context.rank > 0)
        self.prompts = list(data.captions(task.paths, config.run.seed))
        if context.is_dry_run:
            self.prompts = sorted(self.prompts, key=len)[-2:]  # one is held out; long ones need most memory
        with context.main_process_first():
            self.inputs.arguments(self.bucket, [*dict.fromkeys(self.prompts), ""])
            self.paths = self._empty_paths() if context.is_dry_run else self._paths()  # (P, S + 1, ...) float16
        self.held_out = max(1, round(HELD_OUT * len(self.paths)))
        self.adapted = self.add_adapters()

    def _guidance(self) -> float:
        """Return the scale of the guidance that the student learns to do without."""
        task, info = self.config.task, self.inputs.info
        if info.guidance_kind == "classifier_free":
            return (info.guidance if task.guidance is None else task.guidance) or 1.0
        if task.guidance not in (None, 0, 1):
            raise ConfigError(
                f"task.guidance = {task.guidance:g}: {self.config.model.pretrained} has no classifier-free guidance; "
                "leave it out, and set model.guidance where the model takes the scale as an input"
            )
        return 1.0

    def _levels(self) -> Tensor:
        """Return the noise levels at which the pipeline makes the student's steps, (S + 1,) from about 1 to 0."""
        call = self.inputs.call(self.bucket).pipeline_arguments
        try:
            return euler_levels(self.pipe, self.network, call, self.config.task.student_steps)
        except ValueError as error:
            raise ConfigError(f"model.pretrained = {self.config.model.pretrained!r}: {error}") from error

    def _paths(self) -> Tensor:
        """Return the model's paths, from a file if an earlier run has made them."""
        task, model, run = self.config.task, self.config.model, self.config.run
        settings = (
            self.inputs.key, self.levels.tolist(), task.substeps, self.guidance, self.bucket, self.prompts, run.seed,
            run.mixed_precision, model.dtype, model.network, model.guidance, sorted(model.options.items()),
        )  # fmt: skip
        name = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
        file = self.config.run.output / "cache" / f"paths-{name}.safetensors"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            starts = range(0, len(self.prompts), MAKE)
            shown = track(starts, "making paths", console=Console(stderr=True), disable=self.context.rank > 0)
            made = torch.cat([self._made(start) for start in shown])
            temporary = file.with_suffix(".tmp")
            save_file({"paths": made}, temporary)
            temporary.rename(file)
        return load_file(file)["paths"]

    def _empty_paths(self) -> Tensor:
        """Return what `_paths` does for these prompts without its values: zeros, (P, S + 1, ...) float16."""
        return torch.zeros(
            len(self.prompts), len(self.levels), *self.inputs.call(self.bucket).sample_shape, dtype=torch.float16
        )

    def ahead(self) -> str:
        """Say how often the network is asked to make the paths."""
        task = self.config.task
        calls = (2 * task.student_steps * task.substeps - 1) * (2 if self.guidance > 1 else 1)
        return f"{task.paths:,} paths are made first, by {calls} calls of the network each"

    def _made(self, start: int) -> Tensor:
        """Make some paths, (b, S + 1, ...) float16 on the CPU."""
        prompts, task = self.prompts[start : start + MAKE], self.config.task
        shape = self.inputs.call(self.bucket).sample_shape
        generator = torch.Generator().manual_seed(self.config.run.seed * 1_000_003 + start)
        noise = torch.randn((len(prompts), *shape), generator=generator).to(self.context.device)  # (b, ...)
        cond, uncond = (
            self.to_device(self.inputs.arguments(self.bucket, texts)) for texts in (prompts, [""] * len(prompts))
        )
        with self.context.autocast():
            path = guided_path(
                lambda sample, times, arguments: self.predict(self.bucket, sample, times, list(arguments)).float(),
                self.process, noise, self.levels, task.substeps, self.guidance, cond, uncond,
            )  # fmt: skip
        return path.transpose(0, 1).half().cpu()  # (b, S + 1, ...)

    def batch(self, index: int) -> dict[str, Any]:
        """Return where steps begin and end, (B, ...), the levels there, (B,), and the network's arguments."""
        address = self.context.address(self.config.run, index)
        rng = address.rng()
        rows = rng.integers(self.held_out, len(self.paths), address.size)
        return self._steps(rows, rng.integers(0, self.config.task.student_steps, address.size))

    def _steps(self, rows: np.ndarray, steps: np.ndarray) -> dict[str, Any]:
        numbers, at = torch.from_numpy(rows), torch.from_numpy(steps)
        return {
            "start": self.paths[numbers, at].float(),  # (B, ...)
            "end": self.paths[numbers, at + 1].float(),  # (B, ...)
            "from": self.levels[at],  # (B,)
            "to": self.levels[at + 1],  # (B,)
            "arguments": self.inputs.arguments(self.bucket, [self.prompts[row] for row in rows]),
        }

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean squared error of the step's slope."""
        return self._losses(batch).mean(), {}

    def _losses(self, batch: dict[str, Any]) -> Tensor:
        times = self.process.timesteps(batch["from"])  # (B,)
        predicted = self.predict(self.bucket, batch["start"], times, batch["arguments"]).float()  # (B, ...)
        length = (batch["to"] - batch["from"]).float().reshape(-1, *[1] * (predicted.ndim - 1))  # (B, 1, ...)
        slope = (batch["end"] - batch["start"]) / length  # (B, ...)
        return (predicted - slope).square().flatten(1).mean(dim=1)  # (B,)

    def validate(self) -> dict[str, float]:
        """Return the loss on held-out paths, over all steps and of each."""
        rows = np.arange(min(self.held_out, 64))
        values = {}
        for step in range(self.config.task.student_steps):
            batch = self.to_device(self._steps(rows, np.full(len(rows), step)))
            values[f"loss_step_{step + 1}"] = float(self._losses(batch).mean())
        return {"loss": sum(values.values()) / len(values), **values}

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        """Generate held-out prompts in the student's steps, without guidance."""
        prompts = self.prompts[: self.config.task.preview_images]
        images = [self._drawn(prompt, number) for number, prompt in enumerate(prompts)]
        save_grid(torch.stack(images) * 2 - 1, path, min(len(images), 8))
        (path.parent / "prompts.txt").write_text("\n".join(prompts) + "\n")

    def _drawn(self, prompt: str, number: int) -> Tensor:
        info = self.inputs.info
        name, value = prompt_argument(info, prompt)
        call = {**self.inputs.call(self.bucket).pipeline_arguments, name: value}
        call["num_inference_steps"] = self.config.task.student_steps
        generator = torch.Generator().manual_seed(self.config.task.preview_seed + number)
        made = self.pipe(**call, generator=generator, output_type="np")
        image = torch.as_tensor(np.asarray(getattr(made, info.output)[0])).movedim(-1, -3).float()
        return image if image.ndim == 3 else image[len(image) // 2]

    def metadata(self) -> dict[str, str]:
        """Return what the file says of itself: also how many steps it is for."""
        name = self.inputs.info.guidance_argument
        told = self.inputs.call(self.bucket).pipeline_arguments.get(name)
        guidance = {} if told is None else {"few_step.guidance": f"{told:g}"}
        return {**super().metadata(), "few_step.steps": str(self.config.task.student_steps), **guidance}
