"""Pipelines that generate at once, with the call of the real ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from PIL import Image


class FakePipeline:
    """Ours in small: settable interrupt, cheap preview, a decode that is counted."""

    _callback_tensor_inputs = ("latents", "denoised_latents")
    default_sample_size = 8
    vae_scale_factor = 16
    device = torch.device("cpu")

    def __init__(self, step_seconds: float = 0.0) -> None:
        self.step_seconds = step_seconds
        self.steps_run = 0
        self.decodes = 0
        self.running = 0
        self.overlaps = 0
        self.hooks_freed = 0
        self.in_step = threading.Event()
        # Called in each step with its index from 0. A test holds a step here until it is ready, instead of guessing
        # how long a step takes on this machine.
        self.at_step: Callable[[int], object] = lambda step: None
        self.components = {"transformer": torch.nn.Linear(4, 4)}
        self.scheduler = SimpleNamespace(config={"shift": 3.0, "_private": 1, "sigmas": object()})
        self.finish_now = False
        self._interrupt = False

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    def set_progress_bar_config(self, **kwargs: object) -> None:
        self.progress = kwargs

    def maybe_free_model_hooks(self) -> None:
        self.hooks_freed += 1

    def unknown_words(self, texts: list[str]) -> tuple[str, ...]:
        return ()

    def preview(self, latents: torch.Tensor) -> list[Image.Image]:
        return [Image.new("RGB", latents.shape[-2:][::-1], (10, 200, 30)) for _ in latents]

    def __call__(
        self, prompt, negative_prompt=None, height=None, width=None, num_inference_steps=28, guidance_scale=4.0,
        generator=None, output_type="pil", callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=("latents",),
    ):  # fmt: skip
        self.running += 1
        self.overlaps += self.running > 1
        try:
            return self._run(height, width, num_inference_steps, generator, callback_on_step_end,
                             callback_on_step_end_tensor_inputs)  # fmt: skip
        finally:
            self.running -= 1

    def _run(self, height, width, steps, generator, callback, names):
        if width % 16 or height % 16:
            raise ValueError(f"width={width} is not usable: expected a multiple of 16.")
        self._interrupt = False
        latents = torch.randn(1, 3, height // 16, width // 16, generator=generator)
        for i in range(steps):
            if self._interrupt:
                return SimpleNamespace(images=[])
            self.in_step.set()
            time.sleep(self.step_seconds)
            self.at_step(i)
            self.steps_run += 1
            if callback is not None:
                callback(self, i, torch.tensor(0.0), dict.fromkeys(names, latents))
        if self._interrupt:
            return SimpleNamespace(images=[])
        self.decodes += 1
        values = (latents[0].sigmoid() * 255).to(torch.uint8).permute(1, 2, 0).numpy()
        return SimpleNamespace(images=[Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST)])


class ForeignPipeline(FakePipeline):
    """Like a pipeline of diffusers: `interrupt` can only be read, no cheap preview, latents only."""

    _callback_tensor_inputs = ("latents",)
    interrupt = property(lambda self: self._interrupt)
    preview = None
