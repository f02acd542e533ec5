"""A private temporary folder for a process, and the removal of those whose processes have died."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

PREFIX = "tessera-studio-"
LOCK = "lock"


@contextmanager
def private_folder(parent: Path | None = None) -> Iterator[Path]:
    """Provide a folder that only its owner can read; it is removed at the end.

    A killed process leaves its folder behind. The lock in it is free then, and the next process removes the folder.

    Args:
        parent: holds the folders; None for the system's folder of temporary files.
    """
    root = (parent or Path(tempfile.gettempdir())).resolve()
    remove_stale(root)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
    lock = FileLock(folder / LOCK)
    try:
        with lock.acquire(timeout=0):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale(root: Path) -> None:
    """Remove the folders whose processes have died.

    Args:
        root: holds them.
    """
    for folder in root.glob(f"{PREFIX}*"):
        try:
            if not _is_ours(folder) or (folder / LOCK).is_symlink() or not (folder / LOCK).is_file():
                continue  # another user's, or about to be locked
            with FileLock(folder / LOCK).acquire(timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except (Timeout, OSError):  # in use, or another user's
            continue


def _is_ours(folder: Path) -> bool:
    """Whether a folder belongs to who runs this process; anybody may make one in the system's temporary folder."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and (os.name != "posix" or status.st_uid == os.getuid())
