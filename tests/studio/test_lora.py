"""LoRA files by name: on the model for one job, off again to the last bit, and never another file of the same name."""

from __future__ import annotations

import hashlib
import logging
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from apps.commands.generate import DeviceOptions, run
from apps.commands.given_options import make_options
from apps.service import engine as engine_module
from apps.service.engine import Engine
from apps.service.events import Failed, Picture
from apps.service.job_runner import _notes_on_words
from apps.service.lora import LoraError, find_loras
from apps.service.metadata import read_picture, request_from_settings
from apps.service.option_values import Lora
from apps.service.requests import TextToImageRequest
from apps.studio.album import Shown
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.problems import PLACE
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SettingsHandlers
from apps.studio.strings import Strings
from tests.pipes.tiny import tiny_text_to_image_pipeline
from tests.studio.fakes import FakePipeline


def write_lora(folder, name, seed, rank=2):
    """Write a LoRA file of random weights for the tiny pipeline."""
    torch.manual_seed(seed)
    pipe = tiny_text_to_image_pipeline()
    config = LoraConfig(r=rank, lora_alpha=64, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    pipe.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        weight_name=f"{name}.safetensors",
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
    )
    return folder / f"{name}.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("ink", "wool")):
        write_lora(folder, name, seed)
    tensors = load_file(folder / "ink.safetensors")
    save_file(
        {key.replace("transformer.", "unet."): value for key, value in tensors.items()}, folder / "other.safetensors"
    )
    half = {key.replace("blocks.0.", "blocks.77."): value for key, value in tensors.items()}
    save_file(half, folder / "half.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no tensors in here")
    (folder / "pickle.bin").write_bytes(b"x")
    return folder


@pytest.fixture
def engine(folder, tmp_path):
    pipe = tiny_text_to_image_pipeline()
    made = Engine({"tiny": "x"}, tmp_path, device="cpu", loras=find_loras(folder), load=lambda source: pipe)
    made.model().result(60)
    made.pipe = pipe
    yield made
    made.close()


def ask(name=None, scale=1.0, **more):
    lora = None if name is None else Lora(name=name, scale=scale)
    return TextToImageRequest(prompt="a red apple", steps=2, seed=1, lora=lora, **more)


def painted(engine, request):
    events = list(engine.generate(request))
    assert not isinstance(events[-1], Failed), events[-1]
    return [event for event in events if isinstance(event, Picture)]


def state(pipe):
    return {name: value.clone() for name, value in pipe.transformer.state_dict().items()}


def test_it_is_on_for_its_job_only_and_leaves_no_trace(engine):
    before = state(engine.pipe)
    plain = painted(engine, ask())[0]
    ink, ink_too = painted(engine, ask("ink", num_images=2))
    weak, off = painted(engine, ask("ink", 0.1))[0], painted(engine, ask("ink", 0.0))[0]
    wool = painted(engine, ask("wool"))[0]
    again = painted(engine, ask())[0]
    pixels = [one.image.tobytes() for one in (plain, ink, weak, wool)]
    assert len(set(pixels)) == 4
    assert again.image.tobytes() == off.image.tobytes() == plain.image.tobytes()
    assert ink_too.metadata.lora == ink.metadata.lora
    after = state(engine.pipe)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_settings_hold_its_name_hash_and_scale_and_repeat_the_picture(engine, folder):
    first = painted(engine, ask("ink", 0.5))[0]
    settings = read_picture(first.path)
    content = (folder / "ink.safetensors").read_bytes()
    assert settings.lora == Lora(name="ink", scale=0.5, sha256=hashlib.sha256(content).hexdigest())
    second = painted(engine, request_from_settings(settings))[0]
    assert second.image.tobytes() == first.image.tobytes()


def test_another_file_of_the_same_name_is_refused(engine):
    settings = painted(engine, ask("ink"))[0].metadata
    forged = settings.model_copy(update={"lora": Lora(name="ink", sha256="0" * 64)})
    last = list(engine.generate(request_from_settings(forged)))[-1]
    assert (last.code, "its content differs" in last.message) == ("bad_request", True)


@pytest.mark.parametrize("name", ["other", "half", "broken", "../ink", "pickle"])
def test_what_does_not_fit_fails_with_a_reason_and_leaves_no_trace(engine, name, folder):
    before = state(engine.pipe)
    plain = painted(engine, ask())[0].image.tobytes()
    last = list(engine.generate(ask(name)))[-1]
    assert isinstance(last, Failed)
    assert any(reason in last.message for reason in ("doesn't fit", "There is no LoRA file", "can't be read"))
    assert str(folder) not in last.message
    assert painted(engine, ask())[0].image.tobytes() == plain
    assert list(state(engine.pipe)) == list(before)


def test_a_stop_takes_it_off_too(engine):
    before = state(engine.pipe)
    job = engine.submit(ask("ink").model_copy(update={"steps": 200}))
    events = engine.follow(job)
    while type(next(events)).__name__ != "Step":
        pass
    events.close()
    assert list(state(engine.pipe)) == list(before)


def test_a_model_without_loras_says_so(folder):
    engine = Engine({"fake": "x"}, device="cpu", loras=find_loras(folder), load=lambda source: FakePipeline())
    assert "takes no LoRA files" in list(engine.generate(ask("ink")))[-1].message
    engine.close()


def test_folders_are_checked(tmp_path, folder):
    with pytest.raises(ValueError, match="no folder with LoRA files"):
        find_loras(tmp_path)
    (tmp_path / "out.safetensors").symlink_to(folder / "ink.safetensors")
    with pytest.raises(ValueError, match="not inside"):
        find_loras(tmp_path)
    assert "pickle" not in find_loras(folder)


def test_on_the_command_line(folder, tmp_path, monkeypatch):
    logging.getLogger("apps").setLevel(logging.CRITICAL)
    monkeypatch.setattr(
        engine_module.Engine, "_load_pipeline", lambda self, source, device, load_options: tiny_text_to_image_pipeline()
    )
    cpu, first, second = DeviceOptions(device="cpu"), tmp_path / "a.png", tmp_path / "b.png"
    run(make_options(prompt="a red apple", steps=2, lora=folder / "ink.safetensors", lora_scale=0.5), first, cpu)
    assert read_picture(first).lora.scale == 0.5
    with pytest.raises(ValueError, match=r"'ink'; name it with --lora"):
        run(make_options(), second, cpu, settings=first)
    run(make_options(lora=folder / "ink.safetensors"), second, cpu, settings=first)
    assert second.read_bytes() == first.read_bytes()
    impostor = write_lora(tmp_path, "ink", 9)
    with pytest.raises(LoraError, match="its content differs"):
        run(make_options(lora=impostor), second, cpu, settings=first)
    with pytest.raises(ValueError, match="--lora-scale is for"):
        run(make_options(prompt="x", lora_scale=0.5), second, cpu)
    with pytest.raises(ValueError, match="no LoRA file"):
        run(make_options(prompt="x", lora=folder / "pickle.bin"), second, cpu)


def test_in_the_studio_settings_of_another_file_are_refused(engine):
    words, sessions = Strings("en"), Sessions(None)
    handlers = SettingsHandlers(engine, words, sessions, GenerationHandlers(engine, words, sessions))
    one = painted(engine, ask("ink", 0.5))[0]
    shown = Shown(one.path, one.metadata, one.seconds)
    put = handlers.reuse_settings(shown)
    assert (put["lora"], put["lora_scale"]) == ("ink", 0.5)
    forged = one.metadata.model_copy(update={"lora": Lora(name="ink", sha256="0" * 64)})
    refused = handlers.reuse_settings(SimpleNamespace(settings=forged))
    assert set(refused) == {PLACE}
    assert "its content differs" in refused[PLACE]
    saved = {"model": "tiny", "lora": "gone", "lora_scale": 2}
    assert "lora" not in handlers._remembered(saved)


@pytest.mark.parametrize(("lora", "notes"), [(None, 1), (Lora(name="dodo"), 0)])
def test_words_that_a_lora_may_have_taught_are_not_called_unknown(lora, notes):
    pipe = SimpleNamespace(unknown_words=lambda texts: ("dodo",))
    model = SimpleNamespace(info_for=lambda task: SimpleNamespace(knows_words=True), pipe_for=lambda task: pipe)
    request = TextToImageRequest(prompt="a dodo", lora=lora)
    assert len(_notes_on_words(request, model)) == notes
