"""PipelineInfo: what a pipeline is and can do. Ours declare it; `diffusers_info` derives it for diffusers'.

Nothing here imports diffusers: a record can be made, stored and read where none is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

TASKS = (
    "text_to_image",
    "image_to_image",
    "inpaint",
    "video_completion",
    "class_to_image",
    "next_scale_text",
    "next_scale_class",
)
"""All tasks; clips are made by `text_to_image`, by `image_to_image` those that begin with an image, and by
`video_completion` those of which a part is given."""

FALLBACK_SIDE = 512
"""Side in pixels for a pipeline that doesn't say its own."""
FALLBACK_FRAMES = 17
FALLBACK_FPS = 16
"""For pipelines of clips that say nothing."""

Guidance = Literal["none", "classifier_free", "true_cfg", "distilled"]
Callback = Literal["step_end", "legacy", "scheduler", "none"]


def _nothing() -> Mapping[Any, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineInfo:
    """What a pipeline is and can do.

    Attributes:
        tasks: what its call can be asked for, the main task first, names of `TASKS`.
        arguments: field of a request -> argument of the call that takes it, for example "label" -> "class_labels".
        parameters: all names that the call accepts.
        defaults: argument -> value that the call takes if it is not given.
        fixed: arguments that every call needs, so that it does what it is asked for and nothing else.
        height: default height, pixels.
        width: default width, pixels.
        multiple: height and width must be multiples of it, pixels.
        sizes: width and height of all that it generates, its own first; empty if any multiple will do.
        steps: default number of denoising steps; None if there is no choice.
        grids: rows and columns of each scale of a next-scale model; empty for others.
        guidance: default guidance scale; None without one.
        guidance_kind: "classifier_free" runs a second branch for the negative prompt; "true_cfg" does so only if there
            is a negative prompt; "distilled" is an input of the network and takes no negative prompt.
        frames: default number of frames; None for images.
        frame_step: clips have 1 frame, or 1 more than a multiple of this; other numbers are rounded by the call.
        fps: frames a second of its clips.
        output: attribute of the output that holds the result; "frames" holds a list of clips.
        labels: classes by number, with their names where they have any; empty unless it generates classes.
        label_ids: number of each class by name, all names of a class included.
        callback: how a running call reports its steps: to `callback_on_step_end`, to the older `callback`, only by
            calling its scheduler, or not at all.
        callback_tensors: names of the tensors that `callback_on_step_end` can get.
        can_interrupt: `pipe.interrupt = True` ends the call before the next step, without decoding.
        finish: how it ends early with the image as it is: by its switch `finish_now`, by decoding the latents that the
            callback returns while its other steps are skipped, or not at all.
        preview: how its latents are shown cheaply: by its own method `preview`, by `pipelines.previews`, or not at all.
        has_scheduler: it has a scheduler, which can be exchanged.
        can_tile: its decoder can work tile by tile.
        can_search: it comes with a scorer that chooses among candidates.
        can_load_lora: it takes LoRA files.
        can_stream: its method `stream` yields the frames of a clip as they are finished, and `num_windows` tells in how
            many parts.
        knows_words: `unknown_words` tells which words of a prompt it was not trained on.
        kv_policies: what its cache of keys and values can keep; empty without such a cache.
    """

    tasks: tuple[str, ...]
    arguments: Mapping[str, str]
    parameters: frozenset[str]
    defaults: Mapping[str, Any] = field(default_factory=_nothing)
    fixed: Mapping[str, Any] = field(default_factory=_nothing)
    height: int = FALLBACK_SIDE
    width: int = FALLBACK_SIDE
    multiple: int = 1
    sizes: tuple[tuple[int, int], ...] = ()
    steps: int | None = None
    grids: tuple[tuple[int, int], ...] = ()
    guidance: float | None = None
    guidance_kind: Guidance = "none"
    frames: int | None = None
    frame_step: int = 1
    fps: float = FALLBACK_FPS
    output: Literal["images", "frames"] = "images"
    labels: Mapping[int, str] = field(default_factory=_nothing)
    label_ids: Mapping[str, int] = field(default_factory=_nothing)
    callback: Callback = "none"
    callback_tensors: tuple[str, ...] = ()
    can_interrupt: bool = False
    finish: Literal["switch", "latents", "none"] = "none"
    preview: Literal["own", "latents", "none"] = "none"
    has_scheduler: bool = False
    can_tile: bool = False
    can_search: bool = False
    can_load_lora: bool = False
    can_stream: bool = False
    knows_words: bool = False
    kv_policies: tuple[str, ...] = ()

    def values(self) -> dict[str, Any]:
        """Return the fields by name, as they are."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @property
    def can_finish(self) -> bool:
        """Whether it can end after any step with the image as it is then."""
        return self.finish != "none"

    @property
    def can_preview(self) -> bool:
        """Whether its latents can be shown cheaply."""
        return self.preview != "none"

    @property
    def can_batch(self) -> bool:
        """Whether one call can make several images of one prompt."""
        return "batch_size" in self.arguments

    @property
    def guidance_argument(self) -> str:
        """What the call names the guidance scale."""
        return self.arguments.get("guidance", "guidance_scale")

    def nearest_frames(self, frames: float) -> int:
        """Return the number of frames nearest to one that clips can have; at least that of one step."""
        return 1 + self.frame_step * max(round((frames - 1) / self.frame_step), 1)

    @property
    def frames_argument(self) -> str:
        """What the call names the number of frames."""
        return self.arguments.get("frames", "num_frames")


def tiles(vae: nn.Module | None) -> bool:
    """Return whether an autoencoder can decode tile by tile, as diffusers' do that have a switch for it."""
    return isinstance(getattr(vae, "use_tiling", None), bool)


def class_table(count: int, ids: Mapping[str, int]) -> dict[int, str]:
    """Return the name of each class by number.

    Args:
        count: number of classes.
        ids: number of each class by name; the first name of several counts, and some classes may have none.
    """
    found = dict.fromkeys(range(count), "")
    for name, number in ids.items():
        found[number] = found.get(number) or name
    return found
