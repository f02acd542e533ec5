"""What is wrong with a request, in the language of the page: the field by its label, the value, what is accepted.

Errors come from three places: pydantic's checks of a request (by their type), our own errors (by their key, see
`apps.service.request_error`), and the last event of a job that failed (by its code). The sentences are the page's
strings.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from apps.service.events import Failed
from apps.service.failures import is_storage_failure
from apps.service.request_error import TranslatableError
from apps.service.requests import OPTIONS, TASKS
from apps.studio import views
from apps.studio.page_values import PageError
from apps.studio.strings import Strings
from pipelines.acceleration import AccelerationError

LABELS = {
    **{name: one.label for name, one in OPTIONS.items()},
    **{f"expand.{side}": f"expand.{side}" for side in ("left", "top", "right", "bottom")},
    **{
        f"fine_tune.{name}": f"ft.{name}"
        for name in (
            "steps",
            "rank",
            "learning_rate",
            "resolution",
            "batch_size",
            "caption_dropout",
            "seed",
            "preview_every",
            "layers",
            "trigger",
            "caption",
        )
    },
    "loras.name": "loras",
    "loras.scale": "loras.scale",
    "loras.sha256": "loras",
    "size": "size",
    "step_cache.amount": "step_cache.amount",
    "step_cache.preset": "step_cache",
    "task": "task",
}
"""Field of a request, or a part of one -> string with its label on the page."""
PLACE = "problem"
"""Part of the page that shows errors."""
PERCENT = frozenset({"expand.left", "expand.top", "expand.right", "expand.bottom"})
"""Fields that the page shows in percent; the request has shares."""
SHOWN = 4
"""Problems of one request that are shown at once."""
LONGEST = 60
"""Characters of a value that are repeated."""
WHOLE = frozenset({"choices", "names"})
"""Values of errors that are never cut, because they come from here and not from a request."""
RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
NUMBER = {"int_type", "int_parsing", "int_parsing_size", "int_from_float", "float_type", "float_parsing",
          "finite_number"}  # fmt: skip
EMPTY = (None, "")


def explain(error: Exception, words: Strings) -> str:
    """Say what is wrong with a request.

    Args:
        error: of pydantic, of ours, or any other; of the last kind nothing is repeated, because it may name paths.
        words: of the page.
    """
    if isinstance(error, ValidationError):
        found = [_say_item(item, error.title, words) for item in error.errors(include_url=False)]
        return " ".join(dict.fromkeys(found[:SHOWN]))
    if isinstance(error, AccelerationError):
        return f"{words.refusal(error)}."
    if isinstance(error, PageError):
        return words(error.key)
    if isinstance(error, TranslatableError):
        return _say(error, words)
    return words("failed.storage" if is_storage_failure(error) else "wrong_form")


def explain_failure(failed: Failed, words: Strings) -> str:
    """Say why a job failed; what a library said itself is quoted behind the page's own sentence."""
    if isinstance(failed.cause, TranslatableError | ValidationError):
        return explain(failed.cause, words)
    key, known = f"failed.{failed.code}", words.keys()
    return words(key if key in known else "failed.failed", message=failed.message)


def problem(text: str) -> dict[str, Any]:
    """Return the changes of the page that show an error, in its only place.

    Args:
        text: what is wrong, in the language of the page.
    """
    return {PLACE: views.problem(text)}


def label(field: str, words: Strings) -> str:
    """Return the label of a request's field on the page; of a field that the page doesn't know its name."""
    return words(LABELS[field]) if field in LABELS else field[:LONGEST]


# ------------------------------------------------------------------------------ our errors


def _say(error: TranslatableError, words: Strings) -> str:
    """Put the values of an error into its sentence; a field becomes its label. One without a key is said in English."""
    if not error.key:
        return str(error)
    values = {name: value if name in WHOLE else _short(value) for name, value in error.values.items()}
    if "field" in values:
        values["field"] = label(str(error.values["field"]), words)
    if "task" in values:
        values["task"] = words(f"task.{values['task']}")
    if isinstance(cause := error.values.get("cause"), Exception):
        values["cause"] = explain(cause, words)
    return words(f"error.{error.key}", **values)


# ---------------------------------------------------------------------- errors of pydantic


def _say_item(item: Mapping[str, Any], title: str, words: Strings) -> str:  # noqa: PLR0911  (one for each kind)
    """Say one failed check of pydantic by its type."""
    own = (item.get("ctx") or {}).get("error")
    if isinstance(own, Exception):
        return explain(own, words)
    kind, place = _locate(title, item["loc"])
    field = ".".join(place)
    rules = {} if kind is None else _rules(kind, place)
    scale = 100 if field in PERCENT else 1
    shown = {"field": label(field, words), "value": _shown(item["input"], scale)}
    if item["type"].startswith("refused."):  # of an acceleration
        return explain(AccelerationError(item["type"], **item["ctx"]), words)
    match item["type"]:
        case "extra_forbidden":
            return words("error.setting", **shown)
        case "string_too_long":
            most = rules.get("maxLength", item["ctx"]["max_length"])
            return words("error.long", field=shown["field"], value=len(item["input"]), most=most)
        case type_ if item["input"] in EMPTY or type_ == "missing":
            return words("error.missing", **shown, accepted=_accepted(rules, scale, words))
        case type_ if type_ in RANGE or type_ in NUMBER or rules.keys() & {"enum", "const", "minimum", "maximum"}:
            key = "whole" if type_.startswith("int_") else "number" if type_ in NUMBER else "value"
            return words(f"error.{key}", **shown, accepted=_accepted(rules, scale, words))
        case _:
            return words("error.form", **shown)


def _locate(title: str, loc: Sequence[int | str]) -> tuple[type[BaseModel] | None, tuple[str, ...]]:
    """Find the request model and the path of its field that an error is about.

    The location of an error begins with the task when the kind of request was found by it, and holds parts that
    pydantic made up for the alternatives of a union.
    """
    parts = tuple(str(part) for part in loc)
    kind = next((one for one in TASKS.values() if one.__name__ == title), None)
    if parts and parts[0] in TASKS:
        kind, parts = TASKS[parts[0]], parts[1:]
    parts = tuple(part for part in parts if re.fullmatch(r"[a-z][a-z0-9_]*", part) and part not in _TYPES)
    if kind is None:  # checked by itself, such as a line of a file
        kind = next((one for one in TASKS.values() if parts and parts[0] in one.model_fields), None)
    return kind, parts


_TYPES = frozenset({"int", "str", "float", "bool", "constrained"})


@functools.cache
def _rules(kind: type[BaseModel], place: tuple[str, ...]) -> dict[str, Any]:
    """Return what the JSON schema of a request says about one of its fields; empty for an unknown one."""
    schema = kind.model_json_schema()
    found: dict[str, Any] = schema
    for name in place:
        found = _not_null(found.get("properties", {}).get(name, {}), schema)
    return found if place else {}


def _not_null(found: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Return the first alternative of a field's schema that is not null, with its reference resolved.

    Of a list of objects the schema of the objects is returned.
    """
    for one in found.get("anyOf", [found]):
        if one.get("type") == "array" and "$ref" in one.get("items", {}):
            return _not_null(one["items"], schema)
        if one.get("type") != "null":
            name = str(one.get("$ref", "")).rpartition("/")[2]
            return schema["$defs"][name] if name else one
    return {}


def _accepted(rules: Mapping[str, Any], scale: float, words: Strings) -> str:
    """Say which values the schema of a field accepts."""
    if "enum" in rules:
        return words("accepted.choices", choices=", ".join(map(str, rules["enum"])))
    lowest, above = rules.get("minimum"), rules.get("exclusiveMinimum")
    highest, below = rules.get("maximum"), rules.get("exclusiveMaximum")
    low = lowest if lowest is not None else above
    high = highest if highest is not None else below
    if low is None or high is None:
        return words("accepted.number") if rules.get("type") in ("number", "integer") else words("accepted.any")
    key = "accepted.above" if lowest is None else "accepted.below" if highest is None else "accepted.range"
    return words(key, lowest=_shown(low, scale), highest=_shown(high, scale))


def _shown(value: object, scale: float = 1) -> str:
    """Return a value as the page shows it."""
    if isinstance(value, float) or (isinstance(value, int) and scale != 1):
        return f"{value * scale:g}"
    return _short(value)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
