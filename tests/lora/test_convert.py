"""`dit.lora.convert` and `tessera convert-lora`: which family, where it is written, what is refused and why."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dit.lora
from apps import cli
from dit.lora import LoraFileError, LoraMisfitError
from dit.lora.conversion import Lora, read, write
from dit.lora.dialects import DIALECTS
from dit.lora.layers import LoraLayer
from dit.lora.names import RULES
from dit.lora.table import dialect_document, reads_original, writes
from pipelines import load_lora
from tests.families.tiny import tiny_pipeline
from tests.lora.made import FAMILIES, assert_equal_layers, random_lora, tensors_of

Q = "transformer.transformer_blocks.0.attn.to_q"


def blocks(family, counts):
    """A LoRA of `to_q` in so many blocks of each list."""
    one = LoraLayer(torch.randn(2, 8), torch.randn(8, 2), 2.0)
    return {f"{path}.{n}.attn.to_q": one for path, count in counts.items() for n in range(count)}


def saved(folder, tensors, **metadata):
    folder.mkdir(exist_ok=True)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file(tensors, folder / "ink.safetensors", metadata=metadata or None)
    return folder / "ink.safetensors"


# ------------------------------------------------------------------------- family


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        ("flux", {"transformer_blocks": 19, "single_transformer_blocks": 38}),
        ("hunyuan_video", {"transformer_blocks": 20, "single_transformer_blocks": 40}),
        ("sd3", {"transformer_blocks": 24}),
        ("qwen_image", {"transformer_blocks": 60}),
    ],
)
def test_the_number_of_blocks_tells_families_apart(family, counts, tmp_path):
    file = saved(tmp_path, tensors_of(blocks(family, counts)))
    assert read(file).family == family


@pytest.mark.parametrize(
    ("key", "value", "family"),
    [
        ("modelspec.architecture", "Flux.1-dev/lora", "flux"),
        ("modelspec.architecture", "hunyuan-video/lora", "hunyuan_video"),
        ("ss_base_model_version", "flux1", "flux"),
        ("lora_family", "hunyuan_video", "hunyuan_video"),
    ],
)
def test_metadata_tell_families_apart(key, value, family, tmp_path):
    file = saved(tmp_path, tensors_of(blocks(family, {"single_transformer_blocks": 3})), **{key: value})
    assert read(file).family == family


def test_a_choice_that_matters_is_asked_for(tmp_path):
    file = saved(tmp_path, tensors_of(blocks("flux", {"transformer_blocks": 3})))
    with pytest.raises(LoraFileError, match=r"fits several families \(flux, .*hunyuan_video.*--family"):
        dit.lora.convert(file, "comfyui")
    assert not list(tmp_path.glob("*comfyui*"))
    written = dit.lora.convert(file, "comfyui", family="hunyuan_video")
    assert read(written).family == "hunyuan_video"


def test_a_choice_that_does_not_matter_is_made_but_not_remembered(tmp_path):
    """Names and factors are the same in both; where they are not, the question comes again."""
    file = saved(tmp_path, tensors_of(blocks("flux", {"transformer_blocks": 3})))
    written = dit.lora.convert(file, "onetrainer")
    assert len(load_file(written)) == 9
    with safe_open(written, "pt") as opened:
        assert "lora_family" not in opened.metadata()
    with pytest.raises(LoraFileError, match="fits several families"):
        dit.lora.convert(written, "comfyui")


@pytest.mark.parametrize("family", FAMILIES)
def test_original_names_tell_the_family_where_they_are_its_own(family, tmp_path):
    if writes(family, "comfyui") != "yes" or reads_original(family) == "the same":
        pytest.skip("its names are no others")
    layers = random_lora(family)
    file = write(Lora("ink", family, layers, {}), "comfyui", tmp_path / "ink.safetensors")
    tensors = load_file(file)
    bare = saved(tmp_path / "bare", tensors)
    assert read(bare).family == family


# ---------------------------------------------------------------- nothing is lost


KEPT_OUT = {
    "another layer": ("transformer.transformer_blocks.0.attn.to_z.lora_A.weight", "no part of a LoRA"),
    "text encoder": ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "text encoder"),
    "kohya's text encoder": ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text encoder"),
    "difference": ("transformer.transformer_blocks.0.norm1.diff", "whole differences"),
    "noise": ("note", "no part of a LoRA"),
}


@pytest.mark.parametrize("to", DIALECTS)
@pytest.mark.parametrize("what", KEPT_OUT)
def test_a_key_without_a_place_is_listed_and_nothing_written(what, to, tmp_path):
    key, word = KEPT_OUT[what]
    pair = {key: torch.ones(2, 8)}
    if key.endswith(".weight"):
        other = key.replace("lora_A", "lora_B").replace("lora_down", "lora_up")
        pair[other] = torch.ones(8, 2)
    file = saved(tmp_path, tensors_of(random_lora("flux")) | pair)
    with pytest.raises(LoraMisfitError) as refused:
        dit.lora.convert(file, to, family="flux")
    assert key in str(refused.value)
    assert word in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ink.safetensors"]


@pytest.mark.parametrize("to", DIALECTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_of_a_file_arrives(family, to, tmp_path):
    """Both factors of every layer can be found again in what is written, fused layers among them."""
    if writes(family, to) == "no":
        with pytest.raises(LoraFileError, match="have no name in the original code"):
            write(Lora("ink", family, random_lora(family), {}), to, tmp_path / "ink.safetensors")
        return
    layers = random_lora(family)
    file = write(Lora("ink", family, layers, {}), to, tmp_path / "ink.safetensors")
    held = sum(
        tensor.abs().double().sum() for key, tensor in load_file(file).items() if "lora_" in key.rsplit(".", 2)[1]
    )
    wanted = sum(part.abs().double().sum() for layer in layers.values() for part in (layer.down, layer.up))
    torch.testing.assert_close(held, wanted)


@pytest.mark.parametrize(
    ("part", "kind"),
    [("lokr_w1", "LoKr"), ("hada_w1_a", "LoHa"), ("oft_blocks", "OFT"), ("lora_mid.weight", "Tucker")],
)
def test_other_kinds_are_named(part, kind, tmp_path):
    file = saved(tmp_path, {f"{Q}.{part}": torch.ones(2, 2), f"{Q}.alpha": torch.tensor(1.0)})
    with pytest.raises(LoraFileError, match=kind):
        dit.lora.convert(file, "comfyui")


SPOILT = {
    "half": (lambda t: {key: value for key, value in t.items() if "lora_B" not in key}, "lacks its factor B"),
    "nan": (lambda t: {**t, f"{Q}.lora_A.weight": torch.full((2, 32), torch.nan)}, "NaN or infinite"),
    "ranks": (lambda t: {**t, f"{Q}.lora_B.weight": torch.ones(32, 5)}, r"\(32, 5\)"),
    "alpha": (lambda t: {**t, f"{Q}.alpha": torch.ones(3)}, "3 values, expected one"),
    "twice": (lambda t: t | {key.replace("transformer.", "", 1): v for key, v in t.items()}, "holds two LoRAs"),
    "input-wise DoRA": (lambda t: {**t, f"{Q}.dora_scale": torch.ones(1, 32)}, "one length for each input"),
    "some DoRA": (lambda t: {**t, f"{Q}.dora_scale": torch.ones(32, 1)}, "DoRA"),
    "empty": (lambda t: {}, "no tensors"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_files_are_refused_with_the_reason(how, tmp_path):
    spoil, words = SPOILT[how]
    layers = random_lora("flux", only="transformer_blocks.0.attn.to_")
    layers = {name: layer for name, layer in layers.items() if not name.startswith("single")}
    file = saved(tmp_path, spoil(tensors_of(layers)))
    for to in ("diffusers", "comfyui") if how == "some DoRA" else ("comfyui",):
        with pytest.raises(LoraFileError, match=words):
            dit.lora.convert(file, to, family="flux")


def test_a_fused_layer_of_another_model_is_told(tmp_path):
    tensors = {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(2, 8),
               "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": torch.ones(25, 2)}  # fmt: skip
    with pytest.raises(LoraFileError, match="25 rows for 8 inputs"):
        dit.lora.convert(saved(tmp_path, tensors), "diffusers", family="flux")


# ------------------------------------------------------------------------ writing


def test_where_it_is_written(tmp_path):
    file = saved(tmp_path, tensors_of(random_lora("wan")), ss_steps="500")
    assert dit.lora.convert(file, "kohya") == tmp_path / "ink-kohya.safetensors"
    assert dit.lora.convert(file, "peft") == tmp_path / "ink-peft" / "adapter_model.safetensors"
    assert (
        dit.lora.convert(file, "peft", output=tmp_path / "a" / "b")
        == tmp_path / "a" / "b" / "adapter_model.safetensors"
    )
    written = dit.lora.convert(file, "comfyui", output=tmp_path / "new" / "x.safetensors")
    with safe_open(written, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "lora_family": "wan", "ss_steps": "500"}
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("to", ["kohya", "peft"])
def test_nothing_is_overwritten(to, tmp_path):
    file = saved(tmp_path, tensors_of(random_lora("wan")))
    written = dit.lora.convert(file, to)
    before = written.read_bytes()
    with pytest.raises(FileExistsError, match="is there already"):
        dit.lora.convert(file, to)
    assert written.read_bytes() == before


def test_a_configuration_of_another_adapter_is_not_overwritten(tmp_path):
    file = saved(tmp_path, tensors_of(random_lora("wan")))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"adapter_config\.json"):
        dit.lora.convert(file, "peft", output=tmp_path / "out")


def test_wrong_arguments(tmp_path):
    file = saved(tmp_path, tensors_of(random_lora("wan")))
    with pytest.raises(ValueError, match="to='a1111', expected one of diffusers, peft"):
        dit.lora.convert(file, "a1111")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="family='sdxl', expected one of flux"):
        dit.lora.convert(file, "kohya", family="sdxl")
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        dit.lora.convert(file, "kohya", output=tmp_path / "ink.pt")
    with pytest.raises(LoraFileError, match="no LoRA file"):
        dit.lora.convert(tmp_path / "nowhere.safetensors", "kohya")


def test_rank_stabilised_loras_keep_their_scale(tmp_path):
    layers = random_lora("text_dit", rank=4, alpha=4.0)
    config = {"r": 4, "lora_alpha": 6, "use_rslora": True, "peft_type": "LORA"}
    plain = {key: tensor for key, tensor in tensors_of(layers, "base_model.model.").items() if "alpha" not in key}
    file = saved(tmp_path, plain)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    written = dit.lora.convert(file, "kohya", family="text_dit")
    assert {layer.scale for layer in read(written).layers.values()} == {6 / 2}


# ------------------------------------------------------------------ loader, commands


@pytest.mark.parametrize("family", ["flux", "sd3", "wan", "lumina2", "z_image", "hunyuan_video"])
@pytest.mark.parametrize("to", ["peft", "comfyui", "kohya"])
def test_load_lora_on_pipelines_of_diffusers(family, to, tmp_path):
    pipe = tiny_pipeline(family)
    layers = random_lora(family, only="attn")
    layers |= random_lora(family, only="attention")
    file = write(Lora("ink", family, layers, {}), to, tmp_path / "ink.safetensors")
    load_lora(pipe, file, "ink")
    for name, layer in layers.items():
        delta = pipe.transformer.get_submodule(name).get_delta_weight("ink")
        torch.testing.assert_close(delta, layer.delta().float(), atol=1e-4, rtol=1e-4)


def test_load_lora_where_the_class_takes_no_adapters(tmp_path):
    layers = random_lora("pixart", only="attn")
    file = write(Lora("ink", "pixart", layers, {}), "diffusers", tmp_path / "ink.safetensors")
    pipe = tiny_pipeline("pixart")
    load_lora(pipe, file, "ink")
    for name, layer in layers.items():
        delta = pipe.transformer.get_submodule(name).get_delta_weight("ink")
        torch.testing.assert_close(delta, layer.delta().float(), atol=1e-4, rtol=1e-4)


def test_load_lora_tells_what_has_no_transformer():
    with pytest.raises(TypeError, match="no transformer that could take adapters"):
        load_lora(object(), {})


def command(*words):
    with pytest.raises(SystemExit) as left:
        cli.main(["convert-lora", *map(str, words)])
    return left.value.code


def test_the_command_line(tmp_path, capsys):
    layers = random_lora("flux")
    file = write(Lora("ink", "flux", layers, {}), "diffusers", tmp_path / "ink.safetensors")
    out = tmp_path / "out" / "ink.safetensors"
    assert command(file, "--to", "comfyui", "-o", out) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert_equal_layers(read(out).layers, layers)
    assert command(file, "--to", "comfyui", "-o", out) == 2
    assert "is there already" in capsys.readouterr().err
    assert command(file, "--to", "a1111") == 2
    assert command(file, "--to", "kohya", "--family", "sdxl") == 2
    assert "expected one of flux" in capsys.readouterr().err
    assert command(tmp_path / "nowhere.safetensors", "--to", "kohya") == 2
    assert command("--help") == 0
    assert "--family" in capsys.readouterr().out


def test_the_command_line_lists_keys_without_a_place(tmp_path, capsys):
    tensors = tensors_of(random_lora("flux")) | {"note": torch.ones(1)}
    assert command(saved(tmp_path, tensors), "--to", "kohya", "--family", "flux") == 1
    told = capsys.readouterr().err
    assert "note" in told
    assert "Traceback" not in told


# ------------------------------------------------------------------------ document


def test_the_document_is_what_the_code_says():
    """`python -m dit.lora.table docs/lora_dialects.md` writes it anew."""
    committed = Path(__file__).parents[2] / "docs" / "lora_dialects.md"
    assert committed.read_text(encoding="utf-8") == dialect_document()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_document_says_what_happens(family, tmp_path):
    layers = random_lora(family)
    for to in DIALECTS:
        lora = Lora("ink", family, layers, {})
        if writes(family, to) == "no":
            with pytest.raises(LoraFileError):
                write(lora, to, tmp_path / f"{to}.safetensors")
        else:
            assert_equal_layers(read(write(lora, to, tmp_path / to / "ink.safetensors"), to).layers, layers)
    assert (reads_original(family) == "no") == (not any(rule.original for rule in RULES[family]))
