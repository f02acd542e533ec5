"""What the page shows that is finished: images on record and sheets of grids, the newest first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from apps.service.engine import Engine
from apps.service.events import Picture
from apps.service.gallery_store import Item
from apps.service.job_store import StoredPicture
from apps.service.media import clip_of
from apps.service.metadata import PictureSettings, parse
from apps.service.reports import decode_reports
from apps.studio.grids import GridRecord, Grids
from pipelines.acceleration import PartReport

RECENT = 24
"""Images in the strip below the stage; older ones are in the gallery."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A finished image.

    Attributes:
        path: its file.
        settings: what reproduces it.
        seconds: time it took.
        report: what accelerators did.
        notes: what keeps it from being what was asked for, a sentence each, see `apps.service.events.Picture`.
        reports: what each accelerator did, as values; empty for images of earlier versions.
    """

    path: Path
    settings: PictureSettings
    seconds: float
    report: str = ""
    notes: tuple[str, ...] = ()
    reports: tuple[PartReport, ...] = ()

    @property
    def clip(self) -> Path | None:
        """The clip of which the image shows some frames."""
        return clip_of(self.path, self.settings)


@dataclass(frozen=True, slots=True)
class ShownSheet:
    """A finished grid.

    Attributes:
        path: the file of its sheet.
        record: the grid.
    """

    path: Path
    record: GridRecord


Finished = Shown | ShownSheet


class Album:
    """The finished images and sheets of an engine.

    Args:
        engine: has an output folder.
        grids: of this engine.
    """

    def __init__(self, engine: Engine, grids: Grids) -> None:
        self._engine = engine
        self._grids = grids

    def names(self, owner: str) -> tuple[str, ...]:
        """Return the file names of an owner's newest images: cheap, and another answer means other images."""
        return tuple(one.name for one in self._engine.history(owner, RECENT))

    def recent(self, owner: str) -> list[Finished]:
        """Return an owner's newest images and sheets, what was finished last before the others.

        The gallery has them in the order in which they were asked for, which a queue may change.
        """
        gallery_items = self.gallery_items(self._engine.history(owner, RECENT))
        return sorted(gallery_items, key=lambda one: one.path.stat().st_mtime_ns, reverse=True)[:RECENT]

    def gallery_items(self, pictures: Iterable[StoredPicture]) -> list[Finished]:
        """Return images as they are shown: without those whose file is gone, each complete grid before its cells."""
        found: list[Finished] = []
        seen: set[str] = set()
        for picture in pictures:
            record = self._grids.of_job(picture.job)
            if record is not None and record.id not in seen:
                seen.add(record.id)
                is_newest = picture.job == self._newest(record.jobs)  # else its sheet is among newer images
                if is_newest and (sheet := self.sheet(record)) is not None:
                    found.append(sheet)
            if (shown := self._on_disk(picture)) is not None:
                found.append(shown)
        return found

    def of_item(self, item: Item) -> Finished | None:
        """Return an item of the gallery as it is shown; None if its file is gone."""
        if item.kind == "sheet":
            record = self._grids.of_sheet(item.name)
            return None if record is None else self.sheet(record)
        stored = (one for one in self._engine.pictures(item.job) if one.place == item.place)
        return next((shown for one in stored if (shown := self._on_disk(one)) is not None), None)

    def take(self, picture: Picture) -> Shown:
        """Return an image as it was reported.

        Raises:
            ValueError: it has no file.
        """
        if picture.path is None:
            raise ValueError("The studio's engine has no output folder; give it one.")
        return Shown(
            picture.path, picture.metadata, picture.seconds, picture.report, tuple(picture.notes), picture.reports
        )

    def sheet(self, record: GridRecord) -> ShownSheet | None:
        """Return the sheet of a grid that is complete."""
        path = self._grids.sheet(record)
        return None if path is None else ShownSheet(path, record)

    def _newest(self, jobs: Sequence[str]) -> str | None:
        return next((job for job in reversed(jobs) if self._engine.pictures(job)), None)

    def _on_disk(self, picture: StoredPicture) -> Shown | None:
        folder = self._engine.output_dir
        if folder is None or not (folder / picture.name).is_file():
            return None
        notes, reports = tuple(json.loads(picture.notes)), decode_reports(picture.reports)
        return Shown(folder / picture.name, parse(picture.settings), picture.seconds, picture.report, notes, reports)
