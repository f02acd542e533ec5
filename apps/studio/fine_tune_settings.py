"""The settings of the tab Fine-tune: fields of `LoraConfig` with its defaults and ranges, and their way to a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from apps.service import limits
from apps.service.fine_tuning_process import FineTuningError
from apps.service.tethered import without_paths
from apps.studio import fields
from apps.studio.strings import Strings
from apps.training.config import ConfigError, Section, validate_document
from apps.training.tasks.lora_config import LoraConfig
from dit.lora.adapters import LAYERS

PREFIX = "ft_"
"""Of the names of all parts of the tab."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of the tab.

    Attributes:
        section: of `LoraConfig`.
        name: of the field there.
        most: what a server accepts; the field itself may accept more.
        is_whole: whether it is a whole number.
    """

    section: str
    name: str
    most: float
    is_whole: bool = True

    @property
    def _field(self) -> Any:
        kind = LoraConfig.model_fields[self.section].annotation
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            raise TypeError(f"{self.section!r} is no section of LoraConfig; correct SETTINGS.")
        return kind.model_fields[self.name]

    @property
    def default(self) -> Any:
        """What the field holds by itself."""
        return self._field.default

    @property
    def least(self) -> float | None:
        """The smallest value that the field accepts, or one below all that it accepts (see `is_above`)."""
        found = [getattr(rule, name, None) for rule in self._field.metadata for name in ("ge", "gt")]
        return next((value for value in found if value is not None), None)

    @property
    def is_above(self) -> bool:
        """Whether values must be above `least`, and not only as large."""
        return any(getattr(rule, "gt", None) is not None for rule in self._field.metadata)

    @property
    def highest(self) -> float:
        """The largest value that is accepted."""
        own = [rule.le for rule in self._field.metadata if getattr(rule, "le", None) is not None]
        return min([self.most, *own])

    def read(self, value: object) -> float | int | None:
        """Return what a control holds, checked; 0 stands for no value where that is the default.

        Raises:
            FineTuningError: no number, no whole one, or out of range.
        """
        if self.default is None and value in (None, 0):
            return None
        least, said = f"{self.least or 0:g}", repr(value)[:LONGEST]
        is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
        if not isinstance(value, int | float) or isinstance(value, bool) or not is_number or self._is_broken(value):
            raise FineTuningError(
                "ft.whole" if self.is_whole else "ft.number",
                f"{self.name} is {said}; choose a {'whole ' if self.is_whole else ''}number from {least} to "
                f"{self.highest:g}.",
                field=f"fine_tune.{self.name}",
                value=said,
                lowest=least,
                highest=f"{self.highest:g}",
            )
        if not self._is_inside(value):
            raise FineTuningError(
                "ft.above" if self.is_above else "range",
                f"{self.name} is {said}; choose {'above ' if self.is_above else ''}{least} to {self.highest:g}.",
                field=f"fine_tune.{self.name}",
                value=said,
                lowest=least,
                highest=f"{self.highest:g}",
            )
        return int(value) if self.is_whole else float(value)

    def _is_broken(self, value: float) -> bool:
        return self.is_whole and value != int(value)

    def _is_inside(self, value: float) -> bool:
        low = self.least or 0
        return (low < value if self.is_above else low <= value) and value <= self.highest


SETTINGS: dict[str, Setting] = {
    "steps": Setting("run", "steps", 20_000),
    "rank": Setting("lora", "rank", 128),
    "learning_rate": Setting("optimizer", "learning_rate", 10.0, is_whole=False),
    "resolution": Setting("data", "resolution", 1_024),
    "batch_size": Setting("run", "batch_size", 16),
    "caption_dropout": Setting("data", "caption_dropout", 1.0, is_whole=False),
    "seed": Setting("run", "seed", limits.MAX_SEED),
    "preview_every": Setting("run", "preview_every", 20_000),
}
"""Numbers that a visitor may set, in the order of the page."""
LONGEST = 60
"""Characters of a value that are repeated."""
LAYER_KINDS = (*LAYERS, "all")
TEXTS = ("trigger", "caption")
"""Fields of `[data]` that are texts."""
MOST_CLEANED = 4 * limits.MAX_PROMPT_CHARS
"""Characters of a text that are looked at: more than any text may have, so that longer ones are refused."""
MOST_TEXT = 200
"""Characters of a trigger, or of a caption for all."""
LAYERS_DEFAULT: str = Setting("lora", "layers", 0).default[0]
RHYTHM = {"log_every": 250, "validate_every": 10, "save_every": 5}
"""Setting of `[run]` -> how often it is done at least in a whole run; short runs would else show nothing."""
SAVED = ("save_every", "preview_every")
"""Settings of `[run]` that write files, which is done `limits.MAX_SAVES` times at most."""


def build_settings(words: Strings, learning_rate: float) -> dict[str, Any]:
    """Lay out the numbers, of which the learning rate depends on the model, and the choice of layers."""
    parts: dict[str, Any] = {}
    names = iter(SETTINGS.items())
    for pair in zip(names, names, strict=True):
        with gr.Row():
            parts |= {PREFIX + name: _number(name, one, words) for name, one in pair}
    parts[f"{PREFIX}learning_rate"].value = learning_rate
    choices = [(words(f"ft.layers.{kind}"), kind) for kind in LAYER_KINDS]
    parts[f"{PREFIX}layers"] = fields.Dropdown(
        choices, value=LAYERS_DEFAULT, label=words("ft.layers"), filterable=False, elem_id="ft-layers"
    )
    return parts


def _number(name: str, one: Setting, words: Strings) -> Any:
    return fields.Number(
        0 if one.default is None else one.default,  # a browser shows 0 for no number
        label=words(f"ft.{name}"),
        precision=0 if one.is_whole else None,
        minimum=0 if one.default is None else one.least,
        maximum=one.highest,
        min_width=120,
        elem_id=f"ft-{name.replace('_', '-')}",
    )


def to_document(values: Mapping[str, Any], source: str, frames: int) -> dict[str, dict[str, Any]]:
    """Return the settings of a run by section, see `apps.service.fine_tuning.Plan`.

    Args:
        values: what the controls hold, by name.
        source: built-in name, folder or hub id of the model.
        frames: of an example; 1 for images.

    Raises:
        FineTuningError: a value can't be used.
    """
    document: dict[str, dict[str, Any]] = {"run": {}, "model": {"pretrained": source}, "data": {}, "task": {}}
    for name, one in SETTINGS.items():
        document.setdefault(one.section, {})[one.name] = one.read(values[PREFIX + name])
    document["data"] |= {name: _text(name, values[PREFIX + name]) for name in TEXTS}
    if frames > 1:
        document["data"]["num_frames"] = frames
    kind = values[f"{PREFIX}layers"]
    if kind not in LAYER_KINDS:
        choices = ", ".join(LAYER_KINDS)
        message = f"layers is {str(kind)[:40]!r}; choose among {choices}."
        raise FineTuningError("choice", message, field="fine_tune.layers", value=str(kind)[:40], choices=choices)
    document["lora"]["layers"] = [kind]
    _fit_rhythm(document["run"])
    return _validated(document)


def _fit_rhythm(run: dict[str, Any]) -> None:
    """Have short runs log, validate, save and preview often enough, and long ones save and preview not too often."""
    for name, times in RHYTHM.items():
        run[name] = min(Setting("run", name, 0).default, max(run["steps"] // times, 1))
    run["preview_every"] = min(run["preview_every"], run["steps"])
    least = -(-run["steps"] // limits.MAX_SAVES)
    run |= {name: max(run[name], least) for name in SAVED if run[name] > 0}


def _validated(document: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return a document that the training accepts; files and the kind of task are added to it later.

    Raises:
        FineTuningError: it isn't accepted.
    """
    whole = {
        **document,
        "run": {"name": "run", **document["run"]},
        "data": {"folder": ".", **document["data"]},
        "task": {"kind": "lora"},
    }
    try:
        validate_document(whole, LoraConfig)
    except ConfigError as error:
        message = without_paths(str(error))
        raise FineTuningError("ft.refused", message, message=message) from error
    return document


def _text(name: str, value: object) -> str:
    """Return a text without characters that can't be written.

    Raises:
        FineTuningError: it is too long.
    """
    text = clean(value)
    if len(text) > MOST_TEXT:
        raise FineTuningError(
            "long",
            f"{name} has {len(text)} characters; at most {MOST_TEXT} are accepted.",
            field=f"fine_tune.{name}",
            value=len(text),
            most=MOST_TEXT,
        )
    return text


def clean(value: object) -> str:
    """Return a text on one line, without control characters and halves of characters; the rest of megabytes is cut."""
    text = value[:MOST_CLEANED] if isinstance(value, str) else ""
    text = text.encode("utf-8", errors="ignore").decode("utf-8")
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def clean_lines(value: object) -> str:
    """Return a caption, whose lines are captions each, with every line cleaned and none empty."""
    lines = value[:MOST_CLEANED].splitlines() if isinstance(value, str) else []
    return "\n".join(line for line in map(clean, lines) if line)
