"""Images of a model before and after quantization: generated from the same noise, timed, compared, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from apps.service.media import contact_strip
from dit.runtime.hooks import find_networks
from dit.runtime.metrics import psnr
from dit.runtime.state import unwrap
from pipelines.info.inspection import info_of, pipelines_by_task

GAP, MARGIN, LINE = 8, 12, 20
"""Pixels of a sheet: between images, around them, and of a line of text."""
SIDE = 256
"""Of the images on a sheet, pixels; smaller ones are enlarged pixel by pixel, larger ones made smaller."""


@dataclass(frozen=True)
class Made:
    """An image, or a clip, and how long the networks took.

    Attributes:
        frames: one for an image.
        seconds: of a step, by the clock.
    """

    frames: tuple[Image.Image, ...]
    seconds: float


class Painter:
    """Generates with the standard call of a pipeline, whatever its class.

    Args:
        pipe: of ours or diffusers.
        steps: of a run; None is the model's own.
        guidance: scale; None is the model's own.

    Raises:
        ValueError: it generates neither from a text nor from a class.
    """

    def __init__(self, pipe: Any, steps: int | None = None, guidance: float | None = None) -> None:
        self.loaded = pipe
        self.pipe: Any = next(iter(pipelines_by_task(pipe).values()), None)
        if self.pipe is None:
            raise ValueError(f"{type(pipe).__name__} takes neither a prompt nor a class, so it can't be tried")
        self.info = info_of(self.pipe)
        given = {"steps": steps, "guidance": guidance}
        usual = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
        self.options = {
            self.info.arguments.get(name, usual[name]): value for name, value in given.items() if value is not None
        }
        unknown = sorted(set(self.options) - self.info.parameters)
        if unknown:
            raise ValueError(f"{type(self.pipe).__name__} takes no {', '.join(unknown)}; leave it out")

    @property
    def takes_classes(self) -> bool:
        """Whether it generates from classes instead of prompts."""
        return self.info.tasks[0] in ("class_to_image", "next_scale_class")

    def arguments(self, prompt: Any, seed: int) -> dict[str, Any]:
        """Return the arguments of a call.

        Args:
            prompt: text, or the number of a class.
            seed: of the noise.
        """
        name = self.info.arguments.get("label", "class_labels") if self.takes_classes else "prompt"
        given = {
            name: [prompt] if self.takes_classes else prompt,
            "generator": torch.Generator("cpu").manual_seed(seed),
        }
        return {**given, **self.options, **self.info.fixed}

    def calibrate(self, pipe: Any, prompt: Any, seed: int) -> None:
        """Generate for a calibration; decoding is left out where the pipeline can."""
        extra = {"output_type": "latent"} if {"latents", "output_type"} <= self.info.parameters else {}
        self.pipe(**self.arguments(prompt, seed), **extra)

    def paint(self, prompt: Any, seed: int) -> Made:
        """Generate one image or clip."""
        extra = {"output_type": "pil"} if "output_type" in self.info.parameters else {}
        with _clock(self.loaded) as calls:
            output = self.pipe(**{**self.arguments(prompt, seed), **extra})
        frames = list(output.frames[0]) if self.info.output == "frames" else [output.images[0]]
        scheduler = getattr(self.pipe, "scheduler", None) if self.info.steps is not None else None
        steps = len(getattr(scheduler, "timesteps", ())) or len(calls)
        return Made(tuple(_as_image(frame) for frame in frames), sum(calls) / max(steps, 1))


@contextmanager
def _clock(pipe: Any) -> Generator[list[float]]:
    """Note the seconds of each call of a pipeline's networks that denoise, in the `with` block."""
    calls: list[float] = []
    undo: list[Any] = []
    for network in find_networks(pipe).values():
        bare: Any = unwrap(network)
        name = "step" if callable(getattr(type(bare), "step", None)) else "forward"
        own = vars(bare).get(name)
        setattr(bare, name, _timed(getattr(bare, name), calls))
        undo.append((bare, name, own))
    try:
        yield calls
    finally:
        for bare, name, own in undo:
            if own is None:
                delattr(bare, name)
            else:
                setattr(bare, name, own)


def _timed(function: Any, calls: list[float]) -> Any:
    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        started = _now()
        result = function(*args, **kwargs)
        calls.append(_now() - started)
        return result

    return called


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _as_image(frame: Any) -> Image.Image:
    return (
        frame if isinstance(frame, Image.Image) else Image.fromarray((np.asarray(frame) * 255).round().astype("uint8"))
    )


def likeness(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float:
    """Return the PSNR between the frames of two clips, or two images, in dB; infinite for equal ones."""
    one, other = (
        torch.from_numpy(np.stack([np.asarray(frame.convert("RGB")) for frame in frames])).double()
        / 255  # (T, H, W, 3)
        for frames in (before, after)
    )
    return psnr(other, one)


def median_seconds(made: Sequence[Made]) -> float:
    """Return the median time of a step."""
    return statistics.median(one.seconds for one in made)


def side_by_side(prompts: Sequence[Any], before: Sequence[Made], after: Sequence[Made], path: Path, title: str) -> None:
    """Draw the images before and after, a row for each prompt.

    Args:
        prompts: texts, or numbers of classes.
        before: of the plain model.
        after: of the quantized one.
        path: WebP or PNG file to write.
        title: above the right column.
    """
    font, rows = ImageFont.load_default(14), []
    for prompt, one, other in zip(prompts, before, after, strict=True):
        images = [_shown(made.frames) for made in (one, other)]
        decibels = likeness(one.frames, other.frames)
        said = f"{prompt}  -  PSNR {decibels:.1f} dB" if decibels < 200 else f"{prompt}  -  equal"
        rows.append((images, said))
    widths = [max(images[place].width for images, _ in rows) for place in (0, 1)]
    width = max(2 * MARGIN + GAP + sum(widths), 360)
    height = 2 * MARGIN + LINE + sum(images[0].height + LINE + GAP for images, _ in rows)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    lefts = (MARGIN, MARGIN + widths[0] + GAP)
    for left, text in zip(lefts, ("before", title), strict=True):
        draw.text((left, MARGIN), text, "black", font)
    top = MARGIN + LINE
    for images, said in rows:
        for left, image in zip(lefts, images, strict=True):
            sheet.paste(image, (left, top))
            draw.rectangle([left - 1, top - 1, left + image.width, top + image.height], outline="#cccccc")
        draw.text((MARGIN, top + images[0].height + 2), said, "#444444", font)
        top += images[0].height + LINE + GAP
    sheet.save(path, quality=92)


def _shown(frames: Sequence[Image.Image]) -> Image.Image:
    """Return an image, or frames of a clip side by side, in the size of a sheet."""
    image = contact_strip(frames, 4) if len(frames) > 1 else frames[0]
    scale = SIDE / image.height
    size = (max(round(image.width * scale), 1), SIDE)
    whole = scale >= 1 and scale == int(scale)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)
