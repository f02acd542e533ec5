"""`tessera generate --batch`: work through a file of prompts, skip what is done, go on after a failure.

`apps.service.prompt_file` reads the file, for the page too. The name of an image follows from its line and from the
options of the command line, so a second run finds what the first one has done, and a changed line is generated anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from apps.commands.generate import DEFAULT_MODEL, DeviceOptions, follow, make_request
from apps.commands.given_options import GenerateOptions, make_options
from apps.commands.options import check_options, read_line
from apps.commands.outputs import picture_paths, save
from apps.commands.own_files import with_own_preset
from apps.service.compute_profiles import check_request
from apps.service.engine import Engine
from apps.service.logs import no_repetition
from apps.service.model_pool import check_sources, check_upscaler
from apps.service.option_values import IMAGE_FIELDS
from apps.service.prompt_file import command_line_values, parse_lines, read_text
from apps.service.requests import OPTIONS
from apps.service.usage import UsageError, checking
from apps.service.writable import check_folder

EXAMPLE = "1"
"""Stands for the prompts of the lines when their common settings are checked: a text, and the number of a class."""
FROM_LINE = set(make_options().model_dump()) - {"model", "lora", "upscaler"}
"""Names of the command line that a line may have."""
RENAMED = {"width", "height", "label", *(name for name, one in OPTIONS.items() if one.flag != name)}
"""Fields of a request that have other names on the command line."""
NAMING = (
    "prompt", "negative_prompt", "model", "seed", "steps", "guidance", "size", "num", "batch_size", "frames", "style",
    "preset", "scheduler", "image", "mask", "strength", "expand", "memory", "dtype", "attention", "cache",
    "temperature", "top_k", "top_p", "kv_policy", "kv_budget", "search", "candidates", "lora", "lora_scale",
)  # fmt: skip
"""Options that name the files even where nobody says them; later ones don't, so that names stay as they were."""


class BatchError(ValueError):
    """Some lines of a batch failed; the others are done."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the file.

    Attributes:
        number: from 1, as editors count.
        options: what it asks for, with those of the command line behind.
        name: of its image, without the ending.
    """

    number: int
    options: GenerateOptions
    name: str


def run_batch(
    file: Path,
    folder: Path,
    common: GenerateOptions,
    device_options: DeviceOptions | None = None,
    json_output: bool = False,
    keep_settings: bool = True,
    sidecar: bool = False,
) -> None:
    """Generate every line of a file.

    Args:
        file: JSONL or text.
        folder: receives the images; created if absent.
        common: for all lines that don't say otherwise.
        device_options: where to compute.
        json_output: print one JSON object a line instead of text.
        keep_settings: whether the files carry their settings.
        sidecar: whether a JSON file beside each one does.

    Raises:
        BatchError: lines failed; what could be generated is there.
        UsageError: a line or a common setting isn't understood, or the folder can't be written; then nothing has been
            generated.
    """
    device_options, source = device_options or DeviceOptions(), common.model or DEFAULT_MODEL
    with checking():
        read = list(read_lines(file, common))
        lines = [replace(line, options=with_own_preset(line.options, folder)) for line in read]
        common = with_own_preset(common, folder)
        check_folder(folder)
        check_sources([source], device_options.base)
        check_upscaler(common.value("upscaler"))
        rehearsed = check_options(common.changed(prompt=EXAMPLE), source)
        for line in lines:
            _rehearse(line, source)
        setup = device_options.for_memory_profile(common.value("memory"))
        setup = setup.for_quantization(*(line.options.value("quantization") for line in lines))
        opened = setup.engine(source, common.lora, common.value("upscaler"))
    with no_repetition(), closing(opened) as engine:
        with checking(ValueError, FileNotFoundError):
            if rehearsed is not None:
                check_request(rehearsed, engine.devices)
            engine.model().result()
        folder.mkdir(parents=True, exist_ok=True)
        console, failed = Console(soft_wrap=True), 0
        for line in lines:
            row = _generate_line(line, folder, engine, Console(stderr=True, quiet=json_output), keep_settings, sidecar)
            failed += row["state"] == "failed"
            if json_output:
                console.print(json.dumps(row), markup=False, highlight=False)
            else:
                named = row.get("error") or ", ".join(row["paths"])
                console.print(f"line {line.number}: {row['state']}  {named}", markup=False, highlight=False)
    if failed:
        raise BatchError(f"{failed} of {len(lines)} lines failed; run the same command again to try only those.")


def read_lines(file: Path, common: GenerateOptions) -> Iterator[Line]:
    """Read the lines of a file; blank ones and those that begin with # are skipped.

    Raises:
        PromptFileError: a line is neither text nor an object of known names.
    """
    known = FROM_LINE | RENAMED
    for line in parse_lines(read_text(file.read_bytes(), file.name), file.name, known):
        values = command_line_values(line.values)
        said = _typed(line.number, values)
        said |= {key: file.parent / said[key] for key in IMAGE_FIELDS if said.get(key) is not None}
        options = common.changed(**said)
        named = {key: value for key, value in options.model_dump().items() if key in NAMING or value is not None}
        content = json.dumps(named, sort_keys=True, default=str)
        yield Line(line.number, options, f"{line.number:05d}-{_digest(content)}")


def _rehearse(line: Line, source: str) -> None:
    """Check all of a line that can be checked before a model is loaded.

    Raises:
        UsageError: an unknown name, or a value out of range; the message names the line.
    """
    try:
        check_options(line.options, source)
    except UsageError as error:
        raise UsageError(f"Line {line.number}: {error}") from error


def _typed(number: int, said: dict[str, Any]) -> dict[str, Any]:
    """Check the types of a line's options.

    Raises:
        UsageError: one is of another type.
    """
    try:
        return read_line(said)
    except UsageError as error:
        raise UsageError(f"Line {number} holds {error}.") from error


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def _generate_line(
    line: Line, folder: Path, engine: Engine, console: Console, keep_settings: bool, sidecar: bool
) -> dict[str, Any]:
    """Generate one line unless it is done; returns what is reported of it."""
    row: dict[str, Any] = {"line": line.number, "prompt": line.options.prompt, "state": "done"}
    try:
        request = make_request(line.options, engine)
        paths = picture_paths(folder / f"{line.name}.png", request.num_images, sidecar)
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
