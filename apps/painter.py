"""Paint one picture with one pipeline: watch its steps, preview them, stop between two of them.

Works with our pipelines and with any diffusers text-to-image pipeline: what a call may carry is read from its
signature, and a wish that a pipeline cannot fulfil is an error, never a no-op.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from apps.shelf import LoadedModel, Pipeline

PREVIEW_SECONDS = 0.15
"""Previews come no faster than this; an eye doesn't need more."""
PREVIEW_SHARE = 0.05
"""Nor may they cost more than this share of the time."""


class StopRequestedError(Exception):
    """The picture was given up because somebody asked for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """What one picture needs, with nothing left open.

    Attributes:
        prompt: what to paint.
        negative_prompt: what to keep away from; empty for nothing.
        height: pixels.
        width: pixels.
        steps: denoising steps.
        guidance: guidance scale; None for a pipeline that has none.
        seed: of the noise.
    """

    prompt: str
    negative_prompt: str
    height: int
    width: int
    steps: int
    guidance: float | None
    seed: int


OnStep = Callable[[int, Image.Image | None], None]
"""Told after each step: steps done (from 1), and a preview if it is time for one."""


def paint(
    model: LoadedModel, canvas: Canvas, stop: threading.Event, on_step: OnStep, deadline: float = float("inf")
) -> Image.Image:
    """Paint one picture.

    Args:
        model: the pipeline and what it accepts.
        canvas: what to paint.
        stop: once set, no further step starts and nothing is decoded.
        on_step: told after each step, in this thread.
        deadline: `time.monotonic()` value after which the picture is given up.

    Returns:
        The picture.

    Raises:
        StopRequestedError: `stop` was set.
        TimeoutError: the deadline passed.
        ValueError: the pipeline doesn't accept what is asked.
    """
    watch = _StepWatch(model, stop, on_step, deadline)
    arguments = _arguments(model, canvas)
    if "callback_on_step_end" in model.accepts:
        arguments["callback_on_step_end"] = watch
        if "callback_on_step_end_tensor_inputs" in model.accepts:
            arguments["callback_on_step_end_tensor_inputs"] = [watch.tensor]
    try:
        images = model.pipe(**arguments).images
    except StopRequestedError:
        model.pipe.maybe_free_model_hooks()  # the pipeline's last line, which the stop has skipped
        raise
    if watch.late:
        raise TimeoutError
    if stop.is_set():
        raise StopRequestedError
    return images[0]


def _arguments(model: LoadedModel, canvas: Canvas) -> dict[str, Any]:
    """Translate a canvas into the keyword arguments of the pipeline's call."""
    arguments: dict[str, Any] = {
        "prompt": canvas.prompt,
        "height": canvas.height,
        "width": canvas.width,
        "num_inference_steps": canvas.steps,
        # On the CPU whatever the device: then the same seed starts from the same noise everywhere.
        "generator": torch.Generator("cpu").manual_seed(canvas.seed),
        "output_type": "pil",
    }
    if canvas.negative_prompt:
        arguments["negative_prompt"] = canvas.negative_prompt
    if canvas.guidance is not None:
        arguments["guidance_scale"] = canvas.guidance
    for name in arguments:
        if name not in model.accepts:
            raise ValueError(f"The model {model.key!r} has no setting {name!r}; leave it out.")
    return arguments


class _StepWatch:
    """The callback that diffusers calls after each step."""

    def __init__(self, model: LoadedModel, stop: threading.Event, on_step: OnStep, deadline: float) -> None:
        offered = getattr(model.pipe, "_callback_tensor_inputs", ["latents"])
        # The estimate of the finished picture shows far earlier what it will be than the noisy latents.
        self.tensor = "denoised_latents" if "denoised_latents" in offered else "latents"
        self.late = False
        self._model = model
        self._stop = stop
        self._on_step = on_step
        self._deadline = deadline
        self._next_preview = 0.0

    def __call__(self, pipe: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.late = time.monotonic() > self._deadline
        if self._stop.is_set() or self.late:
            if not self._model.can_interrupt:
                raise TimeoutError if self.late else StopRequestedError
            pipe.interrupt = True
            return {}
        self._on_step(step + 1, self._preview(tensors.get(self.tensor)))
        return {}

    def _preview(self, latents: Tensor | None) -> Image.Image | None:
        """Show the latents (1, C, H, W) if the model can and if it's time again."""
        started = time.monotonic()
        if latents is None or not self._model.can_preview or started < self._next_preview:
            return None
        preview = self._model.pipe.preview(latents)[0]
        ended = time.monotonic()
        self._next_preview = ended + max(PREVIEW_SECONDS, (ended - started) / PREVIEW_SHARE)
        return preview
