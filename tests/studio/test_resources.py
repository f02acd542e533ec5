"""A server that is asked for too much, or whose disk is full, goes on, and says how it is."""

from __future__ import annotations

import asyncio
import errno
import logging
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from PIL import Image

from apps.api import messages, streams
from apps.api.streams import KEPT_STEPS, _Broadcast, _latest, _Message
from apps.api.tokens import TokenTable
from apps.service import uploads
from apps.service.defaults import fit_size
from apps.service.engine import Engine
from apps.service.events import Done, EventStream, Failed
from apps.service.failures import failure_of
from apps.service.job_store import JobStore, QueueFullError, StoreError, StoreInUseError
from apps.service.limits import ServerLimits, UploadQuota
from apps.service.logs import PromptFilter
from apps.service.requests import TextToImageRequest
from apps.service.temporary import private_folder, remove_stale
from apps.service.uploads import UploadError, UploadStore, read_upload
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.problems import explain, explain_failure
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SettingsHandlers
from apps.studio.strings import Strings
from pipelines.inputs import words
from tests.studio.fakes import FakePipeline
from tests.studio.serving import client_of, png, serving_page

ASK = {"task": "text_to_image", "prompt": "a fox", "steps": 3}


def ask(**more):
    return TextToImageRequest(**{"prompt": "a fox", "steps": 2, **more})


# ------------------------------------------------------------------------- a full disk


def fill(store, is_full):
    """Let the database grow no further, or as far as it likes."""
    with store._lock:
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages if is_full else 2**30}")


def fill_up(store):
    for number in range(2000):
        store.add_skipped(f"filler-{number}" * 20, range(40))


def test_the_worker_survives_a_full_disk_and_health_tells(tmp_path):
    with serving_page(tmp_path, FakePipeline(0.02), with_users=False) as served, client_of(served) as client:
        assert client.get("/v1/health").json()["status"] == "ok"
        job = client.post("/v1/jobs", json={**ASK, "steps": 40, "prompt": "x" * 2000}).json()["id"]
        stream = served.engine.stream(job)
        fill(served.engine._store, True)
        with pytest.raises(StoreError):
            fill_up(served.engine._store)
        sick = client.get("/v1/health")
        assert (sick.status_code, sick.json()["status"]) == (503, "degraded")
        assert "queue" in sick.json()["problems"][0]
        refused = client.post("/v1/jobs", json={**ASK, "prompt": "y" * 2000})
        assert refused.status_code in (503, 202)
        assert stream.wait_closed(30)  # whoever follows the job hears how it ended
        fill(served.engine._store, False)
        again = client.post("/v1/jobs", json=ASK).json()["id"]
        assert served.engine.stream(again).wait_closed(30)
        assert served.engine.job(again).state == "done"
        assert client.get("/v1/health").json()["status"] == "ok"


def test_reading_a_full_disk_does_not_make_it_well(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("apps.service.engine.RETRY_SECONDS", 0.02)
    engine = Engine({"fake": "x"}, tmp_path, device="cpu", load=lambda source: FakePipeline())
    try:
        list(engine.generate(ask()))
        fill(engine._store, True)
        with pytest.raises(StoreError):
            fill_up(engine._store)
        with caplog.at_level("ERROR", "apps.service.engine"):
            monkeypatch.setattr(engine._store, "check", lambda: (_ for _ in ()).throw(StoreError("still full")))
            assert engine.jobs("local")
            assert engine.unfinished("local") == []
            assert engine.health().problems
            deadline = time.monotonic() + 20
            while "still full" not in caplog.text:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(0.2)  # some ten further attempts
            assert caplog.text.count("still full") == 1
        monkeypatch.undo()
        fill(engine._store, False)
        while engine.health().problems:  # nobody asks for anything: the worker finds out by itself
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        engine.close()


def test_files_that_find_the_disk_full_are_refused_in_words(tmp_path, monkeypatch):
    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device", "/some/where")

    with serving_page(tmp_path, with_users=False) as served, client_of(served) as client:
        content = png(tmp_path).read_bytes()
        monkeypatch.setattr("apps.service.uploads.save_picture", full)
        answer = client.post("/v1/pictures", content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage")
        assert answer.json()["error"]["type"] == "server_error"
        assert "disk" in answer.json()["error"]["message"]
        assert "some" not in answer.text


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_says_that_the_disk_is_full(language):
    said = Strings(language)
    for error in (StoreError("no room at /some/where"), OSError(errno.ENOSPC, "full", "/some/where")):
        assert explain(error, said) == said("failed.storage")
        assert explain_failure(failure_of(error), said) == said("failed.storage")
    assert explain(OSError(errno.ENOENT, "no such file"), said) == said("wrong_form")


def test_a_failure_of_the_store_at_any_moment_ends_no_worker(tmp_path, monkeypatch):
    engine = Engine({"fake": "x"}, tmp_path, device="cpu", load=lambda source: FakePipeline())
    monkeypatch.setattr("apps.service.engine.RETRY_SECONDS", 0.05)
    try:
        for name in ("take", "ahead", "add_picture", "end"):
            whole, failures = getattr(engine._store, name), iter(range(3))

            def broken(*args, whole=whole, failures=failures, **kwargs):
                if next(failures, None) is not None:
                    raise StoreError("no room")
                return whole(*args, **kwargs)

            setattr(engine._store, name, broken)
            last = list(engine.generate(ask()))[-1]
            assert isinstance(last, Failed if name == "add_picture" else Done), name
            if name == "add_picture":
                assert last.code == "storage"
            setattr(engine._store, name, whole)
        assert isinstance(list(engine.generate(ask()))[-1], Done)
        assert engine.health().problems == ()
        assert {job.state for job in engine.jobs()} == {"done", "failed"}
    finally:
        engine.close()


def test_what_ends_threads_does_not_end_the_worker():
    pipe = FakePipeline()
    engine = Engine({"fake": "x"}, device="cpu", load=lambda source: pipe)
    run, pipe._run = pipe._run, lambda *args: sys.exit(3)
    assert isinstance(list(engine.generate(ask()))[-1], Failed)
    pipe._run = run
    assert isinstance(list(engine.generate(ask()))[-1], Done)
    assert engine.health().problems == ()
    engine.close()


def test_health_names_a_worker_that_hangs_or_has_ended(tmp_path):
    pipe, free = FakePipeline(), threading.Event()
    plain = pipe._run
    pipe._run = lambda *args: (free.wait(30), plain(*args))[1]
    engine = Engine({"fake": "x"}, device="cpu", load=lambda source: pipe, server_limits=ServerLimits(hang_seconds=0.1))
    job = engine.submit(ask())
    deadline = time.monotonic() + 20
    while not engine.health().problems:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "no step" in engine.health().problems[0]
    free.set()
    assert engine.stream(job).wait_closed(20)
    assert engine.health().problems == ()
    engine._workers[0].thread = dead = threading.Thread(target=lambda: None)
    dead.start()
    dead.join()
    assert "ended" in engine.health().problems[0]


@pytest.mark.parametrize("content", [b"this is no database at all" * 100, b"SQLite format 3\x00" + b"\xff" * 5000])
def test_a_broken_queue_is_named(tmp_path, content):
    (tmp_path / "jobs.sqlite").write_bytes(content)
    with pytest.raises(StoreError, match=r"jobs\.sqlite"):
        JobStore(tmp_path / "jobs.sqlite")
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(StoreError, match=r"folder\.sqlite"):
        JobStore(tmp_path / "folder.sqlite")


def test_the_queue_is_private_and_of_one_process(tmp_path):
    store = JobStore(tmp_path / "jobs.sqlite")
    store.add("0" * 16, "ann", "{}", 10, 10)
    assert [file.stat().st_mode & 0o077 for file in tmp_path.iterdir()] == [0] * len(list(tmp_path.iterdir()))
    with pytest.raises(StoreInUseError):
        JobStore(tmp_path / "jobs.sqlite")
    store.close()


# ------------------------------------------------------------------------------ readers


def test_an_event_is_encoded_once_for_all_its_readers(tmp_path, monkeypatch):
    encoded = []
    plain = messages.encode_png
    monkeypatch.setattr(messages, "encode_png", lambda image: encoded.append(image) or plain(image))
    pipe = FakePipeline(0.02)
    with serving_page(tmp_path, pipe, with_users=False, streams_per_user=12) as served, client_of(served) as client:
        job = client.post("/v1/jobs", json={**ASK, "steps": 40}).json()["id"]
        begun, told = threading.Barrier(9), []

        def read():
            with client_of(served) as one, one.stream("GET", f"/v1/jobs/{job}/events") as answer:
                begun.wait(20)
                told.append([line for line in answer.iter_lines() if line.startswith("event:")])

        readers = [threading.Thread(target=read) for _ in range(8)]
        for reader in readers:
            reader.start()
        begun.wait(20)
        for reader in readers:
            reader.join(30)
    assert len(told) == 8
    assert all(lines[-1] == "event: done" for lines in told)
    assert len(encoded) <= 40  # not eight times as many
    assert len({id(image) for image in encoded}) == len(encoded)


def test_one_user_reads_a_few_streams_at_a_time(tmp_path):
    limited = serving_page(tmp_path, FakePipeline(0.05), with_users=False, streams_per_user=2)
    with limited as served, client_of(served) as client:
        job = client.post("/v1/jobs", json={**ASK, "steps": 200}).json()["id"]
        path = f"/v1/jobs/{job}/events"
        with client.stream("GET", path) as one, client.stream("GET", path) as two:
            lines = [answer.iter_lines() for answer in (one, two)]
            assert [next(iterator) for iterator in lines]
            assert client.get(path).status_code == 429
        deadline = time.monotonic() + 20
        while True:
            with client.stream("GET", path) as answer:
                if answer.status_code == 200:
                    break
            assert time.monotonic() < deadline
        served.engine.stop(job)


def test_slow_readers_miss_old_steps_and_nothing_else():
    broadcast, number = _Broadcast(), 0
    for picture in range(3):
        for _ in range(50):
            number += 1
            broadcast.add([_Message(number, True, b"step")], False)
        number += 1
        broadcast.add([_Message(number, False, f"result {picture}".encode())], False)
    seen = _latest(broadcast.messages, 0)
    assert sum(one.is_step for one in seen) == KEPT_STEPS
    assert [one.data for one in seen if not one.is_step] == [b"result 0", b"result 1", b"result 2"]
    assert [one.number for one in seen] == sorted(one.number for one in seen)


# ------------------------------------------------------------------------------ uploads


def test_strips_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    content = png(tmp_path, size=(1, 20_000)).read_bytes()
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(UploadError, match=r"1 x 20000.*16384"):
        read_upload(content)


def test_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    at_once, most, lock = 0, 0, threading.Lock()
    plain = uploads.read_upload

    def counted(data):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        try:
            time.sleep(0.01)
            return plain(data)
        finally:
            with lock:
                at_once -= 1

    monkeypatch.setattr(uploads, "read_upload", counted)
    files = [png(tmp_path, (i, 0, 0), name=f"{i}.png").read_bytes() for i in range(12)]
    (tmp_path / "other").mkdir()
    with (
        serving_page(tmp_path / "other", with_users=False) as served,
        client_of(served) as client,
        ThreadPoolExecutor(12) as pool,
    ):
        rows = list(pool.map(lambda content: client.post("/v1/pictures", content=content).json(), files))
    assert len({row["id"] for row in rows}) == 12
    assert most == 1


def test_masks_of_the_page_wait_for_their_turn_and_are_their_users(tmp_path, monkeypatch):
    with serving_page(tmp_path) as served:
        said, sessions = Strings("en"), Sessions(TokenTable(served.users))
        held, recorded = [], []
        monkeypatch.setattr(
            "apps.studio.generation_handlers.read_mask",
            lambda text: held.append(served.engine.uploads.decoding.locked()) or Image.new("L", (32, 32), 255),
        )
        monkeypatch.setattr(served.engine._store, "use_upload", lambda name, owner, size: recorded.append(owner))
        generation = GenerationHandlers(served.engine, said, sessions)
        handlers = SettingsHandlers(served.engine, said, sessions, generation)
        with pytest.raises(KeyError):  # of the model, which isn't among these values
            generation._requests({"mode": "inpaint", "mask": "x"}, "bob")
        handlers.take_source(str(png(tmp_path)), "ann")
    assert held == [True]
    assert recorded == ["bob", "ann"]


def test_sixteen_bits_are_not_cut_off(tmp_path):
    Image.new("I;16", (8, 8), 40_000).save(tmp_path / "deep.png")
    assert read_upload(tmp_path / "deep.png").getpixel((0, 0)) == (156, 156, 156)
    Image.new("I;16", (8, 8), 65_535).save(tmp_path / "white.png")
    assert read_upload(tmp_path / "white.png").getpixel((0, 0)) == (255, 255, 255)


def test_users_have_a_quota_and_what_is_not_used_expires(tmp_path):
    store = JobStore(tmp_path / "jobs.sqlite")
    kept = UploadStore(tmp_path / "uploads", store, UploadQuota(pictures=3, bytes=10**9, seconds=3600))
    names = [kept.add(Image.new("RGB", (8, 8), (i, 0, 0)), "ann") for i in range(3)]
    shared = kept.add(Image.new("RGB", (8, 8), (0, 0, 0)), "bob")
    assert shared == names[0]
    store.add("0" * 16, "ann", f'{{"image": "{names[1]}"}}', 10, 10)
    more = [kept.add(Image.new("RGB", (8, 8), (100 + i, 0, 0)), "ann") for i in range(3)]
    kept.check(names[0], "ann")  # bob has it too
    kept.check(names[1], "ann")  # a waiting job needs it
    with pytest.raises(UploadError):
        kept.check(names[2], "ann")
    for name in more:
        kept.check(name, "ann")
    expiring = UploadStore(tmp_path / "uploads", store, UploadQuota(pictures=3, bytes=10**9, seconds=-1))
    last = expiring.add(Image.new("RGB", (8, 8), (200, 0, 0)), "ann")
    for name in (*more, last):
        with pytest.raises(UploadError):
            kept.check(name, "ann")
    small = UploadStore(tmp_path / "uploads", store, UploadQuota(pictures=99, bytes=150, seconds=3600))
    first = small.add(Image.new("RGB", (8, 8), (201, 0, 0)), "eve")
    small.add(Image.new("RGB", (8, 8), (202, 0, 0)), "eve")
    with pytest.raises(UploadError):
        kept.check(first, "eve")
    store.close()


# -------------------------------------------------------------------------------- queue


def test_users_take_turns(tmp_path):
    store = JobStore(None)
    for i in range(4):
        store.add(f"ann{i}", "ann", "{}", 100, 100)
    first = store.take()
    store.add("bob0", "bob", "{}", 100, 100)
    store.add("eve0", "eve", "{}", 100, 100)
    assert store.ahead() == {"bob0": 1, "eve0": 2, "ann1": 3, "ann2": 4, "ann3": 5}
    order = [first.id]
    while (job := store.take()) is not None:
        order.append(job.id)
        if job.id == "ann1":
            store.add("bob1", "bob", "{}", 100, 100)
    assert order == ["ann0", "bob0", "eve0", "ann1", "bob1", "ann2", "ann3"]


def test_one_user_cannot_fill_the_queue():
    store = JobStore(None)
    for i in range(8):
        store.add(f"ann{i}", "ann", "{}", 8, 8)
    for i in range(4):  # a newcomer gets an equal part, though the queue is full
        store.add(f"bob{i}", "bob", "{}", 8, 8)
    for owner in ("ann", "bob"):
        with pytest.raises(QueueFullError):
            store.add("x", owner, "{}", 8, 9)


def test_pages_of_jobs_do_not_depend_on_the_clock(monkeypatch):
    store = JobStore(None)
    times = iter([50.0, 10.0, 90.0, 20.0])
    monkeypatch.setattr("apps.service.job_store.time.time", lambda: next(times))
    for i in range(4):
        store.add(f"job{i}", "ann", "{}", 9, 9)
    assert [job.id for job in store.jobs("ann", 2)] == ["job3", "job2"]
    assert [job.id for job in store.jobs("ann", 2, "job2")] == ["job1", "job0"]
    assert store.jobs("ann", 2, "unknown") == []


# ------------------------------------------------------------------------------- others


@pytest.mark.parametrize("size", [(4096, 32), (32, 4096), (4096, 64), (5, 4000), (4000, 5), (2048, 128), (300, 200)])
def test_sizes_for_uploads_stay_in_range(size):
    model = type("Model", (), {"sizes": (), "side": 512, "width": 512, "multiple": 16})()
    width, height = fit_size(size, model)
    assert 32 <= width <= 2048
    assert 32 <= height <= 2048
    assert width % 16 == height % 16 == 0


def test_words_of_prompts_stay_out_of_the_servers_log():
    passes = [
        PromptFilter().filter(
            logging.LogRecord(name, logging.WARNING, __file__, 1, "the words %s", ("'secret'",), None)
        )
        for name in (words.logger.name, "apps.service.engine")
    ]
    assert passes == [False, True]


def test_folders_of_dead_processes_go(tmp_path):
    with private_folder(tmp_path) as alive:
        assert alive.stat().st_mode & 0o077 == 0
        dead = tmp_path / "tessera-studio-dead"
        dead.mkdir()
        (dead / "lock").touch()
        (dead / "upload.png").touch()
        (tmp_path / "tessera-studio-link").symlink_to(tmp_path)
        trap = tmp_path / "tessera-studio-trap"
        trap.mkdir()
        (trap / "lock").symlink_to(dead / "upload.png")
        remove_stale(tmp_path)
        assert trap.is_dir()
        assert alive.is_dir()
        assert not dead.exists()
    assert not alive.exists()


def test_readers_are_told_when_events_can_not_be_encoded(monkeypatch):
    real = streams.event_message

    def fail(job, event):
        if not isinstance(event, Failed):
            raise ValueError("odd")
        return real(job, event)

    monkeypatch.setattr(streams, "event_message", fail)
    live = EventStream()
    live.tell(Done(1.0))
    reading = streams.JobStreams(SimpleNamespace(live_stream=lambda job: live)).read(SimpleNamespace(id="abc"), "ann")

    async def read():
        return b"".join([data async for data in reading]).decode()

    told = asyncio.run(read())
    assert "event: failed" in told
    assert "/v1/jobs/abc" in told
