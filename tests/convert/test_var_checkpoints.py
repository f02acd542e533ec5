"""Published VAR checkpoints: in, out, and what is refused."""

import argparse
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from apps.cli import main
from dit.convert import var
from dit.convert.keymap import KeyMapError, Reshape, Split, convert, inverse
from dit.models.next_scale import PRESETS, NextScaleTransformer
from dit.tokenizers import MultiScaleVQ
from pipelines import NextScaleClassToImagePipeline, load_pipeline
from tests.models import next_scale_reference as ref
from tests.models.tiny_next_scale import tokenizer_state, transformer_state
from tests.tokenizers.multi_scale_reference import SCALES


def tessera(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    return int(leaving.value.code or 0)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------- published keys


def affine(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": (shape[0],)}


def published_transformer(depth: int, length: int, shared: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of var_d<depth>.pth, written down from the released class."""
    width = 64 * depth
    shapes = {
        "pos_start": (1, 1, width),
        "pos_1LC": (1, length, width),
        "lvl_1L": (1, length),
        "attn_bias_for_masking": (1, 1, length, length),
        "lvl_embed.weight": (10, width),
        "class_emb.weight": (1001, width),
        **affine("word_embed", width, 32),
        **affine("head_nm.ada_lin.1", 2 * width, width),
        **affine("head", 4096, width),
        **(affine("shared_ada_lin.1", 6 * width, width) if shared else {}),
    }
    for i in range(depth):
        block = f"blocks.{i}"
        shapes |= {
            f"{block}.attn.scale_mul_1H11": (1, depth, 1, 1),
            f"{block}.attn.q_bias": (width,),
            f"{block}.attn.v_bias": (width,),
            f"{block}.attn.zero_k_bias": (width,),
            f"{block}.attn.mat_qkv.weight": (3 * width, width),
            **affine(f"{block}.attn.proj", width, width),
            **affine(f"{block}.ffn.fc1", 4 * width, width),
            **affine(f"{block}.ffn.fc2", width, 4 * width),
            **({f"{block}.ada_gss": (1, 1, 6, width)} if shared else affine(f"{block}.ada_lin.1", 6 * width, width)),
        }
    return shapes


def on_meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict of these shapes; only the buffers that loading compares with have values."""
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    for key, shape in shapes.items():
        if key.endswith("zero_k_bias"):
            state[key] = torch.zeros(shape)
    del state["lvl_1L"], state["attn_bias_for_masking"]  # made anew, as for exports without them
    return state


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("VAR")])
def test_every_published_transformer_fits(name: str) -> None:
    """0 missing and 0 unexpected keys, both ways, at full size."""
    depth = int(name.removeprefix("VAR-d"))
    shapes = published_transformer(depth, 2240 if depth == 36 else 680, shared=depth == 36)
    assert len(shapes) == {16: 220, 20: 272, 24: 324, 30: 402, 36: 446}[depth]
    model = var.transformer_from_official(on_meta(shapes))
    with torch.device("meta"):
        expected = NextScaleTransformer.from_preset(name)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in expected.state_dict().items()
    }
    assert {key: model.config[key] for key in model.config if key[0] != "_"} == {
        key: expected.config[key] for key in expected.config if key[0] != "_"
    }
    assert {key: tuple(value.shape) for key, value in var.transformer_to_official(model).items()} == shapes


def published_tokenizer() -> dict[str, tuple[int, ...]]:
    """Names and shapes of vae_ch160v4096z32.pth, written down from the released class."""
    widths = (160, 160, 320, 320, 640)

    def resnet(name: str, enters: int, leaves: int) -> dict[str, tuple[int, ...]]:
        return {
            **affine(f"{name}.norm1", enters),
            **affine(f"{name}.conv1", leaves, enters, 3, 3),
            **affine(f"{name}.norm2", leaves),
            **affine(f"{name}.conv2", leaves, leaves, 3, 3),
            **(affine(f"{name}.nin_shortcut", leaves, enters, 1, 1) if enters != leaves else {}),
        }

    def attention(name: str) -> dict[str, tuple[int, ...]]:
        return {
            **affine(f"{name}.norm", 640),
            **affine(f"{name}.qkv", 1920, 640, 1, 1),
            **affine(f"{name}.proj_out", 640, 640, 1, 1),
        }

    shapes = {
        **affine("quant_conv", 32, 32, 3, 3),
        **affine("post_quant_conv", 32, 32, 3, 3),
        "quantize.embedding.weight": (4096, 32),
        "quantize.ema_vocab_hit_SV": (10, 4096),
        **affine("encoder.conv_in", 160, 3, 3, 3),
        **affine("encoder.norm_out", 640),
        **affine("encoder.conv_out", 32, 640, 3, 3),
        **affine("decoder.conv_in", 640, 32, 3, 3),
        **affine("decoder.norm_out", 160),
        **affine("decoder.conv_out", 3, 160, 3, 3),
    }
    for i in range(4):
        shapes |= affine(f"quantize.quant_resi.qresi_ls.{i}", 32, 32, 3, 3)
        shapes |= affine(f"encoder.down.{i}.downsample.conv", widths[i], widths[i], 3, 3)
        shapes |= affine(f"decoder.up.{i + 1}.upsample.conv", widths[i + 1], widths[i + 1], 3, 3)
    for side in ("encoder", "decoder"):
        shapes |= resnet(f"{side}.mid.block_1", 640, 640) | resnet(f"{side}.mid.block_2", 640, 640)
        shapes |= attention(f"{side}.mid.attn_1")
    for i, width in enumerate(widths):
        for j in range(2):
            shapes |= resnet(f"encoder.down.{i}.block.{j}", widths[max(i - 1, 0)] if j == 0 else width, width)
        for j in range(3):
            shapes |= resnet(f"decoder.up.{i}.block.{j}", widths[min(i + 1, 4)] if j == 0 else width, width)
    for j in range(2):
        shapes |= attention(f"encoder.down.4.attn.{j}")
    for j in range(3):
        shapes |= attention(f"decoder.up.4.attn.{j}")
    return shapes


@pytest.mark.parametrize("name", ["VAR-d16", "VAR-d36"])
def test_the_published_tokenizer_fits(name: str) -> None:
    shapes = published_tokenizer()
    assert len(shapes) == 324
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    model = var.tokenizer_from_official(state, PRESETS[name]["scales"])
    assert model.config.block_out_channels == (160, 160, 320, 320, 640)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e5) == 1089
    assert {key: tuple(value.shape) for key, value in var.tokenizer_to_official(model).items()} == shapes


# -------------------------------------------------------------- there and back


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trips_are_bit_exact(shared: bool, dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in transformer_state(shared).items()}
    model = var.transformer_from_official(state)
    assert model.dtype == dtype
    assert tuple(model.config.scales) == SCALES
    assert equal(var.transformer_to_official(model), state)
    state = {key: value.to(dtype) for key, value in tokenizer_state().items()}
    assert equal(var.tokenizer_to_official(var.tokenizer_from_official(state, SCALES)), state)


def test_reshaped_and_folded_kernels_come_back() -> None:
    rules = (Reshape("a", "x", (1, 6), (2, 3)), Split("b", ("y", "z"), kernel_axes=2))
    state = {"a": torch.arange(6.0)[None], "b": torch.arange(8.0).reshape(4, 2, 1, 1)}
    there = convert(state, rules)
    assert {key: tuple(value.shape) for key, value in there.items()} == {"x": (2, 3), "y": (2, 2), "z": (2, 2)}
    assert equal(convert(there, inverse(rules)), state)
    with pytest.raises(KeyMapError, match=r"expected \(1, 6\)"):
        convert({**state, "a": torch.zeros(3)}, rules)
    with pytest.raises(KeyMapError, match="1x1 convolution"):
        convert({**state, "b": torch.zeros(4, 2, 3, 3)}, rules)


def test_buffers_must_say_what_the_schedule_says() -> None:
    state = transformer_state(False)
    with pytest.raises(KeyMapError, match="attn_bias_for_masking"):
        var.transformer_from_official({**state, "attn_bias_for_masking": torch.zeros(1, 1, 30, 30)})
    with pytest.raises(KeyMapError, match="zero_k_bias"):
        var.transformer_from_official({**state, "blocks.1.attn.zero_k_bias": torch.ones(ref.WIDTH)})
    bare = {key: value for key, value in state.items() if not key.endswith(ref.DERIVED)}
    with pytest.raises(ValueError, match="30 tokens are no published schedule"):
        var.transformer_from_official(bare)
    assert equal(var.transformer_to_official(var.transformer_from_official(bare, SCALES)), state)


def test_foreign_and_partial_files_are_refused() -> None:
    state = transformer_state(False)
    with pytest.raises(KeyMapError, match="lacks pos_1LC"):
        var.transformer_from_official({"weight": torch.zeros(1)})
    with pytest.raises(KeyMapError, match=r"blocks\.1\.ffn\.fc2\.bias"):
        var.transformer_from_official({k: v for k, v in state.items() if k != "blocks.1.ffn.fc2.bias"})
    with pytest.raises(KeyMapError, match="1 keys are not part"):
        var.transformer_from_official({**state, "extra": torch.zeros(1)})
    with pytest.raises(KeyMapError, match=r"transformer_blocks\.1\.ff\.net\.2\.bias has shape"):
        var.transformer_from_official({**state, "blocks.1.ffn.fc2.bias": torch.zeros(3)})
    with pytest.raises(KeyMapError, match="a VAR tokenizer"):
        var.tokenizer_from_official(state)


# ---------------------------------------------------------------------- files


def trainer_checkpoint() -> dict:
    """What the official trainer saves."""
    models = {"var_wo_ddp": transformer_state(False), "vae_local": tokenizer_state()}
    return {"epoch": 3, "iter": 7, "trainer": {"config": {"prog_it": 0}, **models}, "args": {"depth": 2}}


def test_single_nested_and_wrapped_files_are_read(tmp_path: Path) -> None:
    state = transformer_state(False)
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "wrapped.pth")
    torch.save(trainer_checkpoint(), tmp_path / "ar-ckpt-last.pth")
    save_file(state, tmp_path / "model.safetensors")
    for name in ("wrapped.pth", "ar-ckpt-last.pth", "model.safetensors"):
        assert equal(var.read_checkpoint(tmp_path / name), state)
    assert equal(var.read_checkpoint(tmp_path / "ar-ckpt-last.pth", var.TOKENIZER), tokenizer_state())
    holds = {path.name: var.holds_both(path) for path in tmp_path.iterdir()}
    assert holds == {"wrapped.pth": False, "ar-ckpt-last.pth": True, "model.safetensors": False}


def test_damaged_and_dangerous_files_are_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (argparse.Namespace, ())

    torch.save({"model": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(pickle.UnpicklingError):
        var.read_checkpoint(tmp_path / "trap.pth")
    torch.save(transformer_state(False), tmp_path / "whole.pth")
    for name, content in (
        ("cut.pth", (tmp_path / "whole.pth").read_bytes()[:5000]),
        ("cut.safetensors", b"\x00" * 20),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            var.read_checkpoint(tmp_path / name)
    torch.save({"step": 3}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not a state dict"):
        var.read_checkpoint(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="absent"):
        var.read_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"the suffix must be one of \.safetensors"):
        var.read_checkpoint(tmp_path / "weights.onnx")


def test_the_command_line_converts_there_and_back(tmp_path: Path) -> None:
    torch.save(transformer_state(True), tmp_path / "var.pth")
    torch.save(tokenizer_state(), tmp_path / "vae.pth")
    arguments = ("convert", "--family", "var", "--checkpoint", tmp_path / "var.pth")
    out = tmp_path / "out"
    assert tessera(*arguments, "-o", out) == 2  # no tokenizer
    assert not out.exists()
    assert tessera(*arguments, "--vae", tmp_path / "vae.pth", "-o", out) == 0
    pipe = load_pipeline(out, device="cpu")
    assert isinstance(pipe, NextScaleClassToImagePipeline)
    assert isinstance(pipe.vae, MultiScaleVQ)
    image = pipe([3], generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)

    back = ("convert", "--family", "var", "--to-official", "--checkpoint")
    assert tessera(*back, out, "-o", tmp_path / "again.pth") == 0
    assert tessera(*back, out / "vae", "-o", tmp_path / "vae.safetensors") == 0
    assert equal(torch.load(tmp_path / "again.pth", weights_only=True), transformer_state(True))
    assert equal(load_file(tmp_path / "vae.safetensors"), tokenizer_state())


def test_the_command_line_reads_a_trainers_checkpoint(tmp_path: Path) -> None:
    torch.save(trainer_checkpoint(), tmp_path / "ar-ckpt-last.pth")
    arguments = ("convert", "--family", "var", "--checkpoint", tmp_path / "ar-ckpt-last.pth", "--dtype", "bfloat16")
    assert tessera(*arguments, "-o", tmp_path / "out") == 0
    pipe = load_pipeline(tmp_path / "out", device="cpu", dtype="bfloat16")
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe([3], output_type="pt").images.shape == (1, 3, 64, 64)
