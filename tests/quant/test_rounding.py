"""Rounding of weights: always on the grid, never worse than nearest, and better where the inputs say how."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit.quant.formats import format_names, grouped, weight_format
from dit.quant.formats.base import ungrouped
from dit.quant.rounding import round_weight
from dit.quant.rounding.adaround import _inverse_soft, _soft, learn_directions
from dit.quant.rounding.gptq import round_and_compensate
from dit.quant.rounding.inputs import Inputs, inputs_of, quantized_inputs, shrinkage
from dit.quant.rounding.nearest import least_squares_scales
from dit.quant.rounding.output_error import OutputError, error_behind
from dit.quant.rounding.signed_sgd import _straight_through
from dit.quant.scheme import ROUNDINGS

COLUMNS, OUTPUTS = 160, 48
ADAPTIVE = ("gptq", "adaround", "signed_sgd")


class Layer:
    """A layer behind a modulated norm: channels of different size, six outliers, inputs that depend on each other."""

    def __init__(self, shared: float = 0.7) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = 0.02 * torch.randn(OUTPUTS, COLUMNS, generator=generator)
        size = (0.3 * torch.randn(COLUMNS, generator=generator)).exp()
        size[torch.randperm(COLUMNS, generator=generator)[:6]] *= 25
        mixture = torch.randn(COLUMNS // 4, COLUMNS, generator=generator) / (COLUMNS // 4) ** 0.5

        def draw(count: int) -> Tensor:
            own = torch.randn(count, COLUMNS, generator=generator)
            common = torch.randn(count, COLUMNS // 4, generator=generator) @ mixture
            return size * (own * (1 - shared) ** 0.5 + common * shared**0.5)

        self.rows, self.unseen = draw(512), draw(1024)

    def error(self, rounded: Tensor, after: Callable[[Tensor], Tensor] = lambda x: x) -> float:
        """Relative error of the output on inputs that no method saw."""
        expected = after(self.unseen @ self.weight.T)
        return ((after(self.unseen @ rounded.T) - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer()


def error_of(weight: Tensor, rows: Tensor | None, gram: Tensor | None = None) -> OutputError:
    inputs = inputs_of(rows, gram)
    assert inputs is not None
    return OutputError.of(weight, inputs)


@pytest.mark.parametrize("method", ROUNDINGS)
@pytest.mark.parametrize("name", ["int8", "int4", "e2m1", "nvfp4", "nf4"])
def test_rounded_weights_are_stored_exactly(layer: Layer, name: str, method: str) -> None:
    fmt = weight_format(name)
    weight = layer.weight[:, : COLUMNS - 7]
    rows = layer.rows[:, : COLUMNS - 7]
    steps = {"iterations": 5} if method in ("adaround", "signed_sgd") else {}
    with torch.no_grad():  # callers need no gradients; methods that do turn them on
        rounded, scales = round_weight(weight, fmt, None, method, rows=rows, **steps)
    assert rounded.shape == weight.shape
    assert not rounded.requires_grad
    tensors = fmt.pack(grouped(rounded, fmt.group), scales, weight.shape[1])
    assert torch.equal(fmt.unpack(tensors, weight.shape[1]), rounded)
    again, _ = round_weight(weight, fmt, None, method, rows=rows, **steps)
    assert torch.equal(again, rounded)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("name", ["int4", "e2m1", "nvfp4"])
def test_adaptive_rounding_takes_a_tenth_of_the_error(layer: Layer, name: str, method: str) -> None:
    fmt = weight_format(name)
    nearest, _ = round_weight(layer.weight, fmt, None, "nearest")
    steps = {} if method == "gptq" else {"iterations": 100}
    for inputs in ({"rows": layer.rows}, {"gram": layer.rows.T @ layer.rows, "samples": 512}):
        rounded, _ = round_weight(layer.weight, fmt, None, method, **inputs, **steps)
        assert layer.error(rounded) <= 0.9 * layer.error(nearest)


@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_dependent_inputs_help_beyond_the_best_scales(layer: Layer, method: str) -> None:
    fmt = weight_format("int4")
    scaled, _ = round_weight(layer.weight, fmt, None, "mse", rows=layer.rows)
    rounded, _ = round_weight(layer.weight, fmt, None, method, rows=layer.rows)
    assert layer.error(rounded) <= 0.9 * layer.error(scaled)


@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_a_small_sample_of_independent_inputs_does_no_harm(method: str) -> None:
    independent = Layer(shared=0.0)
    fmt = weight_format("int4")
    scaled, _ = round_weight(independent.weight, fmt, None, "mse", rows=independent.rows[:200])
    rounded, _ = round_weight(independent.weight, fmt, None, method, rows=independent.rows[:200])
    assert independent.error(rounded) <= 1.02 * independent.error(scaled)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("name", format_names())
def test_no_output_gets_worse_on_the_given_inputs(layer: Layer, name: str, method: str) -> None:
    fmt = weight_format(name)
    gram = layer.rows.T @ layer.rows / 512
    steps = {} if method == "gptq" else {"iterations": 30}
    rounded, _ = round_weight(layer.weight, fmt, None, method, gram=gram, **steps)
    plain, _ = round_weight(layer.weight, fmt, None, "mse", gram=gram)
    error = error_of(layer.weight, None, gram)
    assert bool((error(rounded) <= error(plain) * 1.0001).all())
    assert error(rounded).sum() < error(plain).sum()


@pytest.mark.parametrize("name", format_names())
def test_least_squares_scales(name: str) -> None:
    fmt = weight_format(name)
    weight = torch.distributions.StudentT(4.0).sample((16, 256))
    groups = grouped(weight, fmt.group)
    plain, best = fmt.scales(groups), least_squares_scales(groups, fmt)
    errors = [(fmt.snap(groups, one) - groups).square().sum((1, 2)) for one in (plain, best)]
    assert bool((errors[1] <= errors[0] * 1.0001).all())
    importance = torch.ones(1, 1, 256)
    importance[..., :4] = 1e4
    aware = least_squares_scales(groups, fmt, grouped(importance[0], fmt.group))

    def important(values: Tensor) -> Tensor:
        return (ungrouped(values - groups, 256) * importance[0].sqrt()).square().sum()

    assert important(fmt.snap(groups, aware)) <= important(fmt.snap(groups, best)) * 1.0001
    if name in ("e2m1", "e3m0", "nvfp4", "int4"):
        assert important(fmt.snap(groups, aware)) < 0.9 * important(fmt.snap(groups, best))
        assert errors[1].sum() < errors[0].sum() or fmt.searches


def slow_gptq(weight: Tensor, name: str, group: int, gram: Tensor, damping: float = 0.01) -> Tensor:
    """Optimal brain quantization in the order of the inputs, with an inverse that shrinks by one input at a time."""
    fmt = weight_format(name)
    groups = grouped(weight, group)
    scales = fmt.scales(groups)
    inverse = torch.linalg.inv((gram + damping * gram.diagonal().mean() * torch.eye(len(gram))).double())
    rest, rounded = weight.double(), torch.zeros_like(weight)
    for k in range(weight.shape[1]):
        rounded[:, k] = ungrouped(fmt.snap(grouped(rest.float(), group), scales), weight.shape[1])[:, k]
        error = (rest[:, k] - rounded[:, k]) / inverse[k, k]
        rest = rest - error[:, None] * inverse[k]
        rest[:, k] = 0
        inverse = inverse - inverse[:, k : k + 1] * inverse[k] / inverse[k, k]
        inverse[k, k] = 1.0  # this input is gone; keep later divisions defined
    return rounded


@pytest.mark.parametrize(("name", "group"), [("int4", 16), ("int8", 0), ("e2m1", 32), ("nvfp4", 16)])
@pytest.mark.parametrize("block", [8, 128])
def test_gptq_is_optimal_brain_quantization(layer: Layer, name: str, group: int, block: int) -> None:
    weight, rows = layer.weight[:6, :40].clone(), layer.rows[:, :40]
    gram = rows.T @ rows / 512
    fmt = weight_format(name)
    scales = fmt.scales(grouped(weight, group))
    rounded = round_and_compensate(weight, fmt, group, scales, gram, block)
    torch.testing.assert_close(rounded, slow_gptq(weight, name, group, gram))


def test_gptq_rounds_independent_and_silent_inputs_to_nearest(layer: Layer) -> None:
    fmt = weight_format("int4")
    scales = fmt.scales(grouped(layer.weight, 64))
    plain = ungrouped(fmt.snap(grouped(layer.weight, 64), scales), COLUMNS)
    size = torch.rand(COLUMNS)
    assert torch.equal(round_and_compensate(layer.weight, fmt, 64, scales, torch.diag(size)), plain)
    rows = layer.rows.clone()
    rows[:, 5:9] = 0
    rounded = round_and_compensate(layer.weight, fmt, 64, scales, rows.T @ rows)
    assert torch.equal(rounded[:, 5:9], plain[:, 5:9])
    assert not torch.equal(rounded, plain)


def test_gptq_damps_more_or_says_why_not(layer: Layer) -> None:
    fmt = weight_format("int4")
    gram = layer.rows.T @ layer.rows / 512
    mean = gram.diagonal().mean()
    lowest = torch.linalg.eigvalsh(gram)[0]
    indefinite = gram - (lowest + 0.05 * mean) * torch.eye(COLUMNS)  # damping by 0.01 is not enough, 0.1 is
    rounded, _ = round_weight(layer.weight, fmt, None, "gptq", gram=indefinite)
    nearest, _ = round_weight(layer.weight, fmt, None, "nearest")
    assert layer.error(rounded) < 0.9 * layer.error(nearest)
    scales = fmt.scales(grouped(layer.weight, 64))
    hopeless = gram + 100 * mean * (1 - torch.eye(COLUMNS))
    hopeless[0] *= -1
    with pytest.raises(ValueError, match="gram is not positive semidefinite"):
        round_and_compensate(layer.weight, fmt, 64, scales, hopeless)
    with pytest.raises(ValueError, match="gram has a mean diagonal of 0"):
        round_and_compensate(layer.weight, fmt, 64, scales, torch.zeros(COLUMNS, COLUMNS))


def test_soft_rounding_starts_at_the_weight() -> None:
    fraction = torch.linspace(0, 1, 11)
    torch.testing.assert_close(_soft(_inverse_soft(fraction)), fraction, atol=1e-6, rtol=1e-5)
    assert _soft(torch.tensor([-3.0, 0.0, 3.0])).tolist() == pytest.approx([0.0, 0.5, 1.0])
    assert _soft(torch.tensor(1.0)).item() == pytest.approx(1.2 / (1 + math.exp(-1)) - 0.1)


@pytest.mark.parametrize("scale_aware", [False, True])
@pytest.mark.parametrize("name", ["int4", "e3m0"])
def test_adaround_chooses_between_neighbours(layer: Layer, name: str, scale_aware: bool) -> None:
    fmt = weight_format(name)
    groups = grouped(layer.weight, 32)
    error = error_of(layer.weight, layer.rows)
    scales = least_squares_scales(groups, fmt, grouped(error.inputs.power[None], 32))
    plain = ungrouped(fmt.snap(groups, scales), COLUMNS)
    rounded = learn_directions(layer.weight, fmt, 32, scales, error, iterations=150, scale_aware=scale_aware)
    below, above = (ungrouped(one, COLUMNS) for one in fmt.neighbours(groups, scales))
    assert bool(((rounded == below) | (rounded == above)).all())
    assert error(rounded).sum() < 0.85 * error(plain).sum()
    moved = rounded != plain
    fraction = ((layer.weight - below) / (above - below)).nan_to_num(0.0)
    assert (fraction[moved] - 0.5).abs().mean() < (fraction[~moved] - 0.5).abs().mean()


def test_scale_aware_adaround_moves_wide_steps_slowly(layer: Layer) -> None:
    """V = V' / distance: one step of Adam, as long for every V', moves V further where the step is narrow."""
    fmt = weight_format("e3m0")
    groups = grouped(layer.weight, 32)
    scales = fmt.scales(groups)
    error = error_of(layer.weight, layer.rows)
    below, above = (ungrouped(one, COLUMNS) for one in fmt.neighbours(groups, scales))
    plain = ungrouped(fmt.snap(groups, scales), COLUMNS)
    distance = (above - below)[above > below]

    def flipped(scale_aware: bool) -> float:
        rounded = learn_directions(layer.weight, fmt, 32, scales, error, 1, 0.2, scale_aware)
        return (above - below)[rounded != plain].log().mean().item()

    assert flipped(True) < flipped(False)
    assert distance.log().std() > 0.5, "all steps are alike: this layer shows nothing"


def gelu_behind(outputs: Tensor) -> Tensor:
    return F.gelu(outputs - 1)


def two_kinds(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, rows and unseen rows of a layer with two kinds of tokens; GELU hides the outputs of the first."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 24, generator=generator) * 0.3
    weight[:, -1] = -8  # what the last input, 1 for the first kind, does to the outputs
    common = 2 * torch.randn(2, 1, 23, generator=generator)

    def draw(count: int) -> Tensor:
        rows = torch.randn(2, count, 1, generator=generator) * common
        rows += 0.3 * torch.randn(2, count, 23, generator=generator)
        kind = torch.tensor([1.0, 0.0])[:, None, None].expand(2, count, 1)
        return torch.cat([rows, kind], dim=2).flatten(0, 1)

    return weight, draw(250), draw(1000)


@pytest.mark.parametrize("method", ["adaround", "signed_sgd"])
def test_the_error_behind_an_activation_function(method: str) -> None:
    """The inputs of tokens whose outputs are hidden need not be multiplied well."""
    errors = {None: 0.0, F.gelu: 0.0}
    for seed in range(4):
        weight, rows, unseen = two_kinds(seed)
        for after in errors:
            rounded, _ = round_weight(weight, weight_format("int4"), 24, method, rows=rows, after=after)
            errors[after] += (F.gelu(unseen @ rounded.T) - F.gelu(unseen @ weight.T)).square().mean().item()
    assert errors[F.gelu] < 0.9 * errors[None]


def test_the_error_behind_a_function_counts_as_far_as_rows_tell(layer: Layer) -> None:
    few = error_behind(layer.weight, layer.rows[:50], layer.rows[:50], gelu_behind)
    assert few.share.max() < 0.2
    narrow = torch.randn(4000, 6)
    many = error_behind(layer.weight[:, :6] * 20, narrow, narrow, gelu_behind)
    assert many.share.min() > 0.6
    linear = error_behind(layer.weight, layer.rows, layer.rows, lambda outputs: 3 * outputs)
    torch.testing.assert_close(linear.slope, torch.full((OUTPUTS,), 9.0))
    assert torch.equal(linear.share, torch.zeros(OUTPUTS)), "nothing is gained by looking behind a linear function"
    with pytest.raises(ValueError, match="after made"):
        error_behind(layer.weight, layer.rows, layer.rows, lambda outputs: outputs.sum(0))
    with pytest.raises(ValueError, match="torch can differentiate"):
        error_behind(layer.weight, layer.rows, layer.rows, lambda outputs: outputs.detach().relu())


def quantized(rows: Tensor, levels: int = 31) -> Tensor:
    step = rows.abs().amax(1, keepdim=True) / levels
    return (rows / step).round() * step


@pytest.mark.parametrize("method", ["mse", *ADAPTIVE])
@pytest.mark.parametrize("shared", [0.0, 0.7])
def test_weights_make_up_for_quantized_inputs(method: str, shared: float) -> None:
    whole = Layer(shared)
    fmt = weight_format("int4")
    target = whole.unseen @ whole.weight.T
    gram = whole.unseen.T @ whole.unseen / 1024
    steps = {"iterations": 60} if method in ("adaround", "signed_sgd") else {}
    for known in ({}, {"gram": 7 * gram}):
        known |= {"rows": whole.rows, **steps}
        errors = []
        for scheme in (None, quantized):
            rounded, _ = round_weight(whole.weight, fmt, None, method, activation_scheme=scheme, **known)
            errors.append((quantized(whole.unseen) @ rounded.T - target).norm())
        assert errors[1] < 0.96 * errors[0]


def test_the_best_weight_for_quantized_inputs_is_that_of_least_squares(layer: Layer) -> None:
    rows = torch.cat([layer.rows[:, :20], layer.unseen[:, :20]]).repeat(8, 1)
    rows = rows + 0.3 * torch.randn_like(rows)
    weight = layer.weight[:, :20]
    shifted, inputs, seen = quantized_inputs(weight, rows, None, None, lambda x: quantized(x, 3))
    assert torch.equal(seen, quantized(rows, 3))
    torch.testing.assert_close(inputs.dense(), seen.T @ seen / len(rows), rtol=0.02, atol=0.02)
    damped = torch.cat([seen, torch.diag((0.01 * seen.square().mean() * len(rows)).sqrt().expand(20))])
    expected = torch.linalg.lstsq(damped, torch.cat([rows @ weight.T, damped[len(rows) :] @ weight.T])).solution.T
    assert (shifted - expected).norm() < 0.15 * (shifted - weight).norm()
    assert (shifted - weight).norm() > 0.02 * weight.norm()
    unchanged, _, _ = quantized_inputs(weight, rows, None, None, lambda x: x)
    assert torch.equal(unchanged, weight)
    with pytest.raises(ValueError, match="keep their shape"):
        quantized_inputs(weight, rows, None, None, lambda x: x[:, 1:])
    with pytest.raises(ValueError, match="what activation_scheme returned has 1 values that are not finite"):
        quantized_inputs(
            weight, rows, None, None, lambda x: x.index_put((torch.tensor(0), torch.tensor(0)), x.new_tensor(math.nan))
        )


def test_gradients_of_signed_sgd_are_those_of_autoround() -> None:
    """Equation 3 with the rounding passed straight through, for a symmetric integer format."""
    fmt = weight_format("int6")
    groups = grouped(torch.randn(5, 40), 0)
    first = fmt.scales(groups)
    shift = ((torch.rand_like(groups) - 0.5) * 0.8).requires_grad_()
    clip = (0.8 + 0.2 * torch.rand(5, 1, 1)).requires_grad_()
    step = first.step * clip
    code = groups / step + shift
    # Codes that are rounded down to the last one count as inside here and as beyond the range there: leave them out.
    between = (code.detach().abs() > 31) & (code.detach().abs() <= 31.5)
    weighting = torch.randn_like(groups) * ~between
    rounded = code + (code.round() - code).detach()
    expected = step * rounded.clamp(-31, 31)
    wanted = torch.autograd.grad((expected * weighting).sum(), [shift, clip])

    now = fmt.scales(groups, clip=clip.detach())
    found = _straight_through(groups, fmt, now, shift * first.step * clip.detach(), first.step * clip)
    torch.testing.assert_close(found, expected)
    got = torch.autograd.grad((found * weighting).sum(), [shift, clip])
    torch.testing.assert_close(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-4, atol=1e-5)
    assert bool((wanted[0] == 0).any()), "no weight is beyond the range: this shows nothing of clipping"


def test_errors_by_moments_and_by_rows_agree(layer: Layer) -> None:
    own = 0.1 * torch.rand(COLUMNS)
    sample = layer.rows[:60] / 60**0.5
    by_matrix, by_rows = Inputs(sample.T @ sample, None, own), Inputs(None, sample, own)
    torch.testing.assert_close(by_matrix.power, by_rows.power)
    torch.testing.assert_close(by_matrix.dense(), by_rows.dense())
    rounded = (layer.weight + 0.01 * torch.randn_like(layer.weight)).requires_grad_()
    slow = (layer.rows[:60] @ (rounded - layer.weight).T).square().mean(0)
    slow = slow + (rounded - layer.weight).square() @ (own + 0.3)
    gradient = torch.autograd.grad(slow.sum(), rounded)[0]
    for inputs in (by_matrix, by_rows):
        errors = OutputError(layer.weight, inputs, 0.3)(rounded)
        torch.testing.assert_close(errors, slow, rtol=1e-4, atol=1e-6)
        found = torch.autograd.grad(errors.sum(), rounded)[0]
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-4)


def slow_shrinkage(rows: Tensor) -> float:
    """Variance of the estimated correlations over their squares, pair by pair (Schaefer and Strimmer, 2005)."""
    scaled = rows / rows.square().mean(0).sqrt()
    above = below = 0.0
    for i in range(rows.shape[1]):
        for j in range(rows.shape[1]):
            if i != j:
                products = scaled[:, i] * scaled[:, j]
                above += products.var().item() / len(rows)
                below += products.mean().item() ** 2
    return min(1.0, above / below)


@pytest.mark.parametrize("count", [20, 300])
def test_shrinkage(layer: Layer, count: int) -> None:
    rows = layer.rows[:count, :30]
    assert shrinkage(rows) == pytest.approx(slow_shrinkage(rows), rel=1e-3)
    independent = torch.randn(count, 30)
    assert shrinkage(independent) > 0.8
    assert shrinkage(layer.rows) < 0.2
    assert shrinkage(rows, rows) == pytest.approx(shrinkage(rows), rel=1e-5)
    assert shrinkage(rows, torch.randn(count, 30)) > 0.8
    exact = layer.rows.T @ layer.rows / 512
    whole, shrunk, sampled = inputs_of(None, exact), inputs_of(None, exact, samples=512), inputs_of(layer.rows, None)
    assert whole is not None
    assert shrunk is not None
    assert sampled is not None
    assert torch.equal(whole.dense(), exact)
    torch.testing.assert_close(shrunk.dense(), sampled.dense(), rtol=0.02, atol=0.02 * exact.abs().max().item())
    torch.testing.assert_close(shrunk.power, exact.diagonal())
    torch.testing.assert_close(sampled.power, exact.diagonal())
    assert inputs_of(None, None) is None


@pytest.mark.parametrize("method", ROUNDINGS)
def test_odd_layers(method: str) -> None:
    """One output, fewer inputs than a group, a row of zeros, an input that is always 0."""
    rows = torch.randn(9, 5)
    rows[:, 2] = 0
    weight = torch.zeros(2, 5)
    weight[1] = torch.tensor([1.0, -2, 1e4, 0.3, 0.1])
    steps = {"iterations": 15} if method in ("adaround", "signed_sgd") else {}
    for name in format_names():
        for part in (weight, weight[1:]):
            rounded, scales = round_weight(part.bfloat16(), weight_format(name), None, method, rows=rows, **steps)
            assert bool(torch.isfinite(rounded).all())
            assert bool((scales.step > 0).all())
            assert bool((rounded[:-1] == 0).all())
            assert rounded[-1, 2].item() == pytest.approx(1e4, rel=0.35)


def test_arguments_that_do_not_fit_are_refused(layer: Layer) -> None:
    fmt, weight, rows = weight_format("int4"), layer.weight, layer.rows
    cases: list[tuple[str, str, dict[str, object]]] = [
        ("best", "rounding is 'best'; use one of nearest", {}),
        ("gptq", "needs inputs of the layer", {}),
        ("adaround", "needs inputs of the layer", {}),
        ("nearest", "iterations has no meaning for rounding 'nearest'", {"iterations": 3}),
        ("gptq", "after has no meaning for rounding 'gptq'", {"rows": rows, "after": F.gelu}),
        ("adaround", "lr is -1.0; use a positive number", {"rows": rows, "lr": -1.0}),
        ("adaround", "iterations is 0; use a positive number", {"rows": rows, "iterations": 0}),
        ("adaround", "after and activation_scheme need rows", {"gram": torch.eye(COLUMNS), "after": F.gelu}),
        ("gptq", r"rows is \(512, 159\); use sample inputs", {"rows": rows[:, 1:]}),
        ("gptq", r"gram is \(3, 3\)", {"gram": torch.eye(3)}),
        ("gptq", "samples is 0", {"gram": torch.eye(COLUMNS), "samples": 0}),
        ("gptq", "rows has 160 values that are not finite, the first in row 0", {"rows": rows[:1] * math.nan}),
        ("gptq", "gram has 25600 values that are not finite", {"gram": torch.full((COLUMNS, COLUMNS), math.inf)}),
        ("mse", r"importance is \(3,\); use one number an input", {"importance": torch.ones(3)}),
        ("mse", "importance has negative values", {"importance": -torch.ones(COLUMNS)}),
        ("nearest", "activation_scheme has no meaning", {"rows": rows, "activation_scheme": quantized}),
        ("mse", "after and activation_scheme need rows", {"activation_scheme": quantized}),
    ]
    for method, message, arguments in cases:
        with pytest.raises(ValueError, match=message):
            round_weight(weight, fmt, None, method, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight has 1 values that are not finite, the first in row 3"):
        round_weight(weight.index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(math.nan)), fmt, None, "nearest")
    with pytest.raises(ValueError, match="int8 always has one scale a row"):
        round_weight(weight, weight_format("int8"), 64, "nearest")
