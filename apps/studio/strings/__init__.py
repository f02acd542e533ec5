"""What the page says, in the languages of the JSON files beside this one and in the folders of its areas."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from apps.service.reports import TEXTS, report_text
from pipelines.acceleration import AccelerationError, PartReport
from pipelines.acceleration.texts import render

FOLDER = Path(__file__).parent
AREAS: tuple[str, ...] = ("app", "brush", "gallery", "models", "prompts", "server", "speed")
"""Folders of parts of the page that keep their strings together; their keys begin with the name of the folder."""


class Strings:
    """The page's words in one language.

    Args:
        language: name of a file in this folder, without its ending.

    Raises:
        FileNotFoundError: no such language.
    """

    def __init__(self, language: str) -> None:
        self.language = language
        self._strings: dict[str, str] = _read(FOLDER / f"{language}.json")
        help_file = FOLDER / "help" / f"{language}.json"
        self._help: dict[str, str] = _read(help_file) if help_file.is_file() else {}
        for area in AREAS:
            self._strings |= _read(FOLDER / area / f"{language}.json")

    def __call__(self, key: str, /, **values: Any) -> str:
        """Return a string with its values put in.

        Raises:
            KeyError: no such string.
        """
        text = self._strings[key]
        return text.format(**values) if values else text

    def report(self, parts: Iterable[PartReport]) -> str:
        """Return what accelerators did as one line in the page's language."""
        return report_text(parts, self._report_texts())

    def help(self, option: str) -> str:
        """Return the help of an option in the page's language; empty where only its declaration has one, in English."""
        return self._help.get(option, "")

    def refusal(self, error: AccelerationError) -> str:
        """Return why an acceleration is refused."""
        text = render(error.key, error.values, self._report_texts())
        return text[:1].upper() + text[1:]

    def _report_texts(self) -> Mapping[str, str]:
        """Return the sentences of `apps.service.reports`; English stands there."""
        if self.language == "en":
            return TEXTS
        return _read(FOLDER / "reports" / f"{self.language}.json")

    def __contains__(self, key: str) -> bool:
        return key in self._strings

    def keys(self) -> set[str]:
        """Return the keys of all strings."""
        return set(self._strings)


def _read(file: Path) -> dict[str, str]:
    return json.loads(file.read_text(encoding="utf-8"))


@functools.cache
def languages() -> tuple[str, ...]:
    """Return the languages there are, English first."""
    found = sorted(file.stem for file in FOLDER.glob("*.json"))
    return tuple(sorted(found, key=lambda name: name != "en"))
