"""The grids of a server: which jobs are the cells of which grid, and the sheet of one that is complete.

A cell is a job like any other; a record on disk beside the queue, one JSON file a grid, says what they belong to. So a
page that opens finds a grid whoever began it, and after a restart of the server too.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apps.service.engine import Engine
from apps.service.grid import Filled, compose, mosaic
from apps.service.job_store import StoredPicture
from apps.service.sheet import GridSettings, save_sheet
from apps.service.stored_images import STATE_FOLDER

logger = logging.getLogger(__name__)

CELL_SIDE = 256
"""Longest side of a cell, pixels, from which a thumbnail is made."""
MOST_THUMBNAILS = 64
"""Thumbnails in memory; beyond them the oldest ones are made again."""

Place = tuple[int, int, int]
"""Index of a cell along x, y and z."""
Cells = Mapping[Place, tuple[Path, float]]
"""File and seconds of the images of a grid."""


class GridRecord(BaseModel):
    """One grid.

    Attributes:
        id: 16 hex digits.
        created: seconds since 1970.
        settings: what generates it again.
        jobs: of its cells, row by row.
        sheet: file name of the sheet; empty until it has been written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{16}$")
    created: float
    settings: GridSettings
    jobs: tuple[str, ...]
    sheet: str = ""

    def places(self) -> dict[str, Place]:
        """Return where the cell of each job stands."""
        x, y, z = (range(len(axis.values)) for axis in self.settings.axes)
        places = [(i, j, k) for k in z for j in y for i in x]
        return dict(zip(self.jobs, places, strict=True))

    def label(self, job_id: str) -> str:
        """Say what sets the cell of a job apart: the axes and their values."""
        named = zip(self.settings.axes, self.places()[job_id], strict=True)
        return ", ".join(f"{axis.name} {axis.values[index]}" for axis, index in named if axis.name)


class Grids:
    """The grids on an engine's output folder.

    Args:
        engine: generates the cells.

    Raises:
        ValueError: the engine has no output folder.
    """

    def __init__(self, engine: Engine) -> None:
        if engine.output_dir is None:
            raise ValueError("The studio's engine has no output folder; give it one.")
        self._engine = engine
        self._output = engine.output_dir
        self._folder = engine.output_dir / STATE_FOLDER / "grids"
        self._thumbnails: dict[str, Image.Image] = {}
        self._known: dict[str, GridRecord | None] = {}
        self._grid_of: dict[str, str] = {}

    def add(self, settings: GridSettings, jobs: list[str]) -> GridRecord:
        """Record that jobs are the cells of a grid, row by row."""
        record = GridRecord(id=secrets.token_hex(8), created=time.time(), settings=settings, jobs=tuple(jobs))
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._write(record)
        return record

    def of_job(self, job_id: str) -> GridRecord | None:
        """Return the grid that a job is a cell of, if it is one."""
        if job_id not in self._grid_of and self._folder.is_dir():
            for file in self._folder.glob("*.json"):
                if file.stem not in self._known:
                    self._read(file)
        grid = self._grid_of.get(job_id)
        return None if grid is None else self._known[grid]

    def is_complete(self, record: GridRecord) -> bool:
        """Whether nothing of a grid waits or runs any more."""
        return all(self._engine.job(job).ended is not None for job in record.jobs)

    def sheet(self, record: GridRecord) -> Path | None:
        """Return the sheet of a grid, which is written once, when all of its cells have ended.

        Args:
            record: the grid.

        Returns:
            The file; None if the grid isn't complete, has no images, or the sheet has been removed.
        """
        if record.sheet:
            path = self._output / record.sheet
            return path if path.is_file() else None
        saved = self._read(self._folder / f"{record.id}.json")  # the page in another language may have been first
        if saved is not None and saved.sheet:
            return self.sheet(saved)
        if not self.is_complete(record):
            return None
        filled = {place: self._filled(picture) for place, picture in self._pictures(record).items()}
        if not filled:
            return None
        name = f"{datetime.fromtimestamp(record.created):%Y%m%d-%H%M%S}-grid-{record.id}.png"
        settings = record.settings
        sheet = compose(settings.axes, filled)
        path = save_sheet(sheet, self._output / name, settings, keep_settings=settings.request.keep_settings)
        self._write(record.model_copy(update={"sheet": name}))
        self._record(record, name, sheet.size)
        return path

    def _record(self, record: GridRecord, name: str, size: tuple[int, int]) -> None:
        """Put a sheet into the gallery of whose grid it is."""
        request = record.settings.request
        owner, prompt = self._engine.job(record.jobs[0]).owner, str(getattr(request, "prompt", ""))
        self._engine.gallery.add_sheet(owner, name, prompt, request.model or "", size, record.jobs)

    def of_sheet(self, name: str) -> GridRecord | None:
        """Return the grid whose sheet has this file name."""
        return next((one for one in self._all() if one.sheet == name), None)

    def record_sheets(self) -> None:
        """Put the sheets that are not in the gallery there, as those of an older version."""
        for record in self._all():
            path = self._output / record.sheet
            if not record.sheet or not path.is_file() or self._engine.owner_of_file(record.sheet) is not None:
                continue
            try:
                with Image.open(path, formats=["PNG"]) as image:
                    self._record(record, record.sheet, image.size)
            except (OSError, ValueError, SyntaxError, KeyError, Image.DecompressionBombError) as error:
                logger.warning("the sheet %s does not come into the gallery: %s", record.sheet, error)

    def _all(self) -> list[GridRecord]:
        """Return all grids, those in files that were not read yet too."""
        for file in sorted(self._folder.glob("*.json")) if self._folder.is_dir() else ():
            if file.stem not in self._known:
                self._read(file)
        return [record for record in self._known.values() if record is not None]

    def files(self, record: GridRecord) -> Cells:
        """Return the image of each cell that has one, and the seconds that it took."""
        pictures = self._pictures(record).items()
        return {place: (self._output / picture.name, picture.seconds) for place, picture in pictures}

    def thumbnail(self, record: GridRecord) -> Image.Image | None:
        """Return the images of a complete grid side by side; None if their files are gone.

        The sheet is a file: it is white wherever it is opened, printed or sent to, whoever looked at it first. A small
        view of it would be a white plate with unreadable letters on a dark page, so the page shows the images alone.
        """
        if record.id not in self._thumbnails:
            pictures: dict[Place, Image.Image] = {}
            for place, (path, _) in self.files(record).items():
                with Image.open(path, formats=["PNG", "WEBP"]) as image:
                    image.thumbnail((CELL_SIDE, CELL_SIDE))
                    pictures[place] = image.convert("RGB")
            if not pictures:
                return None
            laid = mosaic(record.settings.axes, pictures)
            side = max(laid.size)
            # The page cuts thumbnails to squares: of two cells it would show half of each.
            self._thumbnails[record.id] = ImageOps.pad(laid, (side, side), color=(0, 0, 0, 0))
            while len(self._thumbnails) > MOST_THUMBNAILS:
                self._thumbnails.pop(next(iter(self._thumbnails)), None)
        return self._thumbnails.get(record.id)

    def _pictures(self, record: GridRecord) -> dict[Place, StoredPicture]:
        """Return what is on record of each cell whose file is there."""
        found: dict[Place, StoredPicture] = {}
        for job, place in record.places().items():
            for picture in self._engine.pictures(job):
                if (self._output / picture.name).is_file():
                    found[place] = picture
        return found

    def _filled(self, picture: StoredPicture) -> Filled:
        with Image.open(self._output / picture.name, formats=["PNG", "WEBP"]) as image:
            return Filled(image.convert("RGB"), picture.seconds, picture.report)

    def _read(self, file: Path) -> GridRecord | None:
        try:
            record = GridRecord.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:  # of another version
            logger.warning("the grid %s can't be read any more: %s", file.stem, error)
            record = None
        self._keep(file.stem, record)
        return record

    def _write(self, record: GridRecord) -> None:
        partial = self._folder / f".{record.id}.{secrets.token_hex(4)}.part"
        partial.write_text(record.model_dump_json(), encoding="utf-8")
        partial.replace(self._folder / f"{record.id}.json")
        self._keep(record.id, record)

    def _keep(self, name: str, record: GridRecord | None) -> None:
        self._known[name] = record
        if record is not None:
            self._grid_of |= dict.fromkeys(record.jobs, name)
