"""QuantLinear: kernels against the plain reference, gradients, moving, saving, sharing, compiled code, bad files."""

import copy

import pytest
import torch
from torch import nn

from dit.quant.activations import OFFSET, quantize_rows
from dit.quant.formats import format_names, grouped, weight_format
from dit.quant.gelu import ProjectedGELU, fused_gelus
from dit.quant.kernels.onednn import has_vnni
from dit.quant.kernels.prepacked import PrepackedWeight
from dit.quant.linear import QuantLinear, share_inputs
from dit.quant.reference import fake_quantize_activations
from dit.quant.rotation import rotation_sign
from dit.quant.scheme import Scheme, formats_of
from dit.runtime.metrics import relative_error

K, N = 192, 160


def make(scheme: Scheme, seed: int = 0, bias: bool = True, columns: int = K, rows: int = N) -> QuantLinear:
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns)
    form = weight_format(scheme.weights)
    parts = grouped(weight, scheme.group or 0)
    tensors = form.pack(parts, form.scales(parts), columns)
    if scheme.alpha is not None:
        tensors["input_balance"] = torch.rand(columns) + 0.5
    if scheme.rotate:
        tensors["rotation_sign"] = rotation_sign(columns)
    if scheme.rank:
        tensors["low_rank_down"] = torch.randn(scheme.rank, columns).bfloat16()
        tensors["low_rank_up"] = torch.randn(rows, scheme.rank).bfloat16()
    if scheme.static:
        tensors["input_scale"] = torch.tensor([0.03])
    return QuantLinear.from_tensors(scheme, tensors, columns, rows, torch.randn(rows) if bias else None)


def schemes() -> list[Scheme]:
    found = [Scheme(name, weight_format(name).group, "int8") for name in format_names()]
    found += [Scheme("int8", 0, activations) for activations in ("none", "int6", "int4", "fp8")]
    found += [
        Scheme("int8", 0, "int8", alpha=0.5, rotate=64, rank=4),
        Scheme("int4", 64, "int8", alpha=0.5, rotate=64, rank=4),
        Scheme("int8", 0, "int8", static=True),
        Scheme("int8", 0, "int8", per_sample=True, rotate=64),
        Scheme("int4", 64, "int8", per_sample=True, rank=4),
        Scheme("int8", 0, "int8", shift=0.17),
        Scheme("int4", 64, "int6", shift=0.17, rank=4),
        Scheme("int4", 64, "int4", activation_group=64),
    ]
    return found


@pytest.mark.parametrize("scheme", schemes(), ids=str)
def test_every_kernel_equals_the_plain_reference(scheme: Scheme) -> None:
    layer = make(scheme)
    x = torch.randn(2, 50, K)
    x = nn.functional.gelu(x) if scheme.shift else x
    out = layer(x)
    slow = make(scheme)
    slow.kernel = "dequantize"
    assert relative_error(out, slow(x)) < 2e-6
    assert list(slow.calls) == ["dequantize"]
    if scheme.activations == "none":
        assert relative_error(out, x @ layer.effective_weight().T + layer.bias) < 1e-5
    rounded = x.bfloat16()
    assert relative_error(layer(rounded).float(), slow(rounded.float())) < 0.012
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", [schemes()[0], schemes()[2], *schemes()[-5:]], ids=str)
@pytest.mark.parametrize("after", ["gelu_tanh", "gelu"])
def test_kernels_apply_the_activation_function(scheme: Scheme, after: str) -> None:
    layer = make(scheme)
    x = torch.randn(2, 50, K)
    expected = nn.functional.gelu(layer(x), approximate="tanh" if after == "gelu_tanh" else "none")
    assert relative_error(layer(x, after), expected) < 1e-5
    assert relative_error(layer(x.requires_grad_(), after), expected) < 1e-5


def test_a_projection_and_its_gelu_become_one_module() -> None:
    from diffusers.models.activations import GELU

    network = nn.Sequential(GELU(K, N, approximate="tanh"))
    network[0].proj = make(Scheme("int8", 0, per_sample=True))
    x = torch.randn(2, 5, K)
    with torch.no_grad():
        expected, names = network(x), list(network.state_dict())
        for parent, child, module in list(fused_gelus(network)):
            setattr(parent, child, module)
        assert isinstance(network[0], ProjectedGELU)
        assert relative_error(network(x), expected) < 1e-5
        assert list(network.state_dict()) == names
        network[0].proj = nn.Linear(K, N)  # what wraps or replaces the layer is used as it is
        assert torch.equal(network(x), nn.functional.gelu(network[0].proj(x), approximate="tanh"))


@pytest.mark.skipif(not has_vnni(), reason="the processor has no VNNI")
def test_integer_layers_take_integer_kernels() -> None:
    x = torch.randn(40, K)
    taken = {name: make(Scheme(name, weight_format(name).group)) for name in ("int8", "int6", "int4", "nf4")}
    for layer in taken.values():
        layer(x)
    found = {name: list(layer.calls) for name, layer in taken.items()}
    assert found == {"int8": ["onednn"], "int6": ["int_mm"], "int4": ["int_mm"], "nf4": ["dequantize"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [127, 31, 7])
def test_rows_are_quantized_as_the_definition_says(dtype: torch.dtype, levels: int) -> None:
    x = (torch.randn(70, 333) * torch.logspace(-6, 6, 70)[:, None]).to(dtype)
    x[3] = 0
    name = {127: "int8", 31: "int6", 7: "int4"}[levels]
    signed, unsigned = (quantize_rows(x, levels, unsigned=flag) for flag in (False, True))
    assert torch.equal(signed.values.int(), unsigned.values.int() - OFFSET)
    assert int(signed.values.abs().max()) <= levels
    expected = fake_quantize_activations(x.float(), Scheme("int8", 0, name))
    found = signed.values * signed.scale
    assert (found != expected).float().mean() < 1e-3  # ties
    assert ((found - expected).abs() <= signed.scale * 1.0001).all()


def test_rows_that_are_not_finite_stay_so() -> None:
    layer = make(Scheme("int8", 0))
    x = torch.randn(4, K)
    x[1, 5], x[2, 0] = float("nan"), float("inf")
    finite = torch.isfinite(layer(x)).all(dim=1)
    assert finite.tolist() == [True, False, False, True]


def test_the_gradient_is_that_of_the_dequantized_weight() -> None:
    layer = make(Scheme("int8", 0, "int8", alpha=0.5, rotate=64, rank=4))
    x = torch.randn(3, 5, K, requires_grad=True)
    out = layer(x)
    out.square().sum().backward()
    assert x.grad is not None
    assert relative_error(x.grad, 2 * out.detach() @ layer.effective_weight()) < 1e-5
    assert not any(one.requires_grad for one in layer.parameters())


def test_prepacked_weights_read_as_before_and_take_no_more_memory() -> None:
    layer = make(Scheme("int8", 0))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(torch.randn(4, K))
    if has_vnni():
        assert isinstance(layer.weight, PrepackedWeight)
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not isinstance(after["weight"], PrepackedWeight)
    assert layer.nbytes == N * K + 4 * N + 4 * N


def test_casts_leave_codes_and_scales_alone() -> None:
    layer = make(Scheme("int8", 0, alpha=0.5))
    x = torch.randn(4, K)
    expected = layer(x)
    layer.to(torch.bfloat16)
    layer.half()
    assert layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer(x), expected)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected)
    other = make(Scheme("int8", 0, alpha=0.5), seed=1)
    other(x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)


def test_autocast_decides_the_dtype() -> None:
    layer = make(Scheme("int8", 0))
    x = torch.randn(4, K)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x.bfloat16()))


def test_layers_that_read_one_input_quantize_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = Scheme("int8", 0, "int8", rotate=64)
    layers = [make(scheme, seed) for seed in range(3)]
    x = torch.randn(2, 400, K)
    expected = [layer(x) for layer in layers]
    share_inputs(layers)
    counted = []
    monkeypatch.setattr("dit.quant.linear.quantize_rows", lambda *a, **k: counted.append(1) or quantize_rows(*a, **k))
    with torch.no_grad():
        assert all(torch.equal(layer(x), out) for layer, out in zip(layers, expected, strict=True))
        assert len(counted) == 1
        x.mul_(2)  # the same tensor with other values is another input
        doubled = [layer(x) for layer in layers]
        assert len(counted) == 2
        assert all(not torch.equal(one, out) for one, out in zip(doubled, expected, strict=True))
        assert not layers[0].shared._made  # nothing is kept when all have it
    with pytest.raises(ValueError, match="one balance, rotation"):
        share_inputs([layers[0], make(Scheme("int8", 0))])


def test_compiled_code_keeps_the_layer_in_one_graph() -> None:
    layer = make(Scheme("int8", 0, "int8", rotate=64))
    model = nn.Sequential(layer, nn.GELU())
    x = torch.randn(4, K)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_peft_adapts_a_quantized_layer() -> None:
    from peft import LoraConfig, get_peft_model

    model = nn.ModuleDict({"to_q": make(Scheme("int8", 0))})
    x = torch.randn(4, K)
    expected = model["to_q"](x)
    adapted = get_peft_model(nn.Sequential(model["to_q"]), LoraConfig(target_modules=["0"], r=2, lora_alpha=2))
    assert torch.equal(adapted(x).detach(), expected)  # lora_B is zero
    adapted(x).sum().backward()
    gradients = {name: one.grad for name, one in adapted.named_parameters() if one.requires_grad}
    assert any(grad is not None and bool(grad.abs().sum() > 0) for grad in gradients.values())


def test_full_precision_leaves_activations_alone() -> None:
    layer = make(Scheme("int8", 0))
    x = torch.randn(4, K)
    layer.full_precision = True
    assert relative_error(layer(x), x @ layer.effective_weight().T + layer.bias) < 1e-5


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight_scale", torch.ones(N // 2), "weight_scale is"),
        ("weight_scale", torch.full((N,), float("nan")), "NaN or infinity"),
        ("weight", torch.zeros(N, K, dtype=torch.uint8), "weight is"),
        ("input_scale", torch.zeros(1), "input_scale must be positive"),
    ],
)
def test_damaged_tensors_are_refused(name: str, value: torch.Tensor, message: str) -> None:
    layer = make(Scheme("int8", 0, static=True))
    with pytest.raises(ValueError, match=message):
        QuantLinear.from_tensors(layer.scheme, {**layer.stored, name: value}, K, N, None)


def test_schemes_name_what_they_refuse() -> None:
    for wrong in ({"weights": "int5"}, {"alpha": 2.0}, {"rotate": 12}, {"rank": -1}, {"group": 3}, {"rounding": "up"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Scheme(**wrong)
    scheme = Scheme("int4", 64, alpha=0.5, rotate=64)
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    with pytest.raises(ValueError, match="no colour"):
        Scheme.from_dict({"colour": 1})
    assert formats_of("w4a8") == ("int4", "int8")
    assert formats_of("w8a16") == ("int8", "none")
    assert formats_of("e2m1-int6") == ("e2m1", "int6")
    with pytest.raises(ValueError, match="w9a9"):
        formats_of("w9a9")
