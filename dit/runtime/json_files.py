"""Strict reading of untrusted JSON files, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 64 * 2**20
"""Largest JSON file that is read; tokenizer.json files of large vocabularies have a fifth of it."""


def parse_object(text: str | bytes, source: object) -> dict[str, Any]:
    """Parse the text of a JSON object.

    Args:
        text: the JSON.
        source: what it is, at the start of the message: a path, or "the metadata of ...".

    Returns:
        The object.

    Raises:
        ValueError: no JSON, nested too deeply for the parser, or no object.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{source} is nested too deeply to be read: expected a plain JSON object.") from error
    except ValueError as error:  # malformed, or not UTF-8
        raise ValueError(f"{source} is no JSON ({_reason(error)}); the copy is damaged, fetch it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{source} holds a {type(found).__name__} instead of an object.")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        OSError: it can't be read.
        ValueError: no JSON object, or a file too large to be one of a model.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes: expected a JSON file of at most {MAX_BYTES}.")
    return parse_object(path.read_bytes(), path)


def _reason(error: ValueError) -> str:
    return str(error).splitlines()[0][:120]
