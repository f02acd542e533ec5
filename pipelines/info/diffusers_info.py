"""`PipelineInfo` of diffusers' pipelines, derived from their call, components and configurations.

diffusers' pipelines declare nothing about themselves, so everything here is read off names that they have in common.
It is the only place that does so: whoever needs to know something of a pipeline asks `info_of`.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import math
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from pipelines.info.clip_defaults import ClipDefaults, clip_defaults_of, default_fps, default_frames
from pipelines.info.guider_call import guided_call, guider_scale
from pipelines.info.record import FALLBACK_SIDE, Callback, Guidance, PipelineInfo, class_table
from pipelines.info.record import tiles as can_tile
from pipelines.previews import can_preview, is_flow

logger = logging.getLogger(__name__)

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt",),
    "negative_prompt": ("negative_prompt",),
    "label": ("class_labels",),
    "height": ("height",),
    "width": ("width",),
    "steps": ("num_inference_steps",),
    "frames": ("num_frames", "video_length"),
    "image": ("image",),
    "mask": ("mask_image",),
    "strength": ("strength",),
    "batch_size": ("num_images_per_prompt",),
    "seed": ("generator",),
}
"""Field of a request -> what calls of diffusers name it; guidance is settled by `find_guidance`."""

FIRST_FRAME = {"LTXPipeline": "LTXImageToVideoPipeline", "LTX2Pipeline": "LTX2ImageToVideoPipeline"}
"""Pipelines of clips from text, and those over the same weights that take a first frame; `AutoPipeline` knows none."""

LATENT_FACTORS = {"StableDiffusionLatentUpscalePipeline": 2}
"""Pipelines that enlarge the latents of an image -> by how much."""

WIDE = (16, 9)
"""Width : height of clips of pipelines that only say how many pixels they have."""

FALLBACK_MULTIPLE = 8
"""Pixels a latent cell of a pipeline that doesn't say."""


def diffusers_info(pipe: Any) -> PipelineInfo:
    """Find out what a pipeline is and can do.

    Args:
        pipe: a pipeline of diffusers, or any object with a call like theirs. One that holds its guidance scale in a
            component is asked for what `guided_call` makes of it.
    """
    pipe = guided_call(pipe)
    defaults = call_defaults(type(pipe))
    if defaults.get("guidance_scale") is None and (scale := guider_scale(pipe)) is not None:
        defaults["guidance_scale"] = scale
    parameters = call_parameters(type(pipe))
    arguments = {
        name: next(one for one in names if one in parameters)
        for name, names in ARGUMENTS.items()
        if not parameters.isdisjoint(names)
    }
    guidance_argument, kind = find_guidance(pipe, parameters, defaults)
    if guidance_argument is not None:
        arguments["guidance"] = guidance_argument
    guidance, steps = defaults.get(guidance_argument or ""), defaults.get("num_inference_steps")
    height, width = (default_side(pipe, name, defaults) for name in ("height", "width"))
    is_sized = "class_labels" in parameters and {"height", "width"}.isdisjoint(parameters)
    ids = class_ids(pipe) if "class_labels" in parameters else {}
    frames, clips = arguments.get("frames"), clip_defaults(pipe)
    return PipelineInfo(
        tasks=call_tasks(type(pipe)),
        arguments=arguments,
        parameters=parameters,
        defaults=defaults,
        fixed=fixed_arguments(pipe, parameters),
        height=height,
        width=width,
        multiple=side_multiple(pipe),
        sizes=((width, height),) if is_sized else (),
        steps=steps if isinstance(steps, int) else None,
        guidance=float(guidance) if isinstance(guidance, int | float) else None,
        guidance_kind=kind,
        frames=None if frames is None else default_frames(defaults.get(frames), network_config(pipe), clips),
        frame_step=1 if frames is None else frame_step(pipe),
        fps=default_fps(defaults, clips),
        output="images" if frames is None else "frames",
        labels=class_table(count_classes(pipe), ids) if "class_labels" in parameters else {},
        label_ids=ids,
        callback=find_callback(pipe, parameters),
        callback_tensors=tuple(getattr(pipe, "_callback_tensor_inputs", ("latents",))),
        can_interrupt=_has_switch(pipe, "interrupt") and type(pipe).interrupt.fset is not None,
        finish="switch" if _has_switch(pipe, "finish_now") else "latents" if finishes_on_interrupt(pipe) else "none",
        preview="own" if callable(getattr(pipe, "preview", None)) else "latents" if can_preview(pipe) else "none",
        has_scheduler=getattr(pipe, "scheduler", None) is not None,
        can_tile=can_tile(getattr(pipe, "vae", None)),
        can_load_lora=callable(getattr(pipe, "load_lora_weights", None)),
        knows_words=callable(getattr(pipe, "unknown_words", None)),
    )


# --------------------------------------------------------------------------- the call


def call_parameters(pipeline: type) -> frozenset[str]:
    """Return the argument names of the call of a pipeline class."""
    return frozenset(inspect.signature(pipeline.__call__).parameters) - {"self"}


def call_defaults(pipeline: type) -> dict[str, Any]:
    """Return the defaults of the call of a pipeline class by argument; required arguments have none."""
    parameters = inspect.signature(pipeline.__call__).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}


def call_tasks(pipeline: type) -> tuple[str, ...]:
    """Return what a pipeline class can be asked for by the arguments of its call, the main task first."""
    accepts = call_parameters(pipeline)
    if "class_labels" in accepts:
        return ("class_to_image",)
    if "prompt" not in accepts:
        return ()
    if "image" in accepts and not accepts.isdisjoint(ARGUMENTS["frames"]) and "strength" not in accepts:
        return ("image_to_image",)  # clips that begin with an image
    others = {"image_to_image": {"image", "strength"}, "inpaint": {"image", "mask_image"}}
    return ("text_to_image", *(task for task, needs in others.items() if needs <= accepts))


def makes_clips(pipeline: type) -> bool:
    """Return whether the call of a pipeline class takes a number of frames."""
    return not call_parameters(pipeline).isdisjoint(ARGUMENTS["frames"])


def find_guidance(pipe: Any, parameters: frozenset[str], defaults: Mapping[str, Any]) -> tuple[str | None, Guidance]:
    """Return what the call names its guidance scale, and what that does.

    A pipeline with both names has its distilled guidance in `guidance_scale`, unless that is off by default.
    """
    if defaults.get("guidance_scale") is None and "true_cfg_scale" in parameters:
        return "true_cfg_scale", "true_cfg"
    if "guidance_scale" not in parameters:
        return None, "none"
    is_distilled = "true_cfg_scale" in parameters or getattr(network_config(pipe), "guidance_embeds", False) is True
    return "guidance_scale", "distilled" if is_distilled else "classifier_free"


def fixed_arguments(pipe: Any, parameters: frozenset[str]) -> dict[str, Any]:
    """Return arguments without which a pipeline would do something else than it is asked for."""
    fixed: dict[str, Any] = {}
    if "use_resolution_binning" in parameters:  # would generate another size than asked for and scale the image
        fixed["use_resolution_binning"] = False
    length = getattr(getattr(getattr(pipe, "transformer", None), "config", None), "max_text_seq_length", None)
    if length is not None and "max_sequence_length" in parameters:  # the network takes this length and no other
        fixed["max_sequence_length"] = length
    if "clean_caption" in parameters and not all(map(importlib.util.find_spec, ("bs4", "ftfy"))):
        fixed["clean_caption"] = False  # else diffusers warns at every image that it can't be done
    return fixed


def find_callback(pipe: Any, parameters: frozenset[str]) -> Callback:
    """Return how a running call of a pipeline reports its steps."""
    if "callback_on_step_end" in parameters:
        return "step_end"
    if "callback" in parameters:
        return "legacy"
    return "scheduler" if hasattr(getattr(pipe, "scheduler", None), "step") else "none"


def finishes_on_interrupt(pipe: Any) -> bool:
    """Return whether a pipeline, once interrupted, decodes the latents that the callback gave back."""
    has_callback = {"callback_on_step_end", "callback_on_step_end_tensor_inputs"} <= call_parameters(type(pipe))
    return has_callback and _has_switch(pipe, "interrupt") and hasattr(pipe, "scheduler") and is_flow(pipe)


def _has_switch(pipe: Any, name: str) -> bool:
    return isinstance(getattr(type(pipe), name, None), property)


def upscale_factor(pipe: Any) -> int | None:
    """Return how many pixels a side a pipeline makes of one of the image that it is given.

    Args:
        pipe: of diffusers, with an `image` that it enlarges.

    Returns:
        The factor; None where it shows only by running.
    """
    if type(pipe).__name__ in LATENT_FACTORS:
        return LATENT_FACTORS[type(pipe).__name__]
    decoder = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    levels = getattr(getattr(decoder, "config", None), "block_out_channels", None)
    is_known = type(pipe).__name__ in ("StableDiffusionUpscalePipeline", "LDMSuperResolutionPipeline")
    return 2 ** (len(levels) - 1) if is_known and levels else None  # its latents have the size of the image


# ------------------------------------------------------------------- sizes and classes


def default_side(pipe: Any, name: str, defaults: Mapping[str, Any]) -> int:
    """Return the height or width in pixels that a pipeline was made for.

    That is the default of its call, else what its call finds for its shape and area, else its sample size in latents
    times its scale.

    Args:
        pipe: a pipeline.
        name: "height" or "width".
        defaults: of its call.
    """
    pixels = (defaults.get(name), getattr(pipe, f"default_{name}", None), _side_of_shape(pipe, name))
    config = network_config(pipe)
    cells = (
        getattr(pipe, "default_sample_size", None),
        getattr(config, f"sample_{name}", None),
        getattr(config, "sample_size", None),
    )
    scale = latent_scale(pipe) or 0
    sides = [*pixels, *(value * scale for value in cells if isinstance(value, int))]
    return next((side for side in sides if isinstance(side, int) and side > 0), FALLBACK_SIDE)


def _side_of_shape(pipe: Any, name: str) -> int | None:
    """Return the height or width that HunyuanVideo-1.5 finds in a call without them; None for others."""
    find = getattr(getattr(pipe, "video_processor", None), "calculate_default_height_width", None)
    target = getattr(pipe, "target_size", None)
    if find is None or not isinstance(target, int):
        return None
    across, down = getattr(pipe, "default_aspect_ratio", WIDE)  # that from a first frame has the frame's
    return int(find(down, across, target)[("height", "width").index(name)])


def latent_scale(pipe: Any) -> int | None:
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


def side_multiple(pipe: Any, packs: bool = False) -> int:
    """Return what height and width must be multiples of: pixels per latent cell times cells per token.

    Args:
        pipe: a pipeline.
        packs: it may pack 2 x 2 cells into a token even if it has no method that says so.
    """
    patch = getattr(network_config(pipe), "patch_size", None) or 1
    across = int(patch) if isinstance(patch, int) else int(patch[-1])  # (t, h, w) of some networks of clips
    pack = getattr(pipe, "_pack_latents", None)
    is_silent = pack is not None and "patch_size" not in inspect.signature(pack).parameters  # LTX packs by the config
    if across == 1 and (packs or is_silent):
        across = 2  # pipelines that pack 2 x 2 cells into a token keep silent about it in the config
    return math.lcm((latent_scale(pipe) or FALLBACK_MULTIPLE) * across, FALLBACK_MULTIPLE)


def frame_step(pipe: Any) -> int:
    """Return how many frames of a clip share a latent frame; its first has one of its own."""
    names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
    found = (getattr(pipe, name, None) for name in names)
    return int(next((step for step in found if isinstance(step, int | float) and step >= 1), 1))


def clip_defaults(pipe: Any) -> ClipDefaults | None:
    """Return what is known of the clips of a pipeline's family; None for one that isn't listed."""
    return clip_defaults_of(type(pipe), getattr(pipe, "config", None), network_config(pipe))


def count_classes(pipe: Any) -> int:
    """Return how many classes the network of a pipeline knows; 0 if it doesn't say."""
    config = network_config(pipe)
    count = getattr(config, "num_classes", None) or getattr(config, "num_embeds_ada_norm", None)
    return count if isinstance(count, int) else 0


def class_ids(pipe: Any) -> dict[str, int]:
    """Return the numbers of the classes that a pipeline has names for, by name."""
    return dict(getattr(pipe, "labels", None) or {}) if count_classes(pipe) else {}


def network_config(pipe: Any) -> Any:
    """Return the configuration of the network that denoises; None without one."""
    network = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    return getattr(network, "config", None)


# ------------------------------------------------------------------ related pipelines


def is_offloaded(pipe: Any) -> bool:
    """Return whether parts of a pipeline are moved to the device only while they run."""
    return any(hasattr(part, "_hf_hook") for part in getattr(pipe, "components", {}).values())


def _over_same_parts(kind: type, pipe: Any) -> Any:
    """Make a pipeline of another class with the components of one; `from_pipe` would cast them to float32."""
    given = {**pipe.config, **pipe.components}
    return kind(**{name: given[name] for name in inspect.signature(kind).parameters if name in given})


def related_pipelines(pipe: Any) -> dict[str, Any]:
    """Make the pipelines of diffusers that change images with the same components, where it has any.

    Args:
        pipe: generates from text only.

    Returns:
        Task -> pipeline.
    """
    if not isinstance(pipe, DiffusionPipeline):
        return {}
    name = type(pipe).__name__
    if name in FIRST_FRAME:
        return {"image_to_image": _over_same_parts(getattr(diffusers, FIRST_FRAME[name]), pipe)}
    # Imported here because it imports every pipeline of diffusers, which takes seconds and warns about torchvision.
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    found: dict[str, Any] = {}
    for task, maker in (("image_to_image", AutoPipelineForImage2Image), ("inpaint", AutoPipelineForInpainting)):
        try:
            found[task] = maker.from_pipe(pipe)
        except ValueError:  # how diffusers says that it has none
            logger.info("diffusers has no %s pipeline for %s", task, name)
    return found
