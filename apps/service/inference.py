"""Generate one batch with one pipeline: watch its steps, preview them, stop between two of them, or end early.

Works with our pipelines and with diffusers' for texts, images and classes: what a call may carry is read from its
signature, and an option that a pipeline does not have is an error, never a no-op.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from apps.service.acceleration import accelerated, config_of, reports_on, search_argument, step_strip
from apps.service.masked_area import MaskedArea
from apps.service.media import candidate_sheet
from apps.service.model_pool import LoadedModel, Pipeline
from apps.service.option_values import parse_timeline
from apps.service.prompt_texts import spans_of, without_weights
from apps.service.request_error import RequestError
from apps.service.requests import OPTIONS, AnyRequest
from apps.service.schedulers import make_scheduler
from apps.service.sound import Sound, sound_of
from apps.service.speed_profiles import resolve_profile
from pipelines.acceleration import AccelerationConfig, AccelerationHandle, PartReport
from pipelines.info.record import PipelineInfo

logger = logging.getLogger(__name__)

PREVIEW_SECONDS = 0.15
"""Previews come no faster than this; an eye doesn't need more."""
PREVIEW_SHARE = 0.05
"""Nor may they cost more than this share of the time."""

ARGUMENTS = {name: one.option.argument for name, one in OPTIONS.items() if one.option.argument}
"""Field of a request -> argument of a call; what a pipeline's info says of its own goes first."""


class StopRequestedError(Exception):
    """The job was given up because somebody asked for it."""


class SkipRequestedError(Exception):
    """The batch was given up because somebody asked for the next one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchInputs:
    """What one batch needs, with nothing left open.

    Attributes:
        request: with the model's defaults filled in.
        seeds: of the noise, one an image.
        image: to start from, of the size of the request.
        last_image: that a clip ends with, of the size of the request.
        video: frames of a clip that is completed, of the size of the request.
        mask: where to generate, of the size of the request.
        alpha: how much of the result shows, of the size of the request; None for all of it on the mask.
        area: the masked area that image and mask are, if only that is generated.
    """

    request: AnyRequest
    seeds: tuple[int, ...]
    image: Image.Image | None = None
    last_image: Image.Image | None = None
    video: tuple[Image.Image, ...] = ()
    mask: Image.Image | None = None
    alpha: Image.Image | None = None
    area: MaskedArea | None = None

    def field(self, name: str) -> Any:
        """Return a field of the request; None where its task has no such field."""
        return getattr(self.request, name, None)


@dataclass(frozen=True, slots=True)
class CancelSignals:
    """How a running batch is ended from another thread.

    Attributes:
        stop: once set, no further step starts and nothing is decoded.
        finish: once set, no further step starts and what there is is decoded.
        skip: as `stop`, but the job goes on with its next batch.
        deadline: `time.monotonic()` value after which the batch is given up.
    """

    stop: threading.Event
    finish: threading.Event
    skip: threading.Event
    deadline: float = float("inf")


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What came out.

    Attributes:
        pictures: of the batch; each a list of frames, one for an image.
        ended_after: steps done, if it was ended early; else None.
        scheduler: the one that was used.
        reports: what each accelerator did; those that did nothing say why.
        sound: of a clip, by models that make some.
    """

    pictures: list[list[Image.Image]]
    ended_after: int | None
    scheduler: Any
    reports: tuple[PartReport, ...] = ()
    sound: Sound | None = None


OnStep = Callable[[int, Image.Image | None, str], None]
"""Called after each step: steps done (from 1), a preview if it is time for one, the strip of a step cache."""


OnPart = Callable[[int, int, list[Image.Image]], None]
"""Called with finished frames of a clip while later ones are generated: number of the first, number of all, frames."""


def run_pipeline(
    model: LoadedModel,
    inputs: BatchInputs,
    signals: CancelSignals,
    on_step: OnStep,
    offload: str = "none",
    on_part: OnPart | None = None,
) -> BatchResult:
    """Generate one batch of images, or one clip.

    Args:
        model: the pipelines and what they accept.
        inputs: what to generate.
        signals: end it.
        on_step: called after each step, in this thread.
        offload: what the model was loaded with, for the report.
        on_part: called for parts of a clip, in this thread, by models that finish clips part by part.

    Raises:
        StopRequestedError: `stop` was set.
        SkipRequestedError: `skip` was set.
        TimeoutError: the deadline passed.
        ValueError: the pipeline doesn't accept what is asked.
    """
    pipe, info = model.pipe_for(inputs.request.task), model.info_for(inputs.request.task)
    weights = _weights(pipe, inputs)
    inputs = replace(inputs, request=without_weights(inputs.request))
    arguments = _arguments(model, inputs)
    name = inputs.request.profile
    profile = None if name is None else resolve_profile(name, pipe, info, arguments)
    config = config_of(inputs.request, info.can_tile, model.is_quantized, profile and profile.parts)
    with _own_scheduler(pipe, info, inputs.field("scheduler")), accelerated(pipe, config) as acceleration:
        arguments = _without_few_step(arguments, config, info) | acceleration.call_arguments
        watch = _StepCallback(model, info, pipe, inputs, signals, on_step, acceleration)
        try:
            with weights, watch.attached(arguments):
                output = pipe(**arguments) if on_part is None else _streamed(pipe, info, arguments, on_part)
        except BaseException:
            pipe.maybe_free_model_hooks()  # the pipeline's last line, which a stop or an error has skipped
            raise
        used = pipe.scheduler if info.has_scheduler else None
        reports = reports_on(pipe, acceleration, output, inputs.request, offload)
        reports = reports if profile is None else (profile.report, *reports)
    if watch.late:
        raise TimeoutError
    if signals.stop.is_set():
        raise StopRequestedError
    if signals.skip.is_set():
        raise SkipRequestedError
    pictures = [list(output.frames[0])] if info.output == "frames" else [[image] for image in output.images]
    # Only the frames of a clip that is ended early are led to their end; its sound is noise still.
    sound = sound_of(pipe, output) if watch.ended_after is None else None
    return BatchResult(pictures, watch.ended_after, used, reports, sound)


def _weights(pipe: Pipeline, inputs: BatchInputs) -> AbstractContextManager[None]:
    """Return what has the text encoders weight words, as the prompts of a batch ask for.

    Raises:
        RequestError: this pipeline can't.
    """
    spans = spans_of(inputs.request)
    if not spans:
        return nullcontext()
    from pipelines.inputs.prompt_syntax import Span
    from pipelines.inputs.prompt_weights import trouble_with, weighted  # with transformers, imported by now

    trouble = trouble_with(pipe)
    if trouble:
        raise RequestError(
            "prompt.weights", f"prompt: words can't be weighted, because {trouble}; leave the weights out."
        )
    timeline = inputs.field("timeline")
    later = [(Span(text),) for _, text in parse_timeline(timeline)] if timeline else []
    return weighted(pipe, [*spans.values(), *later])


def _streamed(pipe: Any, info: PipelineInfo, arguments: dict[str, Any], on_part: OnPart) -> Any:
    """Generate a clip part by part, if the pipeline can; return what its call would have returned."""
    if not info.can_stream:
        return pipe(**arguments)
    frames: list[Image.Image] = []
    total = int(arguments.get(info.frames_argument) or info.frames or 0)
    for chunk in pipe.stream(**{name: value for name, value in arguments.items() if name != "output_type"}):
        new = pipe.image_processor.numpy_to_pil(chunk.frames[0].permute(0, 2, 3, 1).numpy())
        frames += new
        if len(frames) < total:
            on_part(chunk.start, total, new)
    return SimpleNamespace(frames=[frames])


@contextmanager
def _own_scheduler(pipe: Pipeline, info: PipelineInfo, name: str | None) -> Generator[None]:
    """Give a pipeline another scheduler for one call, and its own back.

    Raises:
        ValueError: it has none, or the name doesn't fit it.
    """
    if name is None:
        yield
        return
    if not info.has_scheduler:
        raise RequestError(
            "setting", "This model generates scale by scale and has no scheduler; leave it out.", field="scheduler"
        )
    own = pipe.scheduler
    pipe.scheduler = make_scheduler(own, name)
    try:
        yield
    finally:
        pipe.scheduler = own


def _without_few_step(arguments: dict[str, Any], config: AccelerationConfig, info: PipelineInfo) -> dict[str, Any]:
    """Leave out of a call what a few-step preset decides: the steps, which it may give as timesteps, and guidance."""
    if config.few_step is None:
        return arguments
    decided = {info.arguments.get(name, ARGUMENTS[name]) for name in ("steps", "guidance")}
    return {name: value for name, value in arguments.items() if name not in decided}


# ---------------------------------------------------------------------- arguments


def _arguments(model: LoadedModel, inputs: BatchInputs) -> dict[str, Any]:
    """Translate a canvas into the keyword arguments of the pipeline's call."""
    info = model.info_for(inputs.request.task)
    accepts, names = info.parameters, {**ARGUMENTS, **info.arguments}
    # On the CPU whatever the device: then the same seed starts from the same noise everywhere.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in inputs.seeds]
    given = {name: inputs.field(field) for field, name in names.items() if field not in ("seed", "search")}
    several = len(generators) if len(generators) > 1 else None
    given |= {"image": inputs.image, "last_image": inputs.last_image, "mask_image": inputs.mask}
    given |= {"num_images_per_prompt": several}
    given |= _class_labels(model, inputs) | _prompt_schedule(inputs) | _given_video(inputs)
    given |= _frame_rate(info, inputs.field("fps"))
    arguments = {name: value for name, value in given.items() if value not in (None, "")}
    if inputs.image is not None:  # it has the size already, and some pipelines take the size from it
        arguments = {name: value for name, value in arguments.items() if name in accepts or name not in _SIDES}
    if several is not None and "num_images_per_prompt" in arguments and "num_images_per_prompt" not in accepts:
        raise ValueError(f"The model {model.key!r} generates one image at a time; set batch_size to 1.")
    fields = {name: field for field, name in names.items()}
    for name in arguments:
        if name not in accepts:
            field = fields.get(name, name)
            message = f"The model {model.key!r} has no setting {field!r}; leave it out."
            raise RequestError("setting", message, field=field)
    if inputs.field("search"):
        arguments |= search_argument(inputs.field("search"), inputs.field("candidates"), model.grids)
    arguments["generator"] = generators[0] if len(generators) == 1 else generators
    if "output_type" in accepts:
        arguments["output_type"] = "pil"
    return {**arguments, **_guidance_extras(model, inputs), **info.fixed}


_SIDES = ("height", "width")


def _frame_rate(info: PipelineInfo, fps: float | None) -> dict[str, Any]:
    """Return the frame rate for a call that takes one, as a number of the kind of its default."""
    name = next((one for one in ("frame_rate", "fps") if one in info.parameters), None)
    if fps is None or fps == info.fps or name is None:
        return {}
    return {name: round(fps) if isinstance(info.defaults.get(name), int) else fps}


def _prompt_schedule(inputs: BatchInputs) -> dict[str, Any]:
    """Return the prompts of a clip by their first frames, which take the place of the prompt."""
    later = inputs.field("timeline")
    if later is None:
        return {}
    return {"prompt": None, "prompt_schedule": [(0, inputs.field("prompt")), *parse_timeline(later)]}


def _given_video(inputs: BatchInputs) -> dict[str, Any]:
    """Return the clip to complete, cut to the frames asked for; what a longer one has beyond it is generated."""
    if not inputs.video:
        return {}
    from pipelines.inputs.video_mask import VideoMask

    given, frames, mask = len(inputs.video), inputs.field("frames"), inputs.field("video_mask")
    if frames <= given:
        return {"video": list(inputs.video[:frames])}
    width, height = inputs.video[0].size
    kept = torch.zeros(given, height, width) if mask is None else VideoMask.parse(mask).resolve(given, height, width)
    region = torch.cat([kept.reshape(given, height, width).float(), torch.ones(frames - given, height, width)])
    return {"video": [*inputs.video, *[inputs.video[-1]] * (frames - given)], "mask": region}  # mask (T, H, W)


def _class_labels(model: LoadedModel, inputs: BatchInputs) -> dict[str, Any]:
    """Settle the class for pipelines of diffusers, which take a list of numbers, one an image, and check nothing.

    Raises:
        ValueError: the model has no such class.
    """
    label = inputs.field("label")
    if label is None or model.can_batch:  # ours read names and numbers, and say what is wrong
        return {}
    names = model.label_ids
    number = names.get(label) if isinstance(label, str) else label
    if number not in model.labels:
        raise ValueError(
            f"label: the model {model.key!r} has no class {label!r}; choose a number from 0 to {len(model.labels) - 1}"
            f"{', or a name that it knows' if names else ''}."
        )
    return {"class_labels": [number] * len(inputs.seeds), "num_images_per_prompt": None}


def _guidance_extras(model: LoadedModel, inputs: BatchInputs) -> dict[str, Any]:
    """Settle what pipelines with true guidance would silently ignore: it and a negative prompt need each other.

    Raises:
        ValueError: a negative prompt for a model whose guidance is distilled into it.
    """
    kind = model.info_for(inputs.request.task).guidance_kind
    guidance, negative = inputs.request.guidance, inputs.field("negative_prompt")
    if kind == "true_cfg":
        needs_negative = guidance is not None and guidance > 1 and not negative
        return {"negative_prompt": " "} if needs_negative else {}
    if kind == "distilled" and negative:
        raise RequestError(
            "setting",
            f"The model {model.key!r} has its guidance built in and takes no negative prompt; leave it out.",
            field="negative_prompt",
        )
    return {}


# -------------------------------------------------------------------------- steps


class _StepCallback:
    """The callback that diffusers calls after each step."""

    def __init__(
        self,
        model: LoadedModel,
        info: PipelineInfo,
        pipe: Pipeline,
        inputs: BatchInputs,
        signals: CancelSignals,
        on_step: OnStep,
        acceleration: AccelerationHandle,
    ) -> None:
        # The estimate of the finished image shows far earlier what it will be than the noisy latents.
        self.tensor = "denoised_latents" if "denoised_latents" in info.callback_tensors else "latents"
        self.late = False
        self.ended_after: int | None = None
        self._model = model
        self._info = info
        self._pipe = pipe
        self._inputs = inputs
        self._signals = signals
        self._on_step = on_step
        self._acceleration = acceleration
        self._shows_all = info.steps is None  # of a few scales each is worth a look
        self._next_preview = 0.0
        self._before: Tensor | None = None
        self._can_preview = info.can_preview
        self._finish_after = inputs.field("finish_after")
        if self._finish_after is not None and not info.can_finish:
            raise RequestError(
                "setting",
                f"The model {model.key!r} can't end before its last step; leave finish_after out.",
                field="finish_after",
            )

    @contextmanager
    def attached(self, arguments: dict[str, Any]) -> Generator[None]:
        """Put the watch where a pipeline calls it: a callback, or the scheduler's step if it has none."""
        kind = self._info.callback
        if kind == "step_end":
            arguments["callback_on_step_end"] = self
            if "callback_on_step_end_tensor_inputs" in self._info.parameters:
                arguments["callback_on_step_end_tensor_inputs"] = [self.tensor]
        elif kind == "legacy":
            arguments["callback"] = self.legacy_callback
        with self._inside_scheduler() if kind == "scheduler" else nullcontext():
            yield

    @contextmanager
    def _inside_scheduler(self) -> Generator[None]:
        """Watch the steps of a pipeline that tells nobody about them."""
        scheduler, count = self._pipe.scheduler, 0
        plain = scheduler.step

        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            result = plain(*args, **kwargs)
            self(self._pipe, count, torch.tensor(count), {})
            count += 1
            return result

        scheduler.step = step
        try:
            yield
        finally:
            del scheduler.step  # the class's own shows again

    def __call__(self, pipe: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.late = time.monotonic() > self._signals.deadline
        stops = self._signals.stop.is_set()
        if stops or self.late or self._signals.skip.is_set():
            if not self._info.can_interrupt:
                raise TimeoutError if self.late else StopRequestedError if stops else SkipRequestedError
            pipe.interrupt = True
            return {}
        latents = tensors.get(self.tensor)
        wants_end = self._signals.finish.is_set() or step + 1 == self._finish_after
        replaced = self._end_early(pipe, step, latents) if wants_end and self._info.can_finish else {}
        self._on_step(step + 1, self._preview(latents), step_strip(self._acceleration))
        return replaced

    def legacy_callback(self, step: int, timestep: Tensor, latents: Tensor) -> None:
        """Stand in for the callback of older pipelines, which get the latents and give nothing back."""
        self(self._pipe, step, timestep, {self.tensor: latents})

    def _end_early(self, pipe: Pipeline, step: int, latents: Tensor | None) -> dict[str, Tensor]:
        """Have a pipeline decode the estimate of the finished image instead of going on."""
        if self._info.finish == "switch":
            pipe.finish_now = True
            self.ended_after = step + 1
            return {}
        if self._before is None or latents is None:  # an estimate takes two steps
            return {}
        from dit.runtime.diffusers_compat import skip_other_steps
        from pipelines.previews import predict_x0

        skip_other_steps(pipe)
        self.ended_after = step + 1
        return {"latents": predict_x0(pipe, self._before, latents)}

    def _preview(self, latents: Tensor | None) -> Image.Image | None:
        """Show the latents if the model can and if it's time again."""
        # A copy, because some pipelines (Kandinsky 5) change their latents in place.
        before, self._before = self._before, None if latents is None else latents.clone()
        started = time.monotonic()
        is_early = started < self._next_preview and not self._shows_all
        if latents is None or not self._can_preview or is_early:
            return None
        try:
            preview = self._show(before, latents)
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            # The image matters more than the view on it; latents of an unheard-of kind should not end the work.
            self._can_preview = False
            logger.warning("the model %r generates without previews: %s", self._model.key, error)
            return None
        ended = time.monotonic()
        self._next_preview = ended + max(PREVIEW_SECONDS, (ended - started) / PREVIEW_SHARE)
        return preview

    def _show(self, before: Tensor | None, latents: Tensor) -> Image.Image:
        """Make the small image of latents; those of a flow are first led to where they are going."""
        pipe, inputs = self._pipe, self._inputs
        if self._info.preview == "own":
            shown = pipe.preview(latents)
            return candidate_sheet(shown) if inputs.field("search") else shown[0]
        from pipelines.previews import is_flow, predict_x0, preview  # with diffusers, imported by now

        if before is not None and is_flow(pipe):
            latents = predict_x0(pipe, before, latents)
        return preview(pipe, latents, inputs.field("height"), inputs.field("width"), inputs.field("frames"))[0]
