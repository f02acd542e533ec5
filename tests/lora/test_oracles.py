"""diffusers as a witness: its converters give the same layers, its pipelines load what is written, and the reverse."""

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, HunyuanVideoTransformer3DModel, Lumina2Transformer2DModel
from diffusers.loaders import lora_conversion_utils as theirs
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

import dit.lora
from dit.lora.conversion import Lora, read, write
from dit.lora.layers import LoraLayer
from pipelines.lora.files import adaptable_layers
from tests.families.tiny import tiny_pipeline
from tests.lora.made import FAMILIES, network, random_lora

PIPELINES = tuple(name for name in FAMILIES if name not in ("pixart", "dit", "latte", "hunyuan_dit"))
"""Families whose pipelines load LoRAs by themselves; our own among them, as far as they have one here."""
PIPELINES = tuple(
    name for name in PIPELINES if name not in ("space_time_dit", "pt_dit", "mvdit", "next_scale", "class_dit")
)


STREAMS = ("img", "txt")
NORMS = tuple(f"norm_{name}.weight" for name in ("q", "k", "added_q", "added_k"))

UNABLE = {  # layers that PEFT can't adapt with a rank of 2 or 3 (groups), or whose difference it can't compute (1x1x1)
    "sana": ("conv_depth",),
    "hunyuan_video": ("x_embedder",),
}


def wide_network(family: str, blocks: tuple[int, int] = (1, 1)) -> nn.Module:
    """A network of the published width with few blocks, without weights: some converters know no other width."""
    with torch.device("meta"):
        if family == "flux":
            return FluxTransformer2DModel(num_layers=blocks[0], num_single_layers=blocks[1], guidance_embeds=True)
        if family == "hunyuan_video":
            return HunyuanVideoTransformer3DModel(
                num_layers=1, num_single_layers=1, num_refiner_layers=1, guidance_embeds=True
            )
        return Lumina2Transformer2DModel(num_layers=1, num_refiner_layers=1)


def made(net: nn.Module, alpha: float, without: tuple[str, ...] = ()) -> dict[str, LoraLayer]:
    """A LoRA of rank 2 of every layer but those whose names contain one of `without`."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name, module in adaptable_layers(net).items():
        weight: Any = module.weight
        if not any(part in name for part in without):
            down = torch.randn(2, *weight.shape[1:], generator=generator)
            up = torch.randn(weight.shape[0], 2, *[1] * (weight.ndim - 2), generator=generator)
            layers[name] = LoraLayer(down, up, alpha)
    return layers


def applied(layer: LoraLayer, inputs: Tensor) -> Tensor:
    """What a LoRA adds to the outputs for inputs, (in, n) -> (out, n), without the whole difference of the weight."""
    return layer.scale * layer.up.double().flatten(1) @ (layer.down.double().flatten(1) @ inputs)


def bfl(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """FLUX's converter of control LoRAs asks for the norms too."""
    kinds = ("query", "key")
    norms = [f"double_blocks.{n}.{side}_attn.norm.{kind}_norm" for n in range(19) for side in STREAMS for kind in kinds]
    norms += [f"single_blocks.{n}.norm.{kind}_norm" for n in range(38) for kind in kinds]
    # It knows these names without the prefix.
    given = {key.removeprefix("diffusion_model."): tensor for key, tensor in tensors.items()}
    given |= {f"{name}.scale": torch.ones(128) for name in norms}
    given |= {f"final_layer.adaLN_modulation.1.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    found = theirs._convert_bfl_flux_control_lora_to_diffusers(given)
    return {key: tensor for key, tensor in found.items() if not key.endswith(NORMS) and "norm_out" not in key}


# family, dialect, alpha, diffusers' converter, layers left out and why
ORACLES = [
    ("flux", "kohya", 1.0, theirs._convert_kohya_flux_lora_to_diffusers, ("norm_out", " proj_out"), True),
    # It exchanges halves of the first factor of an adaptive norm too, as the next two do; see the checkpoints below.
    ("flux", "comfyui", 2.0, bfl, ("norm_out",), True),
    # Of these names it knows the attention and the embedders.
    ("flux", "onetrainer", 1.0, theirs._convert_kohya_flux_lora_to_diffusers,
     ("norm", "ff", "proj_mlp", "blocks.0.proj_out"), True),
    ("flux2", "comfyui", 2.0, theirs._convert_non_diffusers_flux2_lora_to_diffusers, ("norm_out",), False),
    ("flux2", "kohya", 1.0, theirs._convert_kohya_flux2_lora_to_diffusers, ("norm_out", "guid", "modul"), False),
    # A first factor is cut like a second one, with the halves of adaptive norms and the refiner's fused layers.
    ("hunyuan_video", "comfyui", 2.0, theirs._convert_hunyuan_video_lora_to_diffusers,
     ("norm_out", "refiner_blocks"), True),
    ("lumina2", "comfyui", 2.0, theirs._convert_non_diffusers_lumina2_lora_to_diffusers,
     ("embed", "norm_out"), True),
    ("wan", "comfyui", 1.0, theirs._convert_non_diffusers_wan_lora_to_diffusers,
     ("patch_embedding", "condition_embedder", "proj_out"), False),
    ("wan", "comfyui", 2.0, theirs._convert_non_diffusers_wan_lora_to_diffusers, ("patch_embedding",), False),
    ("wan", "kohya", 1.0, theirs._convert_musubi_wan_lora_to_diffusers,
     ("patch_embedding", "condition_embedder", "proj_out"), False),
    ("qwen_image", "comfyui", 1.0, theirs._convert_non_diffusers_qwen_lora_to_diffusers, (), False),
    ("qwen_image", "kohya", 1.0, theirs._convert_non_diffusers_qwen_lora_to_diffusers, (), False),
    # It leaves the number of the resolution out, and fused layers as they are where keys have dots.
    ("z_image", "kohya", 1.0, theirs._convert_non_diffusers_z_image_lora_to_diffusers, ("all_",), False),
    ("ltx", "comfyui", 2.0, theirs._convert_non_diffusers_ltxv_lora_to_diffusers, ("proj_in", "time_embed"), False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "dialect", "alpha", "convert", "without", "wide"),
    ORACLES,
    ids=[f"{family}-{dialect}-{alpha:g}" for family, dialect, alpha, *_ in ORACLES],
)
def test_the_converters_of_diffusers_agree(family, dialect, alpha, convert, without, wide, tmp_path):
    net = wide_network(family, (19, 38) if convert is bfl else (1, 1)) if wide else network(family)
    layers = made(net, alpha, without)
    if family == "flux" and dialect == "kohya":
        layers.pop("proj_out")  # it leaves the alpha of the last layers out
    file = write(Lora("ink", family, layers, {}), dialect, tmp_path / "ink.safetensors")
    found = {key.removeprefix("transformer."): tensor for key, tensor in convert(load_file(file)).items()}
    assert {key.rsplit(".lora_", 1)[0] for key in found} == set(layers)
    generator = torch.Generator().manual_seed(1)
    for name, ours in read(file, dialect, family=family).layers.items():
        one = LoraLayer(found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"], 1.0)
        inputs = torch.randn(ours.down[0].numel(), 2, generator=generator, dtype=torch.float64)
        made_by_ours = applied(ours, inputs)
        # alpha is folded into their factors
        torch.testing.assert_close(applied(one, inputs) * one.rank, made_by_ours, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(made_by_ours, applied(layers[name], inputs), atol=1e-9, rtol=1e-12)


@pytest.mark.parametrize("source", ["kohya", "comfyui", "peft"])
@pytest.mark.parametrize("family", PIPELINES)
def test_pipelines_of_diffusers_load_what_is_written(family, source, tmp_path):
    """By their own loader, in their own dialect, from any dialect before."""
    pipe = tiny_pipeline(family)
    layers = random_lora(family)
    # Layers of several ranks and alphas, so that the patterns of the metadata are needed.
    odd = random_lora(family, seed=1, rank=3, alpha=1.5, only="to_q")
    unable = UNABLE.get(family, ())
    layers = {name: odd.get(name, layer) for name, layer in layers.items() if not any(part in name for part in unable)}
    (tmp_path / "in").mkdir()
    file = write(Lora("ink", family, layers, {}), source, tmp_path / "in" / "ink.safetensors")
    written = dit.lora.convert(file, "diffusers", output=tmp_path / "ink.safetensors", family=family)
    if family == "text_dit":
        pipe.load_lora_weights(written, adapter_name="ink")
    else:
        pipe.load_lora_weights(str(tmp_path), weight_name=written.name, adapter_name="ink")
    for name, layer in layers.items():
        delta = pipe.transformer.get_submodule(name).get_delta_weight("ink")
        torch.testing.assert_close(delta, layer.delta().float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("to", ["comfyui", "kohya", "onetrainer", "peft"])
@pytest.mark.parametrize("family", PIPELINES)
def test_what_pipelines_of_diffusers_save_is_read(family, to, tmp_path):
    pipe: Any = tiny_pipeline(family)
    names = [name for name in adaptable_layers(pipe.transformer) if name.endswith(("to_q", "to_k", "to_v"))]
    config = LoraConfig(r=2, lora_alpha=3, target_modules=names, init_lora_weights=False, alpha_pattern={names[0]: 5})
    pipe.transformer.add_adapter(config)
    kwargs = {}
    if family != "text_dit":
        from diffusers.training_utils import _collate_lora_metadata

        kwargs = _collate_lora_metadata({"transformer": pipe.transformer})
        pipe.save_lora_weights(tmp_path, get_peft_model_state_dict(pipe.transformer), **kwargs)
    else:
        pipe.transformer.save_lora_adapter(tmp_path)
    wanted = {name: pipe.transformer.get_submodule(name).get_delta_weight("default") for name in names}
    written = dit.lora.convert(tmp_path, to, output=tmp_path / "out" / "ink.safetensors", family=family)
    found = read(written, to).layers
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        torch.testing.assert_close(found[name].delta().float(), delta.detach(), atol=1e-5, rtol=1e-5)
