"""Files of prompts, one a line, as `tessera generate --batch` and the page read them.

A line is plain text, a JSON string, or a JSON object with a prompt and settings. Settings have the names of the command
line (`size`, `num`, `cache`) or of a request (`width`, `num_images`, `step_cache`). Blank lines and those that begin
with # are skipped. A line that is not understood refuses the whole file, with its number and the key.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from apps.service import limits
from apps.service.option_text import parse_size
from apps.service.request_error import RequestError
from apps.service.requests import OPTIONS, TASKS
from apps.service.validation import explain_fields

MAX_BYTES = 16 * 2**20
MAX_LINES = 100_000
COMMAND_LINE_NAMES = frozenset({"size", *(one.flag for name, one in OPTIONS.items() if one.flag != name)})
"""Settings that the command line has under another name than a request."""


class PromptFileError(RequestError):
    """A file of prompts has a line that is not understood, or too many."""


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One line of a file.

    Attributes:
        number: from 1, as editors count.
        values: settings by their names in the file; the prompt is among them.
    """

    number: int
    values: Mapping[str, Any]


def request_field_names() -> frozenset[str]:
    """Return the names of all settings that a request of any task has."""
    return frozenset(name for kind in TASKS.values() for name in kind.model_fields) - {"task"}


def read_text(data: bytes, name: str) -> str:
    """Decode a file.

    Raises:
        PromptFileError: it is too large, or no UTF-8 text.
    """
    if len(data) > MAX_BYTES:
        raise PromptFileError(
            "file.bytes",
            f"{name} has {len(data)} bytes; at most {MAX_BYTES} are read. Split the file.",
            file=name,
            value=len(data),
            most=MAX_BYTES,
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptFileError(
            "file.text", f"{name} is not UTF-8 text; save it as UTF-8, with one prompt a line.", file=name
        ) from error


def parse_lines(text: str, name: str, known: Collection[str], most: int = MAX_LINES) -> list[PromptLine]:
    """Read the lines of a file.

    Args:
        text: its content.
        name: of the file, for errors.
        known: names that a JSON object may have.
        most: prompts that are accepted.

    Raises:
        PromptFileError: a line is not understood, or there are too many prompts, or none.
    """
    rows = [(number, row.strip()) for number, row in enumerate(text.splitlines(), 1)]
    rows = [(number, row) for number, row in rows if row and not row.startswith("#")]
    if not rows:
        raise PromptFileError("file.empty", f"{name} has no prompts; write one a line.", file=name)
    if len(rows) > most:
        raise PromptFileError(
            "file.lines",
            f"{name} has {len(rows)} prompts; at most {most} are accepted at once. Split the file.",
            file=name,
            value=len(rows),
            most=most,
        )
    return [PromptLine(number, _parse(row, number, known)) for number, row in rows]


def _parse(row: str, number: int, known: Collection[str]) -> dict[str, Any]:
    """Read one line."""
    if row.startswith("[") and _is_json(row):
        raise PromptFileError(
            "file.list",
            f"Line {number} is a JSON list; give text, or an object with the key 'prompt'.",
            line=number,
        )
    if not row.startswith(("{", '"')):
        return {"prompt": row}
    try:
        value = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise PromptFileError(
            "file.json", f"Line {number} is no JSON: {error}.", line=number, reason=str(error)
        ) from error
    if isinstance(value, str):
        return {"prompt": value}
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise PromptFileError(
            "file.key",
            f"Line {number} holds {', '.join(unknown)}; known are {', '.join(sorted(known))}.",
            line=number,
            key=", ".join(unknown),
            choices=", ".join(sorted(known)),
        )
    if value.get("prompt") is None and value.get("label") is None:
        raise PromptFileError(
            "file.prompt", f"Line {number} has no prompt; add the key 'prompt'.", line=number, key="prompt"
        )
    return value


def _is_json(row: str) -> bool:
    """Whether a line is JSON; text may begin with a bracket too."""
    try:
        json.loads(row)
    except (ValueError, RecursionError):
        return False
    return True


# ------------------------------------------------------------------- to fields of a request


def request_fields(line: PromptLine) -> dict[str, Any]:
    """Return a line's settings under their names in a request, each checked by itself.

    Raises:
        PromptFileError: a setting is out of range, with the number of the line and the key.
    """
    fields: dict[str, Any] = {}
    for key, value in line.values.items():
        try:
            read = _translate(key, value)
            checked = _field_model().model_validate(read)
        except (ValueError, TypeError) as error:
            raise line_error(line.number, key, error) from error
        fields |= {name: getattr(checked, name) for name in read}
    if {"width", "height"} <= fields.keys() and fields["width"] is not None and fields["height"] is not None:
        try:
            limits.check_size(fields["height"], fields["width"])
        except RequestError as error:
            raise line_error(line.number, str(error.values.get("field", "width")), error) from error
    return fields


def line_error(number: int, key: str, error: Exception) -> PromptFileError:
    """Return the error of a line that holds what a request doesn't take."""
    kind = next((one for one in TASKS.values() if key in one.model_fields), None)
    said = explain_fields(error, kind or _field_model()) if isinstance(error, ValidationError) else str(error)
    return PromptFileError("file.value", f"Line {number}, {key}: {said}", line=number, key=key, cause=error)


def _translate(key: str, value: Any) -> dict[str, Any]:
    """Return a setting under the names of a request."""
    if key == "size":
        if not isinstance(value, int | str):
            raise RequestError("form", f"{key} has a form that is not accepted.", field=key, value=value)
        width, height = parse_size(str(value))
        return {"width": width, "height": height}
    one = _BY_FLAG.get(key) or OPTIONS.get(key)
    if one is None:
        return {key: value}
    return {one.name: one.from_text(str(value)) if one.is_composed and _is_text(value) else value}


def _is_text(value: Any) -> bool:
    """Whether a value is written as text, or as a number that is short for it."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)


_BY_FLAG = {one.flag: one for one in OPTIONS.values()}


@functools.cache
def _field_model() -> type[BaseModel]:
    """Return a model with every field of every request, none of them required."""
    fields: dict[str, Any] = {}
    for kind in TASKS.values():
        for name, field in kind.model_fields.items():
            if name != "task":
                fields.setdefault(name, (field.rebuild_annotation() | None, None))
    return create_model("PromptLineFields", __config__=ConfigDict(frozen=True, extra="forbid"), **fields)


# ------------------------------------------------------------- to words of the command line


def command_line_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line's settings under their names on the command line, as far as it has them.

    Raises:
        ValueError: a setting has another form.
    """
    named = {name: value for name, value in values.items() if value is not None}  # null is open
    for name, one in OPTIONS.items():
        if one.flag != name and {name, one.flag} <= named.keys():
            raise ValueError(f"{one.flag} and {name} are the same setting; give one of them.")
    if named.keys() & {"width", "height"}:
        named["size"] = f"{named.pop('width', None)}x{named.pop('height', None)}"
    if "label" in named:
        named["prompt"] = named.pop("label")
    named["prompt"] = str(named["prompt"])  # the number of a class
    for name in set(named) & set(OPTIONS):
        one, value = OPTIONS[name], named.pop(name)
        named[one.flag] = one.type.text_of(value) if one.is_composed and isinstance(value, dict) else value
    return named
