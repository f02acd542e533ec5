"""The settings that are compared: read as people type them, each as fields of a request that it changes.

default                                  the request as it is
steps=10 step_cache=taylorseer           options of requests, by their names there or on the command line
fast: {"step_cache": "budget=0.35"}      an acceleration, or fields of a request, as JSON; `NAME:` gives a name
saved.json                               the same in a file, such as a saved `AccelerationConfig`
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from apps.service.grid import NUMBERS, OFF, Axis, read_axis
from apps.service.option_values import Acceleration
from apps.service.request_error import RequestError
from apps.service.requests import OPTIONS, REQUEST, SHORT_FOR, AnyRequest, explain
from pipelines.acceleration import AccelerationConfig

SAME = ("model", "prompt", "negative_prompt", "seed", "style")
"""Options that could be varied, and are the same in a comparison."""
VARIED = {
    name: one
    for name, one in OPTIONS.items()
    if (one.option.is_axis and name not in SAME) or name in ("acceleration", "preset")
}
"""What a setting may change, by the names of requests."""
FLAGS = {one.flag: name for name, one in VARIED.items()}
DEFAULT = "default"
"""The setting that changes nothing."""
MOST = 9
"""Settings of one comparison, the reference among them."""
MAX_TEXT = 4_000
MAX_LABEL = 60
LABELLED = re.compile(r"\s*([^=:{}\"'/\\]{1,60}):(?:\s+(.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to generate what is compared.

    Attributes:
        label: what it is called.
        fields: of the request -> value, as `REQUEST` checks it; the others stay as they are.
    """

    label: str
    fields: Mapping[str, Any] = field(default_factory=dict)


class SettingError(ValueError):
    """A setting that can't be had for a request.

    Args:
        setting: which one.
        error: what is wrong: a `RequestError`, or a `pydantic.ValidationError` of the request.
    """

    def __init__(self, setting: Setting, error: ValueError) -> None:
        said = explain(error) if isinstance(error, ValidationError) else str(error)
        super().__init__(f"The setting {setting.label!r}: {said}")
        self.setting, self.error = setting, error


def read_setting(text: str, *, may_read_files: bool = True) -> Setting:
    """Read a setting, see the module.

    Args:
        text: as typed.
        may_read_files: whether it may name a JSON file.

    Raises:
        RequestError: it is of another form, or names what can't be varied.
        OSError: the file can't be read.
    """
    if len(text) > MAX_TEXT:
        raise RequestError(
            "compare.long",
            f"A setting has {len(text)} characters; at most {MAX_TEXT} are read.",
            value=len(text),
            most=MAX_TEXT,
        )
    if may_read_files and text.strip().endswith(".json"):
        path = Path(text.strip())
        with path.open(encoding="utf-8", errors="replace") as file:
            return Setting(path.stem[:MAX_LABEL], _from_json(file.read(MAX_TEXT * 10)))
    label, rest = "", text.strip()
    found = LABELLED.fullmatch(rest)
    if found is not None:
        label, rest = " ".join(found[1].split()), (found[2] or "").strip()
    fields = {} if rest in ("", DEFAULT) else _from_json(rest) if rest.startswith("{") else _from_words(rest)
    return Setting((label or " ".join(rest.split()) or DEFAULT)[:MAX_LABEL], fields)


def read_settings(texts: Sequence[str], axes: Sequence[Axis] = (), *, may_read_files: bool = True) -> list[Setting]:
    """Read the settings of a comparison; the first one is the reference.

    Args:
        texts: see `read_setting`; with one only, the request as it is goes before it.
        axes: options varied in every combination, for each of the settings; the first values are the reference's.
        may_read_files: see `read_setting`.

    Raises:
        RequestError: fewer than two settings, or too many; an option varied twice.
        OSError: a file can't be read.
    """
    if len({axis.name for axis in axes}) < len(axes):
        raise RequestError("grid.twice", "An option is varied twice; vary each once, with all of its values.")
    bases = len(texts) or bool(axes)
    count = (2 if bases == 1 and not axes else bases) * math.prod(len(axis.values) for axis in axes)
    if not 2 <= count <= MOST:  # before anything is made: combinations grow exponentially with the axes
        raise RequestError("compare.count", f"{count} settings are compared; give 2 to {MOST}.", value=count, most=MOST)
    found = [read_setting(text, may_read_files=may_read_files) for text in texts]
    if len(found) == 1 and not axes:
        found.insert(0, Setting(DEFAULT))
    found = [_combined(one, axes, values) for one in found or [Setting("")] for values in _combinations(axes)]
    return _distinct(found)


def read_variation(text: str) -> Axis:
    """Read `NAME=A,B,...`, an option and its values.

    Raises:
        RequestError: no such form, no such option, or a value of another kind.
    """
    name, equals, values = text.partition("=")
    if not equals:
        raise RequestError(
            "compare.vary",
            f"{text[:60]!r} is not understood; write NAME=A,B, such as steps=4,8.",
            value=text[:60],
        )
    return read_axis(_known(name.strip().replace("-", "_")), values)


def plan(request: AnyRequest, settings: Sequence[Setting]) -> list[AnyRequest]:
    """Return the request of each setting: one image or clip, of one prompt, seed and size.

    Args:
        request: what all of them change; with a seed.
        settings: the first one is the reference.

    Raises:
        SettingError: the task has no such field, a value is out of range, or values don't go together.
    """
    one = {**request.model_dump(), "num_images": 1, "batch_size": 1, "pick": None}
    found = []
    for setting in settings:
        try:
            missing = next((name for name in setting.fields if name not in type(request).model_fields), None)
            if missing is not None:
                task = request.task.replace("_", " ")
                raise RequestError("setting", f"{task} has no {missing} to vary.", field=missing)
            found.append(REQUEST.validate_python({**one, **_replaced(setting), **setting.fields}))
        except ValueError as error:
            raise SettingError(setting, error) from error
    return found


def _replaced(setting: Setting) -> dict[str, None]:
    """Return the options of the common request that parts of a setting's acceleration stand for."""
    parts = getattr(setting.fields.get("acceleration"), "parts", {})
    return {name: None for part, names in SHORT_FOR.items() if part in parts for name in names if name in OPTIONS}


def _from_words(text: str) -> dict[str, Any]:
    """Read `name=value` with spaces between."""
    try:
        words = shlex.split(text)
    except ValueError as error:  # a quotation mark without its other one
        raise _form(text) from error
    pairs = [word.partition("=") for word in words]
    if not all(name and equals for name, equals, _ in pairs):
        raise _form(text)
    return {known: _value(known, value) for name, _, value in pairs for known in (_known(name.replace("-", "_")),)}


def _from_json(text: str) -> dict[str, Any]:
    """Read a JSON object: parts of an acceleration, or fields of a request."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _form(text) from error
    if not isinstance(found, dict):
        raise _form(text)
    parts = set(AccelerationConfig.model_fields)
    if found and set(found) <= parts:
        return {"acceleration": Acceleration.from_text(json.dumps(found))}
    values = {_known(str(name)): value for name, value in found.items()}
    return {name: _value(name, value) if isinstance(value, str) else value for name, value in values.items()}


def _known(name: str) -> str:
    """Return an option that may be varied by the name that requests have."""
    known = FLAGS.get(name, name)
    if known not in VARIED:
        choices = ", ".join(VARIED)
        raise RequestError(
            "compare.field",
            f"{name[:40]!r} can't be varied in a comparison; choose among {choices}.",
            value=name[:40],
            choices=choices,
        )
    return known


def _value(name: str, text: str) -> Any:
    """Read the value of an option; `off` leaves it out."""
    one = VARIED[name]
    if text == OFF and one.type not in NUMBERS:
        return None
    try:
        return one.from_text(text)
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError("compare.value", f"{name}: {text[:40]!r} is no number.", field=name, value=text[:40]) from (
            error
        )


def _form(text: str) -> RequestError:
    return RequestError(
        "compare.form",
        f"The setting {text[:60]!r} is not understood; write NAME=VALUE with spaces between, or a JSON object.",
        value=text[:60],
    )


def _combinations(axes: Sequence[Axis]) -> list[tuple[str, ...]]:
    return list(itertools.product(*(axis.values for axis in axes)))


def _combined(setting: Setting, axes: Sequence[Axis], values: Sequence[str]) -> Setting:
    """Add one value of each axis to a setting."""
    named = [(_known(axis.name), value) for axis, value in zip(axes, values, strict=True)]
    words = " ".join(f"{name}={value}" for name, value in named)
    label = ", ".join(filter(None, (setting.label, words)))
    fields = {**setting.fields, **{name: _value(name, value) for name, value in named}}
    return Setting((label or DEFAULT)[:MAX_LABEL], fields)


def _distinct(settings: Sequence[Setting]) -> list[Setting]:
    """Add a number to labels that occur more than once."""
    seen: dict[str, int] = {}
    found = []
    for one in settings:
        seen[one.label] = seen.get(one.label, 0) + 1
        label = one.label if seen[one.label] == 1 else f"{one.label[: MAX_LABEL - 4]} ({seen[one.label]})"
        found.append(Setting(label, one.fields))
    return found
