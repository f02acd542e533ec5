"""Nothing is lost and nothing is doubled, whatever happens to the process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from apps.service.engine import Engine
from apps.service.events import Done, Failed, Picture, Step, Stopped
from apps.service.job_store import JobStore, StoredPicture, StoreInUseError
from apps.service.limits import ServerLimits
from apps.service.metadata import read_picture, request_from_settings
from apps.service.requests import TextToImageRequest
from tests.studio.fakes import FakePipeline
from tests.studio.killed import JOBS, PICTURES, STEPS

PROJECT = Path(__file__).resolve().parents[2]


def start(folder, pipe=None, **limits):
    pipe = pipe or FakePipeline(0.02)
    return Engine({"fake": "x"}, folder, device="cpu", load=lambda source: pipe, server_limits=ServerLimits(**limits))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills its own children")
def test_the_line_survives_kill_9(tmp_path):
    command = [sys.executable, "-m", "tests.studio.killed", str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()

    engine = start(tmp_path)
    jobs = engine.jobs()
    assert Counter(job.state for job in jobs) == {"done": JOBS}
    assert any(job.attempts > 1 for job in jobs)  # some were really hit in the midst of it
    files = {path.name for path in tmp_path.glob("*.png")}
    assert files == {picture.name for job in jobs for picture in engine.pictures(job.id)}
    assert len(files) == JOBS * PICTURES
    seeds = [read_picture(tmp_path / name).seed for name in files]
    assert len(set(seeds)) == len(seeds)
    for name in sorted(files)[:3]:  # and what was generated in pieces is what is generated in one go
        settings = read_picture(tmp_path / name)
        assert settings.steps == STEPS
        again = next(event for event in engine.generate(request_from_settings(settings)) if isinstance(event, Picture))
        with Image.open(tmp_path / name) as image:
            assert image.tobytes() == again.image.tobytes()
    assert not list(tmp_path.glob(".*.part"))
    engine.close()


def test_closing_puts_the_running_job_back(tmp_path):
    engine = start(tmp_path, FakePipeline(0.05))
    job = engine.submit(TextToImageRequest(prompt="x", steps=100, num_images=2))
    other = engine.submit(TextToImageRequest(prompt="y", steps=2))
    while not any(isinstance(event, Step) for _, event in engine.stream(job).read(0, 1.0)):
        pass
    engine.close()
    engine = start(tmp_path, FakePipeline())
    assert all(engine.stream(one).wait_closed(60) for one in (job, other))
    assert [engine.job(one).state for one in (job, other)] == ["done", "done"]
    assert len(engine.pictures(job)) == 2
    assert engine.job(job).attempts == 1  # it was put back, not begun twice
    engine.close()


def test_a_job_that_kills_the_server_is_given_up(tmp_path):
    store = JobStore(tmp_path / "jobs.sqlite")
    store.add("a" * 16, "me", "{}", 8, 8)
    for _ in range(3):
        assert store.take().id == "a" * 16
        store.recover(attempts=3)
    assert store.take() is None
    assert (store.get("a" * 16).state, store.get("a" * 16).code) == ("failed", "crashed")


def test_two_engines_never_share_a_line(tmp_path):
    engine = start(tmp_path)
    with pytest.raises(StoreInUseError, match="Another tessera"):
        start(tmp_path)
    engine.close()
    start(tmp_path).close()


def test_pictures_count_once(tmp_path):
    store = JobStore(None)
    store.add("b" * 16, "me", "{}", 8, 8)
    for _ in range(2):
        store.add_picture(StoredPicture("b" * 16, 0, "x.png", "{}", 1.0))
    assert len(store.pictures("b" * 16)) == 1
    assert len(store.history("me", 10)) == 1
    assert store.history("you", 10) == []


def test_one_user_does_not_fill_the_line():
    pipe, end = FakePipeline(), threading.Event()
    pipe.at_step = lambda step: end.wait(60)
    engine = start(None, pipe, queue=6, queue_per_user=2)
    for _ in range(2):
        engine.submit(TextToImageRequest(prompt="x", steps=50), owner="greedy")
    refused = list(engine.generate(TextToImageRequest(prompt="x"), owner="greedy"))
    assert isinstance(refused[0], Failed)
    assert (refused[0].code, len(refused)) == ("queue_full", 1)
    modest = engine.submit(TextToImageRequest(prompt="x", steps=1), owner="modest")
    assert [job.owner for job in engine.jobs("modest")] == ["modest"]
    for job in engine.jobs("greedy"):
        engine.stop(job.id)
    end.set()
    assert engine.stream(modest).wait_closed(60)
    assert engine.job(modest).state == "done"


def test_finish_now_keeps_the_picture_and_can_be_repeated(tmp_path):
    class Patient(FakePipeline):
        """Ends when it is told, like ours."""

        finish_now = property(lambda self: self._ends, lambda self, value: setattr(self, "_ends", value))

        def _run(self, height, width, steps, generator, callback, names):
            self._interrupt = self.finish_now = False
            latents = torch.randn(1, 3, height // 16, width // 16, generator=generator)
            for i in range(steps):
                self.at_step(i)
                latents = latents * 0.9 + 0.1
                callback(self, i, None, dict.fromkeys(names, latents))
                if self.finish_now or self._interrupt:
                    break
            image = Image.fromarray((latents[0].sigmoid() * 255).byte().permute(1, 2, 0).numpy())
            return SimpleNamespace(images=[] if self._interrupt else [image.resize((width, height))])

    pipe, finished = Patient(), threading.Event()
    pipe.at_step = lambda step: step != 3 or finished.wait(60)
    engine = start(tmp_path, pipe)
    job = engine.submit(TextToImageRequest(prompt="x", steps=200, num_images=3))
    assert not engine.finish(engine.submit(TextToImageRequest(prompt="waits", steps=1)))
    events = []
    for event in engine.stream(job):
        events.append(event)
        if isinstance(event, Step) and event.step == 3:
            assert engine.finish(job)
            finished.set()
    assert isinstance(events[-1], Done)
    (picture,) = (event for event in events if isinstance(event, Picture))
    assert picture.metadata.finish_after == 4  # the step that ran when it was asked
    again = next(
        event for event in engine.generate(request_from_settings(picture.metadata)) if isinstance(event, Picture)
    )
    assert again.image.tobytes() == picture.image.tobytes()
    engine.close()


def test_a_stopped_job_keeps_its_finished_pictures(tmp_path):
    pipe, stop, events = FakePipeline(), threading.Event(), []
    pipe.at_step = lambda step: pipe.steps_run < 5 or stop.wait(60)  # the second image begins
    engine = start(tmp_path, pipe)
    for event in engine.generate(TextToImageRequest(prompt="x", steps=5, num_images=9), stop):
        events.append(event)
        if isinstance(event, Picture):
            stop.set()
    assert isinstance(events[-1], Stopped)
    (job,) = engine.jobs()
    assert job.state == "stopped"
    assert len(engine.pictures(job.id)) == 1
    assert isinstance(engine.stream(job.id).read()[-1][1], Stopped)
    with pytest.raises(KeyError):
        engine.stream("no such job")
    engine.close()
