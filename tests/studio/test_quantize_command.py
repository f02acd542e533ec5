"""`tessera quantize`: what it writes, that it loads and gives the same images, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from apps import cli
from apps.commands import quantize as command
from apps.commands.quantize import QuantizeOptions, run
from apps.commands.quantize_images import Painter, likeness
from apps.service.usage import UsageError
from dit.quant import MixedPrecisionPlan, QuantLinear, calibrate, quantize_
from dit.quant.calibration import Calibration
from dit.quant.costs import LinearCosts
from dit.quant.step_policy import StepPolicy
from dit.runtime.artifacts import model_fingerprint
from pipelines import load_pipeline
from pipelines.acceleration import AccelerationConfig
from pipelines.quantization.networks import quantization_of
from pipelines.quantization.steps import stored_policy
from pipelines.step_cache import PROFILE_FILE
from sampling.step_cache.calibration import calibrate_budget
from tests.families.tiny import tiny_pipeline
from tests.pipes.tiny import tiny_text_to_image_pipeline

COSTS = LinearCosts({"plain": 1e-11, "integers": 4e-12, "packed integers": 5e-12, "dequantized": 13e-12})
CARD = "---\nlicense: mit\n---\n# Tiny\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny pipeline with a vocabulary, a card, and a step cache's profile."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    pipe = tiny_text_to_image_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(path)
    (path / "vocabulary.txt").write_text("apple\nfox\npizza\nstar\n")
    (path / "README.md").write_text(CARD)
    calibrate_budget(load_pipeline(path, device="cpu"), ["a cat"], 4).save(path / PROFILE_FILE)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("# two of them\na red apple\n\n42\n")
    return path


def options(folder: Path, output: Path, **fields: Any) -> QuantizeOptions:
    return QuantizeOptions(model=str(folder), output=output, **{"device": "cpu", "steps": 2, **fields})


def report_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "report.json").read_text())


def test_the_folder_loads_and_its_report_is_true(folder: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "small"
    run(options(folder, output, bits="w4a8", calib=prompts, full_precision_last=1, seed=7))
    pipe, plain = load_pipeline(output, device="cpu"), load_pipeline(folder, device="cpu")
    report = report_of(output)
    # what is quantized, and how
    assert quantization_of(pipe.transformer) == "viditq:w4a8"
    assert stored_policy(pipe.transformer) == StepPolicy(0, 1)
    assert report["calibration"] == "2 prompts of prompts.txt, 2 steps each, seeds from 7"
    layers = {name: one.nbytes for name, one in pipe.transformer.named_modules() if isinstance(one, QuantLinear)}
    assert {one["name"]: one["bytes_after"] for one in report["layers"]} == layers
    assert report["bytes_after"] == sum(one.nbytes for one in pipe.transformer.parameters())
    assert report["bytes_before"] == sum(one.nbytes for one in plain.transformer.parameters())
    assert any(one["error"] > 0 for one in report["layers"])
    # images: those of the saved model are as near as the report says
    assert [(one["prompt"], one["seed"]) for one in report["images"]] == [("a red apple", 7), ("42", 8)]
    for one in report["images"]:
        before, after = (Painter(which, 2).paint(one["prompt"], one["seed"]).frames for which in (plain, pipe))
        assert likeness(before, after) == pytest.approx(one["psnr"], abs=0.05)
    with Image.open(output / "comparison.webp") as sheet:
        assert sheet.height > 2 * 256
        assert sheet.width > 2 * 256
    with Image.open(output / "errors.png") as chart:
        assert len(chart.convert("RGB").getcolors(2**20)) > 3
    page = (output / "report.md").read_text()
    assert f"{report['ratio']:.2f} times smaller" in page
    assert "the first 0 and the last 1 steps" in page
    assert report["seconds_a_step"]["before"] > 0
    # what belongs to it
    assert (output / "vocabulary.txt").read_text() == (folder / "vocabulary.txt").read_text()
    card = (output / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n> This is the model below, quantized (viditq w4a8)")
    assert card.endswith("# Tiny\n")
    with AccelerationConfig.from_dict({"step_cache": "budget=0.5"}).apply(pipe) as handle:
        pipe("a cat", num_inference_steps=4)
        assert handle.report()["step_cache"].is_active
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", "small"]


def test_a_calibration_is_kept_and_used_again(folder: Path, prompts: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.safetensors"
    run(options(folder, tmp_path / "a", bits="w4a8", calib=prompts, save_calib=kept, compare=0))
    assert len(Calibration.load(kept).layers) > 10
    run(options(folder, tmp_path / "b", bits="w4a8", calib=kept, compare=0))
    first, second = (load_pipeline(tmp_path / name, device="cpu").transformer for name in "ab")
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    assert report_of(tmp_path / "b")["calibration"] == "kept.safetensors"
    assert report_of(tmp_path / "b")["images"] == []
    assert not (tmp_path / "b" / "comparison.webp").exists()
    tiny_pipeline("wan").save_pretrained(tmp_path / "wan")
    with pytest.raises(UsageError, match="another architecture"):
        run(options(tmp_path / "wan", tmp_path / "c", calib=kept, compare=0))


def test_prompts_of_the_models_own_vocabulary_or_none(folder: Path, tmp_path: Path) -> None:
    run(options(folder, tmp_path / "own", compare=1))
    assert "of the model's own" in report_of(tmp_path / "own")["calibration"]
    assert set(report_of(tmp_path / "own")["images"][0]["prompt"].split()) & {"apple", "fox", "pizza", "star"}
    bare = tmp_path / "bare"
    tiny_text_to_image_pipeline().save_pretrained(bare)
    run(options(bare, tmp_path / "free", compare=0))
    report = report_of(tmp_path / "free")
    assert report["calibration"] is None
    assert "nothing was calibrated" in report["notes"][0]
    assert not (tmp_path / "free" / "errors.png").exists()
    run(options(folder, tmp_path / "asked", data_free=True, compare=0))
    assert report_of(tmp_path / "asked")["calibration"] is None


def test_components_layers_and_recipes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit.quant.roles.LEAST_WIDTH", 8)
    run(
        options(
            folder,
            tmp_path / "out",
            bits="w8a8",
            recipe="svdquant",
            components=("transformer", "text_encoder"),
            skip=(r"transformer_blocks\.0\.",),
            data_free=True,
            compare=0,
        )
    )
    pipe = load_pipeline(tmp_path / "out", device="cpu")
    assert quantization_of(pipe.text_encoder) == quantization_of(pipe.transformer) == "svdquant:w8a8"
    names = [one["name"] for one in report_of(tmp_path / "out")["layers"]]
    assert any(name.startswith("text_encoder.") for name in names)
    assert not any(name.startswith("transformer_blocks.0.") for name in names)


@pytest.mark.parametrize("name", ["class_dit"])
def test_models_of_classes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit.quant.roles.LEAST_WIDTH", 8)
    tiny_pipeline(name).save_pretrained(tmp_path / "model")
    (tmp_path / "classes.txt").write_text("1\n2\n")
    run(options(tmp_path / "model", tmp_path / "out", calib=tmp_path / "classes.txt", compare=2))
    assert [one["prompt"] for one in report_of(tmp_path / "out")["images"]] == [1, 2]
    assert quantization_of(load_pipeline(tmp_path / "out", device="cpu").transformer) == "viditq:w8a8"


def test_a_network_in_memory_and_saved_is_the_same_to_files(tmp_path: Path) -> None:
    """Else files of calibrations that are written beside it would be refused."""
    spec = {"bits": "w4a8", "full_precision_first": 1}
    tiny_text_to_image_pipeline().save_pretrained(tmp_path / "plain")
    pipe = load_pipeline(tmp_path / "plain", device="cpu", quantization=spec)
    before = model_fingerprint(pipe.transformer)
    pipe.save_pretrained(tmp_path / "small")
    assert model_fingerprint(load_pipeline(tmp_path / "small", device="cpu").transformer) == before


def test_mixed_precision_within_a_budget(folder: Path, prompts: Path, tmp_path: Path) -> None:
    bits = "w16a16,w8a8"
    run(options(folder, tmp_path / "out", recipe="viditq_mp", bits=bits, budget="12bits", calib=prompts, compare=1))
    report, plan = report_of(tmp_path / "out"), MixedPrecisionPlan.load(tmp_path / "out" / "plan.json")
    assert report["mixed_precision"] == plan.summary()
    assert (plan.method, plan.budget) == ("calls", "12bits")
    assert 8 < plan.average_bits <= 12
    assert "12bits, chosen by calls of the network" in (tmp_path / "out" / "report.md").read_text()
    network = load_pipeline(tmp_path / "out", device="cpu").transformer
    assert quantization_of(network) == f"viditq_mp:{bits}"
    quantized = {name for name, one in network.named_modules() if isinstance(one, QuantLinear)}
    assert quantized == {name for name, chosen in plan.choices.items() if chosen == "w8a8"}
    with Image.open(tmp_path / "out" / "plan.png") as chart:
        colours = {colour for _, colour in chart.convert("RGB").getcolors(2**20) or []}
        assert chart.height > 18 * len(plan.layers)
    assert {(31, 119, 180), (44, 160, 44)} <= colours, "bars of both formats"
    assert (50, 50, 50) in colours, "the largest error is darkest"


def test_mixed_precision_of_a_kept_calibration_and_of_diffusers_pipelines(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their steps are found; where no prompts are known, the calibration tells."""
    bare, kept = tmp_path / "bare", tmp_path / "kept.safetensors"
    tiny_text_to_image_pipeline().save_pretrained(bare)
    fields = {"recipe": "viditq_mp", "bits": "w8a8,w16a16", "budget": "12", "compare": 0}
    calibrate(load_pipeline(bare, device="cpu"), ["a cat"], num_inference_steps=2).save(kept)
    run(options(bare, tmp_path / "out", **{**fields, "calib": kept}))
    assert report_of(tmp_path / "out")["mixed_precision"]["method"] == "layer"
    with pytest.raises(UsageError, match="leave out --data-free"):
        run(options(folder, tmp_path / "no", **{**fields, "data_free": True}))
    monkeypatch.setattr("dit.quant.roles.LEAST_WIDTH", 8)
    tiny_pipeline("pixart").save_pretrained(tmp_path / "pixart")
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    fields |= {"calib": tmp_path / "prompts.txt", "budget": "90%time"}
    monkeypatch.setattr("dit.quant.mixed_precision.measure_linear_costs", lambda: COSTS)
    run(options(tmp_path / "pixart", tmp_path / "alpha", **fields))
    mixed = report_of(tmp_path / "alpha")["mixed_precision"]
    assert mixed["method"] == "calls"
    assert 0 < mixed["time"] <= 0.9
    plan = MixedPrecisionPlan.load(tmp_path / "alpha" / "plan.json")
    assert {one.group for one in plan.layers} == {"content", "cross"}


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": "w3a3"}, "bits is 'w3a3'"),
        ({"recipe": "magic"}, "recipe is 'magic'; use one of int8"),
        ({"recipe": "viditq_mp"}, "name two or more of w8a8"),
        ({"recipe": "viditq_mp", "bits": "w8a8,w4a8"}, "wants a budget"),
        ({"recipe": "viditq_mp", "bits": "w8a8,w4a8", "budget": "much"}, "budget is 'much'"),
        ({"bits": "w8a8,w4a8", "budget": "1bits"}, "take .* at least"),
        ({"budget": "5bits"}, "one format for all layers"),
        ({"recipe": "fp8"}, "'fp8' takes fp8, fp8-none"),
        ({"skip": ("(",)}, "no regular expression"),
        ({"skip": (".*",), "data_free": True}, "no linear layer"),
        ({"components": ("unet",)}, "unet"),
        ({"guidance": 3.0, "steps": 0, "data_free": True}, "steps"),
        ({"save_calib": Path("kept.json")}, "end the name in .safetensors"),
        ({"data_free": True, "save_calib": Path("kept.safetensors")}, "leave out"),
    ],
)
def test_wrong_usage(folder: Path, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        run(options(folder, tmp_path / "out", **{"compare": 1, **fields}))
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prompts.txt", b"# nothing\n\n", "has no prompts"),
        ("prompts.txt", b"\xff\xfe\x00\x01", "not UTF-8"),
        ("prompts.txt", b'{"prompt": "a cat", "trigger": 1}\n', "holds trigger"),
        ("prompts.txt", b"[1, 2]\n", "JSON list"),
        ("kept.safetensors", b"no safetensors", "no safetensors file"),
        ("kept.safetensors", (2**60).to_bytes(8, "little") + b"{}", "no safetensors file"),
    ],
)
def test_hostile_files(folder: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        run(options(folder, tmp_path / "out", calib=tmp_path / name))
    assert not (tmp_path / "out").exists()


def test_files_that_are_none(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no file"):
        run(options(folder, tmp_path / "out", calib=Path("/dev/zero")))
    (tmp_path / "long.txt").write_text("a red apple\n")
    monkeypatch.setattr(command, "MAX_BYTES", 4)
    with pytest.raises(UsageError, match="at most 4 are read"):
        run(options(folder, tmp_path / "out", calib=tmp_path / "long.txt"))


def test_a_folder_that_holds_something_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="isn't empty"):
        run(options(folder, tmp_path / "out", data_free=True))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    run(options(folder, tmp_path / "empty", data_free=True, compare=0))
    assert (tmp_path / "empty" / "model_index.json").is_file()


def test_what_ends_early_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(command, "write_report", fail)
    with pytest.raises(OSError, match="the disk is full"):
        run(options(folder, tmp_path / "out", data_free=True, compare=0))
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_quantized_already(tmp_path: Path) -> None:
    pipe = tiny_text_to_image_pipeline()
    quantize_(pipe, "viditq", "w8a8")
    pipe.save_pretrained(tmp_path / "small")
    with pytest.raises(UsageError, match=r"quantized already: transformer \(viditq:w8a8\)"):
        run(options(tmp_path / "small", tmp_path / "out", data_free=True))


def test_from_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quantize", str(folder), "--data-free", "--compare", "1", "--steps", "2", "--device", "cpu", "--json"]
    with pytest.raises(SystemExit) as leaving:
        cli.main([*words, "-o", str(tmp_path / "out")])
    assert not leaving.value.code
    said = json.loads(capsys.readouterr().out)
    assert said == {name: value for name, value in report_of(tmp_path / "out").items() if name in said}
    assert (said["bits"], said["recipe"], len(said["images"])) == ("w8a8", "viditq", 1)
    with pytest.raises(SystemExit) as leaving:
        cli.main([*words, "-o", str(tmp_path / "out")])
    assert leaving.value.code == 2
    assert "isn't empty" in capsys.readouterr().err
