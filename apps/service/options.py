"""Every generation option, declared once: type and range for pydantic, and an `Option` for all other readers.

The command line (`apps.commands.generate_options`), the HTTP schema (`apps.service.requests`), the record in an image
(`apps.service.metadata`), the page's controls (`apps.studio.controls`), grid axes (`apps.service.grid`), files of
prompts and the arguments of a pipeline's call (`apps.service.inference`) derive from the fields below. To add an
option, add a field to the group of the tasks that have it, the argument to the pipeline, and a label to each language
in `apps/studio/strings`. Groups that `apps.service.metadata.PictureSettings` inherits are recorded in images.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from apps.service import limits
from apps.service.option import Control, Option
from apps.service.option_values import (
    Acceleration,
    AttentionName,
    AttentionPattern,
    DTypeName,
    Expand,
    FileFormat,
    ImageId,
    KvPolicy,
    KvType,
    Label,
    Loras,
    MemoryName,
    ProfileName,
    QuantizationName,
    SchedulerName,
    SearchMethod,
    StepCache,
    Timeline,
    VideoMaskText,
)
from apps.service.panels import COUNT, EDITING, OUTPUT, PROMPT, SAMPLING, SCALES, SPEED

PromptSyntax = Literal["plain", "weights", "dynamic", "a1111"]
"""See `apps.service.prompt_texts`."""


# --------------------------------------------------------------------- fields of several groups

Strength = Annotated[
    float | None,
    Field(ge=0.05, le=1),
    Option(
        help="With --image: strength, how much of it changes; 1 ignores it.",
        panel=EDITING,
        argument="strength",
        default=0.6,
        needs="image",
        control=Control(kind="slider", place="image", start=0.6, step=0.05),
    ),
]
NegativePrompt = Annotated[
    str,
    Field(max_length=limits.MAX_PROMPT_CHARS),
    Option(
        help="Negative prompt: what the image should not show.",
        panel=PROMPT,
        argument="negative_prompt",
        control=Control(kind="text", place="advanced", start=""),
    ),
]
Upscale = Annotated[
    int | None,
    Field(ge=1, le=limits.MAX_UPSCALE),
    Option(
        help="Enlarge the finished image or clip: pixels a side of a pixel; 1 leaves it as it is.",
        panel=OUTPUT,
        idle=1,
        is_axis=False,
        control=Control(kind="radio", place="count", start=1, off=1),
    ),
]
UpscalerName = Annotated[
    str | None,
    Field(max_length=200),
    Option(
        help="With --upscale: built-in name, folder or hub id of an upscaler; realesr-animevideov3 if absent.",
        panel=OUTPUT,
        needs="upscale",
        is_axis=False,
        control=Control(kind="choice", place="advanced", start="", off=""),
    ),
]
ClassLabel = Annotated[
    Label, Option(help="Class: its number, or a name that the model knows.", argument="class_labels", is_axis=False)
]
SourceClip = Annotated[ImageId, Option(help="Hash of an uploaded clip, of which a part is kept.", is_axis=False)]
ClipLength = Annotated[
    int, Field(ge=1, le=limits.MAX_FRAMES), Option(help="Frames of the uploaded clip.", is_axis=False)
]
SourceImage = Annotated[ImageId | None, Option(help="Hash of an uploaded image to start from.", is_axis=False)]


# ------------------------------------------------------------------------------------- groups


class OptionGroup(BaseModel):
    """Base of the groups."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PromptOptions(OptionGroup):
    """What tasks with a prompt have besides; of what a prompt becomes an image records the outcome."""

    prompt_syntax: Annotated[
        PromptSyntax | None,
        Option(
            help="How prompts are read. plain: as they are; weights: (word:1.2) counts; dynamic: {a|b} and "
            "__wildcard__ too; a1111: (word) and [word] too.",
            panel=PROMPT,
            is_axis=False,
            control=Control(kind="choice", place="advanced", start="dynamic", off="plain"),
        ),
    ] = None


class RunOptions(OptionGroup):
    """What all requests have and no image records in this form. `None` is the default of the model or server."""

    model: Annotated[
        str | None,
        Field(max_length=200),
        Option(help="Name of the model in the server's list; the first one if absent.", is_axis=False),
    ] = None
    seed: Annotated[
        int | None,
        Field(ge=0, le=limits.MAX_SEED),
        Option(
            help="Seed of the noise: the same seed gives the same image.",
            panel=SAMPLING,
        ),
    ] = None
    num_images: Annotated[
        int,
        Field(ge=1, le=limits.MAX_PICTURES),
        Option(
            help="Number of images.",
            panel=COUNT,
            flag="num",
            is_axis=False,
            control=Control(kind="slider", place="count", row="counts", start=1, step=1),
        ),
    ] = 1
    batch_size: Annotated[
        int,
        Field(ge=1, le=limits.MAX_BATCH),
        Option(
            help="Batch size: how many of them at once.",
            panel=COUNT,
            is_axis=False,
            control=Control(kind="slider", place="count", row="counts", start=1, step=1),
        ),
    ] = 1
    pick: Annotated[
        int | None,
        Field(ge=0, lt=limits.MAX_BATCH),
        Option(
            help="Keep only this image of the (one) batch, from 0: repeats an image of a batch to the last bit.",
            is_axis=False,
        ),
    ] = None
    preset: Annotated[
        str | None,
        Field(max_length=100),
        Option(
            help="Named settings, see apps/service/presets/presets.json: draft, fine ...", panel=PROMPT, is_axis=False
        ),
    ] = None
    style: Annotated[
        str | None,
        Field(max_length=100),
        Option(
            help="Name of a style, see apps/service/presets/styles.json.",
            panel=PROMPT,
            control=Control(kind="choice", place="advanced", row="styles", start="", off=""),
        ),
    ] = None
    dtype: Annotated[
        DTypeName | None,
        Option(
            help="Data type of the weights; the server's if absent.",
            control=Control(kind="choice", place="advanced", row="computing", start="", off=""),
        ),
    ] = None
    file_format: Annotated[
        FileFormat,
        Option(
            help="Format of the files; both are without loss.",
            is_axis=False,
            control=Control(kind="radio", place="advanced", start="png"),
        ),
    ] = "png"
    keep_settings: Annotated[
        bool,
        Option(
            help="Write what reproduces an image into its file.",
            is_axis=False,
            control=Control(kind="checkbox", place="advanced", start=True),
        ),
    ] = True
    sidecar: Annotated[
        bool,
        Option(
            help="Write it into a JSON file beside the image.",
            is_axis=False,
            control=Control(kind="checkbox", place="advanced", start=False),
        ),
    ] = False


class SharedOptions(OptionGroup):
    """What all tasks have."""

    guidance: Annotated[
        float | None,
        Field(ge=0, le=limits.MAX_GUIDANCE),
        Option(
            help="Guidance scale; 1 or less turns guidance off.",
            panel=SAMPLING,
            argument="guidance_scale",
            control=Control(kind="slider", place="sampling", row="walk", start=4, high=12, step=0.1),
        ),
    ] = None
    memory: Annotated[
        MemoryName | None,
        Option(
            help="fast, tiles (decode in tiles), balanced or low; tessera info says what works here.",
            panel=SPEED,
            control=Control(kind="choice", place="advanced", start="", off=""),
        ),
    ] = None
    attention: Annotated[
        AttentionName | None,
        Option(
            help="Attention backend: native, flex, xformers ...; see tessera info.",
            panel=SPEED,
            control=Control(kind="choice", place="advanced", row="computing", start="", off=""),
        ),
    ] = None
    quantization: Annotated[
        QuantizationName | None,
        Option(
            help="Formats of weights and activations of the networks that denoise: w8a8, w4a8, w4a16 ...; less memory, "
            "and less time where a kernel has them.",
            panel=SPEED,
            control=Control(
                kind="choice",
                place="advanced",
                start="",
                off="",
                choices=("w8a8", "w6a8", "w4a8", "w4a4", "w8a16", "w4a16", "fp8", "nvfp4"),
            ),
        ),
    ] = None
    acceleration: Annotated[
        Acceleration | None,
        Option(
            help='Ways to be faster as one JSON object: {"step_cache": "budget=0.35", "attention": "flex"}.',
            panel=SPEED,
            is_axis=False,
            control=Control(kind="text", place="advanced", start="", off=""),
        ),
    ] = None
    profile: Annotated[
        ProfileName | None,
        Option(
            help="Named setting of speed, from a tuning of the model (tessera tune): balanced (30 dB to the plain "
            "image), faithful (40), fastest (24), low-memory. It decides the ways to be faster.",
            panel=SPEED,
            control=Control(kind="choice", place="sampling", start="", off=""),
        ),
    ] = None
    upscale: Upscale = None
    upscaler: UpscalerName = None
    loras: Annotated[Loras, Option(help="LoRA files of the server's list to put on the model.", is_axis=False)] = ()


class StepOptions(OptionGroup):
    """What tasks with denoising steps have."""

    steps: Annotated[
        int | None,
        Field(ge=1, le=limits.MAX_STEPS),
        Option(
            help="Denoising steps; the model's default if absent.",
            panel=SAMPLING,
            argument="num_inference_steps",
            control=Control(kind="slider", place="sampling", row="walk", start=28, high=100, step=1),
        ),
    ] = None
    finish_after: Annotated[
        int | None,
        Field(ge=1, le=limits.MAX_STEPS * limits.MAX_FRAMES),
        Option(help="End after so many steps, with the image as it is then.", panel=SAMPLING),
    ] = None
    step_cache: Annotated[
        StepCache | None,
        Option(
            help="Compute some steps, forecast the rest: budget=0.35, taylorseer, fbcache:threshold=0.1 ...",
            panel=SPEED,
            flag="cache",
        ),
    ] = None
    attention_pattern: Annotated[
        AttentionPattern | None,
        Option(
            help="Sparse attention after the first fifth of the steps: sol, pooled_topk, radial ...; plan: that in the "
            "model's folder.",
            panel=SPEED,
            idle="plan",
            control=Control(kind="choice", place="advanced", row="sparse", start="", off=""),
        ),
    ] = None
    attention_density: Annotated[
        float | None,
        Field(ge=0.02, le=1),
        Option(
            help="With --attention-pattern: which fraction of the pairs of tokens is computed.",
            panel=SPEED,
            needs="attention_pattern",
            control=Control(kind="slider", place="advanced", row="sparse", start=0.3, low=0.05, step=0.05),
        ),
    ] = None


class SizeOptions(OptionGroup):
    """Size of the image; both sides or neither."""

    height: Annotated[int | None, Option(help="Height in pixels.", argument="height", is_axis=False)] = None
    width: Annotated[int | None, Option(help="Width in pixels.", argument="width", is_axis=False)] = None


class DenoisingOptions(StepOptions, SizeOptions):
    """What requests with denoising steps have; of the scheduler an image records more than its name."""

    scheduler: Annotated[
        SchedulerName | None,
        Option(
            help="euler, heun, sde, dpm++, unipc, ddim or ddpm.",
            panel=SAMPLING,
            control=Control(kind="choice", place="advanced", row="styles", start="", off=""),
        ),
    ] = None


class ClipOptions(OptionGroup):
    """What models of clips have."""

    frames: Annotated[
        int | None,
        Field(ge=1, le=limits.MAX_FRAMES),
        Option(
            help="Frames of a clip; the model's default if absent.",
            panel=COUNT,
            is_axis=False,
            control=Control(kind="number", place="video", off=None),
        ),
    ] = None
    fps: Annotated[
        float | None,
        Field(ge=1, le=120),
        Option(
            help="Frames a second of a clip; models that are told it move accordingly, clips of others play faster or "
            "slower. The model's own if absent.",
            panel=COUNT,
            is_axis=False,
            control=Control(kind="number", place="video", off=None),
        ),
    ] = None
    last_image: Annotated[
        ImageId | None, Option(help="Hash of an uploaded image that a clip ends with.", is_axis=False)
    ] = None
    timeline: Annotated[
        Timeline | None,
        Option(
            help="Later prompts of a clip and the frames they begin at: '16: a dolphin leaping | 32: a fox winking'.",
            panel=PROMPT,
            argument="prompt_schedule",
            is_axis=False,
            control=Control(kind="text", place="video", start="", off=""),
        ),
    ] = None


class CompletionOptions(ClipOptions):
    """What completing a clip that is given in part has."""

    video_mask: Annotated[
        VideoMaskText | None,
        Option(
            help="With --video: what is generated: predict(8) keeps 8 frames and goes on, interpolate(4), "
            "keyframes(0, -1), box(0.5, 0, 1, 1), outpaint(right=0.25); combined by | & ~.",
            panel=EDITING,
            argument="mask",
            needs="video",
            is_axis=False,
            control=Control(kind="text", place="video", start="", off=""),
        ),
    ] = None


class SourceOptions(OptionGroup):
    """What tasks that start from an image have."""

    image: SourceImage = None


class MaskOptions(OptionGroup):
    """What tasks that change a part of an image have."""

    mask: Annotated[
        ImageId | None,
        Option(help="Hash of an uploaded mask, white where to generate.", is_axis=False),
    ] = None
    expand: Annotated[
        Expand | None,
        Option(
            help="With --image: extend it (outpainting): 0.25, or left=0.5,top=0.25.",
            panel=EDITING,
            needs="image",
            is_axis=False,
        ),
    ] = None
    mask_grow: Annotated[
        int | None,
        Field(ge=0, le=limits.MAX_MASK_GROW),
        Option(
            help="With --mask: grow it by so many pixels on every side.",
            panel=EDITING,
            control=Control(kind="slider", place="inpaint", row="mask-edge", start=0, step=1, off=0),
        ),
    ] = None
    mask_blur: Annotated[
        int | None,
        Field(ge=0, le=limits.MAX_MASK_BLUR),
        Option(
            help="With --mask: width of its soft edge in pixels; 0 keeps all outside bit-identical.",
            panel=EDITING,
            control=Control(kind="slider", place="inpaint", row="mask-edge", start=0, step=1, off=0),
        ),
    ] = None
    mask_padding: Annotated[
        int | None,
        Field(ge=1, le=limits.MAX_MASK_PADDING),
        Option(
            help="With --mask: generate the masked area only, with so many pixels around it, at the model's size.",
            panel=EDITING,
            control=Control(kind="slider", place="inpaint", row="mask-edge", start=0, low=0, step=1, off=0),
        ),
    ] = None


class NextScaleOptions(MaskOptions, SourceOptions):
    """What next-scale tasks have; with an image they change a part of it and keep the rest as it is."""

    top_k: Annotated[
        int | None,
        Field(ge=0, le=2**20),
        Option(
            help="Next-scale models: sample among so many tokens; 0 is all.",
            panel=SCALES,
            argument="top_k",
            control=Control(kind="number", place="scales", row="top", start=900),
        ),
    ] = None
    top_p: Annotated[
        float | None,
        Field(ge=0, le=1),
        Option(
            help="Next-scale models: among the likeliest that hold this probability; 0 is all.",
            panel=SCALES,
            argument="top_p",
            control=Control(kind="slider", place="scales", row="top", start=0.95, step=0.01),
        ),
    ] = None
    temperature: Annotated[
        float | None,
        Field(ge=0.01, le=100),
        Option(
            help="Next-scale models: below 1 is bolder, above more varied.",
            panel=SCALES,
            argument="temperature",
            control=Control(kind="slider", place="scales", row="mixing", start=1, low=0.1, high=3, step=0.05),
        ),
    ] = None
    smooth: Annotated[
        bool | None,
        Option(
            help="Next-scale models: mix codes instead of choosing one (for models of classes).",
            panel=SCALES,
            argument="smooth",
            control=Control(kind="checkbox", place="scales", row="mixing", start=False, off=False),
        ),
    ] = None
    kv_policy: Annotated[
        KvPolicy | None,
        Option(
            help="Next-scale models, of earlier scales keep: full, scalekv, snapkv, window ...",
            panel=SCALES,
            argument="kv_policy",
            idle="full",
            control=Control(
                kind="choice",
                place="scales",
                row="kv",
                start="full",
                choices=("full", "window", "streaming", "snapkv", "pyramidkv", "scalekv"),
            ),
        ),
    ] = None
    kv_dtype: Annotated[
        KvType | None,
        Option(
            help="Next-scale models: data type of what is kept of earlier scales.",
            panel=SCALES,
            argument="kv_dtype",
            control=Control(kind="choice", place="scales", row="kv", start="auto"),
        ),
    ] = None
    kv_budget: Annotated[
        float | None,
        Field(gt=0, le=1),
        Option(
            help="With --kv-policy: which fraction is kept.",
            panel=SCALES,
            argument="kv_budget",
            needs="kv_policy",
            control=Control(kind="slider", place="scales", start=0.1, low=0.02, step=0.02),
        ),
    ] = None
    search: Annotated[
        SearchMethod | None,
        Option(
            help="Next-scale models: generate several candidates; the scorer beside the model chooses.",
            panel=SCALES,
            control=Control(kind="choice", place="scales", row="search", start="", off=""),
        ),
    ] = None
    candidates: Annotated[
        int | None,
        Field(ge=2, le=limits.MAX_CANDIDATES),
        Option(
            help="With --search: images to pay for. best_of generates so many; tts and beam spend their tokens early.",
            panel=SCALES,
            needs="search",
            control=Control(kind="slider", place="scales", row="search", start=4, step=1),
        ),
    ] = None
