"""The models a server offers: loaded on first use, one after another, the least recently used one put back.

Callers name a model by its key in a list that the server's owner wrote; where it comes from stays with the shelf.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apps.service import limits
from apps.service.compute_profiles import Setup, can_tile
from apps.service.request_error import RequestError
from apps.service.schedulers import scheduler_names
from apps.service.usage import UsageError, checking
from pipelines.loading.hub_id import split_revision
from pipelines.loading.memory import release

logger = logging.getLogger(__name__)

Pipeline = Any
"""Any `DiffusionPipeline` that generates; its class is unknown until runtime, and its import takes seconds."""

FALLBACK_SIDE = 512
"""Side in pixels for a pipeline that doesn't tell its own."""
FRAMES_ARGUMENTS = frozenset({"num_frames", "video_length"})
"""What calls name the number of frames."""
FIRST_FRAME = {"LTXPipeline": "LTXImageToVideoPipeline"}
"""Pipelines of clips from text, and those over the same weights that take a first frame; `AutoPipeline` knows none."""
FALLBACK_FRAMES = 17
FALLBACK_FPS = 16
"""For the pipelines of clips that don't tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A pipeline in memory and what its call accepts.

    Attributes:
        key: its name on the shelf.
        pipes: the pipeline of each task; they share their weights.
        fingerprint: hash of structure and weights, 16 hex digits.
        side: default height, pixels.
        width: default width, pixels.
        multiple: height and width must be multiples of it, pixels.
        steps: default number of denoising steps; None for a pipeline without a choice, such as one of scales.
        guidance: default guidance scale; None for a pipeline without one, or with one of its own choosing.
        defaults: of the other arguments of the call.
        guidance_argument: what the call names the guidance scale.
        frames: default number of frames; None for a model of images.
        frames_argument: what the call names the number of frames.
        fps: frames a second of its clips.
        can_interrupt: `pipe.interrupt = True` ends the call before the next step, without decoding.
        can_finish: it can end after any step with the image as it is then.
        can_preview: its latents can be shown cheaply.
        labels: number of classes and their names by number, for models that generate classes.
        schedulers: names of the schedulers that fit.
        sizes: width and height of all that it generates, its own first; empty for one that takes any multiple.
        can_tile: its decoder can work tile by tile.
        can_search: it comes with a scorer that chooses among candidates.
    """

    key: str
    pipes: Mapping[str, Pipeline]
    fingerprint: str
    side: int
    width: int
    multiple: int
    steps: int | None
    guidance: float | None
    defaults: Mapping[str, Any]
    guidance_argument: str
    frames: int | None
    frames_argument: str
    fps: float
    can_interrupt: bool
    can_finish: bool
    can_preview: bool
    labels: Mapping[int, str]
    schedulers: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    can_tile: bool
    can_search: bool

    @property
    def pipe(self) -> Pipeline:
        """The pipeline of the first task."""
        return next(iter(self.pipes.values()))

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it can be asked for, the main task first."""
        return tuple(self.pipes)

    def pipe_for(self, task: str) -> Pipeline:
        """Return the pipeline of a task.

        Raises:
            ValueError: the model can't do it.
        """
        if task not in self.pipes:
            able = ", ".join(name.replace("_", " ") for name in self.pipes)
            raise RequestError(
                "task",
                f"The model {self.key!r} can't do {task.replace('_', ' ')}; it can do {able}.",
                model=self.key,
                task=task,
            )
        return self.pipes[task]

    def accepts(self, task: str) -> frozenset[str]:
        """Return the argument names of a task's call."""
        return call_arguments(self.pipe_for(task))


class ModelShelf:
    """Load models by key, each once for a setup, in the background.

    Args:
        sources: key -> built-in name, folder, file or hub id; the first key is the default.
        load: turns a source into a pipeline on its device, for a setup.
        capacity: how many models stay loaded; one that is loaded for two setups counts twice.
        usual: the setup of a model that is asked for without one.

    Raises:
        ValueError: no source at all.
    """

    def __init__(
        self, sources: Mapping[str, str], load: Callable[[str, Setup], Pipeline], capacity: int, usual: Setup
    ) -> None:
        if not sources:
            raise ValueError("The list of models is empty; name at least one built-in model, folder or hub id.")
        self.keys = tuple(sources)
        self._sources = dict(sources)
        self._load = load
        self._capacity = capacity
        self.usual = usual
        self._futures: OrderedDict[tuple[str, Setup], Future[LoadedModel]] = OrderedDict()
        self._table = threading.Lock()  # guards _futures
        self._loading = threading.Lock()  # two models are never read at once: memory and disk are shared

    def get(self, key: str, setup: Setup | None = None) -> Future[LoadedModel]:
        """Return the future of a model and start loading it unless that has been done.

        Args:
            key: one of `keys`.
            setup: what it is loaded for; None is the usual.

        Raises:
            KeyError: not on the shelf.
        """
        if key not in self._sources:
            raise KeyError(key)
        with self._table:
            place = key, setup or self.usual
            future = self._futures.get(place)
            if future is None or (future.done() and future.exception() is not None):  # a failed one may be retried
                future = self._futures[place] = Future()
                threading.Thread(target=self._fill, args=(*place, future), name=f"load {key}", daemon=True).start()
            self._futures.move_to_end(place)
            self._put_back()
            return future

    def peek(self, key: str) -> Future[LoadedModel] | None:
        """Return the future of a model that has been asked for in whatever setup, the usual one first, or None."""
        with self._table:
            found = [future for (name, _), future in self._futures.items() if name == key]
            return self._futures.get((key, self.usual), found[-1] if found else None)

    def source(self, key: str) -> str:
        """Return the name, folder or hub id behind a key."""
        return self._sources[key]

    def _fill(self, key: str, setup: Setup, future: Future[LoadedModel]) -> None:
        try:
            with self._loading:
                future.set_result(inspect_model(key, self._load(self._sources[key], setup)))
        except Exception as error:
            logger.exception("could not load the model %r", key)
            release(error)  # the future keeps the error, which should not keep half a model
            future.set_exception(error)

    def _put_back(self) -> None:
        """Forget the least recently used models beyond the capacity; a running job keeps its own reference."""
        loaded = [place for place, future in self._futures.items() if future.done()]
        for place in loaded[: max(len(self._futures) - self._capacity, 0)]:
            del self._futures[place]


def name_models(sources: Iterable[str]) -> dict[str, str]:
    """Give models the keys by which people choose them.

    Args:
        sources: built-in names, folders, files or hub ids, which `owner/name@COMMIT` pins.

    Returns:
        Key -> source. A folder or file goes by its last name, because a path would tell strangers about the machine;
        equal names are numbered.

    Raises:
        ValueError: a hub id is pinned to something that moves.
    """
    named: dict[str, str] = {}
    for source in dict.fromkeys(sources):
        split_revision(source)  # a wrong pin is told now, and not when somebody waits for the model
        folder = Path(source).expanduser()
        base = folder.resolve().name if folder.exists() else source
        key, count = base, 1
        while key in named:
            count += 1
            key = f"{base} ({count})"
        named[key] = str(folder) if folder.exists() else source
    return named


def check_sources(sources: Collection[str], base: str | None = None) -> None:
    """Refuse names that no model can have; whether the Hub has a repository is found out by loading it.

    Args:
        sources: built-in names, folders, files or hub ids.
        base: of those that are single files: the pipeline that everything else comes from.

    Raises:
        UsageError: neither built in, nor a folder or file here, nor of the form of a hub id; or a base without a file.
    """
    from pipelines.loading.load import builtin_models

    if base is not None and not any(Path(source).expanduser().is_file() for source in sources):
        named = ", ".join(map(repr, sources)) or "none is named"
        raise UsageError(f"--base goes with a model that is a single file ({named}); leave out --base.")
    for source in (*sources, *([] if base is None else [base])):
        with checking():
            split_revision(source)
        named = source in builtin_models() or Path(source).expanduser().exists()
        if not named and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[0-9a-fA-F]{40})?", source) is None:
            raise UsageError(
                f"There is no model {source!r}; name a folder or file that exists, a hub id such as user/repository, "
                f"or a built-in model: {', '.join(builtin_models())}."
            )


def inspect_model(key: str, pipe: Pipeline) -> LoadedModel:
    """Find out what a pipeline's call accepts and what its defaults are.

    Args:
        key: its name on the shelf.
        pipe: a pipeline of ours or of diffusers.

    Raises:
        ValueError: it doesn't generate from text.
    """
    pipes = find_tasks(pipe)
    if not pipes:
        raise ValueError(
            f"{type(pipe).__name__} takes neither a prompt nor a class; the model {key!r} can't be asked for a picture."
        )
    for one in pipes.values():
        one.set_progress_bar_config(disable=True)
    defaults = {name: one.default for name, one in inspect.signature(type(pipe).__call__).parameters.items()}
    defaults |= _own_defaults(pipe)
    # A pipeline with both has its distilled guidance in the first, unless that is off by default.
    guidance_argument = "guidance_scale" if defaults.get("guidance_scale") is not None else "true_cfg_scale"
    guidance, steps = defaults.get(guidance_argument), defaults.get("num_inference_steps")
    frames_argument = next((name for name in FRAMES_ARGUMENTS if name in defaults), "num_frames")
    interrupt = getattr(type(pipe), "interrupt", None)
    can_interrupt = isinstance(interrupt, property) and interrupt.fset is not None
    return LoadedModel(
        key=key,
        pipes=pipes,
        fingerprint=fingerprint(pipe),
        side=default_side(pipe, "height"),
        width=default_side(pipe, "width"),
        multiple=side_multiple(pipe),
        steps=steps if isinstance(steps, int) else None,
        guidance=float(guidance) if isinstance(guidance, int | float) else None,
        defaults=defaults,
        guidance_argument=guidance_argument if guidance_argument in defaults else "guidance_scale",
        frames=default_frames(pipe, defaults[frames_argument]) if frames_argument in defaults else None,
        frames_argument=frames_argument,
        fps=float(defaults.get("frame_rate") or FALLBACK_FPS),
        can_interrupt=can_interrupt,
        can_finish=isinstance(getattr(type(pipe), "finish_now", None), property) or _ends_when_told(pipe),
        can_preview=callable(getattr(pipe, "preview", None)) or _shows_latents(pipe),
        labels=class_names(pipe),
        schedulers=tuple(scheduler_names(getattr(pipe, "scheduler", None))),
        sizes=offered_sizes(pipe),
        can_tile=can_tile(pipe),
        can_search="search" in defaults and getattr(pipe, "scorer", None) is not None,
    )


def _own_defaults(pipe: Pipeline) -> dict[str, Any]:
    """Return what None stands for in the call of our next-scale pipelines from text."""
    if not {"prompt", "kv_policy"} <= call_arguments(pipe):
        return {}
    from pipelines.next_scale.text_to_image import DEFAULTS

    return {**DEFAULTS, **(pipe.config.get("defaults") or {})}


def call_arguments(pipe: Pipeline) -> frozenset[str]:
    """Return the argument names of a pipeline's call."""
    return _arguments_of(type(pipe))


def _arguments_of(pipeline: type) -> frozenset[str]:
    return frozenset(inspect.signature(pipeline.__call__).parameters)


def tasks_on_disk(source: str) -> tuple[str, ...]:
    """Return what a model can be asked for, as far as its folder tells before anything is loaded.

    Args:
        source: built-in name, folder, file or hub id.

    Returns:
        The tasks of its pipeline; empty for what is no folder here, or none that can be read.
    """
    from pipelines.loading.load import PRETRAINED, builtin_models
    from pipelines.loading.sources import pipeline_class, read_index

    folder = PRETRAINED / source if source in builtin_models() else Path(source)
    if not folder.is_dir():
        return ()
    try:
        return _tasks_of(_arguments_of(pipeline_class(read_index(folder))))
    except (OSError, ValueError) as error:
        logger.info("%s doesn't tell what it can do: %s", source, error)
        return ()


def find_tasks(pipe: Pipeline) -> dict[str, Pipeline]:
    """Find out what a pipeline can be asked for, and by which pipeline over the same weights.

    Args:
        pipe: a pipeline of ours or of diffusers.

    Returns:
        Task -> pipeline, the main task first; empty for one that generates neither texts nor classes.
    """
    found = dict.fromkeys(_tasks_of(call_arguments(pipe)), pipe)
    return found | _sister_pipelines(pipe) if tuple(found) == ("text_to_image",) else found


def _tasks_of(accepts: frozenset[str]) -> tuple[str, ...]:
    """Return what a pipeline can be asked for by the arguments of its call, the main task first."""
    if "class_labels" in accepts:
        return ("next_scale_class" if "kv_policy" in accepts else "class_to_image",)
    if "prompt" not in accepts:
        return ()
    if "kv_policy" in accepts:
        return ("next_scale_text",)
    if "image" in accepts and accepts & FRAMES_ARGUMENTS and "strength" not in accepts:
        return ("image_to_image",)  # clips that begin with an image
    others = {"image_to_image": {"image", "strength"}, "inpaint": {"image", "mask_image"}}
    return ("text_to_image", *(task for task, needs in others.items() if needs <= accepts))


def _sister_pipelines(pipe: Pipeline) -> dict[str, Pipeline]:
    """Make the pipelines of diffusers that change images with the same components, where it has any."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline

    hooked = any(hasattr(part, "_hf_hook") for part in getattr(pipe, "components", {}).values())
    if not isinstance(pipe, DiffusionPipeline) or hooked:  # what is offloaded is hooked for one pipeline only
        return {}
    if type(pipe).__name__ in FIRST_FRAME:
        import diffusers

        return {"image_to_image": getattr(diffusers, FIRST_FRAME[type(pipe).__name__]).from_pipe(pipe)}
    found: dict[str, Pipeline] = {}
    for task, maker in (("image_to_image", AutoPipelineForImage2Image), ("inpaint", AutoPipelineForInpainting)):
        try:
            found[task] = maker.from_pipe(pipe)
        except ValueError:  # how diffusers says that it has none
            logger.info("diffusers has no %s pipeline for %s", task, type(pipe).__name__)
    return found


def _ends_when_told(pipe: Pipeline) -> bool:
    """Whether a pipeline of diffusers, once interrupted, decodes the latents that the callback gave back."""
    from pipelines.previews import is_flow

    can_be_told = {"callback_on_step_end", "callback_on_step_end_tensor_inputs"} <= call_arguments(pipe)
    has_switch = isinstance(getattr(type(pipe), "interrupt", None), property)
    return can_be_told and has_switch and hasattr(pipe, "scheduler") and is_flow(pipe)


def class_names(pipe: Pipeline) -> dict[int, str]:
    """Return the classes of a model by number, with their names where they have any; empty for others."""
    count = getattr(_network_config(pipe), "num_classes", None) or getattr(
        _network_config(pipe), "num_embeds_ada_norm", None
    )
    if "class_labels" not in call_arguments(pipe) or not isinstance(count, int):
        return {}
    names: dict[str, int] = getattr(pipe, "labels", None) or {}
    found = dict.fromkeys(range(count), "")
    for name, number in names.items():
        found[number] = found.get(number) or name  # the first name of several
    return found


def default_side(pipe: Pipeline, name: str = "height") -> int:
    """Return the height or width in pixels that a pipeline was made for.

    That is the default of its call, else its sample size in latents times its scale.

    Args:
        pipe: a pipeline.
        name: "height" or "width".
    """
    parameter = inspect.signature(type(pipe).__call__).parameters.get(name)
    pixels = (getattr(parameter, "default", None), getattr(pipe, f"default_{name}", None))
    config = _network_config(pipe)
    cells = (
        getattr(pipe, "default_sample_size", None),
        getattr(config, f"sample_{name}", None),
        getattr(config, "sample_size", None),
    )
    scale = latent_scale(pipe) or 0
    sides = [*pixels, *(value * scale for value in cells if isinstance(value, int))]
    return next((side for side in sides if isinstance(side, int) and side > 0), FALLBACK_SIDE)


def offered_sizes(pipe: Pipeline) -> tuple[tuple[int, int], ...]:
    """Return width and height of all images that a pipeline generates, its own first; empty for any multiple."""
    if {"height", "width"}.isdisjoint(call_arguments(pipe)) and "class_labels" in call_arguments(pipe):
        return ((default_side(pipe, "width"), default_side(pipe, "height")),)
    return tuple((width, height) for height, width in getattr(pipe, "sizes", ()))


def latent_scale(pipe: Pipeline) -> int | None:
    """Return how many pixels a latent cell covers along a side; None for a pipeline that doesn't say."""
    names = (
        "vae_scale_factor",
        "vae_scale_factor_spatial",
        "vae_spatial_compression_ratio",
        "vae_spatial_scale_factor",
    )
    found = next((int(scale) for name in names if (scale := getattr(pipe, name, None))), None)
    levels = getattr(getattr(getattr(pipe, "vae", None), "config", None), "block_out_channels", None)
    return found if found is not None or not levels else 2 ** (len(levels) - 1)  # all of diffusers' halve so often


def side_multiple(pipe: Pipeline) -> int:
    """Return what height and width must be multiples of: pixels per latent cell times cells per token."""
    patch = getattr(_network_config(pipe), "patch_size", None) or 1
    across = int(patch) if isinstance(patch, int) else int(patch[-1])  # (t, h, w) of some networks of clips
    if across == 1 and hasattr(pipe, "_pack_latents"):
        across = 2  # pipelines that pack 2 x 2 cells into a token keep silent about it in the config
    return math.lcm((latent_scale(pipe) or limits.SIDE_MULTIPLE) * across, limits.SIDE_MULTIPLE)


def default_frames(pipe: Pipeline, default: object) -> int:
    """Return how many frames a pipeline was made for: the default of its call, else what its network says."""
    if isinstance(default, int):
        return default
    stored = getattr(_network_config(pipe), "sample_frames", None)
    return stored if isinstance(stored, int) else FALLBACK_FRAMES


def _network_config(pipe: Pipeline) -> Any:
    network = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    return getattr(network, "config", None)


def _shows_latents(pipe: Pipeline) -> bool:
    from pipelines.previews import can_preview  # diffusers is imported by now, or `pipe` is none of its pipelines

    return can_preview(pipe)


def _weights(component: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a network's weights by name, also those that sequential offloading put aside."""
    weights = component.state_dict()
    for path, layer in component.named_modules():
        hook = getattr(layer, "_hf_hook", None)  # accelerate's; several are chained in one
        for one in getattr(hook, "hooks", [hook]):
            aside = getattr(one, "weights_map", None)
            if aside is not None:
                weights |= {
                    f"{path}.{name}".lstrip("."): aside[name] for name, _ in layer.named_parameters(recurse=False)
                }
    return weights


def fingerprint(pipe: Pipeline, values_per_tensor: int = 64) -> str:
    """Hash a pipeline's structure and a sample of its weights.

    A sample, because hashing all of a large model would take longer than generating with it; one trained on has moved
    in every tensor.

    Args:
        pipe: a pipeline; its components that are networks count.
        values_per_tensor: about how many evenly spaced values of each weight are hashed.

    Returns:
        16 hex digits, the same in every process, device and number format that holds the values exactly.
    """
    digest = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        if not isinstance(component, torch.nn.Module):
            continue
        digest.update(json.dumps([name, type(component).__name__]).encode())
        for key, weight in _weights(component).items():
            digest.update(json.dumps([key, list(weight.shape)]).encode())
            if weight.is_meta or weight.numel() == 0:  # offloaded to disk: its structure must do
                continue
            values = weight.flatten()  # (V,)
            values = values[:: max(len(values) // values_per_tensor, 1)]
            digest.update(values.detach().to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]
