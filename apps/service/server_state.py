"""What an administrator sees of the queue: who, which model, since when, and nothing of what was asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass

from apps.service.engine import Engine


@dataclass(frozen=True, slots=True)
class QueueRow:
    """A job that waits or runs.

    Attributes:
        id: of the job.
        owner: who asked.
        model: key of its model.
        task: such as `text_to_image`.
        state: `queued`, `loading` (it waits for its model) or `running`.
        ahead: how many come before it; 0 for one that runs.
        created: seconds since 1970.
        started: seconds since 1970; None until its model is there.
        done: images that are finished.
        images: that it asks for.
    """

    id: str
    owner: str
    model: str
    task: str
    state: str
    ahead: int
    created: float
    started: float | None
    done: int
    images: int


def queue_rows(engine: Engine) -> list[QueueRow]:
    """Return the jobs that run, then those that wait, in the order in which they will probably be served."""
    places, rows = engine.places(), []
    for job in engine.unfinished(None):
        request, started = json.loads(job.request), engine.meter.begun(job.id)
        is_waiting = job.state == "queued"
        rows.append(
            QueueRow(
                job.id,
                job.owner,
                str(request.get("model") or ""),
                str(request.get("task") or ""),
                "queued" if is_waiting else "loading" if started is None else "running",
                places.get(job.id, 0) if is_waiting else 0,
                job.created,
                None if is_waiting else started,
                len(engine.pictures(job.id)),
                1 if request.get("pick") is not None else int(request.get("num_images") or 1),
            )
        )
    return sorted(rows, key=lambda row: row.ahead)
