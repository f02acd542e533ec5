"""What the stage shows while a job runs: previews of an image to come, or the cells of a grid as they fill."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from PIL import Image

from apps.service.events import ClipPart, Step, Upscaling
from apps.service.media import clip_uri
from apps.studio import grid_view, views
from apps.studio.album import Finished, Shown
from apps.studio.grids import Cells, GridRecord, Grids, Place
from apps.studio.stage import Stage
from apps.studio.strings import Strings

SHOWN_FRAMES = 64
"""Frames of an unfinished clip that are shown, the newest ones: browsers get all of them with each part."""
REDRAW_SECONDS = 1.0
"""A grid is redrawn no faster than this, but for a cell that is finished."""


@dataclass(slots=True)
class PictureView:
    """Previews, each in the place of the one before, and of a finished image until there is something newer.

    Attributes:
        size: width and height that the image will have.
        words: of the page.
        stage: draws what is finished.
        shown: the finished image or grid that stands there; None for a preview, or for nothing yet.
        is_by_scales: previews are kept, because each is a scale.
        preview: the newest one.
        strip: what a step cache did.
        scales: the scales so far, as data URIs.
        frames: finished ones of a clip of which later ones are still generated.
        picture: that is being generated, from 1.
        fps: frames a second of the clip.
        playing: the frames as an animation, once it was drawn; empty before.
    """

    size: tuple[int, int]
    words: Strings
    stage: Stage
    shown: Finished | None
    is_by_scales: bool = False
    preview: str | None = None
    strip: str = ""
    scales: tuple[str, ...] = ()
    frames: tuple[Image.Image, ...] = ()
    picture: int = 0
    fps: float = 8.0
    playing: str = ""

    def take(self, step: Step) -> None:
        """Take in a step."""
        self.strip = step.strip
        if step.picture != self.picture:
            self.picture, self.frames = step.picture, ()
        if step.preview is not None and not self.frames:  # what is finished shows more than a preview of what isn't
            self.preview, self.shown = views.preview_uri(step.preview), None
            if self.is_by_scales:
                self.scales = (() if step.step == 1 else self.scales) + (self.preview,)

    def take_part(self, part: ClipPart) -> None:
        """Take in finished frames of a clip, which then plays while the others are generated."""
        self.frames = (*(self.frames if part.start else ()), *part.frames)[-SHOWN_FRAMES:]
        self.fps, self.picture, self.playing, self.shown = part.fps, part.picture, "", None

    def finish(self, shown: Shown) -> None:
        """Take in a finished image."""
        self.shown, self.frames = shown, ()

    def is_due(self, step: Step | ClipPart | Upscaling) -> bool:
        """Whether to redraw: always, because pages ask a few times a second; but steps let a clip play on."""
        return not (self.frames and isinstance(step, Step))

    def progress(self, step: Step | ClipPart | Upscaling) -> tuple[str, float]:
        """Return the line under the stage and the share of the work that is done."""
        return progress_line(step, self.words)

    def draw(self, note: str, share: float | None) -> str:
        """Draw the stage."""
        if self.shown is not None:
            return self.stage.draw(self.shown, note, share, self.strip, self.scales)
        if self.frames and not self.playing:
            self.playing = clip_uri(self.frames, self.fps)
        picture = self.playing if self.frames else self.preview
        return views.stage(
            picture,
            size=self.size,
            note=note,
            share=share,
            is_preview=picture is not None and not self.frames,
            strip=self.strip,
            scales=self.scales,
        )


@dataclass(slots=True)
class GridView:
    """The cells that are finished; nothing that the buttons could act on until all are.

    Attributes:
        record: the grid.
        place: of the cell that is being generated.
        grids: give the cells.
        words: of the page.
    """

    record: GridRecord
    place: Place
    grids: Grids
    words: Strings
    shown: Finished | None = field(default=None, init=False)
    cells: Cells = field(init=False)
    next_redraw: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.cells = self.grids.files(self.record)

    def take(self, step: Step) -> None:
        """Take in a step; a grid shows whole cells only."""

    def take_part(self, part: ClipPart) -> None:
        """Take in finished frames; a grid shows whole cells only."""

    def finish(self, shown: Shown) -> None:
        """Take in a finished cell, which is on record already."""
        self.cells, self.next_redraw = self.grids.files(self.record), 0.0

    def is_due(self, step: Step | ClipPart | Upscaling) -> bool:
        """Whether to redraw: seldom, because a table of images takes a browser longer than one."""
        del step
        if time.monotonic() < self.next_redraw:
            return False
        self.next_redraw = time.monotonic() + REDRAW_SECONDS
        return True

    def progress(self, step: Step | ClipPart | Upscaling) -> tuple[str, float]:
        """Return the line under the stage and the share of the work that is done."""
        number, count = self.number, len(self.record.jobs)
        if isinstance(step, Upscaling):
            note = self.words("cell.upscaling", number=number, count=count)
        elif isinstance(step, ClipPart):
            return self.words("part", done=step.done, total=step.total), (number - 1 + step.share) / count
        else:
            note = self.words("cell", number=number, count=count, step=step.step, steps=step.steps)
        return note, (number - 1 + step.share) / count

    @property
    def number(self) -> int:
        """Which cell is being generated, from 1."""
        return list(self.record.places().values()).index(self.place) + 1

    @property
    def seconds(self) -> float:
        """Time that the finished cells took."""
        return sum(seconds for _, seconds in self.cells.values())

    def draw(self, note: str, share: float | None) -> str:
        """Draw the stage."""
        busy = None if share is None else self.place
        return grid_view.stage(self.record, self.cells, self.words, note=note, share=share, busy=busy)


View = PictureView | GridView


def progress_line(step: Step | ClipPart | Upscaling, words: Strings) -> tuple[str, float]:
    """Return the line under the stage and the share of the work that is done."""
    if isinstance(step, ClipPart):
        return words("part", done=step.done, total=step.total), step.share
    if isinstance(step, Upscaling):
        of_frames = "upscaling" if step.count == 1 else "upscaling.pieces"
        key = of_frames if step.pictures == 1 else "upscaling.many"
        places = {name: getattr(step, name) for name in ("done", "count", "picture", "pictures")}
        return words(key, **places), step.share
    progress = {"step": step.step, "steps": step.steps, "eta": f"{step.eta:.1f}"}
    if step.pictures == 1:
        return words("step", **progress), step.share
    if step.batch == 1:
        return words("step.many", picture=step.picture, pictures=step.pictures, **progress), step.share
    return words("step.batch", picture=step.picture, last=step.last, pictures=step.pictures, **progress), step.share
