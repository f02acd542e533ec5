"""What stands on the page, as its listeners receive it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Values = Mapping[str, Any]
"""Everything that stands on the page, by the names of the components."""


class PageError(ValueError):
    """Something is missing on the page.

    Args:
        key: of the string that says so.
    """

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def filled(value: object) -> object:
    """Return what a control holds; an empty one holds a text, which the checks of the request refuse.

    None stands for the default in a request, so it must not come from a number that somebody has deleted.
    """
    return "" if value is None else value
