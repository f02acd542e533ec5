"""The gallery of an output folder: what is listed, deleted with undo, and packed; rows and files together.

Deleted images are moved into the trash of the state folder, with the clip and the settings beside them, and come back
bit for bit. A row is marked before its files move: after a crash between the two, `settle` moves what is left.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from apps.service.archive import MAX_ARCHIVE_BYTES, MAX_ARCHIVED, stream_archive
from apps.service.gallery_store import GalleryStore, Item, Person
from apps.service.job_store import JobStore
from apps.service.metadata import sidecar_path
from apps.service.request_error import RequestError
from apps.service.thumbnails import Thumbnails

logger = logging.getLogger(__name__)

TRASH_SECONDS = 7 * 24 * 3_600.0
"""How long deleted images can be restored; then their files are removed for good."""


class GoneError(OSError):
    """The file of an image isn't there."""


@dataclass(frozen=True, slots=True)
class Deletion:
    """Images that were deleted together.

    Attributes:
        batch: name by which they are restored, 16 hex digits.
        numbers: of all of them, sheets that went with their cells included.
    """

    batch: str
    numbers: tuple[int, ...]


class Gallery(GalleryStore):
    """The images of an output folder.

    Args:
        jobs: the store of jobs.
        output: folder of the images.
        state: private folder for the trash and small versions.
    """

    def __init__(self, jobs: JobStore, output: Path, state: Path) -> None:
        super().__init__(jobs)
        self._output, self._trash = output, state / "trash"
        self._moving = threading.Lock()
        self.thumbnails = Thumbnails(state / "thumbnails")
        self.settle()
        self.purge_old()

    # ------------------------------------------------------------------ files

    def file(self, item: Item) -> Path:
        """Return the file of an image.

        Raises:
            GoneError: somebody has removed it.
        """
        path = self._output / item.name
        if path.is_symlink() or not path.is_file():
            raise GoneError(f"The file {item.name} has been removed.")
        return path

    def clip(self, item: Item) -> Path | None:
        """Return the file of a clip; None for an image, or if the file is gone."""
        path = (self._output / item.name).with_suffix(".mp4")
        return path if item.kind == "clip" and path.is_file() and not path.is_symlink() else None

    def thumbnail(self, item: Item) -> Path:
        """Return the small version of an image; of a clip its first frame.

        Raises:
            GoneError: the image's file has been removed.
            ThumbnailError: it is no image.
        """
        is_row = item.kind == "clip" and item.width > 0 and item.height > 0  # some frames side by side
        return self.thumbnails.get(self.file(item), (item.width, item.height) if is_row else None)

    def archive(self, items: Sequence[Item]) -> Iterator[bytes]:
        """Return a ZIP file of images and clips, part by part; files that are gone are left out.

        Args:
            items: at most `MAX_ARCHIVED`.

        Raises:
            RequestError: too many, too many bytes, or none that is there.
        """
        files = []
        for item in items:
            path, clip = self._output / item.name, self.clip(item)
            files += [one for one in (path, clip) if one is not None and one.is_file() and not one.is_symlink()]
        total = sum(file.stat().st_size for file in files)
        if len(items) > MAX_ARCHIVED or total > MAX_ARCHIVE_BYTES:
            message = (
                f"{len(items)} images with {total} bytes are chosen, and a ZIP file holds at most {MAX_ARCHIVED} with "
                f"{MAX_ARCHIVE_BYTES}; choose fewer."
            )
            raise RequestError(
                "archive.most", message, count=len(items), value=total, most=MAX_ARCHIVED, most_bytes=MAX_ARCHIVE_BYTES
            )
        if not files:
            raise RequestError("archive.none", "None of the images has a file any more; choose others.")
        return stream_archive(files)

    # ------------------------------------------------------------------ deleting

    def remove(self, who: Person, numbers: Sequence[int]) -> Deletion:
        """Delete images, so that they can be restored for `TRASH_SECONDS`.

        Args:
            who: asks.
            numbers: of images; those of others, and that aren't there, are left out.

        Returns:
            What was deleted.

        Raises:
            StoreError: the queue can't be written.
            OSError: a file can't be moved.
        """
        self.purge_old()
        with self._moving:
            batch, items = self.delete(who, numbers)
            for item in items:
                self._move(item, self._output, self._place(item))
        return Deletion(batch, tuple(item.number for item in items))

    def restore(self, who: Person, batch: str) -> tuple[int, ...]:
        """Bring back what was deleted together.

        Args:
            who: asks; nothing of others comes back.
            batch: from `remove`.

        Returns:
            Numbers of the images that are back; none for a batch that isn't there or was purged.

        Raises:
            StoreError: the queue can't be written.
            OSError: a file can't be moved.
        """
        with self._moving:
            items = self.deleted(who, batch=batch)
            self.undelete(item.number for item in items)
            for item in items:
                self._move(item, self._place(item), self._output)
                shutil.rmtree(self._place(item), ignore_errors=True)
        return tuple(item.number for item in items)

    def empty_trash(self, who: Person) -> int:
        """Remove the deleted images of a user for good; of an administrator only the own ones too.

        Returns:
            How many they were.
        """
        return self._purge(self.deleted(Person(who.name)))

    def purge_old(self) -> int:
        """Remove for good what was deleted more than `TRASH_SECONDS` ago, and say how many images that were."""
        return self._purge(self.deleted(before=time.time() - TRASH_SECONDS))

    def settle(self) -> None:
        """Move the files that a crash has left in another place than their rows say."""
        for item in self.deleted():
            self._move(item, self._output, self._place(item))
        if not self._trash.is_dir():
            return
        gone = {item.number for item in self.deleted()}
        for place in self._trash.iterdir():
            if not place.name.isdecimal() or int(place.name) in gone:
                continue
            for file in place.iterdir():
                target = self._output / file.name
                if self.is_known(int(place.name)) and not target.exists():
                    file.replace(target)
            shutil.rmtree(place, ignore_errors=True)

    def _purge(self, items: Iterable[Item]) -> int:
        items = list(items)
        if not items:
            return 0
        with self._moving:
            for item in items:  # before the rows: what is left after a crash between the two is removed next time
                self.thumbnails.forget(self._place(item) / item.name)
                shutil.rmtree(self._place(item), ignore_errors=True)
            self.purge(items)
        return len(items)

    def _place(self, item: Item) -> Path:
        """Return the folder of an image in the trash."""
        return self._trash / str(item.number)

    def _move(self, item: Item, source: Path, target: Path) -> None:
        """Move the files of an image that are there."""
        path = source / item.name
        files = [path, sidecar_path(path)] + ([path.with_suffix(".mp4")] if item.kind == "clip" else [])
        found = [file for file in files if file.is_file() and not file.is_symlink()]
        if found:
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in found:
            file.replace(target / file.name)
