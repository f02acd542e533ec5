"""What a person asks of the engine, and what the engine tells back: one request, a few kinds of event.

Web page, command line and (later) HTTP speak these types only; none of them knows threads or pipelines.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from apps import limits
from apps.media import Clip
from apps.metadata import PictureSettings


def _filled(text: str) -> str:
    """Refuse a text of blanks."""
    if not text.strip():
        raise ValueError("the prompt is empty; say what to paint.")
    return text.strip()


Prompt = Annotated[str, Field(max_length=limits.MAX_PROMPT_CHARS), AfterValidator(_filled)]


class TextToImageRequest(BaseModel):
    """Ask for pictures of a text. `None` means the model's own default.

    Attributes:
        prompt: what to paint.
        negative_prompt: what to keep away from; empty for nothing.
        height: pixels.
        width: pixels.
        steps: denoising steps.
        guidance: guidance scale; 1 turns guidance off.
        frames: of a clip, for models that make clips.
        seed: of the first picture, the next ones count up; None draws one, which every picture records.
        num_images: how many pictures.
        model: key in the engine's list of models; None takes the first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompt: Prompt
    negative_prompt: str = Field(default="", max_length=limits.MAX_PROMPT_CHARS)
    height: int | None = None
    width: int | None = None
    steps: int | None = Field(default=None, ge=1, le=limits.MAX_STEPS)
    guidance: float | None = Field(default=None, ge=0, le=limits.MAX_GUIDANCE)
    frames: int | None = Field(default=None, ge=1, le=limits.MAX_FRAMES)
    seed: int | None = Field(default=None, ge=0, le=limits.MAX_SEED)
    num_images: int = Field(default=1, ge=1, le=limits.MAX_PICTURES)
    model: str | None = Field(default=None, max_length=200)

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width go together; give both or neither.")
        if self.height is not None and self.width is not None:
            limits.check_size(self.height, self.width)
        return self

    def seeds(self) -> list[int]:
        """Return the seed of every picture; draws the first one if the request leaves it open."""
        first = secrets.randbelow(limits.MAX_SEED + 1) if self.seed is None else self.seed
        return [(first + i) % (limits.MAX_SEED + 1) for i in range(self.num_images)]


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits for `ahead` others."""

    ahead: int


@dataclass(frozen=True, slots=True)
class ModelLoading:
    """The model is being read into memory."""

    model: str


@dataclass(frozen=True, slots=True)
class Step:
    """A denoising step is done.

    Attributes:
        step: steps of this picture that are done, from 1.
        steps: steps of one picture.
        picture: which picture is being painted, from 1.
        pictures: how many were asked for.
        preview: a small view of the picture to come; None when it's too early for a new one, or when the
            model has no cheap view.
        eta: seconds until the whole request is done.
    """

    step: int
    steps: int
    picture: int
    pictures: int
    preview: Image.Image | None
    eta: float


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture is done.

    Attributes:
        path: where it was written; None for an engine without an output folder.
        seed: of its noise.
        metadata: what reproduces it, as stored in the file.
        image: the picture itself; of a clip some frames side by side.
        seconds: time it took.
        clip: the frames, from a model that makes clips.
        video: where the clip was written.
    """

    path: Path | None
    seed: int
    metadata: PictureSettings
    image: Image.Image
    seconds: float
    clip: Clip | None = None
    video: Path | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """All pictures are painted; the last event."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Stopped:
    """The request was stopped; the last event. Pictures told before stay valid."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The request can't be fulfilled; the last event.

    Attributes:
        code: for programs: queue_full, unknown_model, model_failed, bad_request, out_of_memory, missing_extra,
            too_slow, failed.
        message: for people; holds no path and no trace, so that it may be shown to strangers.
        cause: the error itself, for the log and for the owner of the machine.
    """

    code: str
    message: str
    cause: Exception | None = None


Event = Queued | ModelLoading | Step | Picture | Done | Stopped | Failed
