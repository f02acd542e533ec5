"""What pydantic finds wrong with a value, in our words: the field, the accepted range, the remedy; never the value."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ValidationError

MOST = 8
"""Errors that are reported of one request."""
PATTERNS = {
    r"^[0-9a-f]{64}$": "the hash of an image that was uploaded before (64 hex digits)",
    r"^[a-z0-9_]{1,40}$": "a name of lower-case letters, digits and _",
    r"^[a-z0-9_.-]{1,40}$": "a name of lower-case letters, digits and _.-",
    r"^(auto|\d{1,5}x\d{1,5})$": "auto, or WIDTHxHEIGHT in pixels such as 128x128",
}
"""What the patterns of our fields stand for."""
CHOICES = re.compile(r"\^\(([a-z0-9_|]+)\)\$")
Schema = Mapping[str, Any]


def explain_fields(error: ValidationError, models: Mapping[str, type[BaseModel]] | type[BaseModel]) -> str:
    """Say what is wrong, a clause an error.

    Args:
        error: of pydantic.
        models: the class that was validated, or the classes of a discriminated union by their tags.

    Returns:
        Clauses such as `steps: choose 1 to 200`, with semicolons between them.
    """
    clauses = [explain_item(item, models) for item in error.errors(include_url=False, include_input=False)]
    return "; ".join(list(dict.fromkeys(clauses))[:MOST])


def explain_item(item: Mapping[str, Any], models: Mapping[str, type[BaseModel]] | type[BaseModel]) -> str:
    """Say what one error of `ValidationError.errors` is about; see `explain_fields`."""
    loc, kind = tuple(item["loc"]), item["type"]
    if kind.startswith("union_tag") and isinstance(models, Mapping):
        return f"task: choose among {', '.join(models)}"
    model, owner = models if isinstance(models, type) else None, "the request"
    if isinstance(models, Mapping) and loc and loc[0] in models:
        model, owner, loc = models[loc[0]], str(loc[0]), loc[1:]
    place, schema = _walk({} if model is None else _schema(model), loc)
    if kind == "extra_forbidden":
        owner = place.rpartition(".")[0] or owner
        return f"{place or 'request'}: {owner} has no such setting; leave it out"
    return f"{place or 'request'}: {_remedy(item, schema, at_root=not place)}"


@lru_cache(maxsize=64)
def _schema(model: type[BaseModel]) -> Schema:
    """Return the JSON schema of a class, which takes pydantic tens of milliseconds to make."""
    return model.model_json_schema()


def _remedy(item: Mapping[str, Any], schema: Schema, *, at_root: bool) -> str:
    """Say what is accepted where an error is."""
    kind = item["type"]
    if kind in ("value_error", "assertion_error"):  # the words of our own checks
        return str(item.get("ctx", {}).get("error", "")) or "is not accepted"
    if kind == "json_invalid":
        return "the body is not valid JSON; send a JSON object"
    if at_root:
        return "send a JSON object with the fields of the request"
    wanted = accepted(schema)
    if kind.startswith("int_") and "whole" not in wanted:
        wanted = wanted.replace("choose", "choose a whole number,", 1)
    if kind == "missing":
        return f"is missing; {wanted}"
    if kind == "finite_number":
        return f"must be finite; {wanted}"
    return wanted


def _walk(schema: Schema, loc: Sequence[Any]) -> tuple[str, Schema]:
    """Follow an error's location through a JSON schema.

    Returns:
        The names of the fields on the way with dots between them, cleaned, and the schema of the last field.
    """
    root, names = schema, []
    for part in loc:
        options = [found.get("properties", {}) for found in _options(schema, root)]
        found = next((properties[part] for properties in options if part in properties), None)
        if found is not None:
            names.append(str(part))
            schema = found
        elif isinstance(part, int):
            names.append(str(part))
            schema = next((one["items"] for one in _options(schema, root) if "items" in one), {})
        elif any(options) or not names:  # an unknown field; else the name of a member of a union
            names.append(re.sub(r"\W", "?", str(part))[:40])
            schema = {}
    return ".".join(names), {**schema, "$defs": root.get("$defs", {})}


def _options(schema: Schema, root: Schema) -> list[Schema]:
    """Return what a schema allows besides null, with references followed."""
    found: list[Schema] = []
    for one in schema.get("anyOf", schema.get("oneOf", [schema])):
        reference = one.get("$ref", "").rpartition("/")[2]
        found.append(root.get("$defs", {}).get(reference, {}) if reference else one)
    return [one for one in found if one.get("type") != "null"]


def accepted(schema: Schema) -> str:
    """Say what a field accepts.

    Args:
        schema: JSON schema of the field, with `$defs` for what it refers to.
    """
    clauses = [_accepted(one) for one in _options(schema, schema)]
    return ", or ".join(dict.fromkeys(clauses)) or "is not of the accepted form"


def _accepted(schema: Schema) -> str:  # noqa: PLR0911  (one for each kind)
    if "const" in schema or "enum" in schema:
        return f"choose {_either(schema.get('enum') or [schema.get('const')])}"
    match schema.get("type"):
        case "integer":
            return f"choose {_between(schema, 'a whole number')}"
        case "number":
            return f"choose {_between(schema, 'a number')}"
        case "boolean":
            return "choose true or false"
        case "string":
            return _text(schema)
        case "array":
            return "give a list"
        case "object" if "properties" in schema:
            return f"give an object with {', '.join(schema['properties'])}"
        case "object":
            return "give an object"
    return "is not of the accepted form"


def _between(schema: Schema, what: str) -> str:
    """Name a range of numbers, as far as it has ends."""
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if schema["type"] == "integer" and below is not None:
        high, below = below - 1, None
    if low is not None and high is not None:
        return f"{low} to {high}" if schema["type"] == "integer" else f"{low:g} to {high:g}"
    ends = [f"at least {low:g}" if low is not None else "", f"above {above:g}" if above is not None else ""]
    ends += [f"at most {high:g}" if high is not None else "", f"below {below:g}" if below is not None else ""]
    return " ".join([what, ", ".join(filter(None, ends))]).strip()


def _text(schema: Schema) -> str:
    """Name what a text may be."""
    pattern, least, most = schema.get("pattern"), schema.get("minLength"), schema.get("maxLength")
    if pattern is not None:
        choices = CHOICES.fullmatch(pattern)
        if choices is not None:
            return f"choose {_either(choices[1].split('|'))}"
        return f"give {PATTERNS[pattern]}" if pattern in PATTERNS else "is not of the accepted form"
    if most is None:
        return "give a text"
    return f"give a text of {f'{least} to' if least else 'at most'} {most} characters"


def _either(choices: Sequence[Any]) -> str:
    """List choices."""
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last
