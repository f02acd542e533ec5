"""The types of generation options: names to choose from, and values of several parts with their spelling as text."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_serializer,
    model_validator,
)

from apps.service import limits
from apps.service.request_error import RequestError
from pipelines.acceleration.config import AccelerationConfig
from pipelines.acceleration.parts import MAIN_PARAMETERS, AttentionPart, StepCachePart
from pipelines.acceleration.texts import AccelerationError

ImageId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""Hash of an image's pixels, see `apps.service.uploads`."""
IMAGE_FIELDS = ("image", "mask", "last_image", "video")
"""Fields of requests that name uploaded images; of a clip that of its frames, see `apps.service.uploaded_clips`."""
SchedulerName = Literal["euler", "heun", "sde", "dpm++", "unipc", "ddim", "ddpm"]
"""Choices of `apps.service.schedulers`."""
KvPolicy = Annotated[str, Field(pattern=r"^[a-z0-9_.-]{1,40}$")]
"""A policy of `dit.cache`; the pipeline checks the name."""
KvType = Literal["auto", "int8"]
MemoryName = Literal["fast", "tiles", "balanced", "low"]
"""Choices of `apps.service.compute_profiles`."""
AttentionName = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,40}$")]
"""A backend of diffusers; which of them work here is known by `apps.service.compute_profiles`."""
AttentionPattern = Literal[
    "plan", "radial", "sol", "pooled_topk", "subblock", "draft", "cube", "svg", "svg_spatial", "svg_temporal"
]
"""Patterns of sparse attention of which a request says how much is computed; "plan" is that in the model's folder."""
SERVED_ATTENTION = ("backend", "plan", "pattern", "density", "dense_first")
"""Fields of an acceleration's attention that a request may have; of plans only "model"."""
QuantizationName = Annotated[
    Literal["none", "w8a8", "w6a8", "w4a8", "w4a4", "w8a16", "w4a16", "fp8", "nvfp4"],
    AfterValidator(lambda name: None if name == "none" else name),
]
"""Formats of weights and activations, see `dit.quant.scheme.formats_of`; "none" is the same as nothing said."""
SERVED_QUANTIZATION = ("bits", "recipe", "calibration", "full_precision_first", "full_precision_last")
"""Fields of an acceleration's quantization that a request may have; of calibrations only "model"."""
ProfileName = Literal["balanced", "faithful", "fastest", "low-memory"]
"""Named settings of speed, see `pipelines.tuning.profiles.NAMED_GOALS`."""
DTypeName = Literal["float32", "bfloat16", "float16"]
SearchMethod = Literal["best_of", "tts", "beam"]
FileFormat = Literal["png", "webp"]
Label = Annotated[int, Field(ge=0, le=10**6)] | Annotated[str, Field(min_length=1, max_length=200)]
"""Number or name of a class."""


def parse_timeline(text: str) -> tuple[tuple[int, str], ...]:
    """Read later prompts of a clip: `16: a dolphin leaping | 32: a fox winking`, or each on a line of its own.

    Args:
        text: of a request.

    Returns:
        First frames and prompts, in order.

    Raises:
        RequestError: another form; frames that don't rise from 1.
    """
    entries = []
    for part in re.split(r"[|\n]", text):
        number, colon, prompt = (one.strip() for one in part.partition(":"))
        if not (number or colon):  # an empty line
            continue
        if not (prompt and re.fullmatch(r"[0-9]{1,6}", number)):
            message = "a part of the timeline is not understood; write FRAME: PROMPT, such as 16: a dolphin leaping."
            raise RequestError("timeline", message, field="timeline", value=part.strip()[:40])
        entries.append((int(number), prompt))
    frames = [0, *(frame for frame, _ in entries)]
    if any(before >= after for before, after in pairwise(frames)):
        message = f"timeline names the frames {frames[1:]}; write them in rising order, the first one above 0."
        raise RequestError("timeline.order", message, field="timeline")
    return tuple(entries)


def write_timeline(entries: Sequence[tuple[int, str]]) -> str:
    """Return the usual spelling of a timeline."""
    return " | ".join(f"{frame}: {prompt}" for frame, prompt in entries)


def _checked_timeline(text: str) -> str:
    return write_timeline(parse_timeline(text))


_Length = Field(min_length=1, max_length=limits.MAX_PROMPT_CHARS)
Timeline = Annotated[str, _Length, AfterValidator(_checked_timeline), _Length]
"""Later prompts of a clip, see `parse_timeline`."""


def _checked_video_mask(text: str) -> str:
    """Refuse a text that says no mask, see `pipelines.VideoMask.parse`."""
    from pipelines.inputs.video_mask import VideoMask

    try:
        VideoMask.parse(text)
    except ValueError as error:
        message = (
            "video_mask is not understood; write for example predict(8), interpolate(4), keyframes(0, -1) or "
            "box(0.5, 0, 1, 1)."
        )
        raise RequestError("video_mask", message, field="video_mask", value=text[:40]) from error
    return text.strip()


VideoMaskText = Annotated[str, Field(min_length=1, max_length=400), AfterValidator(_checked_video_mask)]
"""Which part of a clip is generated, such as `predict(8)`."""


class StepCache(BaseModel):
    """Which steps are computed and how the others are forecast.

    Attributes:
        preset: name of a preset of `sampling.step_cache`.
        amount: of the preset's main parameter, see `MAIN_PARAMETERS`; None is its default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    preset: str = Field(pattern=r"^[a-z0-9_.-]{1,40}$")
    amount: float | None = Field(default=None, gt=0, le=100)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read `budget=0.35`, `taylorseer` or `fbcache:threshold=0.1`.

        Raises:
            ValueError: an unknown preset, or a parameter other than its main one (the Python API takes them all).
        """
        from pipelines.step_cache import parse_cache

        others = (f"{name}:{key}=..." for name, key in MAIN_PARAMETERS.items() if name != "budget")
        offered = ", ".join(["budget=0.35", *others])
        try:
            preset, params = parse_cache(text)
            main = MAIN_PARAMETERS[preset]
        except (ValueError, KeyError) as error:
            raise _unknown_cache(text, offered) from error
        if set(params) - {main}:
            raise _unknown_cache(text, offered)
        amount = params.get(main)
        if amount is not None and not isinstance(amount, int | float):
            raise ValueError(f"The step cache {text!r} needs a number behind {main}=.")
        return cls(preset=preset, amount=amount)

    @classmethod
    def text_of(cls, parts: Mapping[str, Any]) -> str:
        """Write parts of any kind as the text that `from_text` reads, or refuses."""
        preset, amount = parts.get("preset"), parts.get("amount")
        if not isinstance(preset, str):
            raise ValueError("a step cache needs the name of a preset")
        return preset if amount is None else f"{preset}:{MAIN_PARAMETERS.get(preset, 'amount')}={amount}"


def _unknown_cache(text: str, offered: str) -> RequestError:
    message = f"The step cache {text!r} can't be set here; choose among {offered}."
    return RequestError("choice", message, field="step_cache", value=text[:40], choices=", ".join(MAIN_PARAMETERS))


class Lora(BaseModel):
    """A LoRA file on the model.

    Attributes:
        name: of the file in the owner's list.
        scale: 1 is as trained, 0 nothing.
        sha256: of the file's content; None takes what has the name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(min_length=1, max_length=200)
    scale: float = Field(default=1.0, ge=-4, le=4)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")


def _as_several(value: Any) -> Any:
    """Take one LoRA, or none, as requests and images of earlier versions have it."""
    return () if value is None else (value,) if isinstance(value, Mapping | Lora) else value


def _each_once(loras: tuple[Lora, ...]) -> tuple[Lora, ...]:
    """Refuse a LoRA that is named twice.

    Raises:
        RequestError: it is.
    """
    names = [one.name for one in loras]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(
            "lora.twice", f"The LoRA file {twice!r} is chosen twice; choose it once, with one scale.", value=twice
        )
    return loras


Loras = Annotated[
    tuple[Lora, ...],
    BeforeValidator(_as_several),
    AfterValidator(_each_once),
    Field(max_length=limits.MAX_LORAS, validation_alias=AliasChoices("loras", "lora")),
]
"""LoRA files on the model at once; `lora` with a single one is read too."""


class Expand(BaseModel):
    """How far an image is extended on each side, as fractions of its width or height; what is added is generated.

    Attributes:
        left: fraction of the width.
        right: fraction of the width.
        top: fraction of the height.
        bottom: fraction of the height.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    left: float = Field(default=0, ge=0, le=2)
    right: float = Field(default=0, ge=0, le=2)
    top: float = Field(default=0, ge=0, le=2)
    bottom: float = Field(default=0, ge=0, le=2)

    @model_validator(mode="after")
    def _check_growth(self) -> Self:
        if not any((self.left, self.right, self.top, self.bottom)):
            raise RequestError("expand", "expand grows no side; give left, right, top or bottom a share such as 0.25.")
        return self

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read `0.25` for all sides, or some of `left=0.5,right=...,top=...,bottom=...`.

        Raises:
            ValueError: another form.
        """
        parts = [part.partition("=") for part in text.split(",")]
        try:
            if len(parts) == 1 and not parts[0][1]:
                return cls.model_validate(dict.fromkeys(cls.model_fields, float(text)))
            return cls.model_validate({side.strip(): float(share) for side, _, share in parts})
        except ValueError as error:
            raise ValueError(
                f"{text!r} is not understood; write a share from 0 to 2 such as 0.25 for all sides, or sides such as "
                "left=0.5,top=0.25."
            ) from error

    @classmethod
    def text_of(cls, parts: Mapping[str, Any]) -> str:
        """Write parts of any kind as the text that `from_text` reads, or refuses."""
        return ",".join(f"{side}={share}" for side, share in parts.items())


SERVED = (
    "quantization",
    "few_step",
    "attention",
    "step_cache",
    "guidance_cache",
    "kv_cache",
    "next_scale",
    "decoder_tiling",
)
"""Parts of an acceleration that a request may have. Offload belongs to how a model is loaded (`memory`), parallelism to
how the process was started, and compiling can't be stopped and changes the whole process."""
BACKEND_NAME = re.compile(r"[a-z0-9_]{1,40}")


def _refuse_unserved(config: AccelerationConfig) -> None:
    """Refuse parts that a request may not have, and names of files.

    Raises:
        RequestError: it names them.
    """
    refused = sorted({*config.files(), *(set(config.parts) - set(SERVED))})
    if refused:
        choices = ", ".join(SERVED)
        raise RequestError(
            "acceleration.part",
            f"a request can't have {', '.join(refused)}; it can have {choices}, without names of files.",
            names=", ".join(refused),
            choices=choices,
        )
    if config.attention is not None:
        _check_attention(config.attention)
    if config.quantization is not None:
        _check_fields("quantization", set(config.quantization.model_dump()), SERVED_QUANTIZATION)
    if config.step_cache is not None:
        _check_step_cache(config.step_cache)


def _check_attention(part: AttentionPart) -> None:
    """Refuse what a request may not set: parameters of patterns can cost any time and memory.

    Raises:
        RequestError: another field than those that anybody can use, or no name of a backend.
    """
    if part.backend is not None and BACKEND_NAME.fullmatch(part.backend) is None:
        raise RequestError("form", "acceleration.attention is no name of a backend.", field="attention", value="")
    _check_fields("attention", part.asked, SERVED_ATTENTION)


def _check_fields(part: str, asked: Collection[str], served: Sequence[str]) -> None:
    """Refuse fields of a part that a request may not have.

    Raises:
        RequestError: it names them.
    """
    refused = sorted(set(asked) - set(served))
    if refused:
        choices = ", ".join(served)
        raise RequestError(
            "acceleration.part",
            f"acceleration.{part}: a request can't have {', '.join(refused)}; it can have {choices}.",
            names=", ".join(refused),
            choices=choices,
        )


def _check_step_cache(part: StepCachePart) -> None:
    """Refuse what a request may not set: patterns, ratios and the like can cost any time, and types differ by preset.

    Raises:
        RequestError: another preset or parameter than those that anybody can use, or a value out of range.
    """
    main = MAIN_PARAMETERS.get(part.preset)
    if main is None or set(part.params) - {main}:
        offered = ", ".join(f"{name} ({key})" for name, key in MAIN_PARAMETERS.items())
        raise RequestError(
            "acceleration.step_cache",
            f"acceleration.step_cache: a request can have a preset with its main parameter alone: {offered}.",
            choices=offered,
        )
    if main in part.params:
        amount = part.params[main]
        is_number = isinstance(amount, int | float) and not isinstance(amount, bool)
        is_whole = main != "every" or isinstance(amount, int)
        if not is_number or not 0 < amount <= 100 or not is_whole:
            what = "a whole number" if main == "every" else "a number"
            raise RequestError(
                "acceleration.amount",
                f"acceleration.step_cache: {main} must be {what} above 0, up to 100.",
                names=main,
            )


class Acceleration(AccelerationConfig):
    """Ways to be faster as one value, as far as a request may ask for them: no files, nothing of the process."""

    @model_validator(mode="after")
    def _check_served(self) -> Self:
        _refuse_unserved(self)
        return self

    @model_serializer
    def _write(self) -> dict[str, Any]:
        """Leave out the parts that are not set."""
        return self.to_dict()

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read a JSON object such as `{"step_cache": "budget=0.35", "attention": "flex"}`.

        Raises:
            RequestError: it is none, or has other parts or values.
        """
        try:
            values = json.loads(text)
            if not isinstance(values, dict):
                raise ValueError("it is no JSON object")
        except (ValueError, RecursionError) as error:
            raise RequestError(
                "acceleration.json",
                f'acceleration: {error}; write a JSON object such as {{"step_cache": "budget=0.35"}}.',
            ) from error
        try:
            _refuse_unserved(AccelerationConfig.from_dict(values))
            return cls.from_dict(values)
        except AccelerationError as error:
            raise RequestError("acceleration", f"acceleration: {error}", cause=error) from error

    @classmethod
    def text_of(cls, parts: Mapping[str, Any]) -> str:
        """Write parts of any kind as the text that `from_text` reads, or refuses."""
        return json.dumps(dict(parts))
