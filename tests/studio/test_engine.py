from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from apps.service.engine import Engine
from apps.service.events import Done, Failed, ModelLoading, Picture, Queued, Step, Stopped
from apps.service.limits import ServerLimits
from apps.service.metadata import read_picture
from apps.service.requests import TextToImageRequest
from tests.studio.fakes import FakePipeline, ForeignPipeline


def make_engine(pipe, tmp_path=None, may_load=None, **limits):
    def load(source):
        assert may_load is None or may_load.wait(60)
        return pipe

    return Engine(
        {"fake": "somewhere"},
        output_dir=tmp_path,
        device="cpu",
        server_limits=ServerLimits(**limits),
        load=load,
    )


def ask(**settings):
    return TextToImageRequest(**{"prompt": "a red apple", "steps": 3, **settings})


def test_events_come_in_order_and_the_file_reproduces_the_picture(tmp_path):
    seen_loading, events = threading.Event(), []
    engine = make_engine(FakePipeline(), tmp_path, may_load=seen_loading)
    for event in engine.generate(ask(seed=7, num_images=2, height=64, width=96)):
        events.append(event)
        seen_loading.set()

    assert [type(event) for event in events] == [
        ModelLoading, Step, Step, Step, Picture, Step, Step, Step, Picture, Done,
    ]  # fmt: skip
    first, second = (event for event in events if isinstance(event, Picture))
    assert (first.seed, second.seed) == (7, 8)
    assert first.image.size == (96, 64)
    assert read_picture(first.path) == first.metadata
    settings = first.metadata
    again = ask(prompt=settings.prompt, seed=settings.seed, steps=settings.steps,
                height=settings.height, width=settings.width)  # fmt: skip
    repeated = next(event for event in engine.generate(again) if isinstance(event, Picture))
    assert repeated.image.tobytes() == first.image.tobytes()
    assert repeated.path != first.path
    assert settings.scheduler == {"class": "SimpleNamespace", "shift": 3.0}
    assert settings.versions["torch"] == torch.__version__


def test_model_defaults_fill_what_a_request_leaves_open():
    engine = make_engine(FakePipeline())
    picture = next(e for e in engine.generate(TextToImageRequest(prompt="x")) if isinstance(e, Picture))
    assert (picture.metadata.steps, picture.metadata.guidance, picture.image.size) == (28, 4.0, (128, 128))
    assert picture.path is None


def test_an_open_seed_is_drawn_and_recorded():
    engine = make_engine(FakePipeline())
    seeds = {next(e.seed for e in engine.generate(ask()) if isinstance(e, Picture)) for _ in range(3)}
    assert len(seeds) == 3


def test_steps_carry_previews_and_a_shrinking_estimate(monkeypatch):
    pipe, now = FakePipeline(), [0.0]
    pipe.at_step = lambda step: now.append(now[-1] + 0.0625)  # seconds of a clock that only steps move
    for module in ("apps.service.inference", "apps.service.job_runner"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=lambda: now[-1]))
    steps = [e for e in make_engine(pipe).generate(ask(steps=8)) if isinstance(e, Step)]
    assert [step.step for step in steps] == list(range(1, 9))
    assert [step.step for step in steps if step.preview is not None] == [1, 4, 7]  # 0.15 seconds apart at least
    assert steps[0].preview.size == (8, 8)
    assert [step.eta for step in steps] == [0.0625 * left for left in range(7, -1, -1)]


@pytest.mark.parametrize("kind", [FakePipeline, ForeignPipeline])
def test_stop_ends_within_one_step_and_decodes_nothing(kind):
    pipe, stop, events = kind(), threading.Event(), []
    pipe.at_step = lambda step: step < 2 or stop.wait(60)  # the third one runs when stop is pressed
    for event in make_engine(pipe).generate(ask(steps=50), stop):
        events.append(event)
        if isinstance(event, Step) and event.step == 2:
            stop.set()
    assert isinstance(events[-1], Stopped)
    assert [event.step for event in events if isinstance(event, Step)] == [1, 2]
    assert pipe.steps_run == 3
    assert pipe.decodes == 0
    assert pipe.running == 0
    assert pipe.hooks_freed == (kind is ForeignPipeline)


def test_closing_the_iterator_stops_and_waits_for_the_worker():
    pipe, stop = FakePipeline(), threading.Event()
    pipe.at_step = lambda step: step == 0 or stop.wait(60)
    engine = make_engine(pipe)
    events = engine.generate(ask(steps=50), stop)
    while not isinstance(next(events), Step):
        pass
    events.close()
    assert pipe.running == 0
    assert pipe.decodes == 0
    assert isinstance(list(engine.generate(ask()))[-1], Done)  # and the place in the line is free again


def test_requests_run_one_at_a_time_and_know_their_place():
    pipe, all_in_line = FakePipeline(), threading.Event()
    pipe.at_step = lambda step: all_in_line.wait(60)
    engine = make_engine(pipe)
    logs = [[] for _ in range(3)]

    def consume(log):
        log.extend(engine.generate(ask(steps=5)))

    threads = [threading.Thread(target=consume, args=(log,)) for log in logs]
    for number, thread in enumerate(threads, 1):
        thread.start()
        while len(engine.jobs()) < number or not pipe.in_step.wait(0.01):
            pass  # until it stands in line, and the first one is being generated
    all_in_line.set()
    for thread in threads:
        thread.join()
    assert pipe.overlaps == 0
    assert all(isinstance(log[-1], Done) for log in logs)
    assert logs[2][:2] == [Queued(2), Queued(1)]


def test_a_waiting_request_can_be_stopped():
    pipe, end = FakePipeline(), threading.Event()
    pipe.at_step = lambda step: step == 0 or end.wait(60)
    engine = make_engine(pipe)
    first = engine.generate(ask(steps=50), end)
    while not isinstance(next(first), Step):
        pass
    stop = threading.Event()
    waiting = engine.generate(ask(), stop)
    assert next(waiting) == Queued(1)
    stop.set()
    assert list(waiting) == [Stopped()]
    first.close()


def test_a_full_line_says_so():
    pipe, end = FakePipeline(), threading.Event()
    pipe.at_step = lambda step: step == 0 or end.wait(60)
    engine = make_engine(pipe, queue=1)
    first = engine.generate(ask(steps=50), end)
    while not isinstance(next(first), Step):
        pass
    (event,) = engine.generate(ask())
    assert isinstance(event, Failed)
    assert event.code == "queue_full"
    first.close()


@pytest.mark.parametrize("kind", [FakePipeline, ForeignPipeline])
def test_the_time_limit_holds(kind):
    pipe = kind(step_seconds=0.05)
    last = list(make_engine(pipe, seconds=0.1).generate(ask(steps=50)))[-1]
    assert isinstance(last, Failed)
    assert last.code == "too_slow"
    assert pipe.decodes == 0


def test_wrong_wishes_fail_with_a_reason_and_leave_the_engine_usable():
    engine = make_engine(FakePipeline())
    unknown = list(engine.generate(ask(model="../etc")))[-1]
    wrong = list(engine.generate(ask(height=72, width=72)))[-1]
    assert (unknown.code, wrong.code) == ("unknown_model", "bad_request")
    assert "multiple of 16" in wrong.message
    assert isinstance(list(engine.generate(ask()))[-1], Done)


def test_a_setting_the_pipeline_lacks_is_an_error_not_a_no_op():
    class Plain(FakePipeline):
        def __call__(self, prompt, height=None, width=None, num_inference_steps=2, generator=None, output_type="pil"):
            return self._run(height, width, num_inference_steps, generator, None, ())

    engine = make_engine(Plain())
    refused = list(engine.generate(ask(negative_prompt="blue")))[-1]
    assert refused.code == "bad_request"
    assert "negative_prompt" in refused.message
    assert isinstance(list(engine.generate(ask()))[-1], Done)


def test_a_model_that_does_not_load_hides_the_path_and_may_be_retried():
    attempts = []

    def load(source):
        attempts.append(source)
        if len(attempts) == 1:
            raise OSError("no file /home/someone/secret/model_index.json")
        return FakePipeline()

    engine = Engine({"a": "/home/someone/secret"}, device="cpu", load=load)
    failed = list(engine.generate(ask()))[-1]
    assert failed.code == "model_failed"
    assert "secret" not in failed.message
    assert isinstance(failed.cause, OSError)
    assert isinstance(list(engine.generate(ask()))[-1], Done)


def test_the_shelf_keeps_only_so_many_models():
    loads = []

    def load(source):
        loads.append(source)
        return FakePipeline()

    engine = Engine({k: k for k in "abc"}, device="cpu", server_limits=ServerLimits(loaded_models=2), load=load)
    for key in "abcba":
        engine.model(key).result(60)
    assert loads == ["a", "b", "c", "a"]


def test_memory_trouble_is_named():
    class Greedy(FakePipeline):
        def _run(self, *args):
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert list(make_engine(Greedy()).generate(ask()))[-1].code == "out_of_memory"


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt": "  "},
        {"prompt": "x" * 2_001},
        {"steps": 0},
        {"steps": 10_000},
        {"guidance": float("nan")},
        {"seed": -1},
        {"num_images": 1_000},
        {"height": 64},
        {"height": 100, "width": 100},
        {"height": 8, "width": 8},
        {"height": 2_048, "width": 2_048},
        {"unknown": 1},
    ],
)
def test_requests_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=r".+"):
        ask(**settings)


def test_devices_and_dtypes_are_checked():
    with pytest.raises(ValueError, match="nonsense"):
        Engine({"a": "a"}, device="nonsense")
    with pytest.raises(ValueError, match="int7"):
        Engine({"a": "a"}, device="cpu", dtype="int7")
    with pytest.raises(ValueError, match="at least one"):
        Engine({}, device="cpu")
