"""Memory profiles, number formats and attention backends: for one job, on record, and gone after it."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import gradio as gr
import httpx
import pytest
import torch
from PIL import Image

from apps.api.app import create_app
from apps.commands.generate import DeviceOptions, run
from apps.commands.given_options import make_options
from apps.service import compute_profiles as profiles
from apps.service.acceleration import accelerated
from apps.service.compute_profiles import (
    NO_ACCELERATOR,
    PROFILES,
    LoadOptions,
    UnavailableError,
    load_options_of,
    memory_profiles,
)
from apps.service.engine import Engine
from apps.service.events import Done, Failed, Picture
from apps.service.grid import plan, read_axis
from apps.service.metadata import read_picture, request_from_settings, save_picture
from apps.service.option_values import Acceleration
from apps.service.request_error import RequestError
from apps.service.requests import TextToImageRequest
from apps.studio.forms import form_to_request, settings_to_form
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.panels import memory_note
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SettingsHandlers
from apps.studio.strings import Strings
from dit.runtime.diffusers_compat import active_attention_backend, attention_backend_scope
from tests.families.tiny import tiny_pipeline
from tests.pipes.tiny import tiny_text_to_image_pipeline
from tests.studio.test_page import PAGE

WORDS = Strings("en")
MATH = "_native_math"


def ask(**settings):
    return TextToImageRequest(**{"prompt": "a red apple", "steps": 2, "seed": 1, "height": 32, "width": 32, **settings})


def generate(engine, request):
    told = list(engine.generate(request))
    assert isinstance(told[-1], Done), told[-1]
    return next(event for event in told if isinstance(event, Picture))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_text_to_image_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def engine(folder, tmp_path):
    engine = Engine({"tiny": str(folder)}, tmp_path, device="cpu")
    yield engine
    engine.close()


def watch(pipe, seen):
    """Note what every attention layer of a network is told to use, and by the thread of which worker."""

    def note(layer, given):
        name = layer.processor._attention_backend
        seen.append((threading.current_thread(), getattr(name, "value", name)))

    for part in pipe.transformer.modules():
        if hasattr(part, "processor"):
            part.register_forward_pre_hook(note)
    return pipe


# ---------------------------------------------------------------------------- attention


def test_a_jobs_attention_is_gone_with_it(engine):
    seen, before = [], active_attention_backend()
    watch(engine.model().result(60).pipe, seen)
    first = generate(engine, ask(attention=MATH))
    assert {name for _, name in seen} == {MATH}
    assert "attention backend _native_math" in first.report
    seen.clear()
    plain = generate(engine, ask())
    assert {name for _, name in seen} == {None}
    assert active_attention_backend() == before
    assert (first.metadata.attention, plain.metadata.attention) == (MATH, None)
    stop = threading.Event()
    for event in engine.generate(ask(attention=MATH, steps=50), stop):  # also when it is stopped
        if type(event).__name__ == "Step":
            stop.set()
    seen.clear()
    generate(engine, ask())
    assert {name for _, name in seen} == {None}


def test_a_job_on_another_device_is_left_alone(tmp_path):
    """Two workers at once: diffusers' own switch would reach both."""
    seen = []
    engine = Engine(
        {"tiny": "x"}, tmp_path, device="cpu,cpu", load=lambda source: watch(tiny_text_to_image_pipeline(), seen)
    )  # a pipeline a worker
    try:
        jobs = [engine.submit(ask(attention=MATH, steps=60)), engine.submit(ask(steps=60))]
        assert all(engine.stream(job).wait_closed(60) for job in jobs)
        assert [engine.job(job).state for job in jobs] == ["done", "done"]
    finally:
        engine.close()
    by_worker = {}
    for worker, name in seen:
        by_worker.setdefault(worker, set()).add(name)
    if len(by_worker) == 2:
        assert sorted(by_worker.values(), key=str) == [{MATH}, {None}]
    else:  # one worker was quicker than the other could wake: it had both, one after the other
        assert list(by_worker.values()) == [{MATH, None}]


def test_processors_get_back_what_they_had():
    network = tiny_text_to_image_pipeline().transformer
    processors = [part.processor for part in network.modules() if hasattr(part, "processor")]
    processors[0]._attention_backend = "flex"
    with attention_backend_scope([network], MATH) as layers:
        assert layers == len(processors) > 1
        assert {one._attention_backend.value for one in processors} == {MATH}
    assert [one._attention_backend for one in processors] == ["flex"] + [None] * (len(processors) - 1)
    with pytest.raises(ValueError, match="nonsense"), attention_backend_scope([network], "nonsense"):
        pass


def test_a_network_without_such_a_switch_is_refused():
    with pytest.raises(RequestError, match="attention"), accelerated(SimpleNamespace(), Acceleration(attention=MATH)):
        pass


def test_backends_are_those_that_work_here(monkeypatch):
    found = profiles.attention_backends("cpu")
    assert found["native"] == found[MATH] == ""
    assert all(name in found for name in ("flash", "sage", "xformers"))
    assert not [name for name in found if "hub" in name]  # they would fetch code
    monkeypatch.setattr("dit.attention.backends.find_spec", lambda name: None)
    assert profiles.try_attention("flash", torch.device("cpu")) == "flash_attn is not installed"
    assert profiles.try_attention("_sage_qk_int8_pv_fp8_cuda", torch.device("cpu")).endswith("not installed")


# ---------------------------------------------------------------------------- precision


def test_a_number_format_is_recorded_and_paints_the_same_again(engine, folder, tmp_path):
    """The bar: from the file alone, in the engine and on a command line that says nothing of the format."""
    single, half = generate(engine, ask()), generate(engine, ask(dtype="bfloat16"))
    assert (single.metadata.dtype, half.metadata.dtype) == ("float32", "bfloat16")
    assert half.image.tobytes() != single.image.tobytes()
    again = generate(engine, request_from_settings(read_picture(half.path)))
    assert again.image.tobytes() == half.image.tobytes()
    assert generate(engine, ask()).image.tobytes() == single.image.tobytes()  # its weights are not the rounded ones
    run(make_options(model=str(folder)), tmp_path / "cli.png", DeviceOptions(device="cpu"), settings=half.path)
    assert read_picture(tmp_path / "cli.png").dtype == "bfloat16"
    with Image.open(tmp_path / "cli.png") as image:
        assert image.tobytes() == half.image.tobytes()
    run(
        make_options(model=str(folder), dtype="float32"),
        tmp_path / "b.png",
        DeviceOptions(device="cpu"),
        settings=half.path,
    )
    with Image.open(tmp_path / "b.png") as image:
        assert image.tobytes() == single.image.tobytes()


# ------------------------------------------------------------------------------- memory


def test_profiles_of_a_machine_without_an_accelerator(engine):
    here = memory_profiles("cpu")
    assert [name for name, why in here.items() if not why] == ["fast", "tiles"]
    assert set(memory_profiles("cuda").values()) == {""}
    for name in ("balanced", "low"):
        with pytest.raises(UnavailableError, match=f"{NO_ACCELERATOR}. Choose among fast, tiles"):
            engine.submit(ask(memory=name))
    assert isinstance(list(engine.generate(ask(memory="low")))[-1], Failed)
    with pytest.raises(UnavailableError, match=r"'nonsense' can't be had.*native"):
        engine.submit(ask(attention="nonsense"))
    assert engine.jobs() == []


def test_profiles_choose_what_is_loaded():
    default_options = LoadOptions(torch.bfloat16, "group")
    assert load_options_of(ask(), default_options) == default_options
    assert load_options_of(ask(memory="fast", dtype="float32"), default_options) == LoadOptions(torch.float32, "none")
    assert [load_options_of(ask(memory=name), default_options).offload for name in PROFILES] == [
        "none",
        "none",
        "model",
        "sequential",
    ]


def test_tiles_are_switched_on_for_one_job(tmp_path, monkeypatch):
    pipe = tiny_pipeline("pixart")
    engine = Engine({"tiny": "x"}, tmp_path, device="cpu", load=lambda source: pipe)
    seen, decode = [], pipe.vae.decode
    monkeypatch.setattr(
        pipe.vae,
        "decode",
        lambda *given, **more: (seen.append((pipe.vae.use_tiling, pipe.vae.use_slicing)), decode(*given, **more))[1],
    )
    tiled = generate(engine, ask(memory="tiles"))
    assert seen == [(True, True)]
    assert "decodes in tiles" in tiled.report
    assert tiled.metadata.memory == "tiles"
    assert generate(engine, request_from_settings(tiled.metadata)).image.tobytes() == tiled.image.tobytes()
    generate(engine, ask())
    assert seen == [(True, True), (True, True), (False, False)]
    engine.close()


def test_a_decoder_without_tiles_is_refused(engine):
    failed = list(engine.generate(ask(memory="tiles")))[-1]
    assert (failed.code, "can't decode in tiles" in failed.message) == ("bad_request", True)


# ----------------------------------------------------------------- page, grid, API, CLI


def test_the_page_offers_what_there_is_and_says_what_is_not(engine):
    sessions = Sessions(None)
    handlers = SettingsHandlers(engine, WORDS, sessions, GenerationHandlers(engine, WORDS, sessions))
    changes = handlers.load_model_controls("tiny", "text")
    offered = [name for _, name in changes["attention"]["choices"]]
    assert offered[:2] == ["", "native"]
    assert "flash" not in offered
    assert "balanced, low" in changes["memory_note"]
    assert "tiles" in changes["memory_note"]  # this model's decoder has none
    assert memory_note(WORDS, ["cuda"]) == ""
    request = form_to_request({**PAGE, "dtype": "bfloat16", "attention": MATH, "memory": "fast"}, ("text_to_image",))
    assert (request.dtype, request.attention, request.memory) == ("bfloat16", MATH, "fast")


def test_settings_of_another_machine_are_taken_as_far_as_they_go(engine, tmp_path, monkeypatch):
    sessions = Sessions(None)
    handlers = SettingsHandlers(engine, WORDS, sessions, GenerationHandlers(engine, WORDS, sessions))
    settings = generate(engine, ask()).metadata.model_copy(update={"attention": "flash", "memory": "low"})
    assert settings_to_form(settings)["memory"] == "low"
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "there.png", settings)
    warned = []
    monkeypatch.setattr(gr, "Warning", warned.append)
    changes = handlers.load_settings(str(tmp_path / "there.png"))
    assert (changes["memory"], changes["attention"], changes["dtype"]) == ("", "", "float32")
    assert len(warned) == 2
    saved = {name: value for name, value in PAGE.items() if isinstance(value, str | int | float)}
    remembered = handlers._remembered({**saved, "model": "tiny", "attention": "flash", "memory": "tiles"})
    assert "attention" not in remembered
    assert remembered["memory"] == "tiles"


def test_grids_vary_them():
    cells = plan(ask(), [read_axis("attention", f"off, {MATH}"), read_axis("dtype", "float32, bfloat16"),
                         read_axis("memory", "fast")])  # fmt: skip
    assert {(cell.request.attention, cell.request.dtype) for cell in cells} == {
        (None, "float32"), (None, "bfloat16"), (MATH, "float32"), (MATH, "bfloat16"),
    }  # fmt: skip


def test_the_api_tells_and_refuses(engine):
    transport = httpx.ASGITransport(create_app(engine))

    async def talk():
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            wrong = await client.post("/v1/jobs", json={"task": "text_to_image", "prompt": "x", "memory": "balanced"})
            odd = await client.post("/v1/jobs", json={"task": "text_to_image", "prompt": "x", "attention": "../x"})
            return (await client.get("/v1/profiles")).json(), wrong, odd

    import anyio

    told, wrong, odd = anyio.run(talk)
    assert told["memory"]["cpu"] == {"fast": None, "tiles": None, "balanced": NO_ACCELERATOR, "low": NO_ACCELERATOR}
    assert told["attention"]["cpu"]["native"] is None
    assert told["dtype"] == ["float32", "bfloat16", "float16"]
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (422, "unavailable")
    assert odd.status_code == 422


def test_the_command_line_loads_a_model_once_and_for_its_profile():
    assert (
        DeviceOptions(device="cpu").for_memory_profile("low").offload == "none"
    )  # the engine says that it can't be had
    assert DeviceOptions(device="cpu").for_memory_profile(None).offload == "none"
    with pytest.raises(ValueError, match="leave out --offload"):
        DeviceOptions(device="cpu", offload="model").for_memory_profile("fast")
