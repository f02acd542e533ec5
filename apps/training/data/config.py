"""The part of a `[data]` section that says where examples come from; tasks subclass it."""

from pathlib import Path
from typing import Any, ClassVar, Literal

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

    sticker_fields: ClassVar[frozenset[str]] = frozenset({"single", "pair", "count", "jitter"})
    until_step: int = Field(ge=1)
    single: float = Field(default=0.5, ge=0)
    pair: float = Field(default=0.3, ge=0)
    count: float = Field(default=0.2, ge=0)
    jitter: float = Field(default=1.0, ge=0, le=1)


class DataSection(Section):
    """Where examples come from.

    Attributes:
        kind: `stickers`: drawn on the fly; `images`: a folder of images or clips, each with its captions in a `.txt`
            beside it; `jsonl`: a file with one JSON object a line.
        folder: The folder of `images`; for `jsonl` the folder that file names are relative to, that of `file` if unset.
        file: The file of `jsonl`.
        fit: How an image becomes a square of `resolution` pixels: `crop` scales the shorter side and keeps the centre,
            `pad` scales the longer side and adds white, `stretch` ignores the aspect ratio.
        held_out_fraction: Share of the files that is kept for validation, at least one; chosen by a hash of the name.
        vocabulary: Stickers: `starter`, `common`, `all`, or a text file with one sticker name a line.
        colours: Stickers: `basic` draws ten backgrounds, `all` every one, by other words for them too.
        single, pair, count: Stickers: relative frequencies of the kinds of scenes.
    """

    sticker_fields: ClassVar[frozenset[str]] = frozenset({"vocabulary", "colours", "single", "pair", "count"})
    renamed: ClassVar[dict[str, str]] = {
        "validation_scenes": "validation_examples",
        "calibration_scenes": "calibration_images",
    }
    kind: Literal["stickers", "images", "jsonl"] = "stickers"
    folder: Path | None = None
    file: Path | None = None
    fit: Literal["crop", "pad", "stretch"] = "crop"
    held_out_fraction: float = Field(default=0.05, gt=0, lt=1)
    vocabulary: str = "starter"
    colours: Literal["basic", "all"] = "basic"
    single: float = Field(default=0.5, ge=0)
    pair: float = Field(default=0.3, ge=0)
    count: float = Field(default=0.2, ge=0)

    @model_validator(mode="after")
    def _check_kind(self) -> "DataSection":
        needed = {"images": "folder", "jsonl": "file"}.get(self.kind)
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"data.kind = {self.kind!r} needs data.{needed}: give its path")
        if self.kind == "stickers":
            self._refuse({"folder", "file", *FILE_FIELDS}, "of data.kind = 'images' or 'jsonl'")
        else:
            self._refuse(self.sticker_fields, "of data.kind = 'stickers'")
            for number, stage in enumerate(getattr(self, "stages", ())):
                _refuse(stage, Stage.sticker_fields, f"data.stages.{number}", "of data.kind = 'stickers'", self.kind)
        if self.kind == "images":
            self._refuse({"file"}, "of data.kind = 'jsonl'")
        return self

    def _refuse(self, names: set[str] | frozenset[str], owner: str) -> None:
        _refuse(self, names, "data", owner, self.kind)


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

    sticker_fields: ClassVar[frozenset[str]] = DataSection.sticker_fields | {"size_words", "synonyms"}
    size_words: float = Field(default=0.4, ge=0, le=1)
    synonyms: float = Field(default=0.15, ge=0, le=1)
