"""What a person asks of the engine: one pydantic request a task, distinguished by `task`.

Web page, command line and HTTP speak these types only; none of them knows threads or pipelines. A request names
nothing on the machine: models by their key in the owner's list, images by the hash of their content. The fields stand
in `apps.service.options`; here is which task has which, and what of them goes together.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from apps.service import limits
from apps.service.declared import declared_options
from apps.service.option_values import Expand, ImageId
from apps.service.options import (
    ClassLabel,
    ClipLength,
    ClipOptions,
    CompletionOptions,
    Control,
    DenoisingOptions,
    MaskOptions,
    NegativePrompt,
    NextScaleOptions,
    Option,
    PromptOptions,
    RunOptions,
    SharedOptions,
    SourceClip,
    Strength,
)
from apps.service.request_error import RequestError
from apps.service.validation import explain_fields
from pipelines.acceleration.conflicts import SCALES, STEPS


def _filled(text: str) -> str:
    """Refuse a text of blanks."""
    if not text.strip():
        raise RequestError("prompt", "the prompt is empty; say what to generate.")
    return text.strip()


def _check_part(image: ImageId | None, mask: ImageId | None, expand: Expand | None) -> None:
    """Refuse an image without a part to generate, and a part of no image."""
    if (image is None) != (mask is None and expand is None):
        raise RequestError(
            "part", "image goes with mask (white where to generate) or expand (how far it grows), or with both."
        )


def _check_mask(asked: MaskOptions, image: ImageId | None) -> None:
    """Refuse what is said of a mask where there is none."""
    if image is None and (asked.mask_grow or asked.mask_blur):
        raise RequestError(
            "mask.alone", "mask_grow and mask_blur are for a mask; give image with mask or expand, or leave them out."
        )
    if asked.mask_padding is not None and (asked.mask is None or asked.expand is not None):
        raise RequestError(
            "mask.area",
            "mask_padding generates the masked area of an image only; give image and mask without expand, or leave it "
            "out.",
            field="mask_padding",
        )


Prompt = Annotated[
    str,
    Field(max_length=limits.MAX_PROMPT_CHARS),
    AfterValidator(_filled),
    Option(help="Prompt: what to generate.", argument="prompt", label="prompt.field"),
]


SHORT_FOR = {
    "quantization": ("quantization",),
    "step_cache": ("step_cache",),
    "attention": ("attention", "attention_pattern", "attention_density"),
    "kv_cache": ("kv_policy", "kv_budget", "kv_dtype"),
    "few_step": ("steps", "guidance", "scheduler"),
}
"""Part of an acceleration -> options that are short for it."""
DECIDED_BY_PROFILE = (
    "acceleration",
    *(name for part, names in SHORT_FOR.items() if part != "few_step" for name in names),
)
"""Options that a named setting of speed decides."""


class BaseRequest(SharedOptions, RunOptions):
    """What all tasks share. `None` means the model's own default."""

    @model_validator(mode="after")
    def _check_pick(self) -> Self:
        if self.pick is not None and (self.pick >= self.batch_size or self.num_images != self.batch_size):
            raise RequestError("pick", "pick chooses from one batch: give num_images = batch_size, and pick below it.")
        return self

    @model_validator(mode="after")
    def _check_upscale(self) -> Self:
        """Refuse an upscaler that would do nothing, and a size that would become too large."""
        if self.upscaler is not None and self.upscale in (None, 1):
            raise RequestError(
                "upscaler", "upscaler says who enlarges; give upscale too, 2 to 4, or leave upscaler out."
            )
        width, height = getattr(self, "width", None), getattr(self, "height", None)
        if width is not None and height is not None:
            limits.check_upscaled(width, height, self.upscale, getattr(self, "frames", None))
        return self

    @model_validator(mode="after")
    def _check_acceleration(self) -> Self:
        """Refuse a way to be faster that is asked for twice."""
        parts = {} if self.acceleration is None else self.acceleration.parts
        foreign = STEPS if isinstance(self, NextScaleRequest) else SCALES
        names = ", ".join(name for name in parts if name in foreign)
        if names:
            raise RequestError(
                "acceleration.task", f"acceleration: {names} can't be had for this task; leave it out.", names=names
            )
        for part, names in SHORT_FOR.items():
            said = [name for name in names if getattr(self, name, None) is not None]
            if part in parts and said:
                raise RequestError(
                    "acceleration.twice",
                    f"acceleration.{part} and {', '.join(said)} say the same; give one of them.",
                    field=said[0],
                    names=f"acceleration.{part}",
                )
        return self

    @model_validator(mode="after")
    def _check_profile(self) -> Self:
        """Refuse ways to be faster beside a profile, which decides them."""
        said = [name for name in DECIDED_BY_PROFILE if getattr(self, name, None) is not None]
        if self.profile is not None and said:
            raise RequestError(
                "acceleration.twice",
                f"profile and {', '.join(said)} say the same; give one of them.",
                field=said[0],
                names="profile",
            )
        return self

    def batches(self) -> list[list[int]]:
        """Return the seeds of the images, batch by batch.

        Raises:
            ValueError: the seed is open; `with_seed` draws it.
        """
        if self.seed is None:
            raise ValueError("The seed is open; call with_seed() first.")
        seeds = [(self.seed + i) % (limits.MAX_SEED + 1) for i in range(self.num_images)]
        return [seeds[i : i + self.batch_size] for i in range(0, len(seeds), self.batch_size)]

    def with_seed(self) -> Self:
        """Return the request with a seed: what is generated twice must be the same twice."""
        return self if self.seed is not None else self.model_copy(update={"seed": secrets.randbelow(2**32)})


class DenoisingRequest(BaseRequest, DenoisingOptions):
    """What all tasks with a denoising loop share."""

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if (self.height is None) != (self.width is None):
            raise RequestError("sides", "height and width go together; give both or neither.")
        if self.height is not None and self.width is not None:
            limits.check_size(self.height, self.width)
        return self


class TextToImageRequest(PromptOptions, ClipOptions, DenoisingRequest):
    """Ask for images of a text, or for a clip of it."""

    task: Literal["text_to_image"] = "text_to_image"
    prompt: Prompt
    negative_prompt: NegativePrompt = ""


class ImageToImageRequest(PromptOptions, ClipOptions, DenoisingRequest):
    """Ask for variations of an image, or for a clip that begins with it, which has no strength."""

    task: Literal["image_to_image"] = "image_to_image"
    prompt: Prompt
    negative_prompt: NegativePrompt = ""
    image: ImageId
    strength: Strength = None


class InpaintRequest(PromptOptions, MaskOptions, DenoisingRequest):
    """Ask for a part of an image, or what lies beyond its sides, to be generated; every other pixel is kept as it is.

    With a soft edge (`mask_blur`) the result blends into the image around the grown mask; all beyond it is kept. With
    `mask_padding` width and height are those of the masked area while it is generated; the image keeps its own.
    """

    task: Literal["inpaint"] = "inpaint"
    prompt: Prompt
    negative_prompt: NegativePrompt = ""
    image: ImageId
    strength: Annotated[
        float,
        Field(ge=0.05, le=1),
        Option(
            help="How much of the part changes; 1 ignores what was there.",
            argument="strength",
            control=Control(kind="slider", place="inpaint", start=1.0, step=0.05),
        ),
    ] = 1.0

    @model_validator(mode="after")
    def _check_part(self) -> Self:
        _check_part(self.image, self.mask, self.expand)
        _check_mask(self, self.image)
        return self


class VideoCompletionRequest(PromptOptions, CompletionOptions, DenoisingRequest):
    """Ask for what is missing of a clip; every pixel that is kept comes out as it was.

    A clip that is to be longer than what is given goes on from there. Without a mask all that isn't given is generated.
    """

    task: Literal["video_completion"] = "video_completion"
    prompt: Prompt
    negative_prompt: NegativePrompt = ""
    video: SourceClip
    video_frames: ClipLength

    @model_validator(mode="after")
    def _check_missing(self) -> Self:
        if self.frames is not None:
            self.check_missing(self.frames)
        return self

    def check_missing(self, frames: int) -> None:
        """Refuse a clip of so many frames if all of them are given."""
        if self.video_mask is None and frames <= self.video_frames:
            raise RequestError(
                "video_mask.missing",
                f"all {self.video_frames} frames are given; say by video_mask what to generate, such as predict(8), or "
                "ask for more frames.",
            )


class ClassToImageRequest(DenoisingRequest):
    """Ask for images of a class."""

    task: Literal["class_to_image"] = "class_to_image"
    label: ClassLabel


class NextScaleRequest(NextScaleOptions, BaseRequest):
    """What the next-scale tasks share. With an image they change a part of it and keep the rest as it is."""

    @model_validator(mode="after")
    def _check_part(self) -> Self:
        _check_part(self.image, self.mask, self.expand)
        _check_mask(self, self.image)
        if self.candidates is not None and self.search is None:
            raise RequestError(
                "candidates", "candidates are for a search; name one, such as best_of, or leave them out"
            )
        return self


class NextScaleClassRequest(NextScaleRequest):
    """Ask a next-scale model for images of a class."""

    task: Literal["next_scale_class"] = "next_scale_class"
    label: ClassLabel


class NextScaleTextRequest(PromptOptions, NextScaleRequest):
    """Ask a next-scale model for images of a text."""

    task: Literal["next_scale_text"] = "next_scale_text"
    prompt: Prompt
    negative_prompt: NegativePrompt = ""
    height: int | None = Field(default=None, ge=limits.MIN_SIDE, le=limits.MAX_SIDE)
    width: int | None = Field(default=None, ge=limits.MIN_SIDE, le=limits.MAX_SIDE)


AnyRequest = (
    TextToImageRequest
    | ImageToImageRequest
    | InpaintRequest
    | VideoCompletionRequest
    | ClassToImageRequest
    | NextScaleClassRequest
    | NextScaleTextRequest
)
Request = Annotated[AnyRequest, Field(discriminator="task")]
REQUEST: TypeAdapter[AnyRequest] = TypeAdapter(Request)
"""Checks and reads a request from JSON or Python values."""

TASKS: dict[str, type[AnyRequest]] = {
    "text_to_image": TextToImageRequest,
    "image_to_image": ImageToImageRequest,
    "inpaint": InpaintRequest,
    "video_completion": VideoCompletionRequest,
    "class_to_image": ClassToImageRequest,
    "next_scale_class": NextScaleClassRequest,
    "next_scale_text": NextScaleTextRequest,
}


OPTIONS = declared_options(*TASKS.values())
"""All options of all tasks by the names of their fields."""


def explain(error: ValidationError) -> str:
    """Say what is wrong with a request, without repeating what was in it: fields, accepted ranges, remedies."""
    kinds = {kind.__name__: kind for kind in TASKS.values()}
    return explain_fields(error, kinds.get(error.title, TASKS))
