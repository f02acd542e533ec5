"""Single files: a published layout, GGUF, and the refusal of files that don't fit."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file, save_file

from apps import cli
from dit.runtime.bridge import published_repository
from pipelines import load_pipeline
from pipelines.loading.single_file import find_repository
from tests.families.tiny import tiny_call
from tests.loading.published_layout import to_published, write_quantized

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(folder_of):
    return folder_of("sd3")


@pytest.fixture(scope="module")
def weights(base):
    return load_file(base / WEIGHTS)


@pytest.fixture(scope="module")
def published(weights):
    return to_published(weights, num_layers=3)


@pytest.fixture(scope="module")
def file(published, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "sd3_tiny.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in published.items()}, path)
    return path


@pytest.fixture(scope="module")
def quantized(published, tmp_path_factory):
    pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("files") / "sd3_tiny-Q8_0.gguf"
    write_quantized(path, published)
    return path


@pytest.fixture(scope="module")
def picture(base):
    return paint(load_pipeline(base, device="cpu"))


def paint(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**tiny_call("sd3")).images


def test_a_transformer_file_takes_the_rest_from_its_base(file, base, weights, picture):
    pipe = load_pipeline(file, base=base, device="cpu")
    loaded = pipe.transformer.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    torch.testing.assert_close(paint(pipe), picture, atol=1e-5, rtol=0)
    # the other way to say it, and in diffusers' own layout
    other = load_pipeline(base, transformer=base / WEIGHTS, device="cpu", dtype="bfloat16")
    assert other.transformer.dtype == other.vae.dtype == torch.bfloat16


def test_a_whole_pipeline_takes_only_its_configuration_from_elsewhere(file, base, picture):
    whole = load_pipeline(base, device="cpu")
    brought = {name: part for name, part in whole.components.items() if name.startswith(("vae", "text_encoder"))}
    pipe = load_pipeline(file, config=base, device="cpu", **brought)
    assert pipe.vae is whole.vae
    torch.testing.assert_close(paint(pipe), picture, atol=1e-5, rtol=0)


def test_gguf_stays_quantized_and_paints_nearly_the_same(quantized, base, picture):
    pipe = load_pipeline(quantized, base=str(base), device="cpu", dtype="float32")
    kinds = {type(weight).__name__ for weight in pipe.transformer.parameters()}
    assert "GGUFParameter" in kinds
    painted = paint(pipe)
    assert not torch.equal(painted, picture)
    torch.testing.assert_close(painted, picture, atol=0.05, rtol=0)


def test_gguf_from_the_command_line(quantized, base, tmp_path, capsys):
    words = ["generate", "x", "--model", str(quantized), "--base", str(base), "-o", str(tmp_path / "a.png")]
    with pytest.raises(SystemExit) as left:
        cli.main([*words, "--size", "32", "--steps", "1", "--device", "cpu"])
    assert left.value.code == 0, capsys.readouterr().err
    assert (tmp_path / "a.png").is_file()


def test_gguf_without_its_package(quantized, base, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find_spec(name))
    with pytest.raises(ImportError, match=r"pip install 'tessera\[gguf\]'"):
        load_pipeline(quantized, base=base, device="cpu")


def test_what_a_file_needs_is_said(file, base, quantized, tmp_path, folder_of):
    with pytest.raises(ValueError, match="holds a transformer only"):
        load_pipeline(quantized, device="cpu")
    with pytest.raises(ValueError, match="holds a transformer only"):
        load_pipeline(quantized, config=base, device="cpu")
    with pytest.raises(ValueError, match=r"doesn't hold all of a StableDiffusion3Pipeline .*CLIPTextModel.*Pass base="):
        load_pipeline(file, config=base, device="cpu")
    with pytest.raises(ValueError, match="go with a single file"):
        load_pipeline(base, base=base, device="cpu")
    with pytest.raises(ValueError, match="not both"):
        load_pipeline(file, base=base, config=base, device="cpu")
    with pytest.raises(ValueError, match="can't read a PixArtTransformer2DModel from one file"):
        load_pipeline(file, base=folder_of("pixart"), device="cpu")
    with pytest.raises(FileNotFoundError, match="No file"):
        load_pipeline(tmp_path / "nowhere.safetensors", base=base)
    (tmp_path / "old.ckpt").write_bytes(b"pickled")
    with pytest.raises(ValueError, match=r"old\.ckpt is a pickle"):
        load_pipeline(tmp_path / "old.ckpt", base=base)


@pytest.mark.parametrize("spoil", ["missing", "shape"])
def test_a_file_of_another_network_is_refused(published, base, tmp_path, spoil):
    weights = dict(published)
    if spoil == "missing":
        del weights["final_layer.linear.bias"]
    else:
        weights["x_embedder.proj.weight"] = torch.zeros(32, 8, 2, 2)
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors doesn't fit the configuration of SD3Transformer2DModel"):
        load_pipeline(tmp_path / "other.safetensors", base=base, device="cpu")


def test_weights_that_are_not_there_are_never_left_empty(weights, base, tmp_path):
    """In diffusers' own layout nothing is renamed, so nothing is missed, and a hole would stay on "meta"."""
    fewer = {name: tensor for name, tensor in weights.items() if "transformer_blocks.1.ff.net.0" not in name}
    save_file(fewer, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="doesn't fit"):
        load_pipeline(tmp_path / "a.safetensors", base=base, device="cpu")


def test_the_family_is_found_by_the_names_in_the_file(file, tmp_path):
    flux = {"double_blocks.0.img_attn.norm.key_norm.scale": 2, "img_in.weight": (2, 64), "guidance_in.in_layer.bias": 2}
    save_file({name: torch.zeros(shape) for name, shape in flux.items()}, tmp_path / "flux.safetensors")
    assert find_repository(tmp_path / "flux.safetensors") == "black-forest-labs/FLUX.1-dev"
    with pytest.raises(ValueError, match="doesn't recognise the layout of sd3_tiny"):  # a size never published
        find_repository(file)
    save_file({"something.else": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"doesn't recognise the layout of b\.safetensors"):
        find_repository(tmp_path / "b.safetensors")
    first = {"model.diffusion_model.input_blocks.0.0.weight": torch.empty(320, 4, 3, 3, device="meta")}
    assert published_repository(first) == "stable-diffusion-v1-5/stable-diffusion-v1-5"
