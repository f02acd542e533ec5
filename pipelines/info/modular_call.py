"""Standard call for modular pipelines of diffusers: step callback, interrupt, early end.

A modular pipeline is a tree of blocks that hand a state on. It takes no callback and can't be stopped, so the blocks
are run here one after another, on a copy of the tree whose loops report their steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    ConditionalPipelineBlocks,
    LoopSequentialPipelineBlocks,
    ModularPipeline,
    ModularPipelineBlocks,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines import PipelineState
from PIL import Image
from torch import Tensor

from dit.runtime.hooks import attachments
from pipelines.info.clip_defaults import default_fps, default_frames
from pipelines.info.diffusers_info import ARGUMENTS, clip_defaults, default_side, network_config, side_multiple
from pipelines.info.guider_call import guider_scale, guiders_of, scaled_guider
from pipelines.info.record import Guidance, PipelineInfo, tiles
from pipelines.previews import can_preview, is_flow, predict_x0

logger = logging.getLogger(__name__)

OUTPUTS = {"images": "images", "videos": "frames"}
"""What modular pipelines name their results -> what the outputs of standard pipelines name them."""
CALLBACK_ARGUMENTS = ("callback_on_step_end", "callback_on_step_end_tensor_inputs")
CALLBACK_TENSORS = ("latents",)

StepCallback = Callable[..., Mapping[str, Tensor] | None]


@dataclass
class ModularOutput:
    """What a call returns.

    Attributes:
        images: generated images; None for clips, and empty for a call that was interrupted.
        frames: generated clips, each a list of images; None for images.
        audio: what is heard with them, by pipelines that make sound.
        state: of the pipeline at the end, with everything else that its blocks made.
    """

    images: list[Image.Image] | None
    frames: list[list[Image.Image]] | None
    audio: Any
    state: PipelineState


class ModularCall:
    """A modular pipeline with the call of a standard one.

    It is no copy: components that are set here, or changed in place, are the pipeline's. What isn't defined here is
    asked of the pipeline.

    Args:
        pipe: a modular pipeline with its components.

    Example:
        >>> call = ModularCall(load_pipeline("some/modular-repository"))
        >>> call(prompt="a red apple", callback_on_step_end=watch).images[0].save("apple.png")
    """

    def __init__(self, pipe: ModularPipeline) -> None:
        self.pipe = pipe
        self.interrupt = False
        self.finish_now = False
        self._bar: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "pipe":  # not there yet: while this object is copied
            raise AttributeError(name)
        return getattr(self.pipe, name)

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler; setting it exchanges that."""
        return self.pipe.components.get("scheduler")

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        setattr(self.pipe, "scheduler", scheduler)  # noqa: B010  the pipeline makes such attributes when it is built

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Configure the bars of all loops, as in diffusers."""
        self._bar = kwargs

    def maybe_free_model_hooks(self) -> None:
        """Do nothing: components of modular pipelines are not offloaded here."""

    # ------------------------------------------------------------- what it is and can do

    def info(self) -> PipelineInfo:
        """Return what this pipeline is and can do, by the inputs that its blocks declare."""
        inputs = declared_inputs(self.pipe)
        defaults = {name: one.default for name, one in inputs.items() if not one.required or one.default is not None}
        arguments = {
            field: next(one for one in names if one in inputs)
            for field, names in ARGUMENTS.items()
            if any(one in inputs for one in names)
        }
        has_loop = next(find_loops(self.pipe.blocks), None) is not None
        scale, kind = self._guidance(inputs)
        if kind != "none":
            arguments["guidance"] = "guidance_scale"
        frames = defaults.get(arguments.get("frames", "")) or self._says("default_num_frames")
        clips = clip_defaults(self.pipe)
        is_clip = self._result() == "videos"
        scheduler, steps = self.scheduler, defaults.get("num_inference_steps")
        has_flow = scheduler is not None and is_flow(self)  # type: ignore[arg-type]  it asks for the scheduler only
        height, width = (default_side(self, name, defaults) for name in ("height", "width"))
        known = {*inputs, *(("guidance_scale",) if kind != "none" else ()), *(CALLBACK_ARGUMENTS if has_loop else ())}
        return PipelineInfo(
            tasks=tasks_of_blocks(self.pipe.blocks),
            arguments=arguments,
            parameters=frozenset(known),
            defaults=defaults if scale is None else {**defaults, "guidance_scale": scale},
            height=height,
            width=width,
            multiple=side_multiple(self, packs=True),
            steps=steps if isinstance(steps, int) else None,
            guidance=scale,
            guidance_kind=kind,
            frames=default_frames(frames, network_config(self), clips) if is_clip else None,
            fps=default_fps({**defaults, "fps": defaults.get("fps") or self._says("fps")}, clips),
            output="frames" if is_clip else "images",
            callback="step_end" if has_loop else "none",
            callback_tensors=CALLBACK_TENSORS if has_loop else (),
            can_interrupt=has_loop,
            finish="switch" if has_loop and has_flow else "none",
            preview="latents" if can_preview(self) else "none",  # type: ignore[arg-type]
            has_scheduler=scheduler is not None,
            can_tile=tiles(self.pipe.components.get("vae")),
            can_load_lora=callable(getattr(self.pipe, "load_lora_weights", None)),
        )

    def _says(self, name: str) -> Any:
        """Return an attribute that only some classes of modular pipelines have; None for the others."""
        return getattr(self.pipe, name, None)

    def _guidance(self, inputs: Mapping[str, Any]) -> tuple[float | None, Guidance]:
        """Return the default guidance scale, an input or in a guider, and what it does."""
        if "guidance_scale" in inputs:
            scale = inputs["guidance_scale"].default
            is_distilled = getattr(network_config(self), "guidance_embeds", False) is True
            kind: Guidance = "distilled" if is_distilled else "classifier_free"
            return float(scale) if isinstance(scale, int | float) else None, kind
        scale = guider_scale(self.pipe)
        return scale, "none" if scale is None else "classifier_free"

    def _result(self) -> str:
        """Return the name of the pipeline's result among the outputs of its blocks.

        Raises:
            ValueError: it makes neither images nor clips.
        """
        names = [one.name for one in self.pipe.blocks.outputs]
        found = next((name for name in OUTPUTS if name in names), None)
        if found is None:
            raise ValueError(
                f"{type(self.pipe).__name__} makes neither images nor videos but {', '.join(names[-4:])}: run it with "
                "diffusers."
            )
        return found

    # --------------------------------------------------------------------------- running

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = CALLBACK_TENSORS,
        **inputs: Any,
    ) -> ModularOutput:
        """Generate.

        Args:
            prompt: what to generate.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each step; latents that it
                returns replace the pipeline's. It may set `pipe.interrupt` or `pipe.finish_now`.
            callback_on_step_end_tensor_inputs: the tensors it gets, some of `CALLBACK_TENSORS`.
            **inputs: other inputs of the pipeline, and `guidance_scale` for those that hold it in a guider; None is the
                guider's own.

        Returns:
            The images or clips; none when the call was interrupted.

        Raises:
            ValueError: an input that the pipeline doesn't have, or a required one is missing.
        """
        declared = declared_inputs(self.pipe)
        given = inputs if prompt is None else {"prompt": prompt, **inputs}
        guidance = None if "guidance_scale" in declared else given.pop("guidance_scale", None)
        if guidance is not None and guidance > 1 and "negative_prompt" in declared and not given.get("negative_prompt"):
            given["negative_prompt"] = ""  # without any some pipelines leave the guidance out
        self._check_inputs(declared, given, callback_on_step_end_tensor_inputs)
        if "output_type" in declared:
            given.setdefault("output_type", "pil")
        self.interrupt = self.finish_now = False
        result = self._result()
        blocks = self.pipe.blocks  # a copy, so that what is put on its loops is gone with it
        for loop in find_loops(blocks):
            loop.set_progress_bar_config(**self._bar)
            _Watch(self, callback_on_step_end, callback_on_step_end_tensor_inputs).put_on(loop)
        state = PipelineState()
        for one in blocks.inputs:
            if one.name is not None:
                state.set(one.name, given.get(one.name, one.default), one.kwargs_type)
        with self._guided_by(guidance):
            self._run(blocks, state)
        made: Any = [] if self.interrupt else state.get(result)
        images, frames = (made, None) if OUTPUTS[result] == "images" else (None, made)
        return ModularOutput(images, frames, None if self.interrupt else state.get("audio"), state=state)

    def _run(self, block: Any, state: PipelineState) -> None:
        """Run a block, and those within it one by one, until the call is interrupted."""
        if self.interrupt:
            return
        if isinstance(block, ConditionalPipelineBlocks):
            triggers = {name: state.get(name) for name in block.block_trigger_inputs if name is not None}
            name = block.select_block(**triggers) or block.default_block_name
            if name is not None:
                self._run(block.sub_blocks[name], state)
        elif type(block).__call__ is SequentialPipelineBlocks.__call__:
            for one in block.sub_blocks.values():
                self._run(one, state)
        else:
            block(self.pipe, state)

    @contextmanager
    def _guided_by(self, scale: float | None) -> Generator[None]:
        """Have the guiders guide by a scale for one call, None is their own, and name the branches of guidance."""
        before = guiders_of(self.pipe)
        if scale is not None and not before:
            raise ValueError(f"{type(self.pipe).__name__} has no guidance scale; leave guidance_scale out.")
        with ExitStack() as branch:
            for name, guider in before.items():
                other = copy(guider) if scale is None else scaled_guider(guider, scale)
                if other.num_conditions > 1:
                    self._check_branches()
                    _name_branches(other, branch)
                setattr(self.pipe, name, other)
            try:
                yield
            finally:
                for name, guider in before.items():
                    setattr(self.pipe, name, guider)

    def _check_branches(self) -> None:
        """Refuse guidance where a cache could not tell its branches apart.

        Raises:
            ValueError: something is attached to a network that computes them one by one, and can't know which it is.
        """
        networks = [one for name, one in self.pipe.components.items() if name.startswith("transformer") and one]
        mute = [one for one in networks if not hasattr(one, "cache_context") and attachments(one)]
        if mute:
            raise ValueError(
                f"{type(self.pipe).__name__} computes the branches of guidance one by one without saying which, so "
                f"that what is attached to {type(mute[0]).__name__} (such as a step cache) would mix them up. Take it "
                "off, or set guidance_scale=1."
            )

    def _check_inputs(self, declared: Mapping[str, Any], given: Mapping[str, Any], tensors: Sequence[str]) -> None:
        """Refuse what the pipeline would ignore, and calls that lack something."""
        name = type(self.pipe).__name__
        unknown = sorted(set(given) - declared.keys())
        if unknown:
            raise ValueError(f"{name} has no input {', '.join(unknown)}; it has {', '.join(sorted(declared))}.")
        said = [one for one, value in given.items() if value is not None]
        lacking = [one for one, needed in used_inputs(self.pipe.blocks, said).items() if needed and one not in said]
        if lacking:
            raise ValueError(f"{name} needs the input {', '.join(lacking)}.")
        strange = sorted(set(tensors) - set(CALLBACK_TENSORS))
        if strange:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs names {strange}, which are not on offer. Choose among "
                f"{list(CALLBACK_TENSORS)}."
            )


class _Watch:
    """Reports the steps of one loop of a running call, and ends them when it is asked to."""

    def __init__(self, call: ModularCall, callback: StepCallback | None, tensors: Sequence[str]) -> None:
        self._call = call
        self._callback = callback
        self._tensors = tensors
        self._done = 0
        self._ended = False

    def put_on(self, loop: LoopSequentialPipelineBlocks) -> None:
        """Wrap the steps of a loop unless another call has wrapped them."""
        step: Any = loop.loop_step

        def watched(components: Any, block_state: Any, **where: Any) -> tuple[Any, Any]:
            if self._ended or self._call.interrupt:
                return components, block_state
            before = block_state.as_dict().get("latents")
            components, block_state = step(components, block_state, **where)
            self._report(before, block_state, where.get("t"))
            return components, block_state

        loop.loop_step = watched  # type: ignore[method-assign]

    def _report(self, before: Any, block_state: Any, timestep: Any) -> None:
        """Tell the callback of a step, and take over what it gives back."""
        latents, step = block_state.as_dict().get("latents"), self._done
        self._done += 1
        if self._callback is None:
            return
        offered = {"latents": latents} if isinstance(latents, Tensor) else {}
        asked = {name: offered[name] for name in self._tensors if name in offered}
        at = torch.as_tensor(step if timestep is None else timestep)
        replaced = (self._callback(self._call, step, at, asked) or {}).get("latents")
        if replaced is not None:
            block_state.latents = replaced
        if self._call.finish_now and not self._call.interrupt:
            self._ended = True
            both = isinstance(before, Tensor) and isinstance(latents, Tensor)
            if replaced is None and both and is_flow(self._call):  # type: ignore[arg-type]
                block_state.latents = predict_x0(self._call, before, latents)  # type: ignore[arg-type]


def _name_branches(guider: Any, branch: ExitStack) -> None:
    """Have a guider say which branch of guidance a network computes, for caches; not all pipelines do it.

    Args:
        guider: a copy for one call.
        branch: holds the context of the running branch.
    """
    prepare, clean_up = guider.prepare_models, guider.cleanup_models

    def prepare_models(network: Any) -> None:
        prepare(network)
        if hasattr(network, "cache_context"):
            branch.enter_context(network.cache_context("cond" if guider.is_conditional else "uncond"))

    def cleanup_models(network: Any) -> None:
        branch.close()
        clean_up(network)

    guider.prepare_models, guider.cleanup_models = prepare_models, cleanup_models


# ----------------------------------------------------------------------------- inputs


def declared_inputs(pipe: ModularPipeline) -> dict[str, Any]:
    """Return the inputs of a modular pipeline's call by name, each with its `default`, `required`, `description`."""
    return {one.name: one for one in pipe.blocks.inputs if one.name is not None}


def used_inputs(blocks: ModularPipelineBlocks, given: Iterable[str]) -> dict[str, bool]:
    """Return the inputs of the blocks that a call would run, each with whether the call has to give it.

    Args:
        blocks: of the pipeline.
        given: inputs that the call gives, by which blocks are chosen.
    """
    try:
        run = blocks.get_execution_blocks(**dict.fromkeys(given, True))
    except NotImplementedError:  # all are run
        run = blocks
    inputs = [] if run is None else run.inputs
    return {one.name: one.required and one.default is None for one in inputs if one.name is not None}


TASK_INPUTS = {
    "text_to_image": ("prompt",),
    "image_to_image": ("prompt", "image"),
    "inpaint": ("prompt", "image", "mask_image"),
}
"""What a request of each task gives."""


def tasks_of_blocks(blocks: ModularPipelineBlocks) -> tuple[str, ...]:
    """Return what a modular pipeline can be asked for by what its blocks take and need, the main task first.

    Args:
        blocks: of the pipeline.

    Returns:
        Tasks; none for a pipeline that needs inputs which no request has.
    """

    def is_able(given: tuple[str, ...]) -> bool:
        used = used_inputs(blocks, given)
        needed = {name for name, is_needed in used.items() if is_needed}
        return needed <= set(given) <= used.keys()

    return tuple(task for task, given in TASK_INPUTS.items() if is_able(given))


def makes_clips_of_blocks(blocks: ModularPipelineBlocks) -> bool:
    """Return whether the result of a modular pipeline is clips."""
    names = [one.name for one in blocks.outputs]
    return next((OUTPUTS[name] for name in OUTPUTS if name in names), None) == "frames"


def find_loops(block: Any) -> Iterator[LoopSequentialPipelineBlocks]:
    """Yield the loops in a tree of blocks, without those inside of other loops."""
    if isinstance(block, LoopSequentialPipelineBlocks):
        yield block
        return
    for one in block.sub_blocks.values():
        yield from find_loops(one)
