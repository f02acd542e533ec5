"""Rotation, balance and low-rank branch, and activations as they are defined."""

import math

import pytest
import torch
from torch import Tensor

from dit.quant.activations import quantize_rows
from dit.quant.balance import (
    AGGREGATES,
    COARSE,
    RANGE,
    balance_scale,
    input_magnitude,
    search_balance,
    spearman,
)
from dit.quant.low_rank import low_rank_branch, truncated_svd
from dit.quant.reference import (
    FP4_MAGNITUDES,
    fake_quantize_activations,
    fake_quantize_nvfp4,
    round_up_to_bfloat16,
)
from dit.quant.rotation import (
    hadamard,
    input_factors,
    prepare,
    resolve_block,
    rotate,
    rotate_gram,
    rotate_slowly,
    rotate_weight,
    rotation_sign,
    unrotate,
)
from dit.quant.scheme import Scheme
from dit.quant.statistics import LayerStatistics


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------ rotation


@pytest.mark.parametrize("size", [1, 2, 8, 128])
def test_hadamard_is_orthonormal_and_symmetric(size: int) -> None:
    matrix = hadamard(size, dtype=torch.float64)
    assert torch.equal(matrix, matrix.mT)
    assert torch.allclose(matrix @ matrix, torch.eye(size, dtype=torch.float64), atol=1e-6)
    assert set((matrix * math.sqrt(size)).round().unique().tolist()) <= {-1.0, 1.0}
    with pytest.raises(ValueError, match="size of a Hadamard matrix is 12; use a power of two"):
        hadamard(12)


@pytest.mark.parametrize("block", [0, 8, 32])
def test_rotation_equals_its_definition_and_can_be_undone(block: int) -> None:
    x, sign = drawn(2, 3, 64), rotation_sign(64)
    fast = rotate(x, sign, block)
    assert fast.shape == x.shape
    assert torch.allclose(fast, rotate_slowly(x, sign, block), atol=1e-5)
    assert torch.allclose(unrotate(fast, sign, block), x, atol=1e-5)
    assert torch.allclose(rotate(x, None, block), rotate_slowly(x, None, block), atol=1e-5)


def test_rotated_inputs_and_weights_give_the_same_outputs() -> None:
    x, weight, sign, balance = drawn(5, 96), drawn(7, 96, seed=1), rotation_sign(96), drawn(96, seed=2).exp()
    prepared = prepare(x, input_factors(1 / balance, sign), 32)
    assert torch.allclose(prepared @ rotate_weight(weight * balance, sign, 32).mT, x @ weight.mT, atol=1e-4)
    gram = x.mT @ x
    rotated = rotate(x, sign, 32)
    assert torch.allclose(rotate_gram(gram, sign, 32), rotated.mT @ rotated, atol=1e-4)


def test_rotation_keeps_the_dtype_and_spreads_an_outlier() -> None:
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    x[0, 5] = 64.0
    rotated = rotate(x, rotation_sign(128), 128)
    assert rotated.dtype == torch.bfloat16
    assert torch.allclose(rotated.float().abs(), torch.full((1, 128), 64 / math.sqrt(128)), rtol=0.01)


def test_signs_are_those_of_the_width() -> None:
    assert torch.equal(rotation_sign(1152), rotation_sign(1152))
    assert not torch.equal(rotation_sign(1152), rotation_sign(1280)[:1152])
    assert set(rotation_sign(64).tolist()) == {-1, 1}
    assert rotation_sign(64).dtype == torch.int8


@pytest.mark.parametrize(
    ("columns", "asked", "block"),
    [(1152, 128, 128), (1152, 1024, 128), (2240, 128, 64), (96, 64, 32), (36, 128, 0), (40, 128, 8), (64, 0, 0)],
)
def test_blocks_are_resolved(columns: int, asked: int, block: int) -> None:
    assert resolve_block(columns, asked) == block


def test_a_block_must_divide_the_inputs() -> None:
    with pytest.raises(ValueError, match="a block of 64 channels does not divide 96"):
        rotate(drawn(2, 96), None, 64)


def test_a_matrix_made_in_inference_mode_can_be_trained_through() -> None:
    with torch.inference_mode():
        hadamard(16, dtype=torch.float64)
    x = drawn(2, 16).double().requires_grad_()
    rotate(x, None, 16).sum().backward()
    assert x.grad is not None


# ------------------------------------------------------------------------------ balance


def statistics(amax: Tensor, sigmas: list[float], branches: list[str] | None = None) -> LayerStatistics:
    bins, columns = amax.shape
    return LayerStatistics(
        torch.tensor(sigmas, dtype=torch.float64),
        tuple(branches or ["all"] * bins),
        amax,
        amax.square() / 4,
        torch.full((bins,), 10),
        drawn(20, columns).bfloat16(),
        torch.arange(20) % bins,
    )


def test_balance_is_the_formula() -> None:
    inputs, weights = torch.tensor([4.0, 1.0, 0.25]), torch.tensor([1.0, 2.0, 0.5])
    for alpha in (0.0, 0.3, 1.0):
        expected = inputs**alpha / weights ** (1 - alpha)
        expected = expected / expected.log().mean().exp()
        assert torch.allclose(balance_scale(inputs, weights, alpha), expected)
    even = inputs / balance_scale(inputs, weights, 1.0)
    assert torch.allclose(even, even[0].expand(3))  # 1 evens out the inputs
    even = weights * balance_scale(inputs, weights, 0.0)
    assert torch.allclose(even, even[0].expand(3))  # 0 the weights
    with pytest.raises(ValueError, match=r"alpha is 1.5; use a number from 0 to 1"):
        balance_scale(inputs, weights, 1.5)


def test_channels_of_zeros_stay_in_range() -> None:
    scale = balance_scale(torch.tensor([0.0, 1e8, 1.0]), torch.tensor([1.0, 0.0, 1.0]), 0.5)
    assert torch.isfinite(scale).all()
    assert RANGE[0] <= scale.min() <= scale.max() <= RANGE[1]


def test_aggregates_of_noise_levels() -> None:
    amax = torch.tensor([[8.0, 1.0], [6.0, 2.0], [2.0, 3.0], [1.0, 4.0]])
    levels = statistics(amax, [0.9, 0.9, 0.5, 0.1], ["cond", "uncond", "all", "all"])
    weights = torch.tensor([1.0, 2.0])
    assert input_magnitude(levels, weights, "max").tolist() == [8.0, 4.0]
    assert input_magnitude(levels, weights, "first").tolist() == [8.0, 2.0]  # both branches of the noisiest
    average = 0.95 * (0.95 * torch.tensor([8.0, 2.0]) + 0.05 * amax[2]) + 0.05 * amax[3]
    assert torch.allclose(input_magnitude(levels, weights, "ema"), average)
    share = torch.softmax(-torch.tensor([-1.0, -1.0, 1.0, 1.0]), 0)  # equal order counts least
    assert torch.allclose(input_magnitude(levels, weights, "spearman"), share @ amax)
    expected = torch.quantile(levels.rows.float().abs(), 0.999, dim=0)
    assert torch.equal(input_magnitude(levels, weights, "percentile"), expected)
    with pytest.raises(ValueError, match=r"aggregate is 'mean'; use one of max, first, ema, spearman, percentile"):
        input_magnitude(levels, weights, "mean")
    assert set(AGGREGATES) == {"max", "first", "ema", "spearman", "percentile"}


def test_levels_that_nobody_knows_do_not_count_as_first() -> None:
    amax = torch.tensor([[8.0], [2.0], [9.0]])
    levels = statistics(amax, [0.9, 0.1, math.nan])
    assert input_magnitude(levels, torch.ones(1), "first").tolist() == [8.0]
    unknown = statistics(amax[:2], [math.nan, math.nan], ["cond", "uncond"])
    assert input_magnitude(unknown, torch.ones(1), "first").tolist() == [8.0]


def test_rank_correlation() -> None:
    x = torch.tensor([1.0, 5.0, 3.0, 3.0])
    assert spearman(x, x.exp()).item() == pytest.approx(1.0)
    assert spearman(x, -x).item() == pytest.approx(-1.0)
    # ranks 1, 4, 2.5, 2.5 and 1, 2, 3, 4: product 1.5 over sqrt(4.5 * 5)
    assert spearman(x, torch.tensor([1.0, 2.0, 3.0, 4.0])).item() == pytest.approx(1.5 / math.sqrt(22.5))


@pytest.mark.parametrize("wanted", [0.0, 0.35, 0.6, 1.0])
def test_the_search_finds_the_exponent(wanted: float) -> None:
    inputs, weights = drawn(32).exp(), drawn(32, seed=1).exp()
    goal = balance_scale(inputs, weights, wanted)

    def error(scale: Tensor | None) -> float:
        return 10.0 if scale is None else float((scale.log() - goal.log()).norm())

    assert search_balance(inputs, weights, error).alpha == pytest.approx(wanted)


def test_the_search_may_find_nothing_better() -> None:
    tried: list[float] = []

    def error(scale: Tensor | None) -> float:
        tried.append(0.0)
        return 0.0 if scale is None else 1.0

    found = search_balance(drawn(8).exp(), drawn(8, seed=1).exp(), error)
    assert (found.scale, found.alpha, found.error) == (None, None, 0.0)
    assert len(tried) == len(COARSE) + 2  # 0 has one neighbour, and none at all is tried


# ------------------------------------------------------------------------------ low rank


def test_truncated_svd_is_the_best_approximation() -> None:
    matrix = drawn(48, 80)
    up, down = truncated_svd(matrix, 6)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    best = (left[:, :6] * values[:6]) @ right[:6]
    assert (up @ down - matrix).norm() <= 1.01 * (best - matrix).norm()
    again = truncated_svd(matrix, 6, start=down)
    assert (again[0] @ again[1] - best).norm() < (up @ down - best).norm() + 1e-4
    assert torch.equal(truncated_svd(matrix, 6)[0], up)


def _coarse(weight: Tensor) -> Tensor:
    step = weight.abs().amax(1, keepdim=True) / 3
    return (weight / step).round() * step


def test_the_branch_takes_what_quantization_loses() -> None:
    weight = drawn(40, 64)
    weight[:, :3] *= 20
    plain = (weight - _coarse(weight)).norm()

    def error(rest: Tensor, part: Tensor) -> float:
        return float((weight - part - rest).norm())

    one = low_rank_branch(weight, 4, _coarse, error, rounds=1)
    ten = low_rank_branch(weight, 4, _coarse, error)
    assert one.down.shape == (4, 64)
    assert one.up.shape == (40, 4)
    assert one.down.dtype == one.up.dtype == torch.bfloat16
    assert one.error < 0.5 * plain
    assert ten.error <= one.error
    part = ten.weight()
    assert error(_coarse(weight - part), part) == pytest.approx(ten.error)
    with pytest.raises(ValueError, match="rank is 41; a weight"):
        low_rank_branch(weight, 41, _coarse, error)


def test_weighting_makes_outputs_nearer_in_any_basis() -> None:
    weight, sign = drawn(40, 64), rotation_sign(64)
    size = torch.ones(64)
    size[[3, 40]] = 15.0
    x = rotate(drawn(200, 64, seed=1) * size, sign, 32)
    rotated = rotate_weight(weight, sign, 32)

    def error(rest: Tensor, part: Tensor) -> float:
        return float((x @ (rotated - part - rest).mT).norm())

    plain = low_rank_branch(rotated, 4, _coarse, error)
    weighted = low_rank_branch(
        rotated,
        4,
        _coarse,
        error,
        weighting=size,
        rotate=lambda one: rotate(one, sign, 32),
        unrotate=lambda one: unrotate(one, sign, 32),
    )
    assert weighted.error < 0.6 * plain.error


# ------------------------------------------------------------------------------ activations


@pytest.mark.parametrize(("name", "levels"), [("int8", 127), ("int6", 31), ("int4", 7)])
def test_integer_activations_equal_the_fast_way(name: str, levels: int) -> None:
    x = drawn(50, 96) * drawn(50, 1, seed=1).exp()
    x[3] = 0
    defined = fake_quantize_activations(x, Scheme(activations=name))
    codes = quantize_rows(x, levels)
    assert torch.allclose(codes.values.float() * codes.scale, defined, atol=1e-6)
    steps = round_up_to_bfloat16(x.abs().amax(1, keepdim=True) / levels)
    whole = defined / steps
    assert torch.allclose(whole, whole.round(), atol=1e-3)
    assert whole.abs().max() <= levels
    assert ((defined - x).abs() <= steps / 2 + 1e-7).all()


def test_scales_are_rounded_up_to_bfloat16() -> None:
    scale = drawn(1000).abs() * 10.0 ** torch.arange(-10, 10).repeat(50)
    rounded = round_up_to_bfloat16(scale)
    assert torch.equal(rounded.bfloat16().float(), rounded)
    assert (rounded >= scale).all()
    assert (rounded <= scale * (1 + 2**-7)).all()


def test_groups_and_static_scales() -> None:
    x = drawn(4, 20)
    grouped = fake_quantize_activations(x, Scheme(activations="int4", activation_group=8))
    parts = [fake_quantize_activations(x[:, i : i + 8], Scheme(activations="int4")) for i in (0, 8, 16)]
    assert torch.equal(grouped, torch.cat(parts, dim=1))
    static = fake_quantize_activations(x, Scheme(static=True), torch.tensor([0.01]))
    assert torch.allclose(static, (x / 0.01).round().clamp(-127, 127) * 0.01)
    with pytest.raises(ValueError, match="static activations: give their input_scale"):
        fake_quantize_activations(x, Scheme(static=True))


def test_float8_activations_have_three_bits_of_mantissa() -> None:
    x = drawn(8, 64)
    rounded = fake_quantize_activations(x, Scheme(activations="fp8"))
    steps = x.abs().amax(1, keepdim=True) / 448
    assert ((rounded - x).abs() <= x.abs() / 16 + steps * 2**-9).all()
    assert torch.allclose(rounded.abs().amax(1), x.abs().amax(1))
    assert torch.equal(fake_quantize_activations(x, Scheme(activations="none")), x)


def test_nvfp4_activations_are_the_nearest_values() -> None:
    x = drawn(6, 40) * torch.tensor([1e-3, 1.0, 100.0, 1.0, 1.0, 0.0])[:, None]
    rounded = fake_quantize_nvfp4(x)
    values = torch.tensor(FP4_MAGNITUDES)
    outer = (x.abs().amax(1, keepdim=True) / (6 * 448)).clamp(min=1e-12)
    for start in (0, 16, 32):
        part, made = x[:, start : start + 16], rounded[:, start : start + 16]
        inner = (part.abs().amax(1, keepdim=True) / 6 / outer).to(torch.float8_e4m3fn).float()
        scale = (inner * outer)[..., None]
        grid = torch.cat([-values, values]) * scale  # (M, 1, 16)
        nearest = (part[..., None] - grid).abs().amin(-1)
        assert torch.allclose((part - made).abs(), nearest, rtol=1e-4, atol=1e-6)
    assert torch.equal(rounded[5], torch.zeros(40))
    one_scale = fake_quantize_activations(x, Scheme(activations="nvfp4"), torch.tensor([1.0]))
    assert (one_scale[1] - x[1]).norm() < 0.2 * x[1].norm()
