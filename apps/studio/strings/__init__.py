"""What the page says, in the languages of the JSON files beside this one."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


class Strings:
    """The page's words in one language.

    Args:
        language: name of a file in this folder, without its ending.

    Raises:
        FileNotFoundError: no such language.
    """

    def __init__(self, language: str) -> None:
        self.language = language
        self._strings: dict[str, str] = json.loads((FOLDER / f"{language}.json").read_text(encoding="utf-8"))

    def __call__(self, key: str, /, **values: Any) -> str:
        """Return a string with its values put in.

        Raises:
            KeyError: no such string.
        """
        text = self._strings[key]
        return text.format(**values) if values else text

    def __contains__(self, key: str) -> bool:
        return key in self._strings

    def keys(self) -> set[str]:
        """Return the keys of all strings."""
        return set(self._strings)


@functools.cache
def languages() -> tuple[str, ...]:
    """Return the languages there are, English first."""
    found = sorted(file.stem for file in FOLDER.glob("*.json"))
    return tuple(sorted(found, key=lambda name: name != "en"))
