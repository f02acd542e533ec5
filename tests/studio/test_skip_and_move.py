"""Leaving one image of several out, and changing the order of what waits."""

from __future__ import annotations

import threading

import pytest

from apps.service.engine import Engine
from apps.service.events import Done, Picture, Queued, Step
from apps.service.job_store import JobStore
from apps.service.requests import TextToImageRequest
from tests.studio.fakes import FakePipeline, ForeignPipeline


def make_engine(pipe, folder=None):
    engine = Engine({"fake": "somewhere"}, folder, device="cpu", load=lambda source: pipe)
    engine.model().result(60)  # the first one imports diffusers
    return engine


def ask(**settings):
    return TextToImageRequest(**{"prompt": "a red apple", "steps": 3, "seed": 5, **settings})


@pytest.mark.parametrize("kind", [FakePipeline, ForeignPipeline])
def test_a_skipped_picture_ends_within_a_step_and_the_next_one_is_painted(kind, tmp_path):
    pipe, skipped = kind(), threading.Event()
    pipe.at_step = lambda step: pipe.steps_run != 20 + 2 or skipped.wait(60)  # the third step of the second image
    engine = make_engine(pipe, tmp_path)
    job, events = engine.submit(ask(num_images=3, steps=20)), []
    for event in engine.follow(job):
        events.append(event)
        if isinstance(event, Step) and (event.picture, event.step) == (2, 2):
            assert engine.skip(job)
            skipped.set()
    assert isinstance(events[-1], Done)
    assert [event.seed for event in events if isinstance(event, Picture)] == [5, 7]
    assert pipe.decodes == 2
    assert pipe.steps_run == 20 + 3 + 20
    assert [picture.place for picture in engine.pictures(job)] == [0, 2]
    assert max(event.step for event in events if isinstance(event, Step) and event.picture == 3) == 20
    assert not engine.skip(job)  # it has ended
    engine.close()


def test_a_wish_that_came_too_late_for_its_picture_does_not_hit_the_next():
    engine = make_engine(FakePipeline(step_seconds=0.01))
    job, seeds = engine.submit(ask(num_images=2)), []
    live = engine._live[job]
    add = engine._store.add_picture

    def add_and_skip(picture):  # the click comes while the first file is being written
        if picture.place == 0:
            live.skip.set()
        add(picture)

    engine._store.add_picture = add_and_skip
    for event in engine.follow(job):
        if isinstance(event, Picture):
            seeds.append(event.seed)
    assert seeds == [5, 6]
    engine.close()


def test_what_was_skipped_stays_so_after_a_crash(tmp_path):
    store = JobStore(tmp_path / "jobs.sqlite")
    store.add("a" * 16, "me", "{}", 9, 9)
    store.add_skipped("a" * 16, range(2, 4))
    store.close()
    assert JobStore(tmp_path / "jobs.sqlite").skipped("a" * 16) == {2, 3}


def test_moving_changes_the_order_among_ones_own_and_nobody_elses_place(tmp_path):
    store = JobStore(tmp_path / "jobs.sqlite")
    for name, owner in (("a1", "ann"), ("b1", "bob"), ("a2", "ann"), ("b2", "bob"), ("a3", "ann")):
        store.add(name, owner, "{}", 9, 9)
    assert store.move("a3", 0)
    assert store.ahead() == {"a3": 0, "b1": 1, "a1": 2, "b2": 3, "a2": 4}
    assert store.move("a3", 99)
    assert store.waiting("ann") == ["a1", "a2", "a3"]
    assert store.move("a2", 0)
    store.add("a4", "ann", "{}", 9, 9)
    assert not store.move("nobody", 0)
    store.close()

    again = JobStore(tmp_path / "jobs.sqlite")  # the order is on disk
    assert [job.id for job in again.recover(3)] == ["a2", "b1", "a1", "b2", "a3", "a4"]
    taken = [again.take().id for _ in range(6)]
    assert taken == ["a2", "b1", "a1", "b2", "a3", "a4"]
    assert not again.move("a2", 0)  # it runs


def test_the_engine_paints_in_the_new_order_and_tells_the_new_places():
    pipe, end = FakePipeline(), threading.Event()
    pipe.at_step = lambda step: step == 0 or end.wait(60)
    engine = make_engine(pipe)
    running = engine.submit(ask(steps=30), stop=end)
    next(event for event in engine.stream(running) if isinstance(event, Step))
    jobs = [engine.submit(ask(seed=seed)) for seed in (1, 2, 3)]
    stream = engine.stream(jobs[0])
    assert engine.move(jobs[2], 0)
    assert [event for _, event in stream.read()] == [Queued(1), Queued(2)]
    assert engine.waiting("local") == [jobs[2], jobs[0], jobs[1]]
    assert not engine.move(running, 0)
    with pytest.raises(ValueError, match="-1"):
        engine.move(jobs[0], -1)
    with pytest.raises(KeyError):
        engine.move("0" * 16, 0)
    engine.stop(running)
    for job in jobs:
        assert engine.stream(job).wait_closed(60)
    ends = [engine.job(job).ended for job in jobs]
    assert ends[2] < ends[0] < ends[1]
    engine.close()
