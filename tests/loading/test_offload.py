"""Offloading: exact, in the right order, with previews, stops and fingerprints as without it.

The hooks of accelerate and diffusers do on a CPU what they do on an accelerator, but for the copying; what needs the
accelerator itself is marked `gpu`.
"""

import threading

import pytest
import torch

from apps.service.engine import Engine
from apps.service.events import Done, Step, Stopped
from apps.service.requests import TextToImageRequest
from dit.tokenizers import vit_autoencoder
from pipelines import load_pipeline
from pipelines.info.fingerprint import fingerprint
from pipelines.loading.offload import apply_offload, check_offload
from pipelines.previews import preview
from tests.families.tiny import tiny_call, tiny_pipeline

CPU = torch.device("cpu")
KINDS = ("model", "sequential", "group")


def tiny(name):
    pipe = tiny_pipeline(name)
    if name == "text_dit":  # its previews come from a buffer of the autoencoder, which offloading moves about too
        torch.nn.init.normal_(pipe.vae.preview_factors, generator=torch.Generator().manual_seed(0))
    return pipe


@pytest.fixture(scope="module")
def plain():
    return {name: tiny(name) for name in ("text_dit", "sd3")}


@pytest.fixture(scope="module")
def pictures(plain):
    return {name: pipe(**tiny_call(name)).images for name, pipe in plain.items()}


@pytest.fixture(params=[(name, kind) for name in ("text_dit", "sd3") for kind in KINDS], ids="-".join)
def offloaded(request):
    name, kind = request.param
    return name, apply_offload(tiny(name), CPU, kind)


@pytest.fixture
def runnable(offloaded):
    """Sequential offloading from the CPU to the CPU fails within accelerate, which frees what it has just stored."""
    if any(weight.is_meta for weight in offloaded[1].transformer.parameters()):
        pytest.skip("needs an accelerator")
    return offloaded


def test_offloading_changes_nothing(runnable, plain, pictures):
    name, pipe = runnable
    shown = []

    def watch(pipe, step, timestep, tensors):
        shown.extend(preview(pipe, tensors["latents"], 16, 32))
        return {}

    assert torch.equal(pipe(**tiny_call(name), callback_on_step_end=watch).images, pictures[name])
    assert len(shown) == 2
    assert len(shown[0].getcolors(1 << 16)) > 1


def test_previews_look_the_same(offloaded, plain, monkeypatch):
    name, pipe = offloaded
    channels = pipe.transformer.config.in_channels
    latents = torch.randn(1, channels, 4, 8, generator=torch.Generator().manual_seed(1))
    if name == "text_dit" and pipe.vae.from_latent.weight.is_meta:  # then a linear map stands in for the decoder
        monkeypatch.setattr(vit_autoencoder, "PREVIEW_TOKENS", 0)
    ours, theirs = preview(pipe, latents, 16, 32)[0], preview(plain[name], latents, 16, 32)[0]
    assert ours.tobytes() == theirs.tobytes()
    assert len(ours.getcolors(1 << 16)) > 8


def test_fingerprints_are_those_of_the_weights(offloaded, plain):
    name, pipe = offloaded
    assert fingerprint(pipe) == fingerprint(plain[name])


def test_the_engine_stops_and_goes_on(runnable):
    _, pipe = runnable
    engine = Engine({"tiny": "somewhere"}, device="cpu", load=lambda source: pipe)
    ask = TextToImageRequest(prompt="a red apple", height=32, width=32, steps=8, seed=1)
    stop, events = threading.Event(), []
    for event in engine.generate(ask, stop):
        events.append(event)
        if isinstance(event, Step):
            stop.set()
    assert isinstance(events[-1], Stopped)
    again = list(engine.generate(ask.model_copy(update={"steps": 2})))
    assert isinstance(again[-1], Done), again[-1]
    assert any(isinstance(event, Step) and event.preview is not None for event in again)


def test_offload_goes_first_and_instead_of_the_move(monkeypatch):
    pipe = tiny_pipeline("text_dit")
    calls = []
    monkeypatch.setattr(type(pipe), "to", lambda self, *args: calls.append("to") or self)
    for method in ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"):
        monkeypatch.setattr(type(pipe), method, lambda self, method=method, **where: calls.append((method, where)))
    cuda = torch.device("cuda:1")
    for offload in ("none", *KINDS):
        assert apply_offload(pipe, cuda, offload) is pipe
    group = {"onload_device": cuda, "offload_type": "leaf_level", "use_stream": True, "non_blocking": True}
    assert calls == [
        "to",
        ("enable_model_cpu_offload", {"device": cuda}),
        ("enable_sequential_cpu_offload", {"device": cuda}),
        ("enable_group_offload", group),
    ]
    monkeypatch.setattr(type(pipe), "model_cpu_offload_seq", None)
    with pytest.raises(ValueError, match=r"doesn't say in which order its components run.*'group' or 'sequential'"):
        apply_offload(pipe, cuda, "model")


@pytest.mark.parametrize("offload", KINDS)
def test_without_an_accelerator_it_is_refused(offload, tmp_path):
    with pytest.raises(ValueError, match=f"offload='{offload}' keeps weights on the CPU.*device 'cpu' has none"):
        check_offload(offload, CPU)
    with pytest.raises(ValueError, match="device 'cpu' has none"):
        Engine({"tiny": str(tmp_path)}, device="cpu", offload=offload)
    check_offload(offload, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("offload", KINDS)
def test_on_an_accelerator(offload, folder_of, pictures):
    pipe = load_pipeline(folder_of("text_dit"), device="cuda", dtype="float32", offload=offload)
    painted = pipe(**tiny_call("text_dit")).images.cpu()
    torch.testing.assert_close(painted, pictures["text_dit"], atol=1e-3, rtol=0)
