"""What an output folder keeps beside its images, and what is on record as events: images, and how jobs ended."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from PIL import Image

from apps.service.events import Done, Event, Failed, Picture, Stopped
from apps.service.job_store import StoredJob, StoredPicture
from apps.service.media import clip_of
from apps.service.metadata import parse, sidecar_path
from apps.service.reports import decode_reports

STATE_FOLDER = ".tessera"
"""Of the output folder: the queue and uploaded images; never served."""


def state_folder(output_dir: Path | None) -> Path | None:
    """Return the folder of what an engine remembers, readable by its owner only."""
    if output_dir is None:
        return None
    folder = output_dir / STATE_FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def last_event(stored: StoredJob) -> Event:
    """Return the last event of a job that has ended."""
    if stored.state == "failed":
        return Failed(stored.code, stored.message)
    return Done((stored.ended or stored.created) - stored.created) if stored.state == "done" else Stopped()


def stored_picture_event(stored: StoredPicture, folder: Path) -> Picture:
    """Return the event of an image on record; of a clip by its image alone."""
    path, settings = folder / stored.name, parse(stored.settings)
    with Image.open(path, formats=["PNG", "WEBP"]) as image:
        image.load()
        clip, notes = clip_of(path, settings), tuple(json.loads(stored.notes))
        reports = decode_reports(stored.reports)
        return Picture(path, settings.seed, settings, image, stored.seconds, None, clip, stored.report, notes, reports)


def measure_stored(db: sqlite3.Connection, folder: Path) -> None:
    """Record how large the images are that an older version recorded without a size; each file is looked at once.

    Args:
        db: the database of jobs.
        folder: with the files of the images.
    """
    query = (
        "SELECT pictures.name, pictures.job, pictures.place FROM pictures JOIN gallery_items AS item "
        "ON item.job = pictures.job AND item.place = pictures.place WHERE pictures.bytes = 0 AND pictures.name != ''"
    )
    found = [(stored_bytes(folder / name), job, place) for name, job, place in db.execute(query).fetchall()]
    if found:
        db.execute("BEGIN IMMEDIATE")
        db.executemany("UPDATE pictures SET bytes = ? WHERE job = ? AND place = ?", found)
        db.execute("COMMIT")


def stored_bytes(picture: Path) -> int:
    """Return the bytes of an image's file and of those that may stand beside it: its clip and its settings."""
    files = (picture, picture.with_suffix(".mp4"), sidecar_path(picture))
    return sum(file.stat().st_size for file in files if file.is_file())
