"""Options that people write as text: sizes and classes."""

from __future__ import annotations

import re

from apps.service import limits


def as_label(prompt: str) -> int | str:
    """Return the class that a prompt names: by its number, or by its name."""
    return int(prompt) if prompt.isdecimal() else prompt


def parse_size(text: str | None) -> tuple[int, int] | tuple[None, None]:
    """Read a size.

    Args:
        text: `128`, `160x128` (width first, as images are measured) or None.

    Returns:
        Width and height in pixels; None and None for None.

    Raises:
        ValueError: another form.
    """
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text.strip())
    if match is None:
        raise ValueError(f"Size {text!r} is not understood; write 128, or width x height such as 160x128.")
    width, height = int(match[1]), int(match[2] or match[1])
    limits.check_size(height, width)
    return width, height
