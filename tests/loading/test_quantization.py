"""`load_pipeline(..., quantization=...)`: built-in models and folders, with and without a calibration, and memory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit.quant import QuantLinear, calibrate
from dit.quant.step_policy import StepPolicy
from dit.runtime.metrics import psnr
from pipelines import load_pipeline
from pipelines.acceleration.quantization import CALIBRATION_FILE, QuantizationPart
from pipelines.loading import memory
from pipelines.loading.memory import GIB, NotEnoughMemoryError, check_memory
from pipelines.quantization.loading import as_part, quantized_bytes
from pipelines.quantization.networks import network_bytes, quantization_of
from pipelines.quantization.steps import stored_policy
from tests.pipes.tiny import tiny_text_to_image_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny pipeline."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_text_to_image_pipeline().save_pretrained(path)
    return path


def balanced(pipe: Any) -> bool:
    return any("input_balance" in one.stored for one in pipe.transformer.modules() if isinstance(one, QuantLinear))


def paint(pipe: Any, **options: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "latent", **options}
    return pipe("a red apple", **call).images


@pytest.mark.parametrize(("bits", "least_psnr", "least_ratio"), [("w8a8", 30, 3.0), ("w4a8", 20, 4.0)])
def test_the_built_in_model(bits: str, least_psnr: float, least_ratio: float) -> None:
    plain = paint(load_pipeline("stickers", device="cpu"), output_type="pt", num_inference_steps=4)
    pipe = load_pipeline("stickers", device="cpu", quantization=bits)
    made = paint(pipe, output_type="pt", num_inference_steps=4)
    assert quantization_of(pipe.transformer) == f"viditq:{bits}"
    assert quantization_of(pipe.text_encoder) == ""
    before, after = network_bytes(pipe.transformer)
    assert before > least_ratio * after
    assert psnr(made.float(), plain.float()) > least_psnr
    assert not torch.equal(made, plain)


def test_a_folder_saved_again_and_loaded(folder: Path, tmp_path: Path) -> None:
    spec = {"bits": "w4a8", "recipe": "svdquant", "full_precision_last": 1, "skip": [r"transformer_blocks\.0\."]}
    pipe = load_pipeline(folder, device="cpu", quantization=spec)
    assert stored_policy(pipe.transformer) == StepPolicy(0, 1)
    made = paint(pipe)
    pipe.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path, device="cpu")
    assert quantization_of(again.transformer) == "svdquant:w4a8"
    assert torch.equal(paint(again), made)
    saved = json.loads((tmp_path / "transformer" / "config.json").read_text())["quantization_config"]
    assert saved["runtime"]["diffusion_step_policy"]["last_steps"] == {"count": 1, "mode": "a16"}
    with pytest.raises(ValueError, match=r"quantized already, transformer \(svdquant:w4a8\)"):
        load_pipeline(tmp_path, device="cpu", quantization="w8a8")


def test_the_calibration_in_the_folder_is_taken(folder: Path) -> None:
    pipe = load_pipeline(folder, device="cpu")
    free = load_pipeline(folder, device="cpu", quantization="w4a8")
    assert not balanced(free)
    calibrate(pipe, ["a red apple"], num_inference_steps=2).save(folder / CALIBRATION_FILE)
    try:
        found = load_pipeline(folder, device="cpu", quantization="w4a8")
        assert balanced(found)
        assert not torch.equal(paint(found), paint(free))
        (folder / CALIBRATION_FILE).write_bytes(b"not a safetensors file")
        with pytest.raises(ValueError, match="no safetensors file"):
            load_pipeline(folder, device="cpu", quantization="w4a8")
    finally:
        (folder / CALIBRATION_FILE).unlink()


def test_text_encoders_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit.quant.roles.LEAST_WIDTH", 8)
    spec = {"bits": "w8a16", "components": ["transformer", "text_encoder"]}
    pipe = load_pipeline(folder, device="cpu", quantization=QuantizationPart(**spec))
    plain = load_pipeline(folder, device="cpu")
    assert quantization_of(pipe.transformer) == quantization_of(pipe.text_encoder) == "viditq:w8a16"
    np.testing.assert_allclose(paint(pipe), paint(plain), atol=0.05)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("w3a3", "bits is 'w3a3'"),
        ("magic:w8a8", "recipe is 'magic'"),
        ({"bits": "w8a8", "rank": 3}, "rank"),
        ({"full_precision_first": 2}, "give the formats as bits"),
        ({"bits": "w8a8", "components": ["unet"]}, "unet"),
        ({"bits": "w8a8", "calibration": "missing.safetensors"}, "no artifact at missing"),
    ],
)
def test_what_cannot_be_had_is_refused(folder: Path, spec: Any, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_pipeline(folder, device="cpu", quantization=spec)


def test_nothing_asked_for_is_nothing_done(folder: Path) -> None:
    assert as_part(None) is None
    assert as_part("none") is None
    assert quantization_of(load_pipeline(folder, device="cpu", quantization="none").transformer) == ""


# ---------------------------------------------------------------------------- memory


def test_only_what_is_left_has_to_fit_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cpu": 100 * GIB, "cuda": 10 * GIB}
    monkeypatch.setattr(memory, "free_memory", lambda device: free[device.type])
    device, parts = torch.device("cuda"), {"transformer": 12 * GIB, "text_encoder": 2 * GIB}
    with pytest.raises(NotEnoughMemoryError, match="quantization w8a8"):
        check_memory(parts, device, torch.bfloat16, "none")
    part = as_part("w4a8")
    assert part is not None
    check_memory(parts, device, torch.bfloat16, "none", {"transformer": quantized_bytes(parts["transformer"], part, 2)})
    free["cpu"] = 13 * GIB  # all weights pass through it
    with pytest.raises(NotEnoughMemoryError, match=r"14\.0 GiB on cpu"):
        check_memory(parts, device, torch.bfloat16, "none", {"transformer": 4 * GIB})


@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "fp8"])
def test_the_estimate_is_near(bits: str) -> None:
    part = as_part(bits)
    assert part is not None
    pipe = load_pipeline("stickers", device="cpu")
    before = network_bytes(pipe.transformer)[0]
    after = network_bytes(load_pipeline("stickers", device="cpu", quantization=bits).transformer)[1]
    assert 0.75 * after < quantized_bytes(before, part, 4) < 1.5 * after
