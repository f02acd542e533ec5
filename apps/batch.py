"""`tessera generate --batch`: work through a file of prompts, skip what is done, go on after a failure.

A line is a JSON object with the words of the command line (`prompt`, `seed`, `steps`, `size`, ...), a JSON string, or
plain text. The name of a picture follows from its line and from what was said on the command line, so a second run
finds what the first one has done, and a changed line is painted anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from apps.engine import Engine
from apps.generate import DEFAULT_MODEL, Machine, Wishes, follow, make_request
from apps.options import check_wishes, read_line
from apps.outputs import check_folder, picture_paths, save
from apps.profiles import check_request
from apps.shelf import check_sources
from apps.usage import UsageError, checking

MAX_LINES = 100_000
EXAMPLE = "1"
"""Stands for the prompts of the lines when their common settings are checked: a text, and the number of a class."""
FROM_LINE = {field.name for field in fields(Wishes)} - {"model", "lora"}


class BatchError(ValueError):
    """Some lines of a batch failed; the others are done."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the file.

    Attributes:
        number: from 1, as editors count.
        wishes: what it asks for, with those of the command line behind.
        name: of its picture, without the ending.
    """

    number: int
    wishes: Wishes
    name: str


def run_batch(
    file: Path,
    folder: Path,
    common: Wishes,
    machine: Machine | None = None,
    json_output: bool = False,
    keep_settings: bool = True,
    sidecar: bool = False,
) -> None:
    """Paint every line of a file.

    Args:
        file: JSONL or text.
        folder: receives the pictures; created if absent.
        common: for all lines that don't say otherwise.
        machine: where to compute.
        json_output: print one JSON object a line instead of text.
        keep_settings: whether the files carry their settings.
        sidecar: whether a JSON file beside each one does.

    Raises:
        BatchError: lines failed; what could be painted is there.
        UsageError: a line or a common setting isn't understood, or the folder can't be written; then nothing has been
            painted.
    """
    machine, source = machine or Machine(), common.model or DEFAULT_MODEL
    with checking():
        lines = list(read_lines(file, common))
        check_folder(folder)
        check_sources([source], machine.base)
        rehearsed = check_wishes(replace(common, prompt=EXAMPLE), source)
        opened = machine.fitted(common.memory).engine(source, common.lora)
    with closing(opened) as engine:
        with checking(ValueError, FileNotFoundError):
            if rehearsed is not None:
                check_request(rehearsed, engine.devices)
            engine.model().result()
        folder.mkdir(parents=True, exist_ok=True)
        console, failed = Console(soft_wrap=True), 0
        for line in lines:
            row = _paint(line, folder, engine, Console(stderr=True, quiet=json_output), keep_settings, sidecar)
            failed += row["state"] == "failed"
            if json_output:
                console.print(json.dumps(row), markup=False, highlight=False)
            else:
                told = row.get("error") or ", ".join(row["paths"])
                console.print(f"line {line.number}: {row['state']}  {told}", markup=False, highlight=False)
    if failed:
        raise BatchError(f"{failed} of {len(lines)} lines failed; run the same command again to try only those.")


def read_lines(file: Path, common: Wishes) -> Iterator[Line]:
    """Read the lines of a file; blank ones and those that begin with # are skipped.

    Raises:
        ValueError: a line is neither text nor an object of known words.
        UsageError: the file isn't UTF-8 text.
    """
    try:
        rows = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{file.name} is no UTF-8 text; give a JSONL or text file with a prompt a line.") from error
    if len(rows) > MAX_LINES:
        raise ValueError(f"{file.name} has {len(rows)} lines; at most {MAX_LINES} are taken.")
    for number, text in enumerate(rows, 1):
        if text.strip() and not text.startswith("#"):
            wishes = replace(common, **_read(text.strip(), number, file.parent))
            content = json.dumps(asdict(wishes), sort_keys=True, default=str)
            yield Line(number, wishes, f"{number:05d}-{hashlib.sha256(content.encode()).hexdigest()[:8]}")


def _read(text: str, number: int, folder: Path) -> dict[str, Any]:
    """Read one line."""
    if not text.startswith(("{", '"')):
        return {"prompt": text}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"Line {number} is no JSON: {error}.") from error
    if isinstance(value, str):
        return {"prompt": value}
    unknown = set(value) - FROM_LINE
    if unknown:
        raise ValueError(f"Line {number} holds {', '.join(sorted(unknown))}; known are {', '.join(sorted(FROM_LINE))}.")
    try:
        read = read_line(value)
    except UsageError as error:
        raise UsageError(f"Line {number} holds {error}.") from error
    return {key: folder / one if key in ("image", "mask") and one is not None else one for key, one in read.items()}


def _paint(
    line: Line, folder: Path, engine: Engine, console: Console, keep_settings: bool, sidecar: bool
) -> dict[str, Any]:
    """Paint one line unless it is done; returns what is told of it."""
    row: dict[str, Any] = {"line": line.number, "prompt": line.wishes.prompt, "state": "done"}
    try:
        request = make_request(line.wishes, engine)
        paths = picture_paths(folder / f"{line.name}.png", request.num_images)
        if all(path.is_file() for path in paths):
            return {**row, "state": "skipped", "paths": [str(path) for path in paths]}
        with closing(follow(engine.generate(request), console)) as pictures:
            written, notes = [], dict[str, None]()
            for path, picture in zip(paths, pictures, strict=True):
                written.append(save(picture, path, keep_settings, sidecar))
                notes |= dict.fromkeys(picture.notes)
    except (ValueError, OSError, TypeError) as error:
        return {**row, "state": "failed", "error": str(error)}
    return {**row, "paths": [str(path) for files in written for path in files], "notes": list(notes)}
