"""Quantization of a request: one option, what it stands for, where it is said and shown, and what a server refuses."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from apps.api.access import model_row
from apps.commands.batch import run_batch
from apps.commands.generate import DeviceOptions, run
from apps.commands.given_options import make_options
from apps.service.acceleration import config_of
from apps.service.compute_profiles import LoadOptions, UnavailableError, load_options_of
from apps.service.engine import Engine
from apps.service.events import Failed, Picture
from apps.service.metadata import read_picture, request_from_settings
from apps.service.option_values import SERVED_QUANTIZATION, QuantizationName
from apps.service.quantized import model_label, stored_quantization
from apps.service.requests import NextScaleTextRequest, TextToImageRequest
from apps.studio import controls
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.panels import settings_panel
from apps.studio.problems import explain
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SettingsHandlers
from apps.studio.strings import Strings, languages
from dit.quant import quantize_
from pipelines.acceleration.quantization import QuantizationPart, usual_recipe
from tests.pipes.tiny import tiny_text_to_image_pipeline

NAMES = [name for name in QuantizationName.__args__[0].__args__ if name != "none"]
CPU = DeviceOptions(device="cpu")


def request(**fields: Any) -> TextToImageRequest:
    return TextToImageRequest(prompt="a red apple", **{"steps": 2, "seed": 5, **fields})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Saved tiny pipelines: a plain one, and the same quantized."""
    root = tmp_path_factory.mktemp("models")
    pipe = tiny_text_to_image_pipeline()
    pipe.save_pretrained(root / "plain")
    quantize_(pipe, "viditq", "w4a8")
    pipe.save_pretrained(root / "small")
    return {name: str(root / name) for name in ("plain", "small")}


@pytest.fixture(scope="module")
def engine(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    found = Engine(folders, tmp_path_factory.mktemp("out"), device="cpu")
    yield found
    found.close()


def painted(engine: Engine, wanted: Any) -> Picture:
    events = list(engine.generate(wanted))
    failed = [one for one in events if isinstance(one, Failed)]
    assert not failed, failed
    return next(one for one in events if isinstance(one, Picture))


# ---------------------------------------------------------------------------- what it stands for


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_the_menu_is_a_part(name: str) -> None:
    part = config_of(request(quantization=name), can_tile=False).quantization
    assert part is not None
    assert (part.bits, part.recipe) == (name, usual_recipe(name))
    assert load_options_of(request(quantization=name), LoadOptions()).quantization == part
    control = controls.CONTROLS["quantization"].option.control
    assert control is not None
    assert name in control.choices


def test_none_is_nothing_said() -> None:
    assert request(quantization="none") == request()
    assert config_of(request(quantization="none"), can_tile=False).parts == {}
    assert NextScaleTextRequest(prompt="a cat", quantization="none").quantization is None
    page = dict.fromkeys(controls.CONTROLS, "")
    assert controls.to_fields(page, ["advanced"])["quantization"] is None


def test_an_acceleration_may_say_more_than_the_option() -> None:
    asked = {"bits": "w4a8", "recipe": "svdquant", "calibration": "model", "full_precision_last": 2}
    wanted = request(acceleration={"quantization": asked})
    assert config_of(wanted, can_tile=False).quantization == QuantizationPart(**asked)
    loaded = load_options_of(wanted, LoadOptions()).quantization
    assert loaded is not None
    assert (loaded.name, loaded.calibration, loaded.policy) == ("svdquant:w4a8", "model", None)
    with pytest.raises(ValueError, match="say the same"):
        request(acceleration={"quantization": "w8a8"}, quantization="w8a8")


@pytest.mark.parametrize("extra", [{"components": ["vae"]}, {"skip": ["(a+)+$"]}])
def test_a_request_names_no_layers(extra: dict[str, Any]) -> None:
    named = f"can't have {next(iter(extra))}; it can have {', '.join(SERVED_QUANTIZATION)}"
    with pytest.raises(ValueError, match=named):
        request(acceleration={"quantization": {"bits": "w8a8", **extra}})


def test_a_request_names_no_files() -> None:
    with pytest.raises(ValueError, match=r"quantization\.calibration"):
        request(acceleration={"quantization": {"bits": "w8a8", "calibration": "/etc/passwd"}})


def test_what_a_server_was_started_with_holds_where_nothing_is_said() -> None:
    part = QuantizationPart.model_validate("w8a8")
    default = LoadOptions(torch.bfloat16, "none", part)
    assert load_options_of(request(), default) == default
    assert load_options_of(request(quantization="w4a8"), default).quantization == QuantizationPart(bits="w4a8")


# ---------------------------------------------------------------------------- images


def test_an_image_of_a_quantized_model_is_recorded_and_repeated(engine: Engine) -> None:
    plain, made = painted(engine, request()), painted(engine, request(quantization="w8a8"))
    assert made.image.tobytes() != plain.image.tobytes()
    assert "quantized viditq:w8a8" in made.report
    assert made.metadata.fingerprint != plain.metadata.fingerprint
    assert made.path is not None
    kept = read_picture(made.path)
    assert kept.quantization == "w8a8"
    again = painted(engine, request_from_settings(kept))
    assert again.image.tobytes() == made.image.tobytes()
    assert painted(engine, request()).image.tobytes() == plain.image.tobytes()
    step = painted(engine, request(acceleration={"quantization": {"bits": "w8a8", "full_precision_first": 1}}))
    assert "activations in 16 bits at 1 of 2 steps" in step.report


def test_a_model_that_was_saved_quantized_says_so(engine: Engine, folders: dict[str, str]) -> None:
    made = painted(engine, request(model="small"))
    assert "quantized viditq:w4a8" in made.report
    assert made.metadata.quantization is None
    with pytest.raises(UnavailableError, match="'small' is quantized already \\(w4a8\\)") as caught:
        engine.submit(request(model="small", quantization="w8a8"))
    for language in languages():
        said = explain(caught.value, Strings(language))
        assert "w4a8" in said
        assert Strings(language)("quantization") in said
    row = model_row(engine, "small")["quantization"]
    size = sum(file.stat().st_size for file in Path(folders["small"]).glob("*/*.safetensors"))
    assert row == {"bits": "w4a8", "recipe": "viditq", "bytes": size}
    assert "quantization" not in model_row(engine, "plain")


def test_the_picker_shows_formats_and_size(engine: Engine) -> None:
    import gradio as gr

    with gr.Blocks():
        shown = dict(settings_panel(engine, Strings("en"))["model"].choices)
    assert shown == {"plain": "plain", model_label("small", engine.source("small")): "small"}
    assert model_label("small", engine.source("small")).startswith("small (w4a8, ")
    sessions = Sessions(None)
    generation = GenerationHandlers(engine, Strings("en"), sessions)
    handlers = SettingsHandlers(engine, Strings("en"), sessions, generation)
    assert handlers.load_model_controls("small", "text")["quantization"] == gr.update(visible=False, value="")
    assert handlers.load_model_controls("plain", "text")["quantization"] == gr.update(visible=True)


def test_folders_that_tell_nothing(tmp_path: Path, folders: dict[str, str]) -> None:
    assert stored_quantization(folders["plain"]) is None
    assert stored_quantization("stickers") is None
    assert stored_quantization("someone/model") is None
    (tmp_path / "model_index.json").write_text("{")
    assert stored_quantization(str(tmp_path)) is None
    (tmp_path / "model_index.json").write_text('{"transformer": ["a", "b"], "../../etc": ["a", "b"]}')
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    found = stored_quantization(str(tmp_path))
    assert found is not None
    assert (found.bits, found.recipe, found.components) == ("bitsandbytes", "", ("transformer",))


# ---------------------------------------------------------------------------- the command line


def test_the_command_line(folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    inner = Engine._load_pipeline
    monkeypatch.setattr(
        Engine, "_load_pipeline", lambda self, *given: loaded.append(given[2].quantization) or inner(self, *given)
    )
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    run(make_options(prompt="a cat", model=folders["plain"], steps=2, quantization="w4a8"), first, CPU)
    assert [one.bits for one in loaded] == ["w4a8"], "it isn't loaded in another way first"
    assert read_picture(first).quantization == "w4a8"
    run(make_options(model=folders["plain"]), second, CPU, settings=first)
    with Image.open(first) as one, Image.open(second) as other:
        assert one.tobytes() == other.tobytes()
    run(make_options(model=folders["plain"], quantization="none"), second, CPU, settings=first)
    assert read_picture(second).quantization is None
    with pytest.raises(ValueError, match=r"quantization.*w8a8"):
        run(make_options(prompt="a cat", model=folders["plain"], quantization="w3a3"), second, CPU)
    with pytest.raises(ValueError, match="quantized already"):
        run(make_options(prompt="a cat", model=folders["small"], quantization="w8a8"), second, CPU)


def test_lines_of_a_file_may_differ(folders: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a cat", "quantization": "none"}\n{"prompt": "a cat"}\n')
    run_batch(file, tmp_path / "out", make_options(model=folders["plain"], steps=2, quantization="w8a8"), CPU)
    kept = sorted((path.name, read_picture(path).quantization) for path in (tmp_path / "out").glob("*.png"))
    assert [name for _, name in kept] == [None, "w8a8"]
