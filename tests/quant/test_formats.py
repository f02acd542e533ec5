"""Weight formats: exact packing, nearest values, layouts byte for byte, and what damaged files get."""

import math

import pytest
import torch
from diffusers.quantizers.bfl.utils import quantize_fp8r, quantize_nvfp4
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit.quant.formats import Format, Scales, format_names, grouped, weight_format
from dit.quant.formats.packing import (
    int4_to_int8,
    pack_nibbles,
    pack_sixes,
    pack_split_halves,
    unpack_nibbles,
    unpack_sixes,
    unpack_split_halves,
)

few = settings(max_examples=40)
names = st.sampled_from(format_names())
FP4 = ("e2m1", "e1m2", "e3m0", "nvfp4", "mxfp4")


def groups_of(name: str) -> tuple[int, ...]:
    fmt = weight_format(name)
    return (fmt.group,) if fmt.fixed_group else (0, 6, 16, 64)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Matrices of odd shapes with rows of zeros, of one huge outlier, and of very different size."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, columns, generator=generator) * 10.0 ** draw(st.integers(-5, 3))
    kind = draw(st.sampled_from(["plain", "zero row", "outlier", "positive", "nearly alike"]))
    if kind == "zero row":
        weight[0] = 0
    elif kind == "outlier":
        weight[0, draw(st.integers(0, columns - 1))] *= 1e5
    elif kind == "positive":
        weight.abs_()
    elif kind == "nearly alike":
        weight = weight[:, :1] * (1 + 1e-3 * torch.randn(rows, columns, generator=generator))
    return weight


def minifloat(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """The value of an unsigned floating-point code without infinities, by definition."""
    exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    if exponent == 0:
        return mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


def grid(fmt: Format, scales: Scales) -> Tensor:
    """All values of each group, ascending, (N, G, L), by the formats' definitions and in the slowest way."""
    step = scales.step
    if fmt.name in ("int8", "int6"):
        limit = 127 if fmt.name == "int8" else 31
        return step * torch.arange(-limit, limit + 1.0)
    if fmt.name == "int4":
        assert scales.zero is not None
        multiplier = scales.stored["weight_multiplier"].float()[..., None]
        values = multiplier * (torch.arange(16.0) - scales.zero)  # (N, G, 16)
        return scales.stored["weight_scale"][:, None, None] * values.clamp(
            -(127 // multiplier) * multiplier, None
        ).clamp(None, 127 // multiplier * multiplier)
    if fmt.name.startswith("int4_group"):
        return step * torch.arange(-8, 8.0)
    if fmt.name == "int4_affine":
        return step * torch.arange(16.0) + scales.stored["weight_offset"][..., None]
    if fmt.name in ("nf4", "nf4_fp32"):
        # Halfway between the two tails' offsets: 8 quantiles above 0 and 7 below, with 0 between (QLoRA, appendix E).
        normal = torch.distributions.Normal(0.0, 1.0)
        offset = 0.9677083
        above = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
        below = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
        levels = torch.cat([above, torch.zeros(1), below]).sort().values
        return step * levels / levels.max()
    if fmt.name == "fp8":
        magnitudes = [minifloat(code, 4, 3, bias=7) for code in range(127)]
    elif fmt.name == "e1m2":
        magnitudes = [4 * minifloat(code, 1, 2, bias=1) for code in range(8)]
    elif fmt.name == "e3m0":
        magnitudes = [minifloat(code, 3, 0, bias=3) for code in range(8)]
    else:
        magnitudes = [minifloat(code, 2, 1, bias=1) for code in range(8)]
    both = torch.tensor(sorted({*magnitudes, *(-one for one in magnitudes)}))
    return step * both


@few
@given(name=names, weight=weights(), data=st.data())
def test_values_on_the_grid_are_stored_exactly(name: str, weight: Tensor, data: st.DataObject) -> None:
    fmt, group = weight_format(name), data.draw(st.sampled_from(groups_of(name)))
    rows, columns = weight.shape
    groups = grouped(weight, group)
    scales = fmt.scales(groups, clip=data.draw(st.sampled_from([None, 1.0, 0.7])))
    assert bool((scales.step > 0).all())
    snapped = fmt.snap(groups, scales)
    tensors = fmt.pack(snapped, scales, columns)
    found = {key: (tuple(one.shape), one.dtype) for key, one in tensors.items()}
    assert found == fmt.stored_shapes(rows, columns, group)
    fmt.check(tensors, columns, group)
    assert torch.equal(fmt.unpack(tensors, columns, group), snapped.flatten(1)[:, :columns])
    assert torch.equal(fmt.snap(snapped, scales), snapped), "snapping twice moved a value"
    assert all(one.is_contiguous() for one in tensors.values())


@few
@given(name=names, weight=weights(), data=st.data())
def test_snapping_takes_the_nearest_value(name: str, weight: Tensor, data: st.DataObject) -> None:
    fmt, group = weight_format(name), data.draw(st.sampled_from(groups_of(name)))
    groups = grouped(weight, group)
    scales = fmt.scales(groups, clip=0.8)
    values = grid(fmt, scales)
    distances = (groups[..., None] - values[:, :, None]).abs()  # (N, G, g, L)
    snapped = fmt.snap(groups, scales)
    nearest = distances.amin(-1)
    tolerance = 3e-6 * torch.maximum(groups.abs(), snapped.abs()) + 1e-30
    assert bool(((snapped - groups).abs() <= nearest + tolerance).all())
    on_grid = (snapped[..., None] - values[:, :, None]).abs().amin(-1)
    assert bool((on_grid <= tolerance).all())


@few
@given(name=names, weight=weights())
def test_snapping_keeps_the_order(name: str, weight: Tensor) -> None:
    fmt = weight_format(name)
    groups = grouped(weight, fmt.group).sort(-1).values
    snapped = fmt.snap(groups, fmt.scales(groups))
    assert bool((snapped.diff(dim=-1) >= 0).all())


@few
@given(name=names, weight=weights())
def test_neighbours_enclose_a_weight(name: str, weight: Tensor) -> None:
    fmt = weight_format(name)
    groups = grouped(weight, fmt.group)
    scales = fmt.scales(groups, clip=0.8)
    values = grid(fmt, scales)
    below, above = fmt.neighbours(groups, scales)
    tolerance = 3e-6 * groups.abs() + 1e-30
    inside = (groups >= values[..., :1]) & (groups <= values[..., -1:])
    assert bool(((below <= groups + tolerance) & (groups <= above + tolerance))[inside].all())
    ends = torch.where(groups > 0, values[..., -1:], values[..., :1])
    torch.testing.assert_close(below[~inside], ends.expand_as(below)[~inside], rtol=1e-5, atol=0)
    assert torch.equal(below[~inside], above[~inside])
    tolerance = 3e-6 * torch.maximum(below.abs(), above.abs()) + 1e-30
    lowest, highest = (below + tolerance)[..., None], (above - tolerance)[..., None]
    between = (values[:, :, None] > lowest) & (values[:, :, None] < highest)
    assert not bool(between.any()), "there is a value between the neighbours"
    snapped = fmt.snap(groups, scales)
    assert bool(((snapped == below) | (snapped == above)).all())


# Relative error of Gaussian weights in groups of 64 where the format has a choice.
ERRORS = {
    "int8": 0.0080, "int6": 0.0326, "int4": 0.0884, "fp8": 0.0264, "e2m1": 0.1055, "e1m2": 0.107, "e3m0": 0.188,
    "nvfp4": 0.0955, "mxfp4": 0.115, "nf4": 0.092, "nf4_fp32": 0.092, "nvfp4_rows": 0.0955, "int4_group": 0.102,
    "int4_group_fp32": 0.102, "int4_affine": 0.091,
}  # fmt: skip


@pytest.mark.parametrize("name", format_names())
def test_error_on_gaussian_weights(name: str) -> None:
    fmt = weight_format(name)
    groups = grouped(torch.randn(256, 1152), fmt.group if fmt.fixed_group else 64)
    error = (fmt.snap(groups, fmt.scales(groups)) - groups).norm() / groups.norm()
    assert error.item() == pytest.approx(ERRORS[name], rel=0.015)


def test_int4_searches_the_least_error() -> None:
    fmt = weight_format("int4")
    weight = torch.randn(64, 640)
    weight[:, 3] *= 20
    groups = grouped(weight, 64)
    importance = torch.ones(1, 10, 64)
    importance[0, 2, :5] = 1000

    def squared(scales: Scales, weighting: Tensor | float = 1.0) -> Tensor:
        return ((fmt.snap(groups, scales) - groups).square() * weighting).sum()

    searched, plain = fmt.scales(groups), fmt.scales(groups, clip=1.0)
    assert squared(searched) < 0.97 * squared(plain)
    aware = fmt.scales(groups, importance=importance)
    assert squared(aware, importance) < 0.8 * squared(searched, importance)
    doubled = grouped(weight * 2, 64)
    assert torch.equal(fmt.scales(doubled).step, 2 * searched.step)


@pytest.mark.parametrize(("columns", "group"), [(256, 64), (100, 64), (96, 32), (70, 0), (42, 6)])
def test_int4_unpacks_to_int8_exactly(columns: int, group: int) -> None:
    fmt = weight_format("int4")
    weight = torch.randn(12, columns)
    weight[5] = 0
    weight[6, 1] = 1e4
    groups = grouped(weight, group)
    scales = fmt.scales(groups)
    tensors = fmt.pack(fmt.snap(groups, scales), scales, columns)
    packed = tensors["weight"], tensors["weight_multiplier"], tensors["weight_zero"]
    matrix = int4_to_int8(*packed, group, columns)
    assert matrix.shape == (12, columns)
    assert matrix.min() >= -127
    assert torch.equal(tensors["weight_scale"][:, None] * matrix.float(), fmt.unpack(tensors, columns, group))
    codes = unpack_split_halves(packed[0], group or columns).int()  # the definition, without bytes that wrap around
    slow = (codes - packed[2][..., None].int()) * packed[1][..., None].int()
    assert torch.equal(slow.flatten(1)[:, :columns], matrix.int())
    out = torch.empty(12, columns, dtype=torch.int8)
    for part in (slice(0, 5), slice(5, 12)):
        assert int4_to_int8(*(one[part] for one in packed), group, columns, out[part]) is not None
    assert torch.equal(out, matrix)


def test_int4_to_int8_refuses_what_does_not_fit() -> None:
    weight, small = torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="groups of 32"):
        int4_to_int8(weight, small, small, 32, 64)
    with pytest.raises(ValueError, match=r"out is torch\.int8"):
        int4_to_int8(weight, small, small, 64, 64, torch.empty(2, 63, dtype=torch.int8))
    with pytest.raises(ValueError, match="contiguous"):
        int4_to_int8(weight, small, small, 64, 64, torch.empty(64, 2, dtype=torch.int8).T)


def test_layouts_of_bytes() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[0x21, 0x43, 0x65, 0x87]]
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)
    halves = pack_split_halves(codes.view(1, 2, 4))
    assert halves.tolist() == [[0x31, 0x42, 0x75, 0x86]]
    assert torch.equal(unpack_split_halves(halves, 4), codes.view(1, 2, 4))
    sixes = torch.tensor([[0b000001, 0b000010, 0b110000, 0b100001, 0b111111]], dtype=torch.uint8)
    packed = pack_sixes(sixes)
    assert packed.tolist() == [[0b10000001, 0b00000000, 0b10000111, 0b00111111, 0, 0]]
    assert torch.equal(unpack_sixes(packed, 5), sixes)


@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_fp8_and_nvfp4_are_those_of_bfl(size: float) -> None:
    weight = torch.randn(48, 96) * size * torch.randn(48, 1).exp()
    weight[3, 5] *= 100
    stored = [
        (weight_format("fp8"), ["weight", "weight_scale"], quantize_fp8r(weight)),
        (weight_format("nvfp4"), ["weight", "weight_scale", "weight_scale_2"], quantize_nvfp4(weight)),
    ]
    for fmt, keys, expected in stored:
        groups = grouped(weight, fmt.group)
        scales = fmt.scales(groups)
        tensors = fmt.pack(fmt.snap(groups, scales), scales, 96)
        for key, theirs in zip(keys, expected, strict=True):
            assert tensors[key].shape == theirs.shape, (fmt.name, key)
            assert torch.equal(tensors[key].reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8)), key


def test_mxfp4_exponents_are_those_of_the_standard() -> None:
    fmt = weight_format("mxfp4")
    largest = [1.0, 3.99, 4.0, 6.0, 7.99, 8.0, 0.01, 1e4]
    weight = torch.randn(len(largest), 32).clamp(-1, 1) * 0.1
    weight *= torch.tensor(largest)[:, None]
    weight[:, 7] = torch.tensor(largest)
    stored = fmt.scales(grouped(weight, 32)).stored["weight_scale"].flatten()
    assert stored.tolist() == [127 + math.floor(math.log2(one)) - 2 for one in largest]


def test_codes_of_floats_are_sign_and_index() -> None:
    for name in FP4:
        fmt = weight_format(name)
        values = torch.zeros(1, fmt.group)
        values[0, :4] = torch.tensor([6.0, -6.0, -1e-9, 1e-9])
        groups = grouped(values, fmt.group)
        scales = fmt.scales(groups)
        packed = fmt.pack(fmt.snap(groups, scales), scales, fmt.group)["weight"]
        assert unpack_nibbles(packed)[0, :4].tolist() == [7, 15, 8, 0]


def test_int6_codes_are_integers() -> None:
    fmt = weight_format("int6")
    weight = torch.tensor([[-31.0, -1, 0, 30, 31, 12]])
    groups = grouped(weight, 0)
    scales = fmt.scales(groups)
    tensors = fmt.pack(fmt.snap(groups, scales), scales, 6)
    assert (unpack_sixes(tensors["weight"], 6).int() - 32).tolist() == weight.int().tolist()
    assert fmt.unpack(tensors, 6).tolist() == weight.tolist()


def test_groups_are_padded_with_zeros() -> None:
    weight = torch.arange(1.0, 11).view(2, 5)
    assert grouped(weight, 4).tolist() == [[[1, 2, 3, 4], [5, 0, 0, 0]], [[6, 7, 8, 9], [10, 0, 0, 0]]]
    assert grouped(weight, 0).shape == (2, 1, 6)
    assert grouped(weight.bfloat16(), 4).dtype == torch.float32


def test_parts_of_scales() -> None:
    fmt = weight_format("int4")
    first, second = grouped(torch.randn(4, 130), 64), grouped(torch.randn(4, 130) * 9, 64)
    one, other = fmt.scales(first), fmt.scales(second)
    assert torch.equal(fmt.snap(first[:, 1:2], one.of_group(1)), fmt.snap(first, one)[:, 1:2])
    rows = torch.tensor([True, False, False, True])
    mixed = one.where(rows, other)
    weight = torch.where(rows[:, None, None], first, second)
    expected = torch.where(rows[:, None, None], fmt.snap(first, one), fmt.snap(second, other))
    assert torch.equal(fmt.snap(weight, mixed), expected)
    assert torch.equal(fmt.unpack(fmt.pack(expected, mixed, 130), 130), expected.flatten(1)[:, :130])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", format_names())
def test_weights_that_are_not_finite_are_refused(name: str, wrong: float) -> None:
    fmt = weight_format(name)
    weight = torch.randn(3, 40)
    groups = grouped(weight, fmt.group)
    weight[2, 7] = wrong
    with pytest.raises(ValueError, match="weight has 1 values that are not finite, the first in row 2"):
        grouped(weight, fmt.group)
    groups[1, 0, 3] = wrong
    with pytest.raises(ValueError, match=r"weight has .* not finite, the first in row 1"):
        fmt.scales(groups)


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", format_names())
def test_clips_that_make_no_sense_are_refused(name: str, clip: float) -> None:
    fmt = weight_format(name)
    with pytest.raises(ValueError, match="clip has values"):
        fmt.scales(grouped(torch.randn(2, 32), fmt.group), clip)


def test_wrong_matrices_and_names_are_refused() -> None:
    for wrong in (torch.zeros(4), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(0, 4)):
        with pytest.raises(ValueError, match="floating-point matrix"):
            grouped(wrong, 0)
    with pytest.raises(ValueError, match="weights is 'int5'; use one of int8"):
        weight_format("int5")
    with pytest.raises(ValueError, match="group is 32, but nvfp4 always has groups of 16"):
        weight_format("nvfp4").resolve_group(32)
    with pytest.raises(ValueError, match="int8 always has one scale a row"):
        weight_format("int8").resolve_group(64)
    with pytest.raises(ValueError, match="group is 7"):
        weight_format("int4").resolve_group(7)
    assert weight_format("int4").resolve_group(None) == 64
    assert weight_format("e2m1").resolve_group(0) == 0
    with pytest.raises(ValueError, match=r"scales\.zero is None"):
        weight_format("int4").snap(
            torch.zeros(1, 1, 64),
            Scales(torch.ones(1, 1, 1), None, weight_format("int4").scales(torch.zeros(1, 1, 64)).stored),
        )


def stored(name: str) -> dict[str, Tensor]:
    fmt = weight_format(name)
    groups = grouped(torch.randn(4, 128), fmt.group)
    scales = fmt.scales(groups)
    return fmt.pack(fmt.snap(groups, scales), scales, 128)


@pytest.mark.parametrize("name", format_names())
def test_damaged_tensors_are_refused(name: str) -> None:
    fmt, tensors = weight_format(name), stored(name)
    fmt.check(tensors, 128)
    for key, tensor in tensors.items():
        missing = {other: one for other, one in tensors.items() if other != key}
        with pytest.raises(ValueError, match=f"lack the tensor '{key}'"):
            fmt.unpack(missing, 128)
        if tensor.ndim:
            with pytest.raises(ValueError, match=r"does the file say another group|has torch\."):
                fmt.unpack(tensors | {key: tensor.view(torch.uint8)[:, :-1] if tensor.ndim > 1 else tensor[:-1]}, 128)
    with pytest.raises(ValueError, match="with 900 inputs and group"):
        fmt.unpack(tensors, 900)
    if name != "mxfp4":
        scale = tensors["weight_scale"].float()
        scale.view(-1)[1] = math.nan
        broken = tensors | {"weight_scale": scale.to(tensors["weight_scale"].dtype)}
        with pytest.raises(ValueError, match="weight_scale has 1 of"):
            fmt.check(broken, 128)


def test_damaged_codes_of_scales_are_refused() -> None:
    tensors = stored("mxfp4")
    tensors["weight_scale"][0, 0] = 255
    with pytest.raises(ValueError, match="codes 255"):
        weight_format("mxfp4").check(tensors, 128)
    for key, value in (("weight_multiplier", 0), ("weight_zero", 16)):
        tensors = stored("int4")
        tensors[key][0, 0] = value
        with pytest.raises(ValueError, match="weight_multiplier has zeros"):
            weight_format("int4").check(tensors, 128)
