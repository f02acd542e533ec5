"""VDT and Latte: equal to the released code, and good citizens of diffusers."""

from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig
from torch import Tensor

from dit.convert.space_time_dit import from_official
from dit.models.dit import DiT
from dit.models.space_time_dit import PRESETS, SpaceTimeDiT
from tests.models import dit_reference
from tests.models import space_time_reference as ref

TINY = {"sample_size": 4, "num_frames": 2, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}


def tiny(kind: str = "vdt", frames: int = 4) -> SpaceTimeDiT:
    """The test model with the reference's weights."""
    family = "vdt" if kind == "vdt" else "latte"
    return from_official(ref.official_state(kind, frames), family, num_attention_heads=dit_reference.HEADS)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def predict(model: SpaceTimeDiT, kind: str, latents: Tensor, time: float) -> Tensor:
    labels = torch.tensor(ref.LABELS) if kind == "latte_class" else None
    text = ref.text() if kind == "latte_text" else None
    return model(latents, torch.tensor(time), labels, text).sample


@pytest.mark.parametrize("kind", ref.KINDS)
@torch.no_grad()
def test_equals_the_released_code(kind: str) -> None:
    for frames in ref.FRAMES:
        for time in ref.TIMES:
            found = torch.tensor(dit_reference.sampled(predict(tiny(kind, frames), kind, ref.clip(frames), time)))
            assert relative_error(found, torch.tensor(ref.GOLDEN[f"{kind}/{frames}/{time}"])) < 1e-5


@pytest.mark.parametrize("kind", ref.KINDS)
@torch.no_grad()
def test_equals_the_slow_reference(kind: str) -> None:
    """Also off the square and off the number of frames it was made for, where the released code can't go."""
    latents = ref.clip(3, 4, 8)
    found = predict(tiny(kind), kind, latents, 3.0)
    state = ref.official_state(kind, 4)
    expected = [ref.reference(state, latent, 3.0, sample, kind) for sample, latent in enumerate(latents)]
    assert found.shape == (2, 2 * dit_reference.CHANNELS, 3, 4, 8)
    assert relative_error(found.double(), torch.stack(expected)) < 1e-5


def test_presets_have_the_published_sizes() -> None:
    assert len(PRESETS) == 14
    with torch.device("meta"):
        dit, latte, vdt = (
            sum(parameter.numel() for parameter in model.parameters())
            for model in (
                DiT.from_preset("DiT-XL/2"),
                SpaceTimeDiT.from_preset("Latte-XL/2", num_classes=101),
                SpaceTimeDiT.from_preset("VDT-L/2"),
            )
        )
    assert latte == dit - (1000 - 101) * 1152  # the same parts, for the classes of UCF-101
    # A branch along time has 5 matrices (qkv, the attention's projection, one behind it), their biases and a norm.
    assert vdt == dit + 28 * (5 * 1152**2 + 7 * 1152)
    with pytest.raises(ValueError, match="Latte-XL/2"):
        SpaceTimeDiT.from_preset("Latte-XXL/2")


@pytest.mark.parametrize("arrangement", ["alternating", "temporal_first"])
def test_a_new_model_starts_at_zero(arrangement: str) -> None:
    model = SpaceTimeDiT(arrangement, **TINY, default_label=0)
    assert model(torch.randn(1, 4, 2, 4, 4), torch.tensor(5.0)).sample.abs().max() == 0


@torch.no_grad()
def test_frames_see_each_other_only_along_time() -> None:
    """A change in one place of one frame reaches another frame by the same place first."""
    block = tiny("vdt").transformer_blocks[0]
    tokens = torch.zeros(1, 4 * 16, dit_reference.WIDTH)
    other = tokens.clone()
    other[:, 0] += torch.randn(dit_reference.WIDTH, generator=torch.Generator().manual_seed(0))
    temb = torch.ones(1, dit_reference.WIDTH)
    moved = (block(other, temb, 4) - block(tokens, temb, 4)).abs().sum(-1).unflatten(1, (4, 16))[0] > 1e-6
    assert moved.all()  # along time to place 0 of every frame, then within each frame everywhere
    latte = tiny("latte")
    moved = latte.transformer_blocks[0](other, temb, 4) - latte.transformer_blocks[0](tokens, temb, 4)
    assert (moved.abs().sum(-1).unflatten(1, (4, 16))[0] > 1e-6).all(dim=1).tolist() == [True, False, False, False]
    moved = latte.transformer_blocks[1](other, temb, 4) - latte.transformer_blocks[1](tokens, temb, 4)
    assert (moved.abs().sum(-1).unflatten(1, (4, 16))[0] > 1e-6).all(dim=0).tolist() == [True] + [False] * 15


@pytest.mark.parametrize("kind", ["vdt", "latte_class"])
def test_gradients_reach_everything_and_checkpointing_changes_nothing(kind: str) -> None:
    model = tiny(kind, 2)

    def gradients() -> Tensor:
        model.zero_grad()
        predict(model, kind, ref.clip(2), 3.0).square().mean().backward()
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    plain, calls = gradients(), []
    handle = model.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.enable_gradient_checkpointing()
    checkpointed = gradients()
    handle.remove()
    assert len(calls) == 2, "the block must run once more in the backward pass"
    assert torch.allclose(plain, checkpointed, rtol=1e-5, atol=1e-8)


@torch.no_grad()
def test_a_block_cache_skips_frame_positions_with_the_blocks() -> None:
    """At a threshold above every change each later step repeats what the blocks added to the first one's output."""
    model, latents = tiny("latte"), ref.clip(4)
    expected = predict(model, "latte", latents, 3.0)
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with model.cache_context("cond"):
        first, second = (predict(model, "latte", latents, 3.0) for _ in range(2))
    assert torch.equal(first, expected)
    assert relative_error(second, expected) < 1e-5


@torch.no_grad()
def test_lora_fused_projections_and_save(tmp_path: Path) -> None:
    model = tiny("vdt").requires_grad_(False)
    before = predict(model, "vdt", ref.clip(4), 3.0)
    model.save_pretrained(tmp_path)
    assert torch.equal(predict(SpaceTimeDiT.from_pretrained(tmp_path).eval(), "vdt", ref.clip(4), 3.0), before)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4 * 2 * ref.DEPTH  # both attentions of every block
    assert relative_error(predict(model, "vdt", ref.clip(4), 3.0), before) > 1e-2
    model.disable_adapters()
    assert torch.equal(predict(model, "vdt", ref.clip(4), 3.0), before)
    other = tiny("vdt")
    other.fuse_qkv_projections()
    assert relative_error(predict(other, "vdt", ref.clip(4), 3.0), before) < 1e-5


@torch.no_grad()
def test_half_precision_stays_close() -> None:
    model = tiny("latte_text")
    expected = predict(model, "latte_text", ref.clip(4), 3.0)
    found = predict(model.to(torch.bfloat16), "latte_text", ref.clip(4).bfloat16(), 3.0)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), expected) < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrangement": "spatial"}, "alternating, temporal_first"),
        ({"num_layers": 3}, "an even number"),
        ({"out_channels": 5}, "8 to learn a variance"),
        ({"sample_size": 5}, "multiple of patch_size 2"),
        ({"num_classes": 3, "default_label": 4}, "label of num_classes = 3"),
    ],
)
def test_bad_configurations_say_what_fits(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpaceTimeDiT(**{**TINY, **change})


def test_bad_calls_say_what_fits() -> None:
    labelled, plain, texts = SpaceTimeDiT(**TINY), tiny("latte"), SpaceTimeDiT(**TINY, num_classes=None, text_dim=6)
    latents, time = torch.zeros(1, 4, 2, 4, 4), torch.zeros(())
    for model, arguments, message in (
        (labelled, (latents[:, :, 0], time), "an image is a clip of one frame"),
        (labelled, (latents[..., :3], time), "multiples of 2"),
        (labelled, (latents, time), "class_labels is None"),
        (plain, (latents, time, torch.zeros(1, dtype=torch.long)), "without labels"),
        (plain, (latents, time, None, torch.zeros(1, 2, 3)), "reads no text"),
        (texts, (latents, time), "pass text states"),
        (texts, (latents, time, None, torch.zeros(1, 5)), "expected text_dim = 6"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
