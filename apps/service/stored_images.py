"""What an output folder keeps beside its images, and what is on record as events: images, and how jobs ended."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from apps.service.events import Done, Event, Failed, Picture, Stopped
from apps.service.job_store import StoredJob, StoredPicture
from apps.service.media import clip_of
from apps.service.metadata import parse
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
