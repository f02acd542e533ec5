"""Files and folders that should be written: tried before any work is spent on what goes into them."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from apps.service.usage import UsageError


def check_writable(file: Path) -> None:
    """Refuse a file that can't be written; folders that are missing can be made later.

    Args:
        file: may exist, then it is replaced.

    Raises:
        UsageError: it is a folder, its folder can't be made or written to, or its name is too long.
    """
    try:
        with suppress(FileNotFoundError, NotADirectoryError):  # a new file, or one whose folder is looked at below
            os.lstat(file)
    except OSError as error:  # such as a name that is too long
        raise UsageError(f"{str(file)!r} can't be written: {error.strerror}. Choose another name.") from error
    if file.is_dir():
        raise UsageError(f"{str(file)!r} is a folder; name a file to write.")
    _check_folder(file.parent, file)


def check_folder(folder: Path) -> None:
    """Refuse a folder that can't be made or written to.

    Raises:
        UsageError: that is so, or it is a file.
    """
    _check_folder(folder, folder)


def _check_folder(folder: Path, named: Path) -> None:
    """Try the nearest folder that exists with a file without a name."""
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise UsageError(f"{str(named)!r} can't be written: {str(folder)!r} is a file, not a folder.")
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise UsageError(
            f"{str(named)!r} can't be written: {error.strerror} ({str(folder)!r}). Choose a folder that you may "
            "write to."
        ) from error
