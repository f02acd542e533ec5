"""`tessera info FILE`: how an image or a clip came to be, as the file itself says, and whether that is signed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apps.service.content_credentials import Credentials
from apps.service.foreign_files import ReadSettings, read_file
from apps.service.metadata import MetadataError, PictureSettings
from apps.service.provenance import UNPRINTABLE, FileOrigin, Provenance, read_origin
from apps.service.usage import UsageError

SHOWN = ("prompt", "negative_prompt", "label", "seed", "width", "height", "frames", "fps", "steps", "guidance",
         "sampler", "model", "dtype")  # fmt: skip
"""Settings that people are told; `--json` has all of them."""


def run(file: Path, json_output: bool = False) -> None:
    """Print what a file says about itself.

    Args:
        file: an image or a clip of any origin.
        json_output: print one JSON object instead of lines.

    Raises:
        UsageError: the file can't be read.
    """
    try:
        origin = read_origin(file)
    except OSError as error:
        raise UsageError(f"{str(file)!r} can't be read: {error.strerror or error}.") from error
    read, why_none = _settings(file)
    settings = None if read is None else read.settings
    if json_output:
        values = _values(file, origin, settings, why_none) | _foreign(read)
        Console(soft_wrap=True).print_json(json.dumps(values), ensure_ascii=True)
        return
    console = Console(soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    shown = rows(origin, settings, why_none)
    if read is not None and read.program:
        shown |= {"written by": read.program, "not kept": _printable(" ".join(map(str, read.notes))) or "nothing"}
    for name, value in shown.items():
        table.add_row(f"  {name}", escape(value))
    console.print(f"[bold]{escape(file.name)}[/]", table, sep="\n", highlight=False)


def rows(origin: FileOrigin, settings: PictureSettings | None, why_none: str) -> dict[str, str]:
    """Return the lines that people are shown, by their names."""
    found = {"origin": origin_sentence(origin), "signature": signature_sentence(origin.credentials)}
    if settings is None:
        return {**found, "settings": why_none}
    values = settings.model_dump(mode="json")
    shown = {name: values[name] for name in SHOWN if values.get(name) not in (None, "")}
    return {**found, **{name.replace("_", " "): _printable(value) for name, value in shown.items()}}


def _printable(value: object) -> str:
    """Return a value of a file on one line, without characters that a terminal obeys."""
    return UNPRINTABLE.sub("", " ".join(str(value).split()))


def origin_sentence(origin: FileOrigin) -> str:
    """Say how a file came to be, as far as it tells."""
    stated = origin.stated
    if stated is None:
        return origin.problem or "the file does not say how it was made"
    return _made(stated) + (f" ({stated.source_type})" if stated.source_type else "")


def _made(stated: Provenance) -> str:
    how = "partly generated" if stated.is_composite else "generated" if stated.is_generated else "written"
    by = f" by {stated.tool}" if stated.tool else ""
    return how + by + (f" with {stated.model}" if stated.model else "")


def signature_sentence(credentials: Credentials | None) -> str:
    """Say whether a file is signed, and what that is worth."""
    if credentials is None:
        return "none"
    if credentials.state == "unchecked":
        return "there is one, which was not checked: pip install 'tessera[c2pa]'"
    if credentials.state == "invalid":
        return f"INVALID ({', '.join(credentials.problems) or 'no reason given'}): trust nothing that the file says"
    signer = credentials.signer or "somebody without a name"
    if credentials.state == "trusted":
        return f"valid, by {signer}; the file is as it was signed"
    return (
        f"valid, by a certificate that names {signer}, which no certificate that is trusted here vouches for; the file "
        "is as it was signed"
    )


def _foreign(read: ReadSettings | None) -> dict[str, Any]:
    """Return which other program wrote the settings, and what of them has no like here."""
    if read is None or not read.program:
        return {"settings_program": None, "settings_notes": []}
    return {"settings_program": read.program, "settings_notes": [str(note) for note in read.notes]}


def _settings(file: Path) -> tuple[ReadSettings | None, str]:
    """Return the settings in a file, of ours or of another program, or why there are none."""
    try:
        return read_file(file), ""
    except (MetadataError, ImportError) as error:
        return None, str(error)


def _values(file: Path, origin: FileOrigin, settings: PictureSettings | None, why_none: str) -> dict[str, Any]:
    stated, credentials = origin.stated, origin.credentials
    return {
        "file": str(file),
        "generated": bool(stated and stated.is_generated),
        "provenance": None if stated is None else asdict(stated),
        "provenance_problem": origin.problem or None,
        "signature": None if credentials is None else asdict(credentials),
        "settings": None if settings is None else settings.model_dump(mode="json"),
        "settings_problem": why_none or None,
    }
