"""The files that pages have handed in: whose they are, and how many of them are kept.

Gradio keeps every uploaded file for a day, however many there are, and names it by its content, so that two users who
hand in the same file share it.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

from apps.service.limits import UploadQuota


class HandedIn:
    """Files by user; those beyond the quota are removed, the least recently handed in first.

    Args:
        quota: what each user may keep.
    """

    def __init__(self, quota: UploadQuota | None = None) -> None:
        self._quota = quota or UploadQuota()
        self._files: dict[str, OrderedDict[str, None]] = {}
        self._lock = threading.Lock()

    def add(self, path: str, user: str) -> None:
        """Note that a user handed a file in, and remove what the user has beyond the quota.

        Args:
            path: where Gradio keeps it.
            user: name.
        """
        with self._lock:
            files = self._files.setdefault(user, OrderedDict())
            files[path] = None
            files.move_to_end(path)
            for one in self._beyond(files):
                del files[one]
                if not any(one in others for others in self._files.values()):
                    Path(one).unlink(missing_ok=True)

    def owns(self, path: str, user: str) -> bool:
        """Whether a user handed a file in, and it is still kept."""
        with self._lock:
            return path in self._files.get(user, ())

    def _beyond(self, files: OrderedDict[str, None]) -> list[str]:
        """Return the files beyond the quota; the newest is never among them."""
        total, beyond = 0, []
        for count, path in enumerate(reversed(files), 1):
            total += _size(path)
            if count > 1 and (count > self._quota.pictures or total > self._quota.bytes):
                beyond.append(path)
        return beyond


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # Gradio has removed it
        return 0
