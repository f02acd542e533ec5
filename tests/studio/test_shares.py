"""Whose job is next: the one of the user with the least recent device seconds; and what users have used."""

from __future__ import annotations

import sqlite3

import pytest

from apps.service import accounting
from apps.service.accounting import Meter
from apps.service.engine import Engine
from apps.service.job_store import JobStore, StoredPicture
from apps.service.requests import TextToImageRequest
from apps.service.shares import HALF_LIFE, WAITING
from tests.studio.fakes import FakePipeline

NOON = 1_796_000_000.0


class Clock:
    """Time that goes on when a test says so."""

    def __init__(self):
        self.now = NOON

    def __call__(self):
        return self.now


def open_store(clock, file=None):
    return JobStore(file, clock, clock)


def work(store, clock, seconds):
    """Take the next job, work on it for the seconds that its name says, and end it; return its name."""
    job = store.take()
    with store.meter.running(job.id, job.owner):
        clock.now += seconds(job)
    store.end(job.id, "done")
    return job.id


def cost(job):
    return {"ann": 1.0, "bob": 10.0}[job.owner]


def fill(store, **jobs):
    for owner, count in jobs.items():
        for number in range(count):
            store.add(f"{owner}-{number:02d}", owner, "{}", 999, 999)


def test_cheap_and_expensive_jobs_get_equal_seconds():
    clock = Clock()
    store = open_store(clock)
    fill(store, ann=30, bob=3)
    done = [work(store, clock, cost) for _ in range(33)]
    assert done.index("bob-02") < 31  # thirty seconds of each: the last expensive one isn't kept for the end
    for upto in range(33):
        ann, bob = (sum(cost_ for name in done[:upto] if name.startswith(who)) for who, cost_ in
                    (("ann", 1.0), ("bob", 10.0)))  # fmt: skip
        if upto <= done.index("bob-02"):  # while both wait, apart by one job at most and what is forgotten meanwhile
            assert abs(ann - bob) <= 11.0
    for owner in ("ann", "bob"):
        own = [name for name in done if name.startswith(owner)]
        assert own == sorted(own)


def test_a_restart_keeps_what_was_used(tmp_path):
    clock, file = Clock(), tmp_path / "jobs.sqlite"
    store = open_store(clock, file)
    fill(store, ann=3, bob=3)
    assert [work(store, clock, cost) for _ in range(2)] == ["ann-00", "bob-00"]
    store.close()
    again = open_store(clock, file)
    again.recover(3)
    assert [work(again, clock, cost) for _ in range(2)] == ["ann-01", "ann-02"]  # bob has used ten times as much
    with again.using() as db:
        assert accounting.used(db, "bob", clock()).seconds == pytest.approx(10.0)
        assert accounting.totals(db).seconds == pytest.approx(13.0)


def test_half_of_what_was_used_is_forgotten_in_a_half_life():
    clock = Clock()
    store = open_store(clock)
    fill(store, bob=1)
    work(store, clock, cost)
    clock.now += 20 * HALF_LIFE
    fill(store, ann=2)
    work(store, clock, cost)
    store.add("bob-01", "bob", "{}", 999, 999)
    assert store.take().id == "bob-01"  # one second of now is more than ten of hours ago
    with store.using() as db:
        (level,) = db.execute("SELECT level FROM shares WHERE owner = 'bob'").fetchone()
    assert level == pytest.approx(10.0)


def test_a_new_name_begins_where_the_least_used_one_who_waits_stands():
    clock = Clock()
    store = open_store(clock)
    fill(store, ann=9, bob=3)
    done = [work(store, clock, cost) for _ in range(2)]
    assert done == ["ann-00", "bob-00"]
    fill(store, eve=3)
    with store.using() as db:
        levels = dict(db.execute("SELECT owner, level FROM shares").fetchall())
    assert levels["eve"] == pytest.approx(1.0, rel=0.02)  # ann's, and not 0
    first = [store.take().id for _ in range(2)]
    assert sorted(first) == ["ann-01", "eve-00"]


def test_a_job_that_runs_counts_before_it_ends():
    clock = Clock()
    store = open_store(clock)
    fill(store, ann=2, bob=2)
    running = store.take()
    assert running.id == "ann-00"
    with store.meter.running(running.id, "ann"):
        clock.now += 5.0
        assert store.take().id == "bob-00"
        assert store.take().id == "bob-01"  # of the second device: bob has used nothing yet, ann five seconds


def test_seconds_are_charged_with_each_image_and_at_the_end_and_once():
    clock = Clock()
    store = open_store(clock)
    fill(store, ann=1)
    store.take()
    with store.meter.running("ann-00", "ann"):
        clock.now += 4.0
        store.add_picture(StoredPicture("ann-00", 0, "", "{}", 4.0))
        with store.using() as db:
            assert accounting.used(db, "ann", clock()).seconds == pytest.approx(4.0)
        clock.now += 2.0
        assert store.meter.pending("ann") == pytest.approx(2.0)
    clock.now += 50.0  # time after the work is nobody's
    store.put_back("ann-00")
    store.take()
    with store.meter.running("ann-00", "ann"):
        clock.now += 1.0
    store.end("ann-00", "stopped")
    with store.using() as db:
        used = accounting.used(db, "ann", clock())
        (mean,) = db.execute("SELECT job_seconds FROM shares WHERE owner = 'ann'").fetchone()
    assert (used.images, used.seconds, used.running) == (1, pytest.approx(7.0), 0)
    assert store.meter.pending("ann") == 0.0
    assert mean == pytest.approx(1.0)
    assert sum(store.meter.jobs.read()[0]) == 1


def test_the_forecast_is_the_order_of_service_when_jobs_take_what_they_took(tmp_path):
    clock = Clock()
    store = open_store(clock)
    fill(store, ann=1, bob=1)
    for _ in range(2):
        work(store, clock, cost)
    for owner, count in (("bob", 3), ("ann", 25)):
        for number in range(1, count + 1):
            store.add(f"{owner}-{number:02d}", owner, "{}", 999, 999)
    assert store.move("ann-07", 0)
    forecast = [job for job, _ in sorted(store.ahead().items(), key=lambda pair: pair[1])]
    done = [work(store, clock, cost) for _ in range(28)]
    assert done[0] == "ann-07"  # moved jobs go first
    assert forecast[:9] == done[:9]  # later ones are apart by what is forgotten meanwhile
    assert sorted(forecast) == sorted(done)


def test_the_next_job_is_found_without_a_look_at_every_row():
    clock = Clock()
    store = open_store(clock)
    fill(store, ann=60, bob=60)
    steps: list[str] = []
    with store.using() as db:
        plan = " ".join(row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {WAITING}"))
        db.set_trace_callback(steps.append)
        store._shares.next()
        db.set_trace_callback(None)
    assert plan.count("INDEX jobs_waiting") == 2
    assert len(steps) <= 3  # one of the users, and one for each of the two who are equal


def test_a_queue_of_an_older_version_gets_the_tables_it_lacks(tmp_path):
    file = tmp_path / "jobs.sqlite"
    store = open_store(Clock(), file)
    fill(store, ann=2)
    store.take()
    store.add_picture(StoredPicture("ann-00", 0, "", "{}", 1.0))
    store.close()
    with sqlite3.connect(file) as db:
        db.executescript(
            "DROP TABLE shares; DROP TABLE usage_days; DROP INDEX jobs_waiting; ALTER TABLE pictures DROP COLUMN bytes;"
        )
    db.close()
    again = open_store(Clock(), file)
    assert [job.id for job in again.recover(3)] == ["ann-00", "ann-01"]
    assert again.pictures("ann-00")[0].bytes == 0
    assert again.take().id == "ann-00"


def test_the_engine_charges_what_it_generates(tmp_path):
    engine = Engine({"fake": "x"}, tmp_path, device="cpu", load=lambda source: FakePipeline(0.002))
    engine.model().result(60)
    try:
        job = engine.submit(TextToImageRequest(prompt="a fox", steps=3, num_images=2), "ann")
        assert engine.stream(job).wait_closed(60)
        used = engine.used("ann")
        assert (used.images, used.pending, used.waiting, used.running) == (2, 0, 0, 0)
        assert 0.0 < used.seconds < 60.0
        assert used.stored == sum((tmp_path / one.name).stat().st_size for one in engine.pictures(job))
        assert engine.totals().images == 2
        assert sum(engine.meter.jobs.read()[0]) == 1
        with engine._store.using() as db:
            db.execute("UPDATE pictures SET bytes = 0")  # as an older version has left them
    finally:
        engine.close()
    again = Engine({"fake": "x"}, tmp_path, device="cpu", load=lambda source: FakePipeline(0.002))
    assert again.used("ann").stored == used.stored > 0
    assert again.used("ann").seconds == pytest.approx(used.seconds)
    again.close()


def test_a_meter_adds_what_it_measured_in_parts():
    clock = Clock()
    meter = Meter(clock)
    for seconds in (2.0, 3.0):
        with meter.running("a", "ann"):
            clock.now += seconds
        clock.now += 100.0
    assert (meter.due("a"), meter.total("a")) == (5.0, 5.0)
    assert (meter.due("b"), meter.total("b"), meter.begun("b")) == (0.0, None, None)
    meter.forget("a", has_ended=True)
    counts, total = meter.jobs.read()
    assert (counts[meter.jobs.bounds.index(5.0)], sum(counts), total) == (1, 1, 5.0)
