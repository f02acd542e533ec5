"""`tessera bench lora-style` on a tiny pipeline with a random LoRA: what it reports, draws and refuses."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from typer.testing import CliRunner

from apps.benchmarks.lora_style import EACH, list_wanted
from apps.benchmarks.run import run
from apps.benchmarks.style_control import Translator, draw, train_control, vary
from apps.cli import app
from apps.service.usage import UsageError
from apps.stickers import load_sprites
from apps.stickers.fluent import TRAINING, UNSEEN, load_fluent
from tests.pipes.tiny import tiny_text_to_image_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_text_to_image_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = tiny_text_to_image_pipeline()
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        pipe.transformer.add_adapter(config)
    folder = tmp_path_factory.mktemp("lora")
    pipe.save_lora_weights(folder, get_peft_model_state_dict(pipe.transformer), weight_name="style.safetensors")
    return folder / "style.safetensors"


def test_the_report_and_the_sheet(model, lora, tmp_path, capsys):
    output = tmp_path / "lora.json"
    report = run("lora-style", model=str(model), lora=lora, trigger="clay", output=output, smoke=True, json_output=True)
    assert json.loads(capsys.readouterr().out) == json.loads(output.read_text()) == report
    assert (report["lora"], report["trigger"]) == ("style.safetensors", "clay")
    assert report["same bits after unloading"] is True
    assert report["images that the LoRA changes"] == 4 * EACH
    assert list(report["tables"]) == ["2 unseen names", "2 training names"]
    for rows in report["tables"].values():
        before, after, flat, true = rows
        assert [row["images"] for row in rows][:2] == ["before", "with the LoRA"]
        assert before["scale"] == after["scale"] > 0.1
        assert before.keys() == flat.keys() == true.keys() > {"distance", "fallen", "style", "identity", "nearer"}
        assert before["fallen"] == pytest.approx(1 - before["distance"] / before["scale"], abs=0.01)
    with Image.open(output.with_suffix(".png")) as sheet:
        assert sheet.width > 12 * 112
        assert sheet.height > 112


def test_what_is_asked_for_is_fixed():
    wanted = list_wanted((*UNSEEN, *TRAINING))
    assert len(wanted) == 128 * EACH
    assert len({one.seed for one in wanted}) == len(wanted)
    assert all(a.name == b.name and a.colour != b.colour for a, b in zip(wanted[::2], wanted[1::2], strict=True))
    assert wanted == list_wanted((*UNSEEN, *TRAINING))


def test_wrong_usage_says_what_to_give(model, tmp_path):
    with pytest.raises(UsageError, match="give --lora FILE"):
        run("lora-style", model=str(model), smoke=True)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    result = CliRunner().invoke(
        app, ["bench", "lora-style", str(model), "--smoke", "--lora", str(tmp_path / "bad.safetensors")]
    )
    assert isinstance(result.exception, UsageError)
    assert "bad.safetensors" in str(result.exception)


def test_the_control_learns_from_pairs_and_is_judged_on_both_sides(tmp_path):
    report = run("style-control", smoke=True, device="cpu", output=tmp_path / "control.json")
    (rows,) = report["tables"].values()
    assert [row["names"] for row in rows] == [len(TRAINING)] * 4 + [len(UNSEEN)] * 4
    assert [row["images"] for row in rows[:4]] == [
        f"{what}, {which}" for which in ("seen", "unseen") for what in ("flat", "translated")
    ]
    assert all(row["distance"] == pytest.approx(row["scale"], abs=0.03) for row in rows[::2])


@pytest.mark.slow
def test_a_control_trained_on_few_pairs_reproduces_them():
    def distance(network: Translator) -> float:
        flat, styled = (draw(sheet, ["fox", "owl"], ["blue", "white"]) for sheet in (load_sprites(), load_fluent()))
        with torch.inference_mode():
            return float((network(flat) - styled).abs().mean())

    untrained, trained = (train_control(["fox", "owl"], steps, torch.device("cpu")) for steps in (1, 60))
    assert distance(trained) < 0.9 * distance(untrained)


def test_pairs_are_varied_together():
    pairs = draw(load_sprites(), ["fox"] * 8, ["blue"] * 8).repeat(1, 2, 1, 1)  # (B, 6, R, R)
    varied = vary(pairs, torch.Generator().manual_seed(1))
    assert torch.equal(varied[:, :3], varied[:, 3:])
    assert len({image.numpy().tobytes() for image in varied}) == 8
