"""Flipped bits in training: the labels of the released code, and sums that stay correctable."""

import pytest
import torch

from dit.tokenizers.self_correction import draw_flip_shares, self_correct
from tests.models.tiny_infinity import tokenizer
from tests.tokenizers.bsq_reference import quantize
from tests.tokenizers.multi_scale_reference import spread

BOTH = pytest.mark.parametrize("case", ["wide", "patchify"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features_of(case: str) -> torch.Tensor:
    vae = tokenizer(case)
    return spread((2, vae.latent_channels, *(side * vae.config.patchify for side in vae.grids[-1])), salt=3)


@BOTH
def test_without_flips_it_is_teacher_forcing(case: str) -> None:
    vae, features = tokenizer(case), features_of(case)
    plain = vae.quantize_features(features)
    for shares in ([], [0.0] * len(vae.grids)):
        found = self_correct(vae, features, shares)
        assert all(torch.equal(*pair) for pair in zip(found.labels, plain.indices, strict=True))
        assert torch.allclose(found.inputs, vae.teacher_inputs(plain.indices), atol=1e-6)
    slow, _, inputs = quantize(features[0], vae.grids, vae.config.patchify)
    assert all(torch.equal(a[0], b) for a, b in zip(found.labels, slow, strict=True))
    assert torch.allclose(found.inputs[0].double(), inputs, atol=1e-5)


@BOTH
def test_labels_make_up_for_the_flips_before_them(case: str) -> None:
    """All bits of a scale flipped: the label of the scale stays, and the next ones undo the harm."""
    vae, features = tokenizer(case), features_of(case)
    plain, found = self_correct(vae, features, []), self_correct(vae, features, [1.0])
    assert torch.equal(found.labels[0], plain.labels[0])
    opposite = vae.accumulate(torch.zeros_like(features), 1 - plain.labels[0], 0)
    second = vae.grids[1][0] * vae.grids[1][1]
    assert torch.allclose(found.inputs[:, :second], vae.next_input(opposite, 1), atol=1e-6)
    assert (found.labels[1] == plain.labels[0]).float().mean() > 0.6  # against the flipped ones
    assert (found.labels[1] != plain.labels[1]).any()


def test_the_share_is_kept_and_the_seed_decides() -> None:
    vae, features = tokenizer("wide"), features_of("wide")
    last = [0.0] * (len(vae.grids) - 1) + [0.25]
    one, same, other = (self_correct(vae, features, last, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.latent, same.latent)
    assert not torch.equal(one.latent, other.latent)
    plain = self_correct(vae, features, [])
    # A flip of the last scale moves its number by twice the size of a bit.
    flipped = ((one.latent - plain.latent).abs() > 1e-3).float().mean()
    assert 0.22 < flipped < 0.28
    assert torch.allclose(one.inputs, plain.inputs, atol=1e-6)


def test_shares_are_whole_percents_up_to_the_largest() -> None:
    shares = draw_flip_shares(2000, 0.3, seeded())
    assert {round(100 * share) for share in shares} == set(range(31))
    assert shares == draw_flip_shares(2000, 0.3, seeded())
    with pytest.raises(ValueError, match="0 to 1"):
        draw_flip_shares(3, 1.5)
    with pytest.raises(ValueError, match="at most a share"):
        self_correct(tokenizer("wide"), features_of("wide"), [0.1] * 8)
    with pytest.raises(ValueError, match=r"shape \(2, 6, 3, 3\)"):
        self_correct(tokenizer("wide"), features_of("wide")[..., :3, :3], [])
