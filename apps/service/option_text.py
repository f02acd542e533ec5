"""Options that people write as text: sizes, how far an image grows, classes."""

from __future__ import annotations

import re

from apps.service import limits
from apps.service.metadata import Expand


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


def read_expand(text: str) -> Expand:
    """Read how far an image should grow.

    Args:
        text: `0.25` for all sides, or some of `left=0.5,right=...,top=...,bottom=...`; shares of its width or height.

    Raises:
        ValueError: another form.
    """
    parts = [part.partition("=") for part in text.split(",")]
    try:
        if len(parts) == 1 and not parts[0][1]:
            return Expand.model_validate(dict.fromkeys(Expand.model_fields, float(text)))
        return Expand.model_validate({side.strip(): float(share) for side, _, share in parts})
    except ValueError as error:
        raise ValueError(
            f"{text!r} is not understood; write a share from 0 to 2 such as 0.25 for all sides, or sides such as "
            "left=0.5,top=0.25."
        ) from error
