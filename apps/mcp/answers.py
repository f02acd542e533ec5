"""What tools answer: a text of JSON, and images as clients of the Model Context Protocol show them."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from apps.service.metadata import PictureSettings, mark_of
from apps.service.provenance import marked_bytes

if TYPE_CHECKING:
    from mcp.types import ContentBlock

MAX_ANSWER_BYTES = 700 * 1024
"""Of all images in one answer: clients refuse answers of more than a megabyte, and base64 makes four bytes of three."""
MAX_SHOWN = 4
"""Images in one answer; of more the text has the addresses."""
SIDES = (1024, 768, 512, 256)
"""Longest sides that an image which is too large for an answer is made smaller to, one after the other."""
MEDIA = {".png": "image/png", ".webp": "image/webp"}


@dataclass(frozen=True, slots=True)
class Shown:
    """An image in an answer.

    Attributes:
        path: its file, PNG or WebP.
        settings: that it was generated with.
    """

    path: Path
    settings: PictureSettings


@dataclass(frozen=True, slots=True)
class Answer:
    """What a tool answers.

    Attributes:
        values: JSON values.
        images: that belong to it.
    """

    values: Mapping[str, Any]
    images: Sequence[Shown] = field(default=())


def content(answer: Answer) -> list[ContentBlock]:
    """Return an answer as the protocol has it: the text first, then the images."""
    from mcp.types import ImageContent, TextContent

    blocks: list[ContentBlock] = [
        TextContent(type="text", text=json.dumps(answer.values, ensure_ascii=False, indent=1))
    ]
    shown = answer.images[:MAX_SHOWN]
    for image in shown:
        kind, data = fitting(image, MAX_ANSWER_BYTES // len(shown))
        blocks.append(ImageContent(type="image", data=base64.b64encode(data).decode(), mimeType=kind))
    return blocks


def fitting(shown: Shown, most: int) -> tuple[str, bytes]:
    """Return an image in at most so many bytes: its file with all that is in it, or else a smaller view as JPEG.

    The view is marked as generated, as every image is.

    Args:
        shown: the image.
        most: bytes; a view of `SIDES[-1]` pixels is taken whatever it has.

    Returns:
        Media type and bytes.
    """
    if shown.path.stat().st_size <= most:
        return MEDIA[shown.path.suffix], shown.path.read_bytes()
    with Image.open(shown.path, formats=["PNG", "WEBP"]) as image:
        whole, data = image.convert("RGB"), b""
    for side in SIDES:
        view = whole.copy()
        view.thumbnail((side, side), Image.Resampling.LANCZOS)
        data = marked_bytes(view, "JPEG", mark_of(shown.settings), is_preview=True, quality=88)
        if len(data) <= most:
            break
    return "image/jpeg", data


def said(settings: PictureSettings) -> dict[str, Any]:
    """Return settings as values, without those that say nothing."""
    return {
        name: value
        for name, value in settings.model_dump(mode="json").items()
        if value not in (None, "", [], {}) and name != "schema_version"
    }
