"""DiT and SiT: equal to the released code, and good citizens of diffusers."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dit.convert.dit import from_official
from dit.models.dit import PRESETS, DiT
from tests.fresh import run_python
from tests.models import dit_reference as ref

FAMILIES = ("dit", "sit")


def tiny(family: str = "dit", size: int = 8) -> DiT:
    """The test model with the reference's weights."""
    return from_official(ref.official_state(size), family, num_attention_heads=ref.HEADS)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def predict(model: DiT, size: int, time: float) -> Tensor:
    return model(ref.inputs(size), torch.tensor(time), torch.tensor(ref.LABELS)).sample


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ref.SIZES)
@torch.no_grad()
def test_equals_the_released_code(family: str, size: int) -> None:
    for time in ref.TIMES[family]:
        found = torch.tensor(ref.sampled(predict(tiny(family, size), size, time)))
        assert relative_error(found, torch.tensor(ref.GOLDEN[f"{family}/{size}/{time}"])) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12)])
@torch.no_grad()
def test_equals_the_slow_reference(family: str, height: int, width: int) -> None:
    """Also off the square size it was made for, where the released code can't go."""
    latents = ref.spread((2, ref.CHANNELS, height, width), salt=5)
    time = ref.TIMES[family][0]
    found = tiny(family)(latents, torch.tensor(time), torch.tensor(ref.LABELS)).sample
    expected = [
        ref.reference(ref.official_state(8), latent, time, label, family)
        for latent, label in zip(latents, ref.LABELS, strict=True)
    ]
    assert found.shape == (2, ref.CHANNELS * (1 if family == "sit" else 2), height, width)
    assert relative_error(found.double(), torch.stack(expected)) < 1e-5


def test_xl_has_the_published_size_and_cost() -> None:
    with torch.device("meta"):
        model = DiT.from_preset("DiT-XL/2")
        arguments = (torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long))
        with FlopCounterMode(display=False) as counter:
            model(*arguments)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert round(parameters / 1e6) == 675
    assert 118.4e9 <= counter.get_total_flops() / 2 <= 118.7e9  # the papers count multiply-adds


def test_presets_are_the_published_ones() -> None:
    assert len(PRESETS) == 24
    with torch.device("meta"):
        small, other = DiT.from_preset("SiT-S/8", sample_size=64), DiT.from_preset("DiT-B/4")
    assert (small.hidden_size, small.config.objective, small.config.sample_size) == (384, "velocity", 64)
    assert (other.hidden_size, other.config.objective, other.config.patch_size) == (768, "epsilon", 4)
    with pytest.raises(ValueError, match="DiT-XL/2"):
        DiT.from_preset("DiT-XXL/2")


def test_a_new_model_starts_at_zero() -> None:
    """adaLN-Zero: an untrained network predicts nothing, whatever the condition."""
    model = DiT(sample_size=4, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=3)
    output = model(torch.randn(2, 4, 4, 4), torch.tensor([1.0, 900.0]), torch.tensor([0, 3])).sample
    assert output.abs().max() == 0


def test_labels_are_dropped_only_in_training() -> None:
    embedding = tiny().label_embed
    labels = torch.zeros(2000, dtype=torch.long)
    dropped = (embedding.train()(labels) == embedding.table.weight[ref.CLASSES]).all(-1).float().mean()
    assert 0.07 < dropped < 0.13
    assert torch.equal(embedding.eval()(labels), embedding.table.weight[:1].expand(2000, -1))


def gradients(model: DiT) -> Tensor:
    """All gradients of a training-like loss, in one vector."""
    model.zero_grad()
    predict(model, 8, 3.0).square().mean().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_gradient_checkpointing_changes_nothing() -> None:
    model = tiny()
    plain = gradients(model)
    calls = []
    handle = model.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.enable_gradient_checkpointing()
    checkpointed = gradients(model)
    handle.remove()
    assert len(calls) == 2, "the block must run once more in the backward pass"
    assert torch.allclose(plain, checkpointed, rtol=1e-5, atol=1e-8)


def test_gradients_equal_those_of_the_slow_reference() -> None:
    model, state = tiny(), ref.official_state(8)
    leaf = {name: tensor.clone().requires_grad_(name != "pos_embed") for name, tensor in state.items()}
    outputs = [ref.reference(leaf, x, 3.0, y, "dit") for x, y in zip(ref.inputs(8), ref.LABELS, strict=True)]
    torch.stack(outputs).square().mean().backward()
    gradients(model)
    for ours, theirs in (
        (model.patch_embed.weight.grad, leaf["x_embedder.proj.weight"].grad),
        (model.label_embed.table.weight.grad, leaf["y_embedder.embedding_table.weight"].grad),
        (model.transformer_blocks[0].attn.to_k.weight.grad, leaf["blocks.0.attn.qkv.weight"].grad.chunk(3)[1]),
        (model.transformer_blocks[2].modulation.linear.weight.grad, leaf["blocks.2.adaLN_modulation.1.weight"].grad),
    ):
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.99999
        assert relative_error(ours, theirs) < 1e-4


def test_lora_scales_and_leaves() -> None:
    model = tiny().requires_grad_(False)
    before = predict(model, 8, 3.0)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4 * ref.DEPTH
    assert all("lora_" in name for name in trained)
    inputs = (ref.inputs(8), torch.tensor(3.0), torch.tensor(ref.LABELS))
    full = model(*inputs).sample
    half = model(*inputs, attention_kwargs={"scale": 0.5}).sample
    assert relative_error(full, before) > 1e-2
    assert 1e-3 < relative_error(half, before) < relative_error(full, before)
    model.disable_adapters()
    assert torch.equal(model(*inputs).sample, before)


@torch.no_grad()
def test_attention_backend_and_fused_projections() -> None:
    model = tiny()
    before = predict(model, 8, 3.0)
    model.set_attention_backend("_native_math")
    try:
        backends = {processor._attention_backend.value for processor in model.attn_processors.values()}
        assert backends == {"_native_math"}
        assert relative_error(predict(model, 8, 3.0), before) < 1e-5
    finally:
        model.set_attention_backend("native")  # the choice is global in diffusers
        model.reset_attention_backend()
    model.fuse_qkv_projections()
    assert relative_error(predict(model, 8, 3.0), before) < 1e-5


def test_saves_and_loads_in_a_fresh_process(tmp_path: Path) -> None:
    model = tiny("sit")
    model.save_pretrained(tmp_path / "model")
    torch.save(predict(model, 8, 0.75).detach(), tmp_path / "expected.pt")
    code = (
        "import torch; from dit.models.dit import DiT; from tests.models import dit_reference as ref\n"
        f"model = DiT.from_pretrained({str(tmp_path / 'model')!r}).eval()\n"
        "found = model(ref.inputs(8), torch.tensor(0.75), torch.tensor(ref.LABELS)).sample\n"
        f"assert torch.equal(found, torch.load({str(tmp_path / 'expected.pt')!r}))\n"
    )
    run_python("-c", code)


def test_half_precision_stays_close() -> None:
    model = tiny()
    with torch.no_grad():
        expected = predict(model, 8, 3.0)
        found = model.to(torch.bfloat16)(ref.inputs(8).bfloat16(), torch.tensor(3.0), torch.tensor(ref.LABELS)).sample
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), expected) < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "score"}, "'epsilon'"),
        ({"out_channels": 5}, "8 to learn a variance"),
        ({"sample_size": 5}, "multiple of patch_size 2"),
    ],
)
def test_bad_configurations_say_what_fits(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(**{"sample_size": 4, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, **change})


def test_a_latent_that_patches_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 2"):
        tiny()(torch.zeros(1, 4, 7, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
