"""The part of a `[data]` section that says where examples come from; tasks subclass it."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from apps.training.config import Section

FILE_FIELDS = frozenset({"fit", "held_out_fraction"})


class Stage(Section):
    """One part of the curriculum.

    Attributes:
        until_step: The optimizer step at which the next stage begins; the last stage goes on for ever.
        single, pair, count: Relative frequencies of the kinds of scenes (stickers only).
        jitter: Largest jitter of the scenes that are seen (stickers only).
    """

    world_fields: ClassVar[frozenset[str]] = frozenset({"single", "pair", "count", "jitter"})
    until_step: int = Field(ge=1)
    single: float = Field(default=0.5, ge=0)
    pair: float = Field(default=0.3, ge=0)
    count: float = Field(default=0.2, ge=0)
    jitter: float = Field(default=1.0, ge=0, le=1)


class SourceSection(Section):
    """Where examples come from: files, or a world that is drawn on the fly, whose settings subclasses add.

    Attributes:
        kind: A world (see `world`); `images`: a folder of images or clips, each with its captions in a `.txt` beside
            it; `jsonl`: a file with one JSON object a line.
        folder: The folder of `images`; for `jsonl` the folder that file names are relative to, that of `file` if unset.
        file: The file of `jsonl`.
        fit: How an image becomes a square of `resolution` pixels: `crop` scales the shorter side and keeps the centre,
            `pad` scales the longer side and adds white, `stretch` ignores the aspect ratio.
        held_out_fraction: Share of the files that is kept for validation, at least one; chosen by a hash of the name.
    """

    world: ClassVar[str]
    """The kind that is drawn on the fly."""
    world_fields: ClassVar[frozenset[str]]
    """Settings that files don't have."""
    kind: str
    folder: Path | None = None
    file: Path | None = None
    fit: Literal["crop", "pad", "stretch"] = "crop"
    held_out_fraction: float = Field(default=0.05, gt=0, lt=1)

    @model_validator(mode="after")
    def _check_kind(self) -> "SourceSection":
        needed = {"images": "folder", "jsonl": "file"}.get(self.kind)
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"data.kind = {self.kind!r} needs data.{needed}: give its path")
        if self.kind == self.world:
            self._refuse({"folder", "file", *FILE_FIELDS}, "of data.kind = 'images' or 'jsonl'")
        else:
            owner = f"of data.kind = {self.world!r}"
            self._refuse(self.world_fields, owner)
            for number, stage in enumerate(getattr(self, "stages", ())):
                _refuse(stage, type(stage).world_fields, f"data.stages.{number}", owner, self.kind)
        if self.kind == "images":
            self._refuse({"file"}, "of data.kind = 'jsonl'")
        return self

    def _refuse(self, names: set[str] | frozenset[str], owner: str) -> None:
        _refuse(self, names, "data", owner, self.kind)


class ClipStage(Section):
    """One part of the curriculum of a generator of clips.

    Attributes:
        until_step: The optimizer step at which the next stage begins; the last stage goes on for ever.
        image_fraction: Share of the batches that show first frames as images.
    """

    world_fields: ClassVar[frozenset[str]] = frozenset()
    until_step: int = Field(ge=1)
    image_fraction: float = Field(default=0.1, ge=0, le=1)


class DataSection(SourceSection):
    """Where images come from.

    Attributes:
        kind: `stickers`, or files.
        vocabulary: Stickers: `starter`, `common`, `all`, or a text file with one sticker name a line.
        colours: Stickers: `basic` draws ten backgrounds, `all` every one, by other words for them too.
        single, pair, count: Stickers: relative frequencies of the kinds of scenes.
    """

    world: ClassVar[str] = "stickers"
    world_fields: ClassVar[frozenset[str]] = frozenset({"vocabulary", "colours", "single", "pair", "count"})
    renamed: ClassVar[dict[str, str]] = {
        "validation_scenes": "validation_examples",
        "calibration_scenes": "calibration_images",
    }
    kind: Literal["stickers", "images", "jsonl"] = "stickers"
    vocabulary: str = "starter"
    colours: Literal["basic", "all"] = "basic"
    single: float = Field(default=0.5, ge=0)
    pair: float = Field(default=0.3, ge=0)
    count: float = Field(default=0.2, ge=0)


class ClipSection(SourceSection):
    """Where clips come from.

    Attributes:
        kind: `moving_stickers`, or files, of which images stand still.
        num_frames: T, frames of an example.
        frame_rates: Frames a second. Moving stickers: each clip has one of these. Files: there is one, and it is what
            the network is told.
        lengths: Moving stickers: frames of the whole clips, one of these each. Of longer ones an excerpt of
            `num_frames` is seen, shorter ones are seen whole. Empty is `num_frames`.
        vocabulary: Moving stickers: `all`, or a text file with one name a line.
        colours: Moving stickers: `basic` draws ten backgrounds, `all` every one.
        passing: Moving stickers: share of the clips in which two pass each other.
        paced: Moving stickers: share of the single ones that are played slowly, fast or backwards, a third each.
        jitter: Moving stickers: how much places, sizes and paths vary, 0 to 1.
        jitter_power: Moving stickers: 1 spreads them evenly, 3 has most of them near the middle.
        synonyms: Moving stickers: probability that a caption calls a sticker by another name.
    """

    world: ClassVar[str] = "moving_stickers"
    world_fields: ClassVar[frozenset[str]] = frozenset(
        {"lengths", "vocabulary", "colours", "passing", "paced", "jitter", "jitter_power", "synonyms"}
    )
    kind: Literal["moving_stickers", "images", "jsonl"] = "moving_stickers"
    num_frames: int = Field(default=17, ge=2)
    frame_rates: list[Annotated[float, Field(gt=0, le=240)]] = Field(default=[8.0], min_length=1)
    lengths: list[Annotated[int, Field(ge=2)]] = []
    vocabulary: str = "all"
    colours: Literal["basic", "all"] = "basic"
    passing: float = Field(default=0.15, ge=0, le=1)
    paced: float = Field(default=0.24, ge=0, le=1)
    jitter: float = Field(default=0.3, ge=0, le=1)
    jitter_power: float = Field(default=1.0, ge=1)
    synonyms: float = Field(default=0.15, ge=0, le=1)

    @model_validator(mode="after")
    def _check_rates(self) -> "ClipSection":
        if self.kind != self.world and len(self.frame_rates) > 1:
            raise ValueError(f"data.frame_rates = {self.frame_rates}: files have one, name only that")
        return self


def _refuse(section: Section, names: set[str] | frozenset[str], where: str, owner: str, kind: str) -> None:
    """Raise if one of the settings has another value than its default: it would do nothing.

    Raises:
        ValueError: With the setting, its value and the remedy.
    """
    fields: Any = type(section).model_fields
    for name in sorted(names & set(fields)):
        value = getattr(section, name)
        if value != fields[name].get_default(call_default_factory=True):
            shown = str(value) if isinstance(value, Path) else value
            raise ValueError(
                f"{where}.{name} = {shown!r} is a setting {owner}, and data.kind is {kind!r}: "
                "remove it or change the kind"
            )


class CaptionedData(DataSection):
    """Where examples with captions come from.

    Attributes:
        size_words: Stickers: share of the single stickers drawn small or large.
        synonyms: Stickers: probability that a caption calls a sticker by one of its keywords.
    """

    world_fields: ClassVar[frozenset[str]] = DataSection.world_fields | {"size_words", "synonyms"}
    size_words: float = Field(default=0.4, ge=0, le=1)
    synonyms: float = Field(default=0.15, ge=0, le=1)
