"""The small parts: exact inverses, closed forms, and clear errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit.layers.embeddings import patchify, sinusoidal_embedding, unpatchify
from dit.layers.feed_forward import FeedForward
from dit.layers.norms import RMSNorm
from dit.layers.positions import apply_rotary, fourier_positions, grid_positions, rotary_embedding, sincos_2d

small = st.integers(1, 3)


@given(grid=st.tuples(small, small, small), patch=st.tuples(small, small, small))
def test_unpatchify_undoes_patchify(grid, patch):
    sizes = [g * p for g, p in zip(grid, patch, strict=True)]
    x = torch.arange(2 * 3 * math.prod(sizes)).reshape(2, 3, *sizes)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, math.prod(grid), math.prod(patch) * 3)
    assert torch.equal(unpatchify(tokens, grid, patch), x)


def test_a_grid_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 5, 4\).*multiples of 1, 2 and 2"):
        patchify(torch.zeros(1, 2, 1, 5, 4), (1, 2, 2))


def test_timestep_waves_follow_the_released_dit():
    waves = sinusoidal_embedding(torch.tensor([3.0]), 8)[0]
    frequencies = [10_000 ** (-i / 4) for i in range(4)]
    expected = [math.cos(3 * f) for f in frequencies] + [math.sin(3 * f) for f in frequencies]
    torch.testing.assert_close(waves, torch.tensor(expected))
    with pytest.raises(ValueError, match="even, got 7"):
        sinusoidal_embedding(torch.tensor([3.0]), 7)


def test_rotary_scores_depend_on_distance_only():
    """<R_a q, R_b k> must be the same for all positions with equal differences, on each axis."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 12, generator=generator)

    def score(a, b):
        rotary = rotary_embedding(torch.tensor([a, b], dtype=torch.float32), (4, 4, 4), theta=100.0)
        pair = torch.stack([query, key])[None, :, None]  # (1, 2, 1, 12)
        turned = apply_rotary(pair, rotary)[0, :, 0]
        return float(turned[0] @ turned[1])

    assert score((0, 1, 2), (3, 2, 0)) == pytest.approx(score((5, 6, 7), (8, 7, 5)), abs=1e-4)
    assert abs(score((0, 1, 2), (3, 2, 0)) - score((0, 1, 2), (3, 2, 1))) > 1e-3


def test_rotation_keeps_lengths():
    rotary = rotary_embedding(grid_positions((2, 3)), (4, 4))
    x = torch.randn(1, 6, 2, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(apply_rotary(x, rotary).norm(dim=-1), x.norm(dim=-1))


def test_rotary_axes_must_match():
    with pytest.raises(ValueError, match="2 position axes"):
        rotary_embedding(grid_positions((2, 3)), (4, 4, 4))


def test_coordinate_waves_mean_the_same_at_any_size():
    """The middle of a 3-wide canvas and that of a 9-wide one get the same waves."""
    small, large = fourier_positions((1, 3), 4), fourier_positions((1, 9), 4)
    torch.testing.assert_close(small[1], large[4])


def test_sincos_table_puts_the_column_first():
    table = sincos_2d(2, 3, 8)
    assert table.shape == (6, 8)
    torch.testing.assert_close(table[0, :4], table[3, :4])  # same column
    torch.testing.assert_close(table[0, 4:], table[2, 4:])  # same row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_torch(dtype):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    norm = RMSNorm(16)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    expected = (x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight).to(dtype)
    torch.testing.assert_close(norm(x), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert norm(x).dtype == dtype


def test_unknown_activation_lists_the_known():
    with pytest.raises(ValueError, match=r"'relu'.*swiglu"):
        FeedForward(8, 16, "relu")
