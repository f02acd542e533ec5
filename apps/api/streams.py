"""Events of jobs as server-sent events, for any number of readers.

Each event is encoded once, off the event loop, however many read it. A reader that is slower than the job misses steps
that are no longer the latest, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from apps.api.messages import event_message, server_sent, stored_picture_message
from apps.service.engine import Engine
from apps.service.events import EventStream, Failed, Step, Upscaling
from apps.service.job_store import StoredJob, StoredPicture
from apps.service.stored_images import last_event

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.04
KEEP_ALIVE_SECONDS = 15.0
KEPT_STEPS = 16
"""Encoded steps of a job that are kept for its readers."""


class TooManyStreamsError(Exception):
    """A user reads as many streams as one may."""


@dataclass(frozen=True, slots=True)
class _Message:
    number: int
    is_step: bool
    data: bytes


@dataclass(eq=False, slots=True)
class _Broadcast:
    """The encoded events of a job that runs or waits.

    Attributes:
        messages: in their order; old steps are dropped.
        readers: how many read them.
        is_whole: nothing follows.
        news: is set, and replaced by another, when there is something new.
        pump: fills it.
    """

    messages: list[_Message] = field(default_factory=list)
    readers: int = 0
    is_whole: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)
    pump: asyncio.Task[None] | None = None

    def add(self, new: list[_Message], is_whole: bool) -> None:
        steps = [message.number for message in (*self.messages, *new) if message.is_step]
        oldest = steps[-KEPT_STEPS] if len(steps) > KEPT_STEPS else 0
        self.messages = [one for one in (*self.messages, *new) if not one.is_step or one.number >= oldest]
        self.is_whole = is_whole
        self.tell()

    def tell(self) -> None:
        news, self.news = self.news, asyncio.Event()
        news.set()


class JobStreams:
    """The event streams of an engine's jobs; lives on one event loop.

    Args:
        engine: whose jobs.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._broadcasts: dict[str, _Broadcast] = {}
        self._reading: Counter[str] = Counter()
        self._encoders = ThreadPoolExecutor(1, "encoder")

    def check(self, user: str) -> None:
        """Refuse one stream too many.

        Raises:
            TooManyStreamsError: the user reads as many as one may.
        """
        most = self._engine.limits.streams_per_user
        if self._reading[user] >= most:
            raise TooManyStreamsError(f"You read {most} streams of events already; end one of them.")

    async def read(self, job: StoredJob, user: str, after: int = 0) -> AsyncGenerator[bytes]:
        """Yield the events of a job until its last one, and a comment now and then when nothing happens.

        Args:
            job: which.
            user: who reads.
            after: number of the last event that the reader has seen; 0 for none.
        """
        self._reading[user] += 1
        try:
            stream = self._engine.live_stream(job.id)
            if stream is None:
                for message in await asyncio.get_running_loop().run_in_executor(self._encoders, self._replay, job.id):
                    yield message
                return
            async for data in self._follow(job.id, stream, after):
                yield data
        finally:
            self._reading[user] -= 1
            if not self._reading[user]:
                del self._reading[user]

    def _replay(self, job_id: str) -> list[bytes]:
        """Return the events that are left of a job that has ended: its images that have files, and its end."""
        job, folder = self._engine.job(job_id), self._engine.output_dir
        rows: list[StoredPicture] = self._engine.pictures(job_id)
        there = [one for one in rows if folder is not None and (folder / one.name).is_file()]
        messages = [stored_picture_message(one) for one in there]
        messages.append(event_message(job_id, last_event(job)))
        return [server_sent(number, *message) for number, message in enumerate(messages, 1)]

    async def _follow(self, job_id: str, stream: EventStream, seen: int) -> AsyncIterator[bytes]:
        broadcast = self._broadcasts.get(job_id)
        if broadcast is None:
            broadcast = self._broadcasts[job_id] = _Broadcast()
            broadcast.pump = asyncio.create_task(self._pump(job_id, stream, broadcast))
        broadcast.readers += 1
        try:
            while True:
                news, is_whole = broadcast.news, broadcast.is_whole
                for message in _latest(broadcast.messages, seen):
                    seen = message.number
                    yield message.data
                if is_whole:
                    return
                try:
                    await asyncio.wait_for(news.wait(), KEEP_ALIVE_SECONDS)
                except TimeoutError:
                    yield b": waiting\n\n"
        finally:
            broadcast.readers -= 1
            if not broadcast.readers and broadcast.pump is not None:
                broadcast.pump.cancel()
                del self._broadcasts[job_id]

    async def _pump(self, job_id: str, stream: EventStream, broadcast: _Broadcast) -> None:
        """Encode the events of a job as they come."""
        loop, seen = asyncio.get_running_loop(), 0
        try:
            while not broadcast.is_whole:
                was_closed = stream.is_closed
                events = stream.read(seen)
                if events or was_closed:
                    steps = [number for number, event in events if isinstance(event, Step | Upscaling)][-KEPT_STEPS:]
                    kept = [one for one in events if not isinstance(one[1], Step | Upscaling) or one[0] in steps]
                    encoded = await loop.run_in_executor(self._encoders, _encode, job_id, kept)
                    seen = events[-1][0] if events else seen
                    broadcast.add(encoded, was_closed)
                else:
                    await asyncio.sleep(POLL_SECONDS)
        except Exception:  # whatever it is: readers should not wait for what never comes
            logger.exception("the events of a job can't be encoded")
            broken = Failed("failed", f"The events can't be shown; GET /v1/jobs/{job_id} says how the job is.")
            broadcast.add(_encode(job_id, [(seen + 1, broken)]), True)


def _encode(job_id: str, events: list) -> list[_Message]:
    return [
        _Message(number, isinstance(event, Step | Upscaling), server_sent(number, *event_message(job_id, event)))
        for number, event in events
    ]


def _latest(messages: list[_Message], seen: int) -> list[_Message]:
    """Return what a reader has not seen, as of now."""
    return [message for message in messages if message.number > seen]
