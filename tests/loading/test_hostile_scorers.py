"""Damaged scorers and components to export: refused with one clear error, as whole pipelines are."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from apps.conversion.atomic_io import read_component
from dit.models.text_dit import TextDiT
from pipelines.next_scale.scorers import read_reward
from tests.loading.mutations import mutation
from tests.pipes.test_search import tiny_clip
from tests.pipes.tiny import tiny_text_to_image_pipeline

CPU = torch.device("cpu")


def test_a_good_scorer_is_read(tmp_path):
    reward = read_reward(tiny_clip(tmp_path), CPU)
    assert reward(torch.rand(2, 3, 32, 32), ["a red cat", "red"]).shape == (2,)
    own = lambda pictures, prompts: torch.zeros(len(pictures))  # noqa: E731 (a callable of a user)
    assert read_reward(own, CPU) is own


def set_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def set_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


NAME = "text_model.encoder.layers.0.mlp.fc1.weight"
DAMAGE = {
    "deep JSON": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "nested too deeply"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), r"config\.json"),
    "another size": (lambda folder: set_config(folder, projection_dim=9), "don't fit the CLIPModel"),
    "no such model": (lambda folder: set_config(folder, model_type="dreamer"), "can't be used"),
    "text": (lambda folder: set_config(folder, projection_dim="wide"), "can't be used|can be built"),
    "no bytes": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "no safetensors file"),
    "missing": (lambda folder: set_weights(folder, lambda held: held.pop(NAME)), "1 are missing"),
    "NaN": (lambda folder: set_weights(folder, lambda held: held[NAME].fill_(torch.nan)), "NaN or infinite"),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "can't be used"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_scorers(name, tmp_path):
    folder = tiny_clip(tmp_path)
    DAMAGE[name][0](folder)
    with pytest.raises((ValueError, OSError), match=DAMAGE[name][1]) as refused:
        read_reward(folder, CPU)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        "config.json: nested deeply",
        "config.json: a list",
        "config.json: num_layers=1000000",
        'config.json: _class_name=["a"]',
        "diffusion_pytorch_model.safetensors: zero bytes",
        "diffusion_pytorch_model.safetensors: NaN in proj_out.bias",
    ],
)
def test_damaged_components_are_not_exported(name, tmp_path):
    tiny_text_to_image_pipeline().save_pretrained(tmp_path)
    assert isinstance(read_component(tmp_path, [TextDiT], "dit", "auto"), TextDiT)
    if "NaN" in name:
        set_nan(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    else:
        mutation(tmp_path, f"transformer/{name}").apply(tmp_path)
    with pytest.raises((ValueError, OSError)) as refused:
        read_component(tmp_path, [TextDiT], "dit", "auto")
    assert "\n" not in str(refused.value)


def set_nan(file: Path) -> None:
    tensors = load_file(file)
    tensors["proj_out.bias"][0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
