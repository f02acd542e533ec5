"""The `[data]` section of fine-tuning: a few files of one subject or style, and how they are shown."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from apps.training.config import Section
from apps.training.data.decode import Fit

Text = Annotated[str, StringConstraints(strip_whitespace=True)]


class FineTuningData(Section):
    """Where examples of fine-tuning come from, how they become tensors, and what their captions say.

    Attributes:
        kind: `images`: a folder of images or clips, each with its captions in a `.txt` beside it; `jsonl`: a file with
            one JSON object a line, whose `weight`, a whole number, multiplies `repeats`.
        folder: The folder of `images`; for `jsonl` the folder that file names are relative to, that of `file` if unset.
        file: The file of `jsonl`.
        held_out_fraction: Share of the files that is kept for validation, chosen by a hash of the name: at least one of
            5 files or more. Of fewer files, or with 0, validation looks at the files that are trained on.
        resolution: Images have about as many pixels as a square of this side; unset is the model's own.
        aspect_ratio_buckets: Keep each image near its own aspect ratio; false makes all of them squares.
        fit: Squares only: `crop` scales the shorter side and keeps the centre, `pad` scales the longer side and adds
            white, `stretch` ignores the aspect ratio.
        max_aspect_ratio: Buckets only: the longest side over the shortest one; longer images are cropped to it.
        num_frames: Frames of an example of a clip. 1 takes the frame in the middle. Images are single frames always.
        frame_rate: Clips only: frames a second of the examples, which are the middle of their clips; unset spreads the
            frames evenly over the whole clip.
        trigger: Words put before every caption that does not have them already; alone where there is no caption.
        caption: Caption of every file that has none.
        caption_dropout: Share of the captions replaced by the empty one, for guidance.
        repeats: How often each file is seen in an epoch.
        random_flip: Mirror half of the examples; not for faces, writing, or captions that tell left from right.
        class_folder: Further images of what the subject is one of, which keep the model from forgetting it (prior
            preservation). They have captions of their own, without the trigger.
        class_caption: Caption of every file in `class_folder` that has none.
    """

    kind: Literal["images", "jsonl"] = "images"
    folder: Path | None = None
    file: Path | None = None
    held_out_fraction: float = Field(default=0.1, ge=0, lt=1)
    resolution: int | None = Field(default=None, ge=16)
    aspect_ratio_buckets: bool = True
    fit: Fit = "crop"
    max_aspect_ratio: float = Field(default=2.0, ge=1, le=8)
    num_frames: int = Field(default=1, ge=1)
    frame_rate: float | None = Field(default=None, gt=0, le=240)
    trigger: Text = ""
    caption: Text = ""
    caption_dropout: float = Field(default=0.05, ge=0, le=1)
    repeats: int = Field(default=1, ge=1)
    random_flip: bool = False
    class_folder: Path | None = None
    class_caption: Text = ""

    @model_validator(mode="after")
    def _check(self) -> "FineTuningData":
        needed = {"images": "folder", "jsonl": "file"}[self.kind]
        if getattr(self, needed) is None:
            raise ValueError(f"data.kind = {self.kind!r} needs data.{needed}: give its path")
        if self.kind == "images":
            self._refuse("file", "works with data.kind = 'jsonl' only: remove it or change the kind")
        if self.aspect_ratio_buckets:
            self._refuse("fit", "makes squares: remove it, or set data.aspect_ratio_buckets = false")
        else:
            self._refuse(
                "max_aspect_ratio", "is for aspect-ratio buckets: remove it, or set data.aspect_ratio_buckets = true"
            )
        if self.num_frames == 1:
            self._refuse("frame_rate", "is for clips: remove it, or set data.num_frames to at least 2")
        if self.class_folder is None:
            self._refuse(
                "class_caption", "captions the images of data.class_folder: give that folder too, or remove it"
            )
        return self

    def _refuse(self, name: str, reason: str) -> None:
        """Raise if a setting that would do nothing has another value than its default.

        Raises:
            ValueError: With the setting, its value and the remedy.
        """
        value, fields = getattr(self, name), type(self).model_fields
        if value != fields[name].default:
            shown: Any = str(value) if isinstance(value, Path) else value
            raise ValueError(f"data.{name} = {shown!r} {reason}")
