"""MVDiT: equal to the released code, and a good citizen of diffusers."""

from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig
from torch import Tensor

from dit.convert.mvdit import from_official
from dit.models.mvdit import MVDiT
from tests.models import dit_reference
from tests.models import mvdit_reference as ref

TINY = {
    "sample_size": 4,
    "num_frames": 2,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "text_dim": 6,
    "text_max_length": 3,
}


def tiny() -> MVDiT:
    """The test model with the reference's weights."""
    return from_official(ref.official_state(4, 8), dit_reference.HEADS)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def predict(model: MVDiT, latents: Tensor, time: float | list[float]) -> Tensor:
    return model(latents, ref.text().to(latents.dtype), torch.tensor(time), ref.MASK).sample


@torch.no_grad()
def test_equals_the_released_code() -> None:
    """One set of weights for all sizes, where the released code has a network for each."""
    model = tiny()
    for size in ref.SIZES:
        for time in ref.TIMES:
            found = torch.tensor(dit_reference.sampled(predict(model, ref.clip(*size), time)))
            expected = ref.GOLDEN[f"{'x'.join(map(str, size))}/{time}"]
            assert relative_error(found, torch.tensor(expected)) < 1e-5


@torch.no_grad()
def test_equals_the_slow_reference() -> None:
    """With a timestep of its own for each sample; the reference has no padding, so masks are tested too."""
    latents, times = ref.clip(3, 8, 4), [3.0, 750.0]
    expected = [ref.reference(ref.official_state(4, 8), latent, times[i], i) for i, latent in enumerate(latents)]
    assert relative_error(predict(tiny(), latents, times).double(), torch.stack(expected)) < 1e-5


@torch.no_grad()
def test_no_mask_means_that_all_text_is_real() -> None:
    """The released code has no way to run without a mask."""
    model, arguments = tiny(), (ref.clip(2, 4, 4), ref.text(), torch.tensor(3.0))
    whole = model(*arguments, torch.ones(2, ref.LENGTH)).sample
    assert relative_error(model(*arguments).sample, whole) < 1e-6
    assert model(*arguments, torch.zeros(2, ref.LENGTH)).sample.isfinite().all()


def test_the_released_size() -> None:
    with torch.device("meta"):
        model = MVDiT()
    width, inner = 1152, 4 * 1152
    attentions = 3 * 4 * (width**2 + width)
    block = attentions + 2 * (2 * width * inner + inner + width) + 18 * width
    embed = 256 * width + width + width**2 + width + 18 * width * (width + 1) + 4 * 4 * width + width
    text = 4096 * width + width + width**2 + width
    head = 2 * width + 32 * width + 32
    assert sum(parameter.numel() for parameter in model.parameters()) == 28 * block + embed + text + head


def test_text_is_dropped_only_in_training() -> None:
    model = MVDiT(**TINY, text_dropout_prob=0.5).eval()
    text = torch.randn(200, 3, 6)
    kept = model.text_projection(text)
    assert torch.equal(model._embed_text(text, torch.float32), kept)
    dropped = (model.train()._embed_text(text, torch.float32) - kept).abs().amax((1, 2)) > 1e-6
    assert 60 < dropped.sum() < 140
    with pytest.raises(ValueError, match="text_max_length = 3"):
        model._embed_text(text[:, :2], torch.float32)


def test_gradients_reach_everything_and_checkpointing_changes_nothing() -> None:
    model, latents = tiny(), ref.clip(2, 4, 8)

    def gradients() -> Tensor:
        model.zero_grad()
        predict(model, latents, 3.0).square().mean().backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not [name for name in missing if f"transformer_blocks.{ref.DEPTH - 1}" not in name], missing
        # nobody reads what the last block makes of the text after its attention along time
        assert all("ff_context" in name for name in missing)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain, calls = gradients(), []
    handle = model.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.enable_gradient_checkpointing()
    checkpointed = gradients()
    handle.remove()
    assert len(calls) == 2, "the block must run once more in the backward pass"
    assert torch.allclose(plain, checkpointed, rtol=1e-5, atol=1e-8)


@torch.no_grad()
def test_a_block_cache_keeps_both_streams() -> None:
    model, latents = tiny(), ref.clip(2, 4, 8)
    expected = predict(model, latents, 3.0)
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with model.cache_context("cond"):
        first, second = (predict(model, latents, 3.0) for _ in range(2))
    assert torch.equal(first, expected)
    assert relative_error(second, expected) < 1e-5


@torch.no_grad()
def test_lora_save_and_half_precision(tmp_path: Path) -> None:
    model, latents = tiny().requires_grad_(False), ref.clip(2, 4, 8)
    before = predict(model, latents, 3.0)
    model.save_pretrained(tmp_path)
    loaded = MVDiT.from_pretrained(tmp_path).eval()
    assert torch.equal(predict(loaded, latents, 3.0), before)
    assert torch.equal(loaded.null_text, ref.official_state(4, 8)["y_embedder.y_embedding"])
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4 * 3 * ref.DEPTH
    assert relative_error(predict(model, latents, 3.0), before) > 1e-2
    found = predict(loaded.to(torch.bfloat16), latents.bfloat16(), 3.0)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), before) < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_channels": 5}, "8 to learn a variance"),
        ({"sample_size": 5}, "multiple of patch_size 2"),
        ({"num_frames": 3, "patch_size_t": 2}, "multiple of patch_size_t 2"),
        ({"time_scale": 0.0}, "above 0"),
    ],
)
def test_bad_configurations_say_what_fits(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MVDiT(**{**TINY, **change})


def test_bad_calls_say_what_fits() -> None:
    model, text, time = MVDiT(**TINY), torch.zeros(1, 2, 6), torch.zeros(())
    for latents, words, message in (
        (torch.zeros(1, 4, 4, 4), text, "an image is a clip of one frame"),
        (torch.zeros(1, 4, 2, 4, 3), text, "use multiples"),
        (torch.zeros(1, 4, 2, 4, 4), torch.zeros(1, 2, 5), r"\(B, L, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(latents, words, time)
