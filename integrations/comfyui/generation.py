"""A node's inputs become a request of tessera's engine, and its events ComfyUI's progress and images."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .model import ENGINES, OWNER, Model, lora_name

if TYPE_CHECKING:
    from apps.service.engine import Engine
    from apps.service.events import Picture

LOOK_SECONDS = 0.2
"""Between two looks at whether the work is to be ended."""
OnStep = Callable[[int, int, Image.Image | None], None]
"""Called after each step: steps done, steps in all, a preview if there is one; raises to end the work."""


def generate(model: Model, fields: Mapping[str, Any], images: Mapping[str, Tensor | None]) -> list[Picture]:
    """Generate what a node asks for.

    Args:
        model: what generates.
        fields: of the request; those that are None are the model's own.
        images: fields that are images, (1, H, W, 3), or masks, (1, H, W), float32 in [0, 1]; None for those that are
            not connected.

    Returns:
        The images or clips.

    Raises:
        ValueError: something can't be had; the message says what.
    """
    from apps.service.events import Failed, Picture, Step, Stopped

    engine = ENGINES.of(model)
    request = make_request(model, engine, fields, images)
    found: list[Picture] = []
    stop, told = threading.Event(), watcher()
    with _ended_by_comfyui(stop), closing(engine.generate(request, stop, OWNER)) as events:
        for event in events:
            if isinstance(event, Step):
                done = (event.picture - 1) * event.steps + event.step * event.batch
                told(done, event.pictures * event.steps, event.preview)
            elif isinstance(event, Picture):
                found.append(event)
            elif isinstance(event, Failed):
                raise ValueError(event.message) from event.cause
            elif isinstance(event, Stopped):
                told(0, 1, None)  # raises what ComfyUI ends a workflow with
                raise ValueError("The work was stopped; queue the workflow again.")
    return found


@contextmanager
def _ended_by_comfyui(stop: threading.Event) -> Iterator[None]:
    """Look whether the user of ComfyUI ends the work, also while a model is loaded, when no step is told."""
    management, done = _module("comfy.model_management"), threading.Event()

    def look() -> None:
        while not done.wait(LOOK_SECONDS):
            if management.processing_interrupted():
                stop.set()
                return

    if not hasattr(management, "processing_interrupted"):
        yield
        return
    thread = threading.Thread(target=look, name="ComfyUI's stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def make_request(model: Model, engine: Engine, fields: Mapping[str, Any], images: Mapping[str, Tensor | None]) -> Any:
    """Return the request for a node; what kind it is follows from what is connected.

    Raises:
        ValueError: a field is out of range, or the acceleration names files.
    """
    from apps.service.requests import TASKS

    given = {name: tensor for name, tensor in images.items() if tensor is not None}
    task = "inpaint" if "mask" in given else "image_to_image" if "image" in given else "text_to_image"
    kind = TASKS[_supported(task, engine)]
    uploaded = {name: engine.uploads.add(to_image(tensor), OWNER) for name, tensor in given.items()}
    values = {name: value for name, value in {**fields, **uploaded}.items() if value is not None}
    if model.loras:
        values["loras"] = [{"name": lora_name(file), "scale": weight} for file, weight in model.loras]
    if model.quantization != "none":
        values["quantization"] = model.quantization
    values |= {name: one for name, one in _speed_of(model).items() if one}
    if unknown := sorted(values.keys() - kind.model_fields.keys()):
        raise ValueError(
            f"{model.source} can't be given {', '.join(unknown)} for this task; leave them at the model's own, or "
            "unconnected."
        )
    return kind.model_validate(values)


def _supported(task: str, engine: Engine) -> str:
    """Return the task of this kind that the model has: next-scale models have one for all of them."""
    tasks = engine.model().result().tasks
    return task if task in tasks else next((one for one in tasks if one == "next_scale_text"), task)


def _speed_of(model: Model) -> dict[str, Any]:
    from apps.service.option_values import Acceleration

    acceleration = Acceleration.from_text(model.acceleration) if model.acceleration.strip() else None
    return {"profile": model.profile, "acceleration": acceleration}


def to_image(tensor: Tensor) -> Image.Image:
    """Return an image, (1, H, W, 3), or mask, (1, H, W), in [0, 1].

    Raises:
        ValueError: it is a batch of several.
    """
    if len(tensor) != 1:
        raise ValueError(f"{len(tensor)} images are connected where one is taken; choose one of the batch.")
    array = (tensor[0].detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(array).convert("RGB")


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Return images of one size as ComfyUI has them, (B, H, W, 3), float32 in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(one.convert("RGB"), dtype=np.float32) / 255 for one in images]))


def watcher() -> OnStep:
    """Return what shows steps in ComfyUI and ends the work when its user wants that; nothing outside of ComfyUI."""
    management, utils = _module("comfy.model_management"), _module("comfy.utils")
    bar = None if utils is None else utils.ProgressBar(1)

    def told(done: int, total: int, preview: Image.Image | None) -> None:
        if management is not None:
            management.throw_exception_if_processing_interrupted()
        if bar is not None:
            shown = None if preview is None else ("JPEG", preview.convert("RGB"), 512)
            bar.update_absolute(done, total, shown)

    return told


def _module(name: str) -> Any:
    """Return a module of ComfyUI; None where it isn't running."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
