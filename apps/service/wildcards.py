"""Wildcards: lists of texts in a folder of the server's owner, of which `__name__` in a prompt takes a line.

`animals.txt` is `__animals__`, `food/fruit.txt` is `__food/fruit__`. A line is a text of its own, with alternatives and
other wildcards if it likes; blank lines and those that begin with # are skipped. Requests name a list and never a file:
the name is looked up among those that were found in the folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from apps.service.request_error import RequestError

FOLDER = "wildcards"
"""Name of the folder that is used where none is named, in the folder that receives the images."""
MAX_FILES = 2_000
MAX_FOLDERS_DEEP = 4
MAX_BYTES = 1_024 * 1_024
"""Of one file."""
MAX_LINES = 20_000
"""Of one file."""
NAMED = 20
"""Wildcards that an error names."""

_NAME = re.compile(r"[A-Za-z0-9]+(?:[_\-/]?[A-Za-z0-9]+)*")


class Wildcards:
    """The wildcards of a folder, read anew each time they are used.

    Args:
        folder: with text files; None, or one that isn't there, has no wildcards.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def names(self) -> tuple[str, ...]:
        """Return the names of all wildcards, sorted."""
        return tuple(sorted(self._files()))

    def lines(self, name: str) -> tuple[str, ...]:
        """Return the lines of a wildcard.

        Args:
            name: without the underscores around it.

        Raises:
            RequestError: there is no such wildcard, or its file is too large or no UTF-8 text.
        """
        files = self._files()
        if name not in files:
            raise self._unknown(name, sorted(files))
        return _read(name, files[name])

    def _unknown(self, name: str, known: list[str]) -> RequestError:
        if not known:
            return RequestError(
                "wildcard.none",
                f"prompt: there is no wildcard {name!r}, nor any other; put text files into the folder of wildcards, "
                "or write \\__ for two underscores.",
                value=name,
            )
        more = f" and {len(known) - NAMED} more" if len(known) > NAMED else ""
        names = ", ".join(known[:NAMED]) + more
        return RequestError(
            "wildcard.unknown",
            f"prompt: there is no wildcard {name!r}; choose among {names}, or write \\__ for two underscores.",
            value=name,
            choices=names,
        )

    def _files(self) -> dict[str, Path]:
        """Return the files by the names of their wildcards."""
        if self.folder is None or not self.folder.is_dir():
            return {}
        found: dict[str, Path] = {}
        for file in _text_files(self.folder.resolve(), MAX_FOLDERS_DEEP):
            name = file.relative_to(self.folder.resolve()).with_suffix("").as_posix()
            if _NAME.fullmatch(name):
                found[name] = file
            if len(found) >= MAX_FILES:
                break
        return found


def _text_files(folder: Path, depth: int) -> Iterator[Path]:
    """Find the text files of a folder and of those in it; links are left out, because they may lead elsewhere."""
    for one in sorted(folder.iterdir()):
        if one.is_symlink() or one.name.startswith("."):
            continue
        if one.is_dir() and depth > 1:
            yield from _text_files(one, depth - 1)
        elif one.is_file() and one.suffix.lower() == ".txt":
            yield one


def _read(name: str, file: Path) -> tuple[str, ...]:
    """Read the lines of a file."""
    with file.open("rb") as opened:
        data = opened.read(MAX_BYTES + 1)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"prompt: the file of the wildcard {name!r} is not UTF-8 text; save it as UTF-8."
        raise RequestError("wildcard.text", message, value=name) from error
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if len(data) > MAX_BYTES or len(lines) > MAX_LINES:
        raise RequestError(
            "wildcard.size",
            f"prompt: the file of the wildcard {name!r} has more than {MAX_BYTES} bytes or {MAX_LINES} lines; "
            "split it.",
            value=name,
            most=MAX_LINES,
        )
    return tuple(lines)
