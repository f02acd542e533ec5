"""Small versions of images for lists of them, made once and kept by the content of what they show."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import threading
from pathlib import Path

from PIL import Image

SIDE = 256
"""Longest side, pixels; smaller images keep their size."""
MAKERS = 2
"""Images that are decoded at one time, which takes memory."""
QUALITY = 82


class ThumbnailError(ValueError):
    """A file is no image of which a small version can be made."""


class Thumbnails:
    """Small WebP versions of images.

    Args:
        folder: that keeps them; created with the first one, readable by its owner only. The files are named by the hash
            of the image's file and the part that is shown, so that equal images share one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[str, int, int], Path] = {}
        self._makers = threading.BoundedSemaphore(MAKERS)

    def get(self, file: Path, part: tuple[int, int] | None = None) -> Path:
        """Return the small version of an image, which is made if there is none.

        Args:
            file: a PNG or WebP image.
            part: width and height at its top left that are shown, such as the first frame of a row; None for all.

        Raises:
            OSError: the file is gone, or the small one can't be written.
            ThumbnailError: it is no image.
        """
        with file.open("rb") as opened:
            changed = os.fstat(opened.fileno())
            key = (f"{file.name}-{part}", changed.st_mtime_ns, changed.st_size)
            known = self._known.get(key)
            if known is not None and known.is_file():
                return known
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        shape = "" if part is None else f"-{part[0]}x{part[1]}"
        small = self._folder / f"{digest}{shape}.webp"
        if not small.is_file():
            with self._makers:
                _write(small, _shrink(file, part))
        self._known[key] = small
        return small

    def forget(self, file: Path) -> None:
        """Remove the small versions of an image that is about to be removed.

        Args:
            file: of the image; one that is gone already has none.
        """
        if not file.is_file():
            return
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        for small in self._folder.glob(f"{digest}*.webp"):
            small.unlink(missing_ok=True)


def _shrink(file: Path, part: tuple[int, int] | None) -> bytes:
    try:
        with Image.open(file, formats=["PNG", "WEBP"]) as image:
            shown = image.convert("RGBA" if "A" in image.getbands() else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ThumbnailError(f"{file.name!r} is no image that can be read.") from error
    if part is not None:
        shown = shown.crop((0, 0, min(part[0], shown.width), min(part[1], shown.height)))
    shown.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, "WEBP", quality=QUALITY, method=2)
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    """Write a file that appears complete or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
