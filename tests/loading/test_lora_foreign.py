"""LoRA files on diffusers' pipelines: layouts of other tools load with the right scale, and nothing stays behind."""

import pytest
import torch
from safetensors.torch import save_file

from apps.service.lora import LoraError, loras_applied
from apps.service.option_values import Lora
from tests.families.tiny import tiny_call, tiny_pipeline

RANK, ALPHA = 2, 1.0
LAYERS = {
    "flux": ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_k"),
    "sd3": ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_v"),
    "wan": ("blocks.0.attn1.to_q", "blocks.1.attn2.to_v"),
}
LAYOUTS = {  # layer -> start of its keys, ends of the factors, whether an alpha stands beside them
    "diffusers": ("transformer.{}", "lora_A.weight", "lora_B.weight", False),
    "bare": ("{}", "lora_A.weight", "lora_B.weight", False),
    "peft": ("base_model.model.{}", "lora_A.weight", "lora_B.weight", False),
    "comfy": ("diffusion_model.{}", "lora_A.weight", "lora_B.weight", False),
    "down and up": ("transformer.{}", "lora_down.weight", "lora_up.weight", True),
    "kohya": ("lora_unet_{}", "lora_down.weight", "lora_up.weight", True),
}


def factors(pipe, name):
    generator = torch.Generator().manual_seed(0)
    made = {}
    for layer in LAYERS[name]:
        outer, inner = pipe.transformer.get_submodule(layer).weight.shape
        made[layer] = [torch.randn(shape, generator=generator) for shape in ((RANK, inner), (outer, RANK))]
    return made


def write(folder, layout, made):
    start, down, up, has_alpha = LAYOUTS[layout]
    tensors = {}
    for layer, (a, b) in made.items():
        key = start.format(layer.replace(".", "_") if layout == "kohya" else layer)
        tensors |= {f"{key}.{down}": a, f"{key}.{up}": b}
        if has_alpha:
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, folder / "ink.safetensors")
    return ALPHA / RANK if has_alpha else 1.0


@torch.no_grad()
def generate(pipe, name):
    return torch.as_tensor(pipe(**tiny_call(name))[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layout_equals_the_merged_weights(name, layout, tmp_path):
    pipe, merged = tiny_pipeline(name), tiny_pipeline(name)
    before, made = generate(pipe, name), factors(pipe, name)
    scale = write(tmp_path, layout, made)
    for layer, (a, b) in made.items():
        merged.transformer.get_submodule(layer).weight.data += scale * b @ a
    with loras_applied(pipe, [Lora(name="ink")], {"ink": tmp_path / "ink.safetensors"}):
        torch.testing.assert_close(generate(pipe, name), generate(merged, name), rtol=1e-4, atol=1e-4)
    assert torch.equal(generate(pipe, name), before)


@pytest.mark.parametrize("beside", [False, True], ids=["transformer alone", "with a text encoder"])
def test_factors_of_another_size_leave_the_layers_as_they_were(beside, tmp_path):
    """FLUX's own loader makes layers of the size that a file wants, and leaves them behind."""
    pipe = tiny_pipeline("flux")
    before, config = generate(pipe, "flux"), dict(pipe.transformer.config)
    width = pipe.transformer.x_embedder.in_features
    parts = {"transformer.x_embedder": (2 * width, pipe.transformer.x_embedder.out_features)}
    if beside:
        name = next(name for name, _ in pipe.text_encoder.named_modules() if name.endswith("q_proj"))
        parts[f"text_encoder.{name}"] = (16, 16)
    tensors = {}
    for layer, (inner, outer) in parts.items():
        tensors |= {
            f"{layer}.lora_A.weight": torch.ones(RANK, inner),
            f"{layer}.lora_B.weight": torch.ones(outer, RANK),
        }
    save_file(tensors, tmp_path / "wide.safetensors")
    wish, files = Lora(name="wide"), {"wide": tmp_path / "wide.safetensors"}
    with pytest.raises(LoraError, match="x_embedder"), loras_applied(pipe, [wish], files):
        pytest.fail("it was taken")
    assert pipe.transformer.x_embedder.in_features == width
    assert dict(pipe.transformer.config) == config
    assert torch.equal(generate(pipe, "flux"), before)


def test_names_that_a_family_knows_with_other_factor_names(tmp_path, monkeypatch):
    pipe = tiny_pipeline("flux")
    (layer, (a, b)), *_ = factors(pipe, "flux").items()
    theirs = "diffusion_model.double_blocks.0.img_attn.q"
    load, given = pipe.load_lora_weights, []

    def as_kohya(source, **options):
        """Like FLUX's loader: of other code's names only those with `lora_down`, here of one layer."""
        given.append(source)
        if isinstance(source, dict):
            load({f"transformer.{layer}.lora_A.weight": source[f"{theirs}.lora_down.weight"],
                  f"transformer.{layer}.lora_B.weight": source[f"{theirs}.lora_up.weight"]}, **options)  # fmt: skip

    monkeypatch.setattr(pipe, "load_lora_weights", as_kohya)
    save_file({f"{theirs}.lora_A.weight": a, f"{theirs}.lora_B.weight": b}, tmp_path / "ink.safetensors")
    before = generate(pipe, "flux")
    with loras_applied(pipe, [Lora(name="ink")], {"ink": tmp_path / "ink.safetensors"}):
        assert not torch.equal(generate(pipe, "flux"), before)
    assert len(given) == 2


def test_whatever_a_loader_raises_is_told_in_one_line(tmp_path):
    """FLUX's lists every key that it doesn't know, in its own words."""
    pipe = tiny_pipeline("flux")
    key = "lora_unet_single_blocks_0_linear9"
    tensors = {f"{key}.lora_down.weight": torch.ones(RANK, 32), f"{key}.lora_up.weight": torch.ones(224, RANK)}
    save_file({**tensors, f"{key}.alpha": torch.tensor(ALPHA)}, tmp_path / "ink.safetensors")
    files = {"ink": tmp_path / "ink.safetensors"}
    with pytest.raises(LoraError, match="doesn't fit this model"), loras_applied(pipe, [Lora(name="ink")], files):
        pytest.fail("it was taken")


def test_fused_layers_of_any_size_are_split(tmp_path):
    """FLUX's own loader takes them in FLUX.1's size only; here the rows go where the network has them."""
    pipe, merged = tiny_pipeline("flux"), tiny_pipeline("flux")
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(RANK, 32, generator=generator), torch.randn(224, RANK, generator=generator)
    key = "lora_unet_single_blocks_0_linear1"
    tensors = {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(ALPHA)}
    save_file(tensors, tmp_path / "ink.safetensors")
    block = merged.transformer.single_transformer_blocks[0]
    layers = (block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp)
    for layer, rows in zip(layers, b.split([32, 32, 32, 128]), strict=True):
        layer.weight.data += ALPHA / RANK * rows @ a
    with loras_applied(pipe, [Lora(name="ink")], {"ink": tmp_path / "ink.safetensors"}):
        torch.testing.assert_close(generate(pipe, "flux"), generate(merged, "flux"), rtol=1e-4, atol=1e-4)
