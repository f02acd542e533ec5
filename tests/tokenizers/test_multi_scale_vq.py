"""The multi-scale tokenizer: equal to the released VQVAE of VAR, scale by scale."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dit.tokenizers import MultiScaleVQ
from dit.tokenizers.multi_scale_vq import phi_of_scale
from tests.models.tiny_next_scale import tokenizer, tokenizer_state
from tests.tokenizers import multi_scale_reference as ref


@pytest.fixture(scope="module")
def vae() -> MultiScaleVQ:
    return tokenizer()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_equals_the_released_code(vae: MultiScaleVQ) -> None:
    codes = vae.quantize(ref.pictures())
    assert [tokens.tolist() for tokens in codes.indices] == ref.GOLDEN["indices"]
    decoded = vae.decode(codes.latent).sample.clamp(-1, 1)
    for name, found in (
        ("latent", codes.latent),
        ("teacher", vae.teacher_inputs(codes.indices)),
        ("decoded", decoded),
    ):
        assert relative_error(torch.tensor(ref.sampled(found)), torch.tensor(ref.GOLDEN[name])) < 1e-5, name


@torch.no_grad()
def test_equals_the_slow_reference(vae: MultiScaleVQ) -> None:
    features = 1.5 * ref.spread((3, ref.CHANNELS, 4, 4), salt=2)
    codes, state = vae.quantizer(features), tokenizer_state()
    for row in range(3):
        tokens, latent, inputs = ref.quantize(state, features[row])
        assert [scale[row].tolist() for scale in codes.indices] == tokens
        assert relative_error(codes.latent[row].double(), latent) < 1e-5
        assert relative_error(vae.teacher_inputs(codes.indices)[row].double(), inputs) < 1e-5


def test_phis_are_shared_as_in_the_released_code() -> None:
    """The third and the eighth of ten scales are ties; their sides are part of the trained weights."""
    assert [phi_of_scale(scale, 10, 4) for scale in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert [phi_of_scale(scale, 10, 1) for scale in range(10)] == [0] * 10
    assert [phi_of_scale(scale, 10, 10) for scale in range(10)] == list(range(10))
    assert phi_of_scale(0, 1, 4) == 0


@torch.no_grad()
def test_scales_add_up(vae: MultiScaleVQ) -> None:
    codes = vae.quantize(ref.pictures())
    assert torch.equal(vae.indices_to_latents(codes.indices), codes.latent)
    assert torch.equal(vae.encode(ref.pictures()).latent, codes.latent)
    latents = vae.start_latents(2)
    for scale, tokens in enumerate(codes.indices):
        before = latents.clone()
        after = vae.accumulate(latents, tokens, scale)
        assert torch.equal(latents, before), "the sum so far must stay as it is"
        vectors = vae.quantizer.codebook(tokens)
        assert torch.allclose(vae.accumulate(latents, vectors, scale), after)  # mixtures of entries work as entries do
        latents = after
    assert torch.equal(
        vae.indices_to_latents(codes.indices[:2]),
        vae.accumulate(vae.accumulate(vae.start_latents(2), codes.indices[0], 0), codes.indices[1], 1),
    )
    with pytest.raises(ValueError, match="got 1 tokens for scale 1, which has 4"):
        vae.accumulate(latents, codes.indices[0], 1)


@torch.no_grad()
def test_partial_pictures_and_previews(vae: MultiScaleVQ) -> None:
    codes = vae.quantize(ref.pictures())
    partial = vae.indices_to_latents(codes.indices[:2])
    assert vae.decode(partial).sample.shape == (2, 3, 64, 64)
    small = vae.preview(partial)
    assert small.shape == (2, 3, 64, 64)
    assert small.abs().max() <= 1
    assert vae.preview(torch.zeros(1, ref.CHANNELS, 16, 12)).shape == (1, 3, 128, 96)


def test_pictures_of_another_size_are_refused(vae: MultiScaleVQ) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 3, 64, 64\)"):
        vae.quantize(torch.zeros(1, 3, 32, 64))


@torch.no_grad()
def test_half_precision_keeps_the_codebook(vae: MultiScaleVQ, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path)
    half = MultiScaleVQ.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.decoder.conv_in.weight.dtype == torch.bfloat16
    assert half.quantizer.codebook.weight.dtype == torch.float32
    tokens = [torch.tensor(scale) for scale in ref.GOLDEN["indices"]]
    assert torch.equal(half.indices_to_latents(tokens), vae.indices_to_latents(tokens))
    found = half.decode(half.indices_to_latents(tokens)).sample.float()
    assert relative_error(found, vae.decode(vae.indices_to_latents(tokens)).sample) < 0.1
