"""Every family in every dialect and back: the same factors, and the same difference of every weight."""

import json
import re
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import dit.lora
from dit.lora.conversion import Lora, read, write
from dit.lora.dialects import DIALECTS
from dit.lora.layers import LoraLayer
from dit.lora.names import RULES, bare_name, to_diffusers, to_original
from dit.runtime.families import FAMILIES as ROWS
from pipelines.lora.files import adaptable_layers, fit_lora, read_lora_file
from tests.families.tiny import tiny_pipeline
from tests.lora.made import (
    FAMILIES,
    KNOWN,
    assert_equal_layers,
    assert_same_deltas,
    network,
    random_lora,
    tensors_of,
)

WRITTEN = [
    (family, to) for family in FAMILIES for to, dialect in DIALECTS.items() if not dialect.original or family in KNOWN
]


def saved(folder, family, to, layers):
    return write(Lora("ink.safetensors", family, layers, {}), to, folder / "ink.safetensors")


# ------------------------------------------------------------------------- tables


def test_every_family_of_the_table_names_its_layers():
    assert all(row.layers for row in ROWS)
    assert all(len(depth) == sum(not one.refiner for one in row.block_lists) for row in ROWS for depth in row.depths)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_a_network_has_one_rule(family):
    for name in adaptable_layers(network(family)):
        for form in (name, name.replace(".", "_")):
            found = [rule for rule in RULES[family] if rule.match_part(form, flat=form != name) is not None]
            assert len({rule.original for rule in found}) == 1, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_name_means_one_layer(family):
    """A name that is both diffusers' and original means the same layer, and so do names with underscores."""
    parts = [part for rule in RULES[family] for part in rule.parts]
    originals = {rule.original: rule.parts for rule in RULES[family] if rule.original}
    assert all(originals[name] == (name,) for name in set(parts) & set(originals))
    for flat in (False, True):
        for name in {*parts, *originals}:
            sample = (name.replace(".", "_") if flat else name).replace("#", "7")
            matches = {rule.original for rule in RULES[family] if rule.match_original(sample, flat) is not None}
            owners = {rule.original for rule in RULES[family] if rule.match_part(sample, flat) is not None}
            assert len(matches | owners) == 1, (name, matches, owners)


# -------------------------------------------------------------------- round trips


@pytest.mark.parametrize(("family", "to"), WRITTEN)
def test_there_and_back_is_exact(family, to, tmp_path):
    layers = random_lora(family)
    file = saved(tmp_path, family, to, layers)
    back = read(file, to)
    assert back.family == family  # the file says so
    assert_equal_layers(back.layers, layers)
    assert_same_deltas(back.layers, layers)


@pytest.mark.parametrize("family", KNOWN)
def test_original_layers_hold_the_same_difference(family):
    """The rows of a fused layer's difference are those of its parts, halves exchanged where the rule says so."""
    layers = random_lora(family)
    for written, whole in to_original(RULES[family], layers).items():
        pieces = to_diffusers(RULES[family], written, False, whole) or {}
        rows = torch.cat([layers[name].delta() for name in pieces])
        rule = next(
            rule
            for rule in RULES[family]
            if rule.row_ratio in (None, whole.ratio) and rule.match_original(written, False) is not None
        )
        if rule.swapped:
            rows = torch.cat(rows.chunk(2)[::-1])
        torch.testing.assert_close(whole.delta(), rows, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("family", "to"), WRITTEN)
def test_a_network_takes_every_dialect(family, to, tmp_path):
    """What the loader puts on a network has the same difference in all dialects."""
    layers = random_lora(family)
    fitted = fit_lora(read_lora_file(saved(tmp_path, family, to, layers)), network(family))
    config = fitted.config
    for name, layer in layers.items():
        alpha = config["alpha_pattern"].get("^" + re.escape(name), config["lora_alpha"])
        found = LoraLayer(fitted.tensors[f"{name}.lora_A.weight"], fitted.tensors[f"{name}.lora_B.weight"], alpha)
        torch.testing.assert_close(found.delta(), layer.delta(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "start", ["base_model.model.", "diffusion_model.", "model.diffusion_model.", "transformer.", ""]
)
@pytest.mark.parametrize("family", KNOWN)
def test_original_names_are_read_behind_every_prefix(family, start, tmp_path):
    layers = random_lora(family)
    save_file(tensors_of(to_original(RULES[family], layers), start), tmp_path / "ink.safetensors")
    assert_equal_layers(read(tmp_path / "ink.safetensors", family=family).layers, layers)
    assert fit_lora(read_lora_file(tmp_path / "ink.safetensors"), network(family)).tensors.keys() == {
        f"{name}.lora_{side}.weight" for name in layers for side in "AB"
    }


# ------------------------------------------------------------------------- fusing


def test_parts_with_one_first_factor_keep_the_rank():
    generator = torch.Generator().manual_seed(0)
    down, ups = torch.randn(2, 32, generator=generator), torch.randn(3, 32, 2, generator=generator)
    names = [f"transformer_blocks.0.attn.to_{which}" for which in "qkv"]
    layers = {name: LoraLayer(down.clone(), up, 1.0) for name, up in zip(names, ups, strict=True)}
    whole = to_original(RULES["flux"], layers)["double_blocks.0.img_attn.qkv"]
    assert whole.rank == 2
    assert torch.equal(whole.up, ups.flatten(0, 1))
    assert_equal_layers(to_diffusers(RULES["flux"], "double_blocks.0.img_attn.qkv", False, whole) or {}, layers)


@pytest.mark.parametrize("family", ["flux", "hunyuan_video"])
@pytest.mark.parametrize("there", ["qkv", "q", "kv", "m", "qm"])
def test_single_blocks_are_fused_from_what_is_there(family, there):
    names = {"q": "attn.to_q", "k": "attn.to_k", "v": "attn.to_v", "m": "proj_mlp"}
    wanted = [f"single_transformer_blocks.1.{names[letter]}" for letter in there]
    layers = {name: layer for name, layer in random_lora(family).items() if name in wanted}
    whole = to_original(RULES[family], layers)["single_blocks.1.linear1"]
    assert whole.up.shape[0] == 7 * whole.down.shape[1]
    assert_same_deltas(to_diffusers(RULES[family], "single_blocks.1.linear1", False, whole) or {}, layers)


@pytest.mark.parametrize(("alpha", "rank"), [(8.0, 4), (3.0, 5), (0.0, 2)])
def test_parts_of_other_ranks_and_scales_are_fused(alpha, rank):
    layers = random_lora("flux", only="transformer_blocks.0.attn.to_", alpha=4.0, rank=2)
    odd = random_lora("flux", seed=1, only="transformer_blocks.0.attn.to_k", alpha=alpha, rank=rank)
    layers = {name: odd.get(name, layer) for name, layer in layers.items() if not name.startswith("single")}
    written = to_original(RULES["flux"], layers)
    back: dict[str, LoraLayer] = {}
    for name, whole in written.items():
        back |= to_diffusers(RULES["flux"], name, False, whole) or {}
    for name, layer in layers.items():
        found = back[name].delta() if name in back else torch.zeros_like(layer.delta())
        torch.testing.assert_close(found, layer.delta(), atol=1e-6 if alpha == 3 else 1e-12, rtol=0)


def test_half_precision_and_mixed_dtypes_stay_exact(tmp_path):
    layers = random_lora("flux", alpha=16.0)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    cast = {}
    for index, (name, layer) in enumerate(layers.items()):
        dtype = dtypes[index % 3]
        cast[name] = LoraLayer(layer.down.to(dtype), layer.up.to(dtype), layer.alpha)
    for to in ("comfyui", "kohya"):
        folder = tmp_path / to
        back = read(saved(folder, "flux", to, cast), to)
        assert_same_deltas(back.layers, cast)
    same = {name: LoraLayer(layer.down.bfloat16(), layer.up.bfloat16(), 16.0) for name, layer in layers.items()}
    file = saved(tmp_path / "bf16", "flux", "kohya", same)
    kept = {tensor.dtype for key, tensor in load_file(file).items() if not key.endswith(".alpha")}
    assert kept == {torch.bfloat16}


@pytest.mark.parametrize("alpha", [0.1, 1 / 3, 1e-5, 7.0])
@pytest.mark.parametrize("to", DIALECTS)
@pytest.mark.parametrize("family", ["wan", "flux"])
def test_any_alpha_is_kept_to_the_last_bit(family, to, alpha, tmp_path):
    if family == "flux":  # three or four parts make one layer, and so many times a double need not be one
        alpha = float(torch.tensor(alpha))
    layers = random_lora(family, alpha=alpha)
    assert_equal_layers(read(saved(tmp_path, family, to, layers), to).layers, layers)


# ------------------------------------------------------------------ DoRA and bias


@pytest.mark.parametrize("to", DIALECTS)
@pytest.mark.parametrize("family", ["flux", "sd3", "lumina2", "sana", "wan"])
def test_magnitudes_and_biases_are_carried(family, to, tmp_path):
    generator = torch.Generator().manual_seed(1)
    layers = {
        name: LoraLayer(
            layer.down,
            layer.up,
            4.0,  # a scale of 2, so that taking it out of a bias rounds nothing
            torch.randn(layer.up.shape[0], generator=generator),
            torch.rand(layer.up.shape[0], generator=generator),
        )
        for name, layer in random_lora(family).items()
    }
    file = saved(tmp_path, family, to, layers)
    assert_equal_layers(read(file, to).layers, layers)
    ends = {key.rsplit(".", 1)[1] for key in load_file(file)}
    assert ("dora_scale" in ends) == (to in ("comfyui", "kohya", "onetrainer"))


def test_a_converted_dora_gives_the_weights_that_peft_gives(tmp_path):
    pipe = tiny_pipeline("wan")
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "net.2"], init_lora_weights=False, use_dora=True)
    pipe.transformer.add_adapter(config)
    pipe.transformer.save_lora_adapter(tmp_path)
    source = tmp_path / "pytorch_lora_weights.safetensors"
    for to in ("comfyui", "kohya"):
        dit.lora.convert(source, to, output=tmp_path / f"{to}.safetensors", family="wan")
    fits = [fit_lora(read_lora_file(file), network("wan")) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert len(fits) == 3
    for fit in fits[1:]:
        assert fit.config == fits[0].config
        assert all(torch.equal(fit.tensors[key], tensor) for key, tensor in fits[0].tensors.items())


# ------------------------------------------------------------------ whole networks


@pytest.mark.parametrize("to", DIALECTS)
def test_our_own_pipelines_load_what_is_written(to, tmp_path):
    pipe = tiny_pipeline("text_dit")
    layers = random_lora("text_dit")
    file = saved(tmp_path, "text_dit", to, layers)
    pipe.load_lora_weights(file, adapter_name="ink")
    for name, layer in layers.items():
        module = pipe.transformer.get_submodule(name)
        torch.testing.assert_close(module.get_delta_weight("ink"), layer.delta().float(), atol=1e-5, rtol=1e-5)


def test_a_folder_of_peft_is_read_by_peft(tmp_path):
    from peft import PeftModel

    layers = random_lora("flux", only="proj_out", alpha=3.0)
    layers = {name: layer for name, layer in layers.items() if name == "proj_out"}  # not those of the single blocks
    source = saved(tmp_path, "flux", "kohya", layers)
    file = dit.lora.convert(source, "peft")
    assert file == tmp_path / "ink-peft" / "adapter_model.safetensors"
    json.loads((file.parent / "adapter_config.json").read_text())
    bare = tiny_pipeline("flux").transformer
    weights: dict[str, Any] = dict(bare.named_parameters())
    before = {name: weights[f"{name}.weight"].clone() for name in adaptable_layers(bare)}
    merged = cast(Any, PeftModel).from_pretrained(bare, file.parent).merge_and_unload()
    for name, layer in adaptable_layers(merged).items():
        wanted = before[name] + (layers[name].delta().float() if name in layers else 0)
        torch.testing.assert_close(layer.weight, wanted)


def test_bare_names():
    assert bare_name("base_model.model.transformer.blocks.0.attn.to_q") == ("blocks.0.attn.to_q", False)
    assert bare_name("lora_unet_blocks_0_self_attn_q") == ("blocks_0_self_attn_q", True)
