"""ZIP files that are sent while they are written, so that neither memory nor disk holds them."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

MAX_ARCHIVED = 1_000
"""Images in one file."""
MAX_ARCHIVE_BYTES = 2 * 1_024 * 1_024 * 1_024
"""Of the files in one."""
PART = 256 * 1_024
"""Bytes that are read at once."""
UNSAFE = re.compile(r"[^A-Za-z0-9._-]|^[.-]+")
"""What names in archives don't have: slashes, drives, hidden files, options of programs."""


class _Sink(io.RawIOBase):
    """Takes what is written until somebody fetches it; can't be sought, so that nothing is written twice."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        part = bytes(data)  # pyright: ignore[reportArgumentType]
        self._parts.append(part)
        return len(part)

    def fetch(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)


def safe_names(files: Sequence[Path]) -> list[str]:
    """Return names for files in an archive: flat, of plain characters, each once."""
    names: list[str] = []
    for file in files:
        stem, suffix = (UNSAFE.sub("_", part) for part in (file.stem, file.suffix.removeprefix(".")))
        name, count = f"{stem}.{suffix}", 1
        while name in names:
            count += 1
            name = f"{stem}-{count}.{suffix}"
        names.append(name)
    return names


def stream_archive(files: Sequence[Path]) -> Iterator[bytes]:
    """Yield a ZIP file, part by part; images and clips are compressed already, so they are stored.

    Args:
        files: to be put in; one that can't be read any more ends the archive with an error, which readers notice.

    Raises:
        OSError: a file can't be read.
    """
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for file, name in zip(files, safe_names(files), strict=True):
            entry = zipfile.ZipInfo.from_file(file, name)
            with file.open("rb") as source, archive.open(entry, "w", force_zip64=False) as target:
                while part := source.read(PART):
                    target.write(part)
                    yield sink.fetch()
            yield sink.fetch()
    yield sink.fetch()
