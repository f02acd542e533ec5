"""Linear layers by oneDNN beside torch's own."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dit.layers import linear as place
from dit.layers.linear import MIN_MACS, Linear, linear
from dit.runtime import onednn
from dit.runtime.compare import relative_error
from dit.runtime.onednn import use_onednn
from pipelines import load_pipeline
from tests.architecture.sources import ROOT

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this build of torch has no oneDNN",
)
pytestmark = needs_onednn


@pytest.fixture
def calls(monkeypatch):
    """Pretends that MKL is slow here, and lists the shapes that oneDNN multiplies."""
    seen, real = [], place._by_onednn

    def watched(x, weight, bias):
        seen.append((tuple(x.shape), tuple(weight.shape)))
        return real(x, weight, bias)

    monkeypatch.setattr(place, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(place, "_by_onednn", watched)
    return seen


def operands(*shape, out=256, seed=0):
    draw = torch.Generator().manual_seed(seed)
    inner = shape[-1]
    return (
        torch.randn(shape, generator=draw),
        torch.randn(out, inner, generator=draw) / inner**0.5,
        torch.randn(out, generator=draw),
    )


@pytest.mark.parametrize("shape", [(64, 128), (3, 40, 128), (2, 5, 20, 128)])
@pytest.mark.parametrize("biased", [True, False])
def test_agrees_with_torch_and_in_double_precision_is_no_worse(calls, shape, biased):
    x, weight, bias = operands(*shape)
    bias = bias if biased else None
    with torch.no_grad():
        ours, theirs = linear(x, weight, bias), F.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert calls == [(shape, (256, 128))]
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact) + 1e-7


def test_reads_transposed_and_sliced_inputs(calls):
    x, weight, _bias = operands(40, 128, 3)
    turned = x.transpose(1, 2)[::2]  # (20, 3, 128)
    weight = operands(200, 128)[0]
    x = turned.repeat(10, 1, 1)[:, 1:]  # (200, 2, 128)
    with torch.no_grad():
        assert relative_error(linear(x, weight), x @ weight.T) < 1e-6
    assert len(calls) == 1


def test_leaves_to_torch_what_onednn_cannot_do_or_is_not_worth_it(calls):
    x, weight, bias = operands(64, 128)
    linear(x, weight, bias)  # gradients are on
    with torch.no_grad():
        linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
        linear(x[:2], weight, bias)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight, bias).dtype is torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            linear(x, weight, bias)
        assert linear(torch.empty(64, 128, device="meta"), torch.empty(256, 128, device="meta")).is_meta
    assert calls == []
    assert counter.get_total_flops() == 2 * 64 * 128 * 256
    assert 2 * 128 * 256 < MIN_MACS <= 64 * 128 * 256


def test_leaves_weights_of_another_kind_alone(calls):
    class Quantized(torch.Tensor):
        pass

    x, weight, _ = operands(64, 128)
    with torch.no_grad():
        linear(x, weight.as_subclass(Quantized))
    assert calls == []


def test_gradients_are_those_of_torch(calls):
    x, weight, bias = operands(64, 128)
    layer = Linear(128, 256)
    layer.load_state_dict({"weight": weight, "bias": bias})
    layer(x).square().sum().backward()
    weight.requires_grad_()
    F.linear(x, weight, bias).square().sum().backward()
    assert torch.equal(layer.weight.grad, weight.grad)
    assert calls == []


@pytest.mark.parametrize(
    ("vendor", "capability", "slow"),
    [("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False)],
)
def test_asks_the_processor(monkeypatch, vendor, capability, slow):
    monkeypatch.setattr(place, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends, "mkl", SimpleNamespace(is_available=lambda: True))
    assert place.mkl_is_slow.__wrapped__() is slow


class Special(nn.Linear):
    pass


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Sequential(nn.Linear(256, 64), Special(64, 64)))


def test_replaces_layers_of_somebody_elses_network_but_not_their_weights(calls):
    net = network()
    x, before, weights = operands(128, 128)[0], copy.deepcopy(net), dict(net.named_parameters())
    assert list(use_onednn(net).converted) == ["0", "2.0"]
    assert use_onednn(net) is None
    assert type(net[2][1]) is Special
    assert list(net.state_dict()) == list(before.state_dict())
    assert all(weights[name] is weight for name, weight in net.named_parameters())
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin[0].weight.mul_(2)  # the copy computes with its own weights
        assert relative_error(net(x), before(x)) < 1e-6 < relative_error(twin(x), before(x))
    assert len(calls) == 4


def test_undo_puts_the_old_layers_back_with_the_weights_of_now(calls):
    net = network()
    old, x = list(net.modules()), operands(128, 128)[0]
    heard = []
    net[0].register_forward_hook(lambda *_: heard.append(1))
    replaced = use_onednn(net)
    net.eval()
    other = {name: value + 1 for name, value in net.state_dict().items()}
    net.load_state_dict(other, assign=True)
    with torch.no_grad():
        net(x)
        replaced.undo()
        net(x)
    assert len(calls) == 2
    assert heard == [1, 1]
    assert all(one is two for one, two in zip(net.modules(), old, strict=True))
    assert all(torch.equal(other[name], value) for name, value in net.state_dict().items())


def test_a_layer_in_two_places_stays_one_layer(calls):
    shared = nn.Linear(128, 128)
    net = nn.Sequential(shared, nn.Sequential(shared))
    replaced = use_onednn(net)
    assert net[0] is net[1][0] is not shared
    replaced.undo()
    assert net[0] is net[1][0] is shared


def test_without_need_nothing_is_replaced(monkeypatch):
    net = network()
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: False)
    assert use_onednn(net) is None
    assert type(net[0]) is nn.Linear


def test_a_loaded_pipeline_uses_onednn_throughout(calls):
    pipe = load_pipeline("stickers-var", device="cpu")
    layers = [part for name in ("transformer", "text_encoder", "vae") for part in getattr(pipe, name).modules()]
    plain = [part for part in layers if type(part) is nn.Linear]
    assert not plain
    assert any(type(part) is Linear for part in pipe.text_encoder.modules())
    pipe.set_progress_bar_config(disable=True)
    pipe("a red apple", generator=torch.Generator().manual_seed(0))
    assert calls


def test_no_network_of_ours_uses_the_plain_layer():
    sources = [path for room in ("layers", "models", "tokenizers") for path in (ROOT / "dit" / room).glob("*.py")]
    plain = [path.name for path in sources if "= nn.Linear(" in path.read_text()]
    assert len(sources) > 10
    assert plain == []
