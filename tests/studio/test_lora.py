"""LoRA files by name: on the model for one job, off again to the last bit, and never another file of the same name."""

from __future__ import annotations

import hashlib
import logging
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from apps.commands.generate import DeviceOptions, run
from apps.commands.given_options import make_options
from apps.service import engine as engine_module
from apps.service import limits
from apps.service.engine import Engine
from apps.service.events import Failed, Picture
from apps.service.job_runner import _notes_on_words
from apps.service.lora import LoraError, find_loras, one_lora
from apps.service.metadata import read_picture, request_from_settings
from apps.service.option_values import Lora
from apps.service.requests import TextToImageRequest
from apps.service.usage import UsageError
from apps.studio import lora_rows
from apps.studio.album import Shown
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.problems import PLACE, explain, explain_failure
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SettingsHandlers
from apps.studio.strings import Strings
from dit.lora.adapters import AdapterSettings, add_adapter, save_adapter
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
    loras = () if name is None else (Lora(name=name, scale=scale),)
    return TextToImageRequest(prompt="a red apple", steps=2, seed=1, loras=loras, **more)


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
    assert ink_too.metadata.loras == ink.metadata.loras
    after = state(engine.pipe)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_settings_hold_its_name_hash_and_scale_and_repeat_the_picture(engine, folder):
    first = painted(engine, ask("ink", 0.5))[0]
    settings = read_picture(first.path)
    content = (folder / "ink.safetensors").read_bytes()
    assert settings.loras == (Lora(name="ink", scale=0.5, sha256=hashlib.sha256(content).hexdigest()),)
    second = painted(engine, request_from_settings(settings))[0]
    assert second.image.tobytes() == first.image.tobytes()


def test_another_file_of_the_same_name_is_refused(engine):
    settings = painted(engine, ask("ink"))[0].metadata
    forged = settings.model_copy(update={"loras": (Lora(name="ink", sha256="0" * 64),)})
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


def test_several_are_on_at_once_each_with_its_own_scale(engine):
    before = state(engine.pipe)

    def both(*scales):
        loras = tuple(Lora(name=name, scale=scale) for name, scale in zip(("ink", "wool"), scales, strict=True))
        return painted(engine, ask().model_copy(update={"loras": loras}))[0]

    first = both(1.0, 0.7)
    pixels = [one.image.tobytes() for one in (first, both(0.7, 1.0), painted(engine, ask("ink"))[0])]
    assert len(set(pixels)) == 3
    assert both(1.0, 0.0).image.tobytes() == pixels[2]
    again = painted(engine, request_from_settings(read_picture(first.path)))[0]
    assert again.image.tobytes() == pixels[0]
    assert [(one.name, one.scale) for one in again.metadata.loras] == [("ink", 1.0), ("wool", 0.7)]
    assert list(state(engine.pipe)) == list(before)


@pytest.mark.parametrize("written", [None, {"name": "ink"}, [{"name": "ink"}]])
def test_requests_of_earlier_versions_name_one_file(written):
    request = TextToImageRequest.model_validate({"prompt": "x", "lora": written})
    assert request.loras == (() if written is None else (Lora(name="ink"),))
    assert TextToImageRequest.model_validate_json(request.model_dump_json()) == request
    with pytest.raises(ValidationError, match="extra_forbidden"):
        TextToImageRequest.model_validate({"prompt": "x", "lora": written, "loras": []})


def test_a_file_is_chosen_once_and_as_many_as_the_page_has_rows():
    with pytest.raises(ValidationError, match="'ink' is chosen twice") as refused:
        TextToImageRequest.model_validate({"prompt": "x", "loras": [{"name": "ink"}, {"name": "ink", "scale": 0.5}]})
    assert "choose it once" in explain(refused.value, Strings("en"))
    names = [{"name": str(number)} for number in range(limits.MAX_LORAS + 1)]
    with pytest.raises(ValidationError, match="at most 4"):
        TextToImageRequest(prompt="x", loras=names)
    assert len(lora_rows.NAMES) == limits.MAX_LORAS


def write_pair(folder, algorithm):
    """Write a LoHa or LoKr of random weights, a folder with its settings."""
    network, settings = tiny_text_to_image_pipeline().transformer, AdapterSettings(algorithm=algorithm, rank=2)
    add_adapter(network, settings)
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return save_adapter(network, folder, settings, {}).parent


@pytest.mark.parametrize("algorithm", ["loha", "lokr"])
def test_folders_of_two_files_are_offered_too(algorithm, tmp_path):
    loras, pipe = tmp_path / "loras", tiny_text_to_image_pipeline()
    write_pair(loras / "felt", algorithm)
    write_lora(loras, "ink", 0)
    (loras / "empty").mkdir()
    assert list(find_loras(loras)) == ["ink", "felt"]
    assert one_lora(loras / "felt") == {"felt": find_loras(loras)["felt"]}
    with pytest.raises(ValueError, match="is no LoRA file"):
        one_lora(loras / "empty")
    with closing(Engine({"tiny": "x"}, tmp_path, device="cpu", loras=find_loras(loras), load=lambda _: pipe)) as engine:
        plain, felt, half = (painted(engine, ask(*one))[0] for one in ((), ("felt",), ("felt", 0.5)))
        assert len({one.image.tobytes() for one in (plain, felt, half)}) == 3
        assert painted(engine, request_from_settings(read_picture(felt.path)))[0].image.tobytes() == (
            felt.image.tobytes()
        )
        mixed = (Lora(name="ink"), Lora(name="felt"))
        last = list(engine.generate(ask().model_copy(update={"loras": mixed})))[-1]
        assert f"'felt' is {algorithm.upper()} and 'ink' is LORA" in last.message
        assert "choose files of one kind" in explain_failure(last, Strings("en"))
        assert painted(engine, ask())[0].image.tobytes() == plain.image.tobytes()
    write_lora(loras, "felt", 1)
    with pytest.raises(ValueError, match=r"felt\.safetensors and a folder felt"):
        find_loras(loras)


def test_links_in_such_a_folder_may_not_lead_elsewhere(tmp_path):
    outside = write_pair(tmp_path / "outside", "loha")
    (tmp_path / "loras" / "felt").mkdir(parents=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "loras" / "felt" / name).symlink_to(outside / name)
    with pytest.raises(ValueError, match="not inside"):
        find_loras(tmp_path / "loras")


def test_rows_appear_one_after_the_other():
    def seen(*chosen):
        return [lora_rows.unfold(*chosen)[row]["visible"] for row in lora_rows.ROWS[1:]]

    assert seen("", "", "", "") == [False, False, False]
    assert seen("ink", "", "", "") == [True, False, False]
    assert seen("", "wool", "", "") == [True, True, False]
    assert seen("ink", "wool", "felt", "") == [True, True, True]
    loras = [{"name": "ink", "scale": 0.5}, {"name": "wool", "scale": 2}]
    assert lora_rows.read(lora_rows.show([Lora(**one) for one in loras])) == loras


def test_several_on_the_command_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        engine_module.Engine, "_load_pipeline", lambda self, source, device, load_options: tiny_text_to_image_pipeline()
    )
    files, cpu = [folder / "ink.safetensors", folder / "wool.safetensors"], DeviceOptions(device="cpu")
    first, second, third = (tmp_path / f"{name}.png" for name in "abc")
    run(make_options(prompt="a red apple", steps=2, lora=files, lora_scale=[0.5, 2]), first, cpu)
    assert [one.scale for one in read_picture(first).loras] == [0.5, 2]
    run(make_options(lora=files[::-1]), second, cpu, settings=first)
    assert second.read_bytes() == first.read_bytes()
    run(make_options(lora=files, lora_scale=0.25), third, cpu, settings=first)
    assert [one.scale for one in read_picture(third).loras] == [0.25, 0.25]
    with pytest.raises(UsageError, match="given 2 times for 1 LoRA files"):
        run(make_options(prompt="x", lora=files[:1], lora_scale=[1, 2]), third, cpu)
    with pytest.raises(ValueError, match="'ink', 'wool'; name it with --lora"):
        run(make_options(), third, cpu, settings=first)


def test_on_the_command_line(folder, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL, "apps")  # for this test only
    monkeypatch.setattr(
        engine_module.Engine, "_load_pipeline", lambda self, source, device, load_options: tiny_text_to_image_pipeline()
    )
    cpu, first, second = DeviceOptions(device="cpu"), tmp_path / "a.png", tmp_path / "b.png"
    run(make_options(prompt="a red apple", steps=2, lora=folder / "ink.safetensors", lora_scale=0.5), first, cpu)
    assert read_picture(first).loras[0].scale == 0.5
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
    forged = one.metadata.model_copy(update={"loras": (Lora(name="ink", sha256="0" * 64),)})
    refused = handlers.reuse_settings(SimpleNamespace(settings=forged))
    assert set(refused) == {PLACE}
    assert "its content differs" in refused[PLACE]
    saved = {"model": "tiny", "lora": "gone", "lora_scale": 2}
    assert "lora" not in handlers._remembered(saved)


@pytest.mark.parametrize(("loras", "notes"), [((), 1), ((Lora(name="dodo"),), 0)])
def test_words_that_a_lora_may_have_taught_are_not_called_unknown(loras, notes):
    pipe = SimpleNamespace(unknown_words=lambda texts: ("dodo",))
    model = SimpleNamespace(info_for=lambda task: SimpleNamespace(knows_words=True), pipe_for=lambda task: pipe)
    request = TextToImageRequest(prompt="a dodo", loras=loras)
    assert len(_notes_on_words(request, model)) == notes
