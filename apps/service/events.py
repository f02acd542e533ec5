"""What the engine tells while it works on a request: a few kinds of event, and the stream that carries them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from apps.service.media import Clip
from apps.service.metadata import PictureSettings
from pipelines.acceleration import PartReport

KEPT = 512
"""Events that a stream remembers for readers that fall behind; beyond them the oldest steps are forgotten."""


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits for `ahead` others."""

    ahead: int


@dataclass(frozen=True, slots=True)
class ModelLoading:
    """The model is being read into memory."""

    model: str


@dataclass(frozen=True, slots=True)
class Step:
    """A denoising step, or a scale, is done.

    Attributes:
        step: steps of this batch that are done, from 1.
        steps: steps of one batch.
        picture: the first image of the batch that is being generated, from 1.
        pictures: how many images were asked for.
        preview: a small view of the image to come; None when it's too early for a new one, or when the
            model has no cheap view.
        eta: seconds until the whole request is done.
        strip: what a step cache did in the steps so far, a letter each: C computed, a dot forecast; empty without one.
        batch: images that are generated at once.
    """

    step: int
    steps: int
    picture: int
    pictures: int
    preview: Image.Image | None
    eta: float
    strip: str = ""
    batch: int = 1

    @property
    def last(self) -> int:
        """The last image of the batch, counted as `picture`."""
        return self.picture + self.batch - 1

    @property
    def share(self) -> float:
        """How much of the request is done, 0 to 1."""
        return (self.picture - 1 + self.batch * self.step / self.steps) / self.pictures


@dataclass(frozen=True, slots=True)
class ClipPart:
    """Frames of a clip are finished while later ones are still generated.

    Attributes:
        start: number of the first one, from 0.
        frames: small views of the new ones, RGB.
        total: frames of the whole clip.
        fps: frames a second.
        picture: which clip, from 1.
        pictures: how many clips were asked for.
    """

    start: int
    frames: tuple[Image.Image, ...]
    total: int
    fps: float
    picture: int = 1
    pictures: int = 1

    @property
    def done(self) -> int:
        """Frames of the clip that are finished."""
        return self.start + len(self.frames)

    @property
    def share(self) -> float:
        """How much of the request is done, 0 to 1."""
        return (self.picture - 1 + self.done / self.total) / self.pictures


@dataclass(frozen=True, slots=True)
class Upscaling:
    """A finished image, or clip, is being enlarged.

    Attributes:
        done: pieces of the work (tiles of images or frames) that are done.
        count: pieces.
        picture: which image, from 1.
        pictures: how many images were asked for.
        share: how much of the request is done, 0 to 1, enlarging left out.
    """

    done: int
    count: int
    picture: int
    pictures: int
    share: float


@dataclass(frozen=True, slots=True)
class Picture:
    """An image is done.

    Attributes:
        path: where it was written; None for an engine without an output folder.
        seed: of its noise.
        metadata: what reproduces it, as stored in the file.
        image: the image itself; of a clip some frames side by side.
        seconds: time it took.
        clip: the frames, from a model that makes clips.
        video: where the clip was written.
        report: what accelerators did, for people; empty without any.
        notes: what keeps the image from being what was asked for, a sentence each, such as words of the prompt that
            the model was not trained on.
        reports: what each accelerator did, as values; `report` is the English of it.
    """

    path: Path | None
    seed: int
    metadata: PictureSettings
    image: Image.Image
    seconds: float
    clip: Clip | None = None
    video: Path | None = None
    report: str = ""
    notes: tuple[str, ...] = ()
    reports: tuple[PartReport, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    """All images are generated; the last event."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Stopped:
    """The request was stopped; the last event. Images reported before stay valid."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The request can't be fulfilled; the last event.

    Attributes:
        code: for programs: queue_full, unknown_model, model_failed, bad_request, out_of_memory, missing_extra,
            too_slow, crashed, storage, quota, failed.
        message: for people; holds no path and no trace, so that it may be shown to strangers.
        cause: the error itself, for the log and for the owner of the machine.
    """

    code: str
    message: str
    cause: Exception | None = None


Event = Queued | ModelLoading | Step | ClipPart | Upscaling | Picture | Done | Stopped | Failed
LAST = (Done, Stopped, Failed)


class EventStream:
    """The events of one request, numbered from 1; any number of readers, each at its own pace."""

    def __init__(self) -> None:
        self._events: deque[tuple[int, Event]] = deque()
        self._sent = 0
        self._closed = False
        self._news = threading.Condition()

    def tell(self, event: Event) -> None:
        """Append an event; nothing follows Done, Stopped or Failed."""
        with self._news:
            if self._closed:
                return
            self._sent += 1
            self._events.append((self._sent, event))
            self._closed = isinstance(event, LAST)
            if len(self._events) > KEPT:
                self._forget_steps()
            self._news.notify_all()

    def read(self, after: int = 0, timeout: float | None = 0.0) -> list[tuple[int, Event]]:
        """Return the events behind number `after`; waits for one if there is none yet.

        Args:
            after: number of the last event that the reader has seen; 0 for none.
            timeout: seconds to wait; None for as long as it takes.

        Returns:
            Numbers and events; empty when the time ran out or nothing will follow.
        """
        with self._news:
            self._news.wait_for(lambda: self._sent > after or self._closed, timeout)
            return [(number, event) for number, event in self._events if number > after]

    @property
    def is_closed(self) -> bool:
        """Whether the last event has been sent."""
        return self._closed

    def wait_closed(self, timeout: float | None = None) -> bool:
        """Wait for the last event; False when the time ran out."""
        with self._news:
            return self._news.wait_for(lambda: self._closed, timeout)

    def _forget_steps(self) -> None:
        recent = self._sent - KEPT // 4
        kept = (item for item in self._events if item[0] > recent or not isinstance(item[1], Step | Upscaling))
        self._events = deque(kept)

    def __iter__(self) -> Iterator[Event]:
        seen = 0
        while news := self.read(seen, None):
            seen = news[-1][0]
            yield from (event for _, event in news)
