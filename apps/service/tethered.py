"""Commands of ours in processes that end with the server, see `apps.service.tether`, and why they failed.

Nothing that a visitor typed as text is part of a command line, except behind the name of an option.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

CODE = Path(__file__).resolve().parents[2]
"""Folder that holds the package `apps`."""
ERROR = re.compile(r"^error:\s*(.+)$", re.MULTILINE)
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
QUOTED_PATH = re.compile(r"(['\"])((?:/|[A-Za-z]:\\)[^'\"\n]*)\1")
PATH = re.compile(r"(?<![^\s'\"()\[{=,:;])(?:~|[A-Za-z]:(?=\\))?[/\\](?:[^\s:'\",;()/\\]+[/\\]?)+")
"""A path in a text; one with spaces ends at the first of them, unless it is in quotes."""
TAIL_BYTES = 64 * 1024
"""Of what a training said, that are looked at for why it failed."""
LONGEST = 600
"""Characters of a reason that are kept."""


def reason_of(said: str, code: int, folder: Path) -> str:
    """Return why a process failed, without paths of the server; empty if the system has ended it.

    Args:
        said: what it wrote.
        code: its exit code.
        folder: that it worked in.
    """
    plain = ANSI.sub("", said).replace("  (--debug shows the trace)", "")
    found = ERROR.findall(plain)
    if not found and code in (-9, 137):
        return ""
    lines = found or [line.strip() for line in plain.splitlines() if line.strip()] or [f"exit code {code}"]
    return without_paths(lines[-1], folder)[:LONGEST]


def without_paths(text: str, *folders: Path) -> str:
    """Return a text with the name of a file or folder where its path stood; addresses of the web stay.

    Args:
        text: of a library, or of ours.
        folders: whose paths are known to be in it, such as those with spaces.
    """
    text = QUOTED_PATH.sub(lambda found: found[1] + _last_part(found[2]) + found[1], text)
    for one in (*folders, CODE):
        text = text.replace(f"{one}{os.sep}", "").replace(str(one), one.name)
    return PATH.sub(lambda found: _last_part(found[0]), text)


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def tail(log: Path) -> str:
    """Return the end of what a process has said; nothing where it said nothing."""
    try:
        with log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
            return file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def command_of(lock: Path, arguments: Sequence[str]) -> list[str]:
    """Return the command line of a command of ours that ends with this process.

    Args:
        lock: file that is held while it runs.
        arguments: of `python -m apps`.
    """
    return [sys.executable, "-m", "apps.service.tether", str(lock), *arguments]


def environment() -> dict[str, str]:
    """Return the environment of the process: the server's, with an output that can be read by programs."""
    return {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "PYTHONUNBUFFERED": "1",
            "PYTHONIOENCODING": "utf-8"}  # fmt: skip
