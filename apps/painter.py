"""Paint one picture or clip with one pipeline: watch its steps, preview them, stop between two of them.

Works with our pipelines and with any diffusers text-to-image pipeline: what a call may carry is read from its
signature, and a wish that a pipeline cannot fulfil is an error, never a no-op.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from apps.shelf import LoadedModel, Pipeline

logger = logging.getLogger(__name__)

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
        frames: of a clip; None for a picture.
    """

    prompt: str
    negative_prompt: str
    height: int
    width: int
    steps: int
    guidance: float | None
    seed: int
    frames: int | None = None


OnStep = Callable[[int, Image.Image | None], None]
"""Told after each step: steps done (from 1), and a preview if it is time for one."""


def paint(
    model: LoadedModel, canvas: Canvas, stop: threading.Event, on_step: OnStep, deadline: float = float("inf")
) -> list[Image.Image]:
    """Paint one picture or clip.

    Args:
        model: the pipeline and what it accepts.
        canvas: what to paint.
        stop: once set, no further step starts and nothing is decoded.
        on_step: told after each step, in this thread.
        deadline: `time.monotonic()` value after which the picture is given up.

    Returns:
        The frames; one for a picture.

    Raises:
        StopRequestedError: `stop` was set.
        TimeoutError: the deadline passed.
        ValueError: the pipeline doesn't accept what is asked.
    """
    watch = _StepWatch(model, canvas, stop, on_step, deadline)
    arguments = _arguments(model, canvas)
    if "callback_on_step_end" in model.accepts:
        arguments["callback_on_step_end"] = watch
        if "callback_on_step_end_tensor_inputs" in model.accepts:
            arguments["callback_on_step_end_tensor_inputs"] = [watch.tensor]
    elif "callback" in model.accepts:  # older pipelines
        arguments["callback"] = watch.old_style
    try:
        output = model.pipe(**arguments)
    except BaseException:
        model.pipe.maybe_free_model_hooks()  # the pipeline's last line, which a stop or an error has skipped
        raise
    if watch.late:
        raise TimeoutError
    if stop.is_set():
        raise StopRequestedError
    return [output.images[0]] if model.frames is None else list(output.frames[0])


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
        arguments[model.guidance_argument] = canvas.guidance
    if canvas.frames is not None:
        arguments[model.frames_argument] = canvas.frames
    for name in arguments:
        if name not in model.accepts:
            raise ValueError(f"The model {model.key!r} has no setting {name!r}; leave it out.")
    return arguments | _guidance_extras(model, canvas) | _other_extras(model)


def _guidance_extras(model: LoadedModel, canvas: Canvas) -> dict[str, Any]:
    """Settle what pipelines with a `true_cfg_scale` would silently ignore: it and a negative prompt need each other.

    Raises:
        ValueError: a negative prompt for a model whose guidance is distilled into it.
    """
    if "true_cfg_scale" not in model.accepts:
        return {}
    if model.guidance_argument == "true_cfg_scale":
        needs_negative = canvas.guidance is not None and canvas.guidance > 1 and not canvas.negative_prompt
        return {"negative_prompt": " "} if needs_negative else {}
    if canvas.negative_prompt:
        raise ValueError(
            f"The model {model.key!r} has its guidance built in and takes no negative prompt; leave it out."
        )
    return {}


def _other_extras(model: LoadedModel) -> dict[str, Any]:
    """Settle what some pipelines would change behind one's back."""
    extras: dict[str, Any] = {}
    if "use_resolution_binning" in model.accepts:  # would paint another size than asked for and scale the picture
        extras["use_resolution_binning"] = False
    length = getattr(getattr(getattr(model.pipe, "transformer", None), "config", None), "max_text_seq_length", None)
    if length is not None and "max_sequence_length" in model.accepts:  # the network takes this length and no other
        extras["max_sequence_length"] = length
    if "clean_caption" in model.accepts and not all(map(importlib.util.find_spec, ("bs4", "ftfy"))):
        extras["clean_caption"] = False  # else diffusers warns at every picture that it can't be done
    return extras


class _StepWatch:
    """The callback that diffusers calls after each step."""

    def __init__(
        self, model: LoadedModel, canvas: Canvas, stop: threading.Event, on_step: OnStep, deadline: float
    ) -> None:
        offered = getattr(model.pipe, "_callback_tensor_inputs", ["latents"])
        # The estimate of the finished picture shows far earlier what it will be than the noisy latents.
        self.tensor = "denoised_latents" if "denoised_latents" in offered else "latents"
        self.late = False
        self._model = model
        self._canvas = canvas
        self._stop = stop
        self._on_step = on_step
        self._deadline = deadline
        self._next_preview = 0.0
        self._before: Tensor | None = None
        self._can_preview = model.can_preview

    def __call__(self, pipe: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.late = time.monotonic() > self._deadline
        if self._stop.is_set() or self.late:
            if not self._model.can_interrupt:
                raise TimeoutError if self.late else StopRequestedError
            pipe.interrupt = True
            return {}
        self._on_step(step + 1, self._preview(tensors.get(self.tensor)))
        return {}

    def old_style(self, step: int, timestep: Tensor, latents: Tensor) -> None:
        """Stand in for the callback of older pipelines, which get the latents and give nothing back."""
        self(self._model.pipe, step, timestep, {self.tensor: latents})

    def _preview(self, latents: Tensor | None) -> Image.Image | None:
        """Show the latents if the model can and if it's time again."""
        before, self._before = self._before, latents
        started = time.monotonic()
        if latents is None or not self._can_preview or started < self._next_preview:
            return None
        try:
            preview = self._show(before, latents)
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            # The picture matters more than the view on it; latents of an unheard-of kind shall not end the work.
            self._can_preview = False
            logger.warning("the model %r paints without previews: %s", self._model.key, error)
            return None
        ended = time.monotonic()
        self._next_preview = ended + max(PREVIEW_SECONDS, (ended - started) / PREVIEW_SHARE)
        return preview

    def _show(self, before: Tensor | None, latents: Tensor) -> Image.Image:
        """Make the small picture of latents; those of a flow are first led to where they are going."""
        pipe, canvas = self._model.pipe, self._canvas
        if callable(getattr(pipe, "preview", None)):
            return pipe.preview(latents)[0]
        from pipelines.previews import guess_finished, is_flow, preview  # with diffusers, imported by now

        if before is not None and is_flow(pipe):
            latents = guess_finished(pipe, before, latents)
        return preview(pipe, latents, canvas.height, canvas.width, canvas.frames)[0]
