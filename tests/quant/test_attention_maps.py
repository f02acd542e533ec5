"""Levels for attention maps: AdaLog and TanQ as they are defined, what they are good for, and how hard a map is."""

import math
from functools import partial

import pytest
import torch

from dit.quant.attention_maps import (
    adalog_codes,
    adalog_values,
    block_incoherence,
    quantize_adalog,
    quantize_even,
    quantize_tanq,
    score_orders,
    search_adalog,
    search_tanq,
    sparse_blocks,
    tanq_codes,
    tanq_values,
)
from dit.runtime.metrics import relative_error


@pytest.fixture(scope="module")
def softmax_map() -> tuple[torch.Tensor, torch.Tensor]:
    """A map of a few large weights a query, (2, 64, 256), and values."""
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(2, 64, 256, generator=generator)
    return scores.softmax(-1), torch.randn(2, 256, 16, generator=generator)


def test_adalog_has_the_published_levels() -> None:
    """By the loop of the authors' `update_table`: a shift, and a fraction rounded to 2^(bits + 1) - 2 parts."""
    for bits, q in ((3, 19), (4, 52), (8, 10)):
        finest = 2 ** (bits + 1) - 2
        expected = [
            2.0 ** -math.floor(k * q / 37) * round(2 ** (-((q * k) % 37) / 37) * finest) / finest
            for k in range(2**bits)
        ]
        codes = torch.arange(2**bits + 1, dtype=torch.int16)
        torch.testing.assert_close(adalog_values(codes, bits, q), torch.tensor([*expected, 0.0]), rtol=1e-7, atol=0)


def test_adalog_rounds_the_logarithm() -> None:
    base = 2 ** (19 / 37)
    weights = torch.tensor([1.0, base**-1.4, base**-1.6, base**-7.4, base**-7.6, 0.0])
    assert adalog_codes(weights, 3, 19).tolist() == [0, 1, 2, 7, 8, 8]
    assert quantize_adalog(weights, 3, 19)[-2:].tolist() == [0.0, 0.0]
    assert torch.equal(quantize_adalog(3 * weights, 3, 19, scale=3.0), 3 * quantize_adalog(weights, 3, 19))


def test_the_searched_base_is_best(softmax_map) -> None:
    weights, value = softmax_map
    exact = weights @ value

    def error(q: int) -> float:
        return relative_error(quantize_adalog(weights, 4, q) @ value, exact)

    q = search_adalog(weights, value, 4)
    assert error(q) == min(map(error, range(10, 139)))
    assert error(q) < 0.7 * error(37)  # of the base 2
    assert error(q) < 0.5 * relative_error(quantize_even(weights, 4) @ value, exact)


def test_tanq_is_the_inverse_of_its_tangent() -> None:
    codes = torch.arange(16, dtype=torch.int16)
    for angle in (0.2, 1.2, 1.5):
        values = tanq_values(codes, 4, angle)
        assert torch.equal(tanq_codes(values, 4, angle), codes)
        assert values[0] == 0
        assert values[-1] == pytest.approx(1, abs=1e-6)
        gaps = values.diff()
        assert bool((gaps[1:] < gaps[:-1]).all())  # denser towards 1
    assert torch.allclose(tanq_values(codes, 4, 1e-3), codes / 15, atol=1e-6)


def test_tanq_suits_weights_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = 1 - 0.3 * torch.rand(1, 64, 64, generator=generator) ** 2
    value = torch.randn(1, 64, 16, generator=generator)
    exact = weights @ value
    angle = search_tanq(weights, value, 4)
    tangent = relative_error(quantize_tanq(weights, 4, angle) @ value, exact)
    assert tangent < 0.6 * relative_error(quantize_even(weights, 4) @ value, exact)


def test_even_levels_hold_their_ends() -> None:
    weights = torch.tensor([0.0, 0.1, 0.5, 1.0])
    assert quantize_even(weights, 2).tolist() == pytest.approx([0, 0, 2 / 3, 1])  # halves go to even codes
    assert quantize_even(weights, 8).sub(weights).abs().max() <= 0.5 / 255 + 1e-7


def test_incoherence_by_hand() -> None:
    weights = torch.tensor([[1.0, 0, 4, 4, 1], [1, 2, 4, 4, 1], [0, 0, 0, 9, 3]])
    found = block_incoherence(weights, 2)
    expected = torch.tensor([[2.0, 1, 1], [1, 2, 1]])  # the last blocks are smaller
    torch.testing.assert_close(found, expected)
    assert block_incoherence(weights, (1, 5))[2, 0] == pytest.approx(9 / (12 / 5))
    assert sparse_blocks(torch.eye(8), 4) == 0.5  # of the blocks on the diagonal three quarters are zeros: not enough
    assert sparse_blocks(torch.ones(8, 8), 4) == 0


def test_the_order_that_gathers_a_map_in_blocks_is_chosen() -> None:
    gathered = torch.block_diag(*[torch.ones(8, 8) + 0.1 * torch.eye(8)] * 4)
    spread = torch.arange(32).view(4, 8).T.flatten()
    maps = [gathered[spread][:, spread], gathered]
    best, scores = score_orders(maps, 8)
    assert best == 1
    assert scores[1] < 0.6 * scores[0]
    assert block_incoherence(maps[0], 8).mean() > 3 * block_incoherence(maps[1], 8).mean()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(quantize_even, torch.ones(2), 9), "bits is 9; use a whole number from 2 to 8"),
        (partial(quantize_adalog, torch.ones(2), 4, 0), "q is 0"),
        (partial(quantize_tanq, torch.ones(2), 4, 1.6), "between 0 and pi / 2"),
        (partial(block_incoherence, torch.ones(2, 2), 0), "at least 1"),
        (partial(score_orders, []), "at least one map"),
        (partial(score_orders, [torch.ones(2, 2)], 2, 1.5), "0 to 1"),
    ],
)
def test_what_is_out_of_range_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
