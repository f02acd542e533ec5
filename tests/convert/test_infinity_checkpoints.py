"""Published Infinity checkpoints: in, out, and what is refused."""

import argparse
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from apps.cli import main
from dit.convert import infinity
from dit.convert.keymap import KeyMapError
from dit.convert.var import read_checkpoint
from dit.models.next_scale import PRESETS, NextScaleTransformer
from dit.tokenizers import MultiScaleBSQ
from pipelines import NextScaleTextToImagePipeline, load_pipeline
from tests.models import infinity_reference as ref
from tests.models.tiny_infinity import tokenizer, transformer_state
from tests.pipes.tiny import tiny_components

PUBLISHED = [name for name in PRESETS if name.startswith("Infinity")]


def tessera(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    return int(leaving.value.code or 0)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------- published keys


def affine(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": (shape[0],)}


def text_keys(name: str, width: int, text: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.mat_kv.weight": (2 * width, text),
        f"{name}.v_bias": (width,),
        f"{name}.zero_k_bias": (width,),
        **affine(f"{name}.proj", width, width),
    }


def published_transformer(depth: int, width: int, heads: int, bits: int, chunks: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released transformer, written down from the released class."""
    shapes = {
        "cfg_uncond": (512, 2048),
        "pos_start": (1, 1, width),
        "text_norm.weight": (2048,),
        "text_proj_for_sos.ca.mat_q": (1, 16, width // 16),
        **text_keys("text_proj_for_sos.ca", width, 2048),
        **affine("text_proj_for_ca.0", width, 2048),
        **affine("text_proj_for_ca.2", width, width),
        "lvl_embed.weight": (15, width),
        **affine("word_embed", width, bits),
        **affine("shared_ada_lin.1", 6 * width, width),
        **affine("head_nm.ada_lin.1", 2 * width, width),
        **affine("head", 2 * bits, width),
    }
    for i in range(depth):
        block = f"block_chunks.{i * chunks // depth}.module.{i % (depth // chunks)}"
        shapes |= {
            f"{block}.ada_gss": (1, 1, 6, width),
            f"{block}.sa.scale_mul_1H11": (1, heads, 1, 1),
            **{f"{block}.sa.{name}_bias": (width,) for name in ("q", "v", "zero_k")},
            f"{block}.sa.mat_qkv.weight": (3 * width, width),
            **affine(f"{block}.sa.proj", width, width),
            **affine(f"{block}.ca.mat_q", width, width),
            **text_keys(f"{block}.ca", width, width),
            **affine(f"{block}.ffn.fc1", 4 * width, width),
            **affine(f"{block}.ffn.fc2", width, 4 * width),
            **affine(f"{block}.ca_norm", width),
        }
    return shapes


SIZES = {
    "Infinity-125M": (12, 768, 8, 32, 4, 274),
    "Infinity-2B": (32, 2048, 16, 32, 8, 694),
    "Infinity-8B": (40, 3584, 28, 56, 8, 862),
}
"""Depth, width, heads, bits of a token, parts of the blocks, and keys as counted in the released class."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_transformer_fits(name: str) -> None:
    """0 missing and 0 unexpected keys, both ways, at full size."""
    *size, keys = SIZES[name]
    shapes = published_transformer(*size)
    assert len(shapes) == keys
    state = {
        key: torch.zeros(shape) if key.endswith("zero_k_bias") else torch.empty(shape, device="meta")
        for key, shape in shapes.items()
    }
    model = infinity.transformer_from_official(state)
    with torch.device("meta"):
        expected = NextScaleTransformer.from_preset(name)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in expected.state_dict().items()
    }
    assert {key: model.config[key] for key in model.config if key[0] != "_"} == {
        key: expected.config[key] for key in expected.config if key[0] != "_"
    }
    assert {key: tuple(value.shape) for key, value in infinity.transformer_to_official(model).items()} == shapes


# -------------------------------------------------------------- there and back


@pytest.mark.parametrize("case", ref.CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trips_are_bit_exact(case: str, dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) for key, value in transformer_state(case).items()}
    model = infinity.transformer_from_official(state, ref.CASES[case]["grids"], ref.CASES[case]["patchify"])
    assert model.dtype == dtype
    assert model.config.latent_channels == ref.CASES[case]["bits"]
    assert equal(infinity.transformer_to_official(model, ref.DEPTH), state)


def test_other_spellings_are_read() -> None:
    state = transformer_state("wide")
    expected = infinity.transformer_from_official(state).state_dict()
    plain = {key.replace("block_chunks.", "blocks.").replace(".module.0", ""): value for key, value in state.items()}
    turned = {key: value.reshape(1, 1, -1, 1) if "scale_mul" in key else value for key, value in state.items()}
    bare = {key: value for key, value in state.items() if not key.endswith("zero_k_bias")}
    tables = {**state, "lvl_1L": torch.zeros(1, 3), "attn_bias_for_masking": torch.zeros(1)}
    for other in (plain, turned, bare, tables):
        assert equal(infinity.transformer_from_official(other).state_dict(), expected)
    assert equal(infinity.transformer_to_official(infinity.transformer_from_official(plain), 1), plain)
    with pytest.raises(ValueError, match="3 equal parts"):
        infinity.transformer_to_official(infinity.transformer_from_official(plain), 3)


def test_foreign_and_partial_files_are_refused() -> None:
    state, last = transformer_state("wide"), "block_chunks.1.module.0.ffn.fc2.bias"
    with pytest.raises(KeyMapError, match="lacks cfg_uncond"):
        infinity.transformer_from_official({"weight": torch.zeros(1)})
    with pytest.raises(KeyMapError, match=last.replace(".", r"\.")):
        infinity.transformer_from_official({key: value for key, value in state.items() if key != last})
    with pytest.raises(KeyMapError, match="1 keys are not part"):
        infinity.transformer_from_official({**state, "extra": torch.zeros(1)})
    with pytest.raises(KeyMapError, match="contradicts"):
        infinity.transformer_from_official({**state, last: torch.zeros(3)})
    with pytest.raises(KeyMapError, match="two for each of 6 bits"):
        infinity.transformer_from_official({**state, "head.weight": torch.zeros(64, ref.WIDTH)})
    with pytest.raises(ValueError, match=r"0\.06M, 0\.25M"):
        infinity.square_scales("2M")


# ---------------------------------------------------------------------- files


def shards(folder: Path, suffix: str) -> Path:
    """A sharded checkpoint, as transformers writes it."""
    state, folder = transformer_state("wide"), folder / suffix
    folder.mkdir()
    stem = "pytorch_model" if suffix == "bin" else "model"
    keys, places = sorted(state), {}
    for part in range(2):
        name = f"{stem}-{part + 1:05d}-of-00002.{suffix}"
        content = {key: state[key].contiguous() for key in keys[part::2]}
        torch.save(content, folder / name) if suffix == "bin" else save_file(content, folder / name)
        places |= dict.fromkeys(content, name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_shards_are_read(tmp_path: Path, suffix: str) -> None:
    folder = shards(tmp_path, suffix)
    state, taken = infinity.read_transformer(folder)
    assert (equal(state, transformer_state("wide")), taken) == (True, "")
    index = next(folder.glob("*.index.json"))
    content = json.loads(index.read_text())
    index.write_text(
        json.dumps({"weight_map": {**content["weight_map"], "head.extra": content["weight_map"]["pos_start"]}})
    )
    with pytest.raises(ValueError, match=r"lack 1 tensors of the index, such as head\.extra"):
        infinity.read_transformer(folder)
    index.write_text(json.dumps({"weight_map": {"pos_start": "../elsewhere.bin"}}))
    with pytest.raises(ValueError, match="outside of its folder"):
        infinity.read_transformer(folder)
    index.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        infinity.read_transformer(folder)
    index.unlink()
    with pytest.raises(ValueError, match="no index of shards"):
        infinity.read_transformer(folder)


def trainer_checkpoint() -> dict:
    """What the official trainer saves."""
    state = transformer_state("wide")
    models = {
        "gpt_fsdp": state,
        "gpt_ema_fsdp": {key: value * 0.5 for key, value in state.items()},
        "vae_local": infinity.tokenizer_to_official(tokenizer("wide")),
    }
    return {"epoch": 3, "trainer": {"config": {"prog_it": 0}, "gpt_fsdp_opt": None, **models}}


def test_a_trainers_checkpoint_is_taken_apart(tmp_path: Path) -> None:
    path = tmp_path / "ar-ckpt.pth"
    torch.save(trainer_checkpoint(), path)
    ema, taken = infinity.read_transformer(path)
    assert taken == "ema"
    assert equal(infinity.read_transformer(path, "model")[0], transformer_state("wide"))
    assert torch.equal(ema["pos_start"], transformer_state("wide")["pos_start"] * 0.5)
    content = trainer_checkpoint()
    del content["trainer"]["gpt_ema_fsdp"]
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"no 'ema' weights; it holds .*'gpt_fsdp'"):
        infinity.read_transformer(path)


def test_damaged_and_dangerous_files_are_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (argparse.Namespace, ())

    torch.save({"trainer": {"gpt_fsdp": Trap()}}, tmp_path / "trap.pth")
    with pytest.raises(pickle.UnpicklingError):
        infinity.read_transformer(tmp_path / "trap.pth")
    torch.save(transformer_state("wide"), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged"):
        infinity.read_transformer(tmp_path / "cut.pth")


def text_model(folder: Path) -> Path:
    """A folder with a small T5 encoder and its tokenizer."""
    parts = tiny_components()
    parts["text_encoder"].save_pretrained(folder)
    parts["tokenizer"].save_pretrained(folder)
    return folder


def test_the_command_line_converts_there_and_back(tmp_path: Path) -> None:
    pictures = infinity.tokenizer_to_official(tokenizer("wide"))
    torch.save(transformer_state("wide"), tmp_path / "infinity.pth")
    torch.save({"vae": pictures, "ema": {}}, tmp_path / "vae.pth")
    arguments = ("convert", "--family", "infinity", "--checkpoint", tmp_path / "infinity.pth")
    out = tmp_path / "out"
    assert tessera(*arguments, "-o", out) == 2  # no tokenizer of images
    assert not out.exists()
    assert tessera(*arguments, "--vae", tmp_path / "vae.pth", "--resolution", "0.06M", "-o", out) == 0
    pipe = load_pipeline(out, device="cpu")
    assert isinstance(pipe, NextScaleTextToImagePipeline)
    assert isinstance(pipe.vae, MultiScaleBSQ)
    assert pipe.config.defaults == {"guidance_scale": 3.0, "temperature": 0.5, "top_p": 0.97}
    image = pipe(prompt_embeds=ref.texts()[0][:1], generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (256, 256)

    back = ("convert", "--family", "infinity", "--to-official", "--checkpoint")
    assert tessera(*back, out, "-o", tmp_path / "again.safetensors") == 0
    assert tessera(*back, out / "vae", "-o", tmp_path / "vae_again.pth") == 0
    again = infinity.transformer_from_official(load_file(tmp_path / "again.safetensors")).state_dict()
    assert equal(again, infinity.transformer_from_official(transformer_state("wide")).state_dict())
    assert equal(read_checkpoint(tmp_path / "vae_again.pth", infinity.TOKENIZER), pictures)


def test_the_command_line_takes_a_text_encoder_along(tmp_path: Path) -> None:
    config = {**ref.config("wide"), "text_dim": tiny_components()["text_encoder"].config.d_model, "text_pool_heads": 2}
    state = infinity.transformer_to_official(NextScaleTransformer(**config), ref.DEPTH)
    content = trainer_checkpoint()
    content["trainer"] |= {"gpt_fsdp": state, "gpt_ema_fsdp": state}
    torch.save(content, tmp_path / "ar-ckpt.pth")
    arguments = ("convert", "--family", "infinity", "--checkpoint", tmp_path / "ar-ckpt.pth", "--resolution", "0.06M")
    text = text_model(tmp_path / "t5")
    assert tessera(*arguments, "--text-encoder", tmp_path, "-o", tmp_path / "none") == 2  # no model there
    assert tessera(*arguments, "--text-encoder", text, "--dtype", "bfloat16", "-o", tmp_path / "out") == 0
    pipe = load_pipeline(tmp_path / "out", device="cpu", dtype="bfloat16")
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe("a red apple", output_type="pt").images.shape == (1, 3, 256, 256)
    assert (
        tessera("convert", "--family", "dit", "--checkpoint", text, "--text-encoder", text, "-o", tmp_path / "x") == 2
    )
