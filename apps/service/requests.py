"""What a person asks of the engine: one pydantic request a task, told apart by `task`.

Web page, command line and HTTP speak these types only; none of them knows threads or pipelines. A request names
nothing on the machine: models by their key in the owner's list, images by the hash of their content.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from apps.service import limits
from apps.service.metadata import (
    AttentionName,
    Expand,
    KvPolicy,
    KvType,
    Lora,
    MemoryName,
    PictureId,
    PictureSettings,
    Precision,
    SchedulerName,
    SearchMethod,
    StepCache,
)
from apps.service.request_error import RequestError
from apps.service.validation import explain_fields


def _filled(text: str) -> str:
    """Refuse a text of blanks."""
    if not text.strip():
        raise RequestError("prompt", "the prompt is empty; say what to paint.")
    return text.strip()


def _check_part(image: PictureId | None, mask: PictureId | None, expand: Expand | None) -> None:
    """Refuse an image without a part to generate, and a part of no image."""
    if (image is None) != (mask is None and expand is None):
        raise RequestError(
            "part", "image goes with mask (white where to paint) or expand (how far it grows), or with both."
        )


def _check_mask_edge(image: PictureId | None, grow: int | None, blur: int | None) -> None:
    """Refuse an edge of a mask where there is none."""
    if image is None and (grow or blur):
        raise RequestError(
            "mask.alone", "mask_grow and mask_blur are for a mask; give image with mask or expand, or leave them out."
        )


MaskGrow = Annotated[int, Field(ge=0, le=limits.MAX_MASK_GROW)]
MaskBlur = Annotated[int, Field(ge=0, le=limits.MAX_MASK_BLUR)]
Prompt = Annotated[str, Field(max_length=limits.MAX_PROMPT_CHARS), AfterValidator(_filled)]
Avoided = Annotated[str, Field(max_length=limits.MAX_PROMPT_CHARS)]
Label = Annotated[int, Field(ge=0, le=10**6)] | Annotated[str, Field(min_length=1, max_length=200)]


class BaseRequest(BaseModel):
    """What all tasks share. `None` means the model's own default.

    Attributes:
        model: key in the engine's list of models; None takes the first.
        seed: of the first image, the next ones count up; None draws one, which every image records.
        num_images: how many images.
        batch_size: how many of them are generated at once.
        pick: keep only this image of the (one) batch, from 0: repeats an image that was generated in a batch, whose
            company moves its last bits.
        guidance: guidance scale.
        memory: what of the model waits elsewhere while it isn't needed, and whether it decodes piece by piece.
        dtype: number format of the weights.
        attention: backend of diffusers through which the network attends.
        lora: LoRA file of the server's list to put on the model.
        style: name of a prompt template in the server's list.
        preset: name of a set of settings in the server's list; what the request says itself goes first.
        file_format: of the images; WebP is written without loss.
        keep_settings: whether the files carry what reproduces them.
        sidecar: whether a JSON file beside each one does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str | None = Field(default=None, max_length=200)
    seed: int | None = Field(default=None, ge=0, le=limits.MAX_SEED)
    num_images: int = Field(default=1, ge=1, le=limits.MAX_PICTURES)
    batch_size: int = Field(default=1, ge=1, le=limits.MAX_BATCH)
    pick: int | None = Field(default=None, ge=0, lt=limits.MAX_BATCH)
    guidance: float | None = Field(default=None, ge=0, le=limits.MAX_GUIDANCE)
    memory: MemoryName | None = None
    dtype: Precision | None = None
    attention: AttentionName | None = None
    lora: Lora | None = None
    style: str | None = Field(default=None, max_length=100)
    preset: str | None = Field(default=None, max_length=100)
    file_format: Literal["png", "webp"] = "png"
    keep_settings: bool = True
    sidecar: bool = False

    @model_validator(mode="after")
    def _check_pick(self) -> Self:
        if self.pick is not None and (self.pick >= self.batch_size or self.num_images != self.batch_size):
            raise RequestError("pick", "pick chooses from one batch: give num_images = batch_size, and pick below it.")
        return self

    def batches(self) -> list[list[int]]:
        """Return the seeds of the images, batch by batch.

        Raises:
            ValueError: the seed is open; `settled` draws it.
        """
        if self.seed is None:
            raise ValueError("The seed is open; call settled() first.")
        seeds = [(self.seed + i) % (limits.MAX_SEED + 1) for i in range(self.num_images)]
        return [seeds[i : i + self.batch_size] for i in range(0, len(seeds), self.batch_size)]

    def settled(self) -> Self:
        """Return the request with a seed: what is generated twice must be the same twice."""
        return self if self.seed is not None else self.model_copy(update={"seed": secrets.randbelow(2**32)})


class DenoisingRequest(BaseRequest):
    """What all tasks with a denoising loop share.

    Attributes:
        height: pixels.
        width: pixels.
        steps: denoising steps.
        scheduler: how the noise is taken away.
        finish_after: end after so many steps with the image as it is then.
        step_cache: compute only some of the steps and forecast the others.
    """

    height: int | None = None
    width: int | None = None
    steps: int | None = Field(default=None, ge=1, le=limits.MAX_STEPS)
    scheduler: SchedulerName | None = None
    finish_after: int | None = Field(default=None, ge=1, le=limits.MAX_STEPS)
    step_cache: StepCache | None = None

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if (self.height is None) != (self.width is None):
            raise RequestError("sides", "height and width go together; give both or neither.")
        if self.height is not None and self.width is not None:
            limits.check_size(self.height, self.width)
        return self


class TextToImageRequest(DenoisingRequest):
    """Ask for images of a text.

    Attributes:
        prompt: what to generate.
        negative_prompt: what to avoid; empty for nothing.
        frames: of a clip, for models that make clips.
    """

    task: Literal["text_to_image"] = "text_to_image"
    prompt: Prompt
    negative_prompt: Avoided = ""
    frames: int | None = Field(default=None, ge=1, le=limits.MAX_FRAMES)


class ImageToImageRequest(DenoisingRequest):
    """Ask for variations of an image, or for a clip that begins with it.

    Attributes:
        prompt: what to generate.
        negative_prompt: what to avoid.
        image: hash of an image handed in before, see `apps.service.uploads`.
        strength: how much is changed, 0.6 if open; 1 ignores the image. Models of clips have none.
        frames: of a clip, for models that make clips.
    """

    task: Literal["image_to_image"] = "image_to_image"
    prompt: Prompt
    negative_prompt: Avoided = ""
    image: PictureId
    strength: float | None = Field(default=None, ge=0.05, le=1)
    frames: int | None = Field(default=None, ge=1, le=limits.MAX_FRAMES)


class InpaintRequest(DenoisingRequest):
    """Ask for a part of an image, or what lies beyond its sides, to be generated; every other pixel is kept as it is.

    Attributes:
        prompt: what to generate.
        negative_prompt: what to avoid.
        image: hash of the image.
        mask: hash of the mask, white where to generate; None for nothing inside the image.
        expand: how far the image grows.
        mask_grow: pixels of the result by which the mask grows on every side, round its corners; 0 if open.
        mask_blur: width in pixels of a soft edge around the grown mask, where the result blends into the image; 0 if
            open, which keeps every pixel outside the mask bit-identical. With it, all beyond the edge are.
        strength: how much of the part is changed; 1 ignores what was there.
    """

    task: Literal["inpaint"] = "inpaint"
    prompt: Prompt
    negative_prompt: Avoided = ""
    image: PictureId
    mask: PictureId | None = None
    expand: Expand | None = None
    mask_grow: MaskGrow | None = None
    mask_blur: MaskBlur | None = None
    strength: float = Field(default=1.0, ge=0.05, le=1)

    @model_validator(mode="after")
    def _check_part(self) -> Self:
        _check_part(self.image, self.mask, self.expand)
        return self


class ClassToImageRequest(DenoisingRequest):
    """Ask for images of a class.

    Attributes:
        label: number or name of the class.
    """

    task: Literal["class_to_image"] = "class_to_image"
    label: Label


class NextScaleRequest(BaseRequest):
    """What the next-scale tasks share. With an image they change a part of it and keep the rest as it is.

    Attributes:
        image: hash of an image to change a part of.
        mask: hash of the mask, white where to generate.
        expand: how far the image grows.
        mask_grow: pixels by which the mask grows, see `InpaintRequest`.
        mask_blur: width of the mask's soft edge, see `InpaintRequest`.
        top_k: draw among so many tokens; 0 is all.
        top_p: draw among the likeliest tokens that hold this share; 0 is all.
        temperature: below 1 is bolder, above more varied.
        smooth: mix codes instead of choosing one.
        kv_policy: what is kept of earlier scales.
        kv_budget: which share of it.
        kv_dtype: in which number format.
        search: generate several candidates and keep the best, as the scorer of the model sees it.
        candidates: images to pay for: `best_of` generates so many, other searches spend their tokens early.
    """

    image: PictureId | None = None
    mask: PictureId | None = None
    expand: Expand | None = None
    mask_grow: MaskGrow | None = None
    mask_blur: MaskBlur | None = None
    top_k: int | None = Field(default=None, ge=0, le=2**20)
    top_p: float | None = Field(default=None, ge=0, le=1)
    temperature: float | None = Field(default=None, ge=0.01, le=100)
    smooth: bool | None = None
    kv_policy: KvPolicy | None = None
    kv_budget: float | None = Field(default=None, gt=0, le=1)
    kv_dtype: KvType | None = None
    search: SearchMethod | None = None
    candidates: int | None = Field(default=None, ge=2, le=limits.MAX_CANDIDATES)

    @model_validator(mode="after")
    def _check_part(self) -> Self:
        _check_part(self.image, self.mask, self.expand)
        _check_mask_edge(self.image, self.mask_grow, self.mask_blur)
        if self.candidates is not None and self.search is None:
            raise RequestError(
                "candidates", "candidates are for a search; name one, such as best_of, or leave them out"
            )
        return self


class NextScaleClassRequest(NextScaleRequest):
    """Ask a next-scale model for images of a class.

    Attributes:
        label: number or name of the class.
    """

    task: Literal["next_scale_class"] = "next_scale_class"
    label: Label


class NextScaleTextRequest(NextScaleRequest):
    """Ask a next-scale model for images of a text.

    Attributes:
        prompt: what to generate.
        negative_prompt: what to avoid.
        height: pixels.
        width: pixels.
    """

    task: Literal["next_scale_text"] = "next_scale_text"
    prompt: Prompt
    negative_prompt: Avoided = ""
    height: int | None = Field(default=None, ge=limits.MIN_SIDE, le=limits.MAX_SIDE)
    width: int | None = Field(default=None, ge=limits.MIN_SIDE, le=limits.MAX_SIDE)


AnyRequest = (
    TextToImageRequest
    | ImageToImageRequest
    | InpaintRequest
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
    "class_to_image": ClassToImageRequest,
    "next_scale_class": NextScaleClassRequest,
    "next_scale_text": NextScaleTextRequest,
}


def repeat(settings: PictureSettings, **changes: Any) -> AnyRequest:
    """Return the request that generates an image again.

    Args:
        settings: as stored in the image.
        **changes: fields of the request to set differently.

    Raises:
        ValueError: the settings don't make a request, such as inpainting without a mask.
    """
    kind = TASKS[settings.task]
    values: dict[str, Any] = {
        name: getattr(settings, name)
        for name in kind.model_fields
        if hasattr(settings, name) and name not in ("scheduler", "model")
    }
    values |= {"scheduler": settings.sampler, "model": settings.model}
    values |= {"num_images": 1, "batch_size": 1}
    if settings.batch_size > 1 and settings.pick is not None:  # its neighbours first: they have a part in its rounding
        first = (settings.seed - settings.pick) % (limits.MAX_SEED + 1)
        values |= {"num_images": settings.batch_size, "batch_size": settings.batch_size, "seed": first}
    known = {name: value for name, value in {**values, **changes}.items() if name in kind.model_fields}
    return kind.model_validate(known)


def explain(error: ValidationError) -> str:
    """Say what is wrong with a request, without repeating what was in it: fields, accepted ranges, remedies."""
    kinds = {kind.__name__: kind for kind in TASKS.values()}
    return explain_fields(error, kinds.get(error.title, TASKS))
