"""Tests of the Triton kernels in their interpreter: `test_triton_kernels` runs them in a process of their own."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dit.attention import attention_reference
from dit.attention.kernels.quantized import attend_by_kernel, quantized_attention
from dit.quant.activations import OFFSET, quantize_rows
from dit.quant.formats import grouped, weight_format
from dit.quant.formats.base import ungrouped
from dit.quant.formats.packing import int4_to_int8
from dit.quant.kernels import triton_int8
from dit.quant.kernels.contract import Use, Weights
from dit.quant.kernels.dequantize import multiply as slow_multiply
from dit.quant.kernels.triton_product import finish_sums, multiply_int8, regroup_int4, unpack_int4
from dit.quant.kernels.triton_rows import quantize_rows_by_triton, round_rows_to_float8
from dit.quant.layer import quantize_linear
from dit.quant.scheme import Scheme
from dit.runtime.metrics import relative_error


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def codes(*shape, seed=0):
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


# ----------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"levels": 7},
        {"unsigned": True},
        {"scale": torch.tensor([0.02])},
        {"samples": 3},
        {"shift": 0.17},
        {"shift": 0.17, "unsigned": True, "levels": 31},
    ],
)
def test_rows_are_quantized_as_by_torch(options):
    for dtype, columns in ((torch.float32, 40), (torch.bfloat16, 9000)):
        x = 3 * numbers(3, columns, dtype=dtype)
        if "shift" in options:
            x = F.gelu(x)
        found, expected = quantize_rows_by_triton(x, **options), quantize_rows(x, **options)
        assert torch.equal(found.scale, expected.scale)
        assert found.values.dtype == expected.values.dtype
        assert (found.values.int() - expected.values.int()).abs().max() <= 1  # the CPU multiplies by the reciprocal
        assert (found.values != expected.values).float().mean() < 2e-3


def test_rows_of_zeros_and_without_numbers():
    x = numbers(4, 33)
    x[0], x[1, 5], x[2, 3] = 0, torch.nan, torch.inf
    found = quantize_rows_by_triton(x)
    assert not found.values[0].any()
    assert found.scale.isfinite().flatten().tolist() == [True, False, False, True]
    assert torch.equal(found.values[3], quantize_rows(x).values[3])


def test_rows_that_are_not_side_by_side():
    x = numbers(5, 80)[:, :64]
    assert torch.equal(quantize_rows_by_triton(x).values, quantize_rows_by_triton(x.contiguous()).values)
    turned = numbers(64, 5).t()
    assert torch.equal(quantize_rows_by_triton(turned).values, quantize_rows_by_triton(turned.contiguous()).values)


def test_rows_in_float8():
    x = 5 * numbers(7, 130, dtype=torch.bfloat16)
    rounded, scale = round_rows_to_float8(x)
    expected = (x.float().abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)
    torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0)
    exact = (x.float() / expected).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert (rounded.view(torch.uint8) != exact.view(torch.uint8)).float().mean() < 2e-3
    rounded, scale = round_rows_to_float8(x, torch.tensor([0.5]))
    assert scale.unique().tolist() == [0.5]
    exact = (x.float() / 0.5).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    is_normal = exact.abs() > 2**-6  # the interpreter cuts off bits of smaller ones
    assert torch.equal(rounded.float()[is_normal], exact[is_normal])


# ------------------------------------------------------------------------------- products


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "after"),
    [
        (33, 64, 40, ""),
        (1, 48, 96, "gelu_tanh"),
        (33, 40, 33, "gelu"),  # can't be described to the tensor memory accelerator
    ],
)
def test_products_are_final(rows, inner, columns, after):
    a, b = codes(rows, inner), codes(columns, inner, seed=1)
    row_scale, column_scale = numbers(rows, 1, seed=2).abs() * 0.01, numbers(columns, seed=3).abs() * 0.01
    bias, sums = numbers(columns, seed=4), numbers(columns, seed=5)
    branch, up = numbers(rows, 16, seed=6), numbers(columns, 16, seed=7)
    exact = (a.double() @ b.double().t() * column_scale + OFFSET * sums) * row_scale + bias + branch @ up.t()
    if after:
        exact = F.gelu(exact, approximate="tanh" if after == "gelu_tanh" else "none")
    found = multiply_int8(
        a, b, row_scale, column_scale, torch.float32, bias=bias, input_sums=sums, offset=OFFSET, branch=branch, up=up,
        after=after,
    )  # fmt: skip
    assert relative_error(found, exact) < 1e-6
    plain = multiply_int8(a, b, row_scale[:1], column_scale, torch.bfloat16)
    assert plain.dtype == torch.bfloat16
    assert relative_error(plain, a.double() @ b.double().t() * column_scale * row_scale[0]) < 3e-3


def test_sums_are_finished_in_place():
    sums = torch.randint(-10000, 10000, (37, 600), dtype=torch.int32)
    row_scale, column_scale, bias = numbers(37, 1).abs(), numbers(500, seed=1).abs() * 1e-4, numbers(500, seed=2)
    out = torch.zeros(37, 520, dtype=torch.bfloat16)
    finish_sums(sums[:, :500], row_scale, column_scale, out[:, :500], bias=bias, after="gelu")
    exact = F.gelu(sums[:, :500].double() * column_scale * row_scale + bias)
    assert relative_error(out[:, :500], exact) < 3e-3
    assert not out[:, 500:].any()


@pytest.mark.parametrize(("group", "columns"), [(64, 100), (32, 96), (0, 50)])
def test_int4_is_unpacked_exactly(group, columns):
    fmt = weight_format("int4")
    groups = grouped(numbers(8, columns), group)
    scales = fmt.scales(groups)
    tensors = fmt.pack(fmt.snap(groups, scales), scales, columns)
    given = tensors["weight"], tensors["weight_multiplier"], tensors["weight_zero"], group, columns
    assert torch.equal(unpack_int4(*given), int4_to_int8(*given))


@pytest.mark.parametrize(("group", "columns", "name"), [(64, 128, "int4_group"), (32, 80, "int4_group_fp32")])
def test_groups_of_int4_become_rows_of_int8(group, columns, name):
    fmt = weight_format(name)
    groups = grouped(numbers(8, columns), group)
    scales = fmt.scales(groups)
    snapped = fmt.snap(groups, scales)
    tensors = fmt.pack(snapped, scales, columns)
    found, step = regroup_int4(tensors["weight"], tensors["weight_scale"], columns)
    exact = fmt.unpack(tensors, columns, group)
    assert (found * step[:, None] - exact).abs().max() <= step.max() * 0.5001
    assert found.abs().max() <= 127
    four_bits = relative_error(exact, ungrouped(groups, columns))
    assert relative_error(found * step[:, None], exact) < four_bits / 8


def test_ranks_are_checked():
    with pytest.raises(ValueError, match="rank is 24"):
        multiply_int8(
            codes(2, 32), codes(8, 32), numbers(2, 1), numbers(8), torch.float32, branch=numbers(2, 24),
            up=numbers(8, 24),
        )  # fmt: skip


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("int4", 64),
        Scheme("int4_group", 32),
        Scheme("int8", 0, per_sample=True),
        Scheme("int8", 0, shift=0.17),
    ],
)
def test_whole_layers_equal_their_definition(scheme):
    linear = torch.nn.Linear(96, 32)
    x = numbers(32, 96)
    x = F.gelu(x) if scheme.shift else x
    made = quantize_linear(linear, scheme)
    weights = Weights(made.scheme, made.tensors, 32, 96, made.bias)
    if scheme.shift:
        dense = weight_format(scheme.weights).unpack(made.tensors, 96, made.scheme.group)
        weights = replace(weights, input_sums=dense.sum(1))
    use = Use(samples=4 if scheme.per_sample else 32, after="gelu_tanh")
    with torch.no_grad():
        most = 0.02 if "group" in scheme.weights else 2e-3
        assert relative_error(triton_int8.multiply(weights, x, use), slow_multiply(weights, x, use)) < most
    static = replace(weights, scheme=replace(made.scheme, static=True, per_sample=False, shift=0.0), input_sums=None)
    static.tensors["input_scale"] = torch.tensor([0.03])
    with torch.no_grad():
        assert relative_error(triton_int8.multiply(static, x, Use()), slow_multiply(static, x, Use())) < most


# ------------------------------------------------------------------------------ attention


def test_attention_computes_scores_in_int8():
    """The kernel quantizes as the reference does, in pieces of 64; values stay as they are."""
    query, key, value = (numbers(1, 128, 1, 32, seed=seed) for seed in range(3))
    key = key + 4
    mask = torch.arange(128)[None] < 100
    found = attend_by_kernel(query, key, value, mask)
    reference = quantized_attention(query, key, value, mask, pv_bits=None)
    assert 0.004 < relative_error(found, attention_reference(query, key, value, mask)) < 0.02
    assert relative_error(found, reference) < 1e-3
