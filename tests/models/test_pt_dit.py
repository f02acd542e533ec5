"""PT-DiT: equal to the released code, mended where that errs, and cheap where it says so."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dit.convert.pt_dit import from_official
from dit.layers.attention import SelfAttention
from dit.models.pt_dit import ProxyGrid, PTDiT, PTDiTBlock, attention_macs
from tests.models import dit_reference
from tests.models import pt_dit_reference as ref

TINY = {"sample_size": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 6}


def tiny(name: str = "clip") -> PTDiT:
    """The test model with the reference's weights."""
    case = ref.CASES[name]
    return from_official(ref.official_state(case.frames), ref.HEADS, case.window, case.proxies)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def predict(model: PTDiT, latents: Tensor, time: float | list[float]) -> Tensor:
    return model(latents, ref.text().to(latents.dtype), torch.tensor(time), ref.MASK).sample


@pytest.mark.parametrize("name", ref.CASES)
@torch.no_grad()
def test_equals_the_released_code(name: str) -> None:
    model = tiny(name)
    for time in ref.TIMES:
        found = torch.tensor(dit_reference.sampled(predict(model, ref.latents(ref.CASES[name].frames), time)))
        assert relative_error(found, torch.tensor(ref.GOLDEN[f"{name}/{time}"])) < 1e-5


@pytest.mark.parametrize(
    ("name", "frames", "height", "width"),
    [
        ("image", 1, 16, 16),
        ("clip", 2, 8, 24),  # not square
        ("image", 1, 12, 14),  # windows don't fit
        ("clip", 2, 10, 18),  # nor groups: some proxies of the last windows stand for nothing
        ("long", 6, 8, 12),  # nor in time
    ],
)
@torch.no_grad()
def test_equals_the_slow_reference(name: str, frames: int, height: int, width: int) -> None:
    """Also with a timestep of its own for each sample, which the released code mixes up."""
    latents, times = ref.latents(frames, height, width), [20.0, 800.0]
    case = ref.CASES[name]
    state = ref.official_state(case.frames)
    expected = [ref.reference(state, latent, times[i], i, case) for i, latent in enumerate(latents)]
    assert relative_error(predict(tiny(name), latents, times).double(), torch.stack(expected)) < 1e-5


@torch.no_grad()
def test_images_need_no_time_axis() -> None:
    model, latents = tiny("image"), ref.latents(1)
    assert torch.equal(predict(model, latents[:, :, 0], 20.0), predict(model, latents, 20.0)[:, :, 0])


@torch.no_grad()
def test_text_that_is_masked_does_not_matter() -> None:
    model, latents, text = tiny("image"), ref.latents(1), ref.text()
    other = text.clone()
    other[0, 3:] += 1  # padding of the first sample
    other[1] += 1
    one, two = (model(latents, words, torch.tensor(20.0), ref.MASK).sample for words in (text, other))
    assert torch.equal(one[0], two[0])
    assert not torch.allclose(one[1], two[1])
    empty = model(latents, text, torch.tensor(20.0), torch.zeros(2, ref.LENGTH)).sample
    assert torch.equal(empty, model(latents, text, torch.tensor(20.0)).sample)


def count_macs(module: torch.nn.Module, *arguments: object) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*arguments)
    return counter.get_total_flops() / 2


def test_attention_costs_less_than_half_of_full_attention() -> None:
    """128 x 128 tokens of the released width, counted and by the formula of the docstring."""
    side, width, length = 128, 1152, 120
    with torch.device("meta"):
        block = PTDiTBlock(width, 16, 4.0, bias=True, shift_window=True)
        tokens, text, temb = torch.zeros(1, side * side, width), torch.zeros(1, length, width), torch.zeros(1, 6, width)
        grid = ProxyGrid.of((1, side, side), (1, 8, 8), (1, 1, 1), 1, torch.device("meta"))
        whole = count_macs(block, tokens, text, temb, grid)
        rest = count_macs(block.ff, tokens) + count_macs(block.text_attn, tokens, text)
        full = count_macs(SelfAttention(width, 16, qk_norm=False), tokens)
    formula = attention_macs(side * side, side * side // 64, 64, width)
    assert whole - rest == formula
    assert full == 4 * side**2 * width**2 + 2 * side**4 * width
    assert formula <= 0.4 * full
    # the break-even that the docstring names
    for side, wins in ((64, False), (72, True)):
        count = side * side
        assert (attention_macs(count, count // 64, 64, width) < 4 * count * width**2 + 2 * count**2 * width) == wins


def test_the_released_model_has_a_billion_parameters() -> None:
    with torch.device("meta"):
        model = PTDiT()
    width, inner = 1152, 4 * 1152
    block = 5 * 4 * (width**2 + width) + 2 * (width**2 + width) + 2 * width * inner + inner + width + 9 * width
    embed = 256 * width + width + width**2 + width + 6 * width * (width + 1) + 4 * 4 * width + width
    text = 4096 * width + width + width**2 + width
    head = 2 * width + 32 * width + 32
    assert sum(parameter.numel() for parameter in model.parameters()) == 28 * block + embed + text + head
    assert 1.0e9 < 28 * block < 1.2e9


def test_a_new_model_adds_nothing_to_pixarts_blocks() -> None:
    """Proxies and shifted windows start closed, whatever their other weights."""
    model = PTDiT(**TINY, window_size=(1, 4, 4)).eval()
    inputs = (torch.randn(1, 4, 8, 8), torch.randn(1, 3, 6), torch.tensor(5.0))
    with torch.no_grad():
        before = model(*inputs).sample
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("proxy_attn", "proxy_cross_attn", "shifted_attn")):
                parameter.add_(1.0)
        assert torch.equal(model(*inputs).sample, before)


@torch.no_grad()
def test_sizes_are_told_to_networks_that_take_them() -> None:
    model = PTDiT(**TINY, window_size=(1, 4, 4), size_conditions=True).eval()
    for embed in (model.resolution_embed, model.aspect_ratio_embed):
        torch.nn.init.normal_(embed.linear_2.weight, std=0.1)
    inputs = (torch.randn(2, 4, 8, 8), torch.randn(2, 3, 6), torch.tensor(5.0))
    one, two = (
        model(*inputs, resolution=torch.full((2, 2), side), aspect_ratio=torch.ones(2)).sample
        for side in (256.0, 512.0)
    )
    assert not torch.allclose(one, two)
    with pytest.raises(ValueError, match="aspect_ratio"):
        model(*inputs)
    with pytest.raises(ValueError, match="leave them out"):
        PTDiT(**TINY)(*inputs, aspect_ratio=torch.ones(2))


def test_gradients_reach_everything_and_checkpointing_changes_nothing() -> None:
    model, latents = tiny("clip"), ref.latents(2, 10, 8)  # padded windows too

    def gradients() -> Tensor:
        model.zero_grad()
        predict(model, latents, [20.0, 800.0]).square().mean().backward()
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    plain, calls = gradients(), []
    assert plain.isfinite().all()
    handle = model.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.enable_gradient_checkpointing()
    checkpointed = gradients()
    handle.remove()
    assert len(calls) == 2, "the block must run once more in the backward pass"
    assert torch.allclose(plain, checkpointed, rtol=1e-5, atol=1e-8)


@torch.no_grad()
def test_lora_save_and_half_precision(tmp_path: Path) -> None:
    model, latents = tiny("clip").requires_grad_(False), ref.latents(4)
    before = predict(model, latents, 20.0)
    model.save_pretrained(tmp_path)
    loaded = PTDiT.from_pretrained(tmp_path).eval()
    assert torch.equal(predict(loaded, latents, 20.0), before)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4 * 5 * ref.DEPTH
    assert relative_error(predict(model, latents, 20.0), before) > 1e-2
    found = predict(loaded.to(torch.bfloat16), latents.bfloat16(), 20.0)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), before) < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_head_dim": 20}, "multiple of 16"),
        ({"attention_head_dim": 16, "size_conditions": True}, "multiple of 3"),
        ({"window_size": (8, 8)}, r"\(frames, rows, columns\)"),
        ({"proxies_per_window": (1, 3, 3)}, "must divide window_size"),
        ({"sample_size": 9}, "multiple of patch_size 2"),
    ],
)
def test_bad_configurations_say_what_fits(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PTDiT(**{**TINY, **change})


def test_bad_calls_say_what_fits() -> None:
    model, text, time = PTDiT(**TINY), torch.zeros(1, 2, 6), torch.zeros(())
    for latents, words, message in (
        (torch.zeros(1, 3, 8, 8), text, r"\(B, 4, H, W\)"),
        (torch.zeros(1, 4, 8, 7), text, "multiples of 2"),
        (torch.zeros(1, 4, 8, 8), torch.zeros(1, 2, 5), r"\(B, L, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(latents, words, time)
