"""TD-LoRA: its formula, timesteps of a batch, files, pipelines of ours and of diffusers, training."""

import math

import pytest
import torch
from diffusers.loaders import FluxLoraLoaderMixin, SanaLoraLoaderMixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from apps.service.lora import Lora, loras_applied
from dit.lora import convert
from dit.lora.adapters import AdapterSettings, add_adapter, save_adapter
from dit.lora.files import LoraFileError, LoraMisfitError
from dit.lora.timestep_experts import (
    ExpertLinear,
    TimestepArgument,
    add_experts,
    checkpointed,
    expert_layers,
    expert_tensors,
    readers_of,
)
from pipelines import load_lora, unload_lora
from tests.families.tiny import tiny_call, tiny_pipeline

FAMILIES = {
    "text_dit": TimestepArgument(),
    "flux": TimestepArgument("timestep", 1.0, 0.0),  # told a thousandth of the timestep
    "pixart": TimestepArgument(),
}


def paint(pipe, family):
    return torch.as_tensor(pipe(**{**tiny_call(family), "num_inference_steps": 2}).images)


class Network(nn.Module):
    """Two linear layers that are told a timestep."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])

    def forward(self, hidden_states, timestep):
        for block in self.blocks:
            hidden_states = torch.tanh(block(hidden_states))
        return hidden_states


def randomised(network, seed=0):
    """Gives every trained parameter random values: second factors start as zeros."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return network


def adapted(experts=3, rank=2, alpha=3.0, **settings):
    torch.manual_seed(0)
    network = Network()
    layers = AdapterSettings("td_lora", rank, alpha, layers=("blocks.*",), experts=experts, **settings)
    assert add_adapter(network, layers) == ["blocks.0", "blocks.1"]
    return randomised(network)


def slow_formula(layer, x, timestep, scale):
    """One sample, one expert at a time."""
    base, down, ups = layer.base_layer, layer.timed_A["default"].weight, layer.timed_B["default"]
    router = layer.timed_router["default"]
    angles = [8 * math.pi * timestep / 1000 * 100 ** (-i / 16) for i in range(16)]
    features = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    logits = router.weight @ features + router.bias
    weights = logits.exp() / logits.exp().sum()
    update = sum(weight * (up @ (down @ x.T)).T for weight, up in zip(weights, ups, strict=True))
    return x @ base.weight.T + base.bias + scale * update


@torch.no_grad()
def test_equals_the_slow_formula_at_different_timesteps():
    network, x = adapted(), torch.randn(4, 5, 6)
    timesteps = torch.tensor([3.0, 250.0, 611.5, 999.0])
    result = network(x, timesteps)
    for row, timestep in enumerate(timesteps.tolist()):
        expected = x[row]
        for layer in network.blocks:
            expected = torch.tanh(slow_formula(layer, expected, timestep, 3.0 / 2))
        torch.testing.assert_close(result[row], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_one_expert_is_plain_lora():
    network, plain = adapted(experts=1), Network()
    add_adapter(plain, AdapterSettings("lora", 2, 3.0, layers=("blocks.*",)))
    for timed, layer in zip(network.blocks, plain.blocks, strict=True):
        layer.base_layer.load_state_dict(timed.base_layer.state_dict())
        layer.lora_A["default"].weight.copy_(timed.timed_A["default"].weight)
        layer.lora_B["default"].weight.copy_(timed.timed_B["default"][0])
    x, timesteps = torch.randn(3, 4, 6), torch.tensor([1.0, 500.0, 900.0])
    torch.testing.assert_close(network(x, timesteps), plain(x, timesteps), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_timesteps_of_all_forms():
    network, x = adapted(), torch.randn(2, 5, 6)
    both = network(x, torch.tensor([700.0, 700.0]))
    for same in (torch.tensor(700.0), torch.tensor([700.0]), 700, torch.tensor([[700.0, 0.0], [3.0, 700.0]])):
        torch.testing.assert_close(network(x, timestep=same), both)
    # Guidance shows every sample twice, at its own timestep.
    pair = torch.tensor([100.0, 700.0])
    doubled = network(torch.cat([x, x]), torch.cat([pair, pair]))
    torch.testing.assert_close(doubled, network(x, pair).repeat(2, 1, 1))
    # Frames, or tokens, may be rows of their own, sample by sample.
    torch.testing.assert_close(network(x.flatten(0, 1), pair), network(x, pair).flatten(0, 1))
    with pytest.raises(ValueError, match="5 rows, but the network got 2 timesteps"):
        network(x[0], pair)
    with pytest.raises(ValueError, match="takes no argument 'time'"):
        add_experts(Network(), ["blocks.0"], rank=1, experts=2, scale=1.0, argument=TimestepArgument("time"))


def test_it_starts_as_nothing_and_experts_part_ways():
    torch.manual_seed(0)
    network, x, timesteps = Network(), torch.randn(8, 4, 6), torch.linspace(0, 1000, 8)
    before = network(x, timesteps)
    add_adapter(network, AdapterSettings("td_lora", 2, layers=("blocks.*",)))
    assert torch.equal(network(x, timesteps), before)
    assert all("timed_" in name for name, one in network.named_parameters() if one.requires_grad)
    optimizer = torch.optim.Adam([one for one in network.parameters() if one.requires_grad], 0.02)
    wanted = before.detach() * (timesteps / 500 - 1)[:, None, None]  # another change at every timestep
    losses = []
    for _ in range(60):
        loss = (network(x, timesteps) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    ups = network.blocks[1].timed_B["default"]
    assert min(float((ups[i] - ups[j]).detach().abs().max()) for i in range(4) for j in range(i)) > 1e-3


def test_checkpointed_blocks_are_computed_anew_at_their_own_timesteps():
    network, x = adapted(), torch.randn(2, 4, 6)
    parameters = [one for one in network.parameters() if one.requires_grad]

    def gradients(call):
        first, second = call(torch.tensor([20.0, 40.0])), call(torch.tensor([900.0, 600.0]))
        return torch.autograd.grad((first * second).sum(), parameters)

    plain = gradients(lambda timesteps: network(x, timesteps))
    blocks, run = list(network.blocks), checkpointed(network)

    def forward(hidden_states, timestep):
        for block in blocks:
            hidden_states = run(lambda states, block=block: torch.tanh(block(states)), hidden_states)
        return hidden_states

    network.forward = forward
    for one, other in zip(gradients(lambda timesteps: network(x, timesteps)), plain, strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """Family, file, and the image that the live adapter makes."""
    family = request.param
    pipe, settings = tiny_pipeline(family), AdapterSettings("td_lora", 2, 3.0)
    add_adapter(pipe.transformer, settings, timestep=FAMILIES[family])
    randomised(pipe.transformer)
    path = tmp_path_factory.mktemp("saved") / "ink.safetensors"
    assert save_adapter(pipe.transformer, path, settings, {"lora_family": family}) == path
    return family, path, paint(pipe, family)


def test_a_file_gives_the_same_images_and_comes_off_without_a_trace(saved):
    family, path, painted = saved
    pipe = tiny_pipeline(family)
    network, plain = pipe.transformer, paint(pipe, family)
    weights, attributes = {name: one.clone() for name, one in network.state_dict().items()}, set(vars(network))
    before = torch.get_rng_state()
    load_lora(pipe, path, "ink")
    assert torch.equal(torch.get_rng_state(), before)
    assert readers_of(network)[0].argument == FAMILIES[family]
    torch.testing.assert_close(paint(pipe, family), painted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(painted, plain, atol=1e-3)
    if hasattr(pipe, "set_adapters"):
        pipe.set_adapters("ink", 0.0)
        torch.testing.assert_close(paint(pipe, family), plain, atol=1e-5, rtol=1e-5)
        pipe.set_adapters("ink", 1.0)
        torch.testing.assert_close(paint(pipe, family), painted, atol=1e-5, rtol=1e-5)
    unload_lora(pipe)
    assert network.state_dict().keys() == weights.keys()
    assert all(torch.equal(network.state_dict()[name], weight) for name, weight in weights.items())
    assert not network._forward_pre_hooks
    assert {name for name in set(vars(network)) - attributes if getattr(network, name) is not None} == set()
    assert torch.equal(paint(pipe, family), plain)


@pytest.mark.parametrize("family", ["text_dit", "flux"])
def test_weights_depend_on_the_step(family, tmp_path):
    """At another timestep the same file changes the network in another way."""
    pipe = tiny_pipeline(family)
    add_adapter(pipe.transformer, AdapterSettings("td_lora", 2), timestep=FAMILIES[family])
    randomised(pipe.transformer)
    seen = []
    layer = next(iter(expert_layers(pipe.transformer).values()))
    layer.register_forward_pre_hook(lambda *_: seen.append(layer.readers["default"].features[0].clone()))
    pipe(**{**tiny_call(family), "num_inference_steps": 3})
    assert len({tuple(features.tolist()) for features in seen}) == 3


def test_two_stand_side_by_side_with_weights(saved):
    family, path, painted = saved
    if family == "pixart":
        pytest.skip("its pipeline has no set_adapters")
    pipe = tiny_pipeline(family)
    load_lora(pipe, path, "one")
    load_lora(pipe, path, "two")
    pipe.set_adapters(["one", "two"], [0.5, 0.5])
    torch.testing.assert_close(paint(pipe, family), painted, atol=1e-4, rtol=1e-4)
    pipe.delete_adapters("one")
    pipe.set_adapters("two", 1.0)
    torch.testing.assert_close(paint(pipe, family), painted, atol=1e-5, rtol=1e-5)
    assert [reader.adapter for reader in readers_of(pipe.transformer)] == ["two"]
    with pytest.raises(LoraFileError, match="in use already"):
        load_lora(pipe, path, "two")
    with pytest.raises(ValueError, match="can't be fused"):
        pipe.fuse_lora()


def test_the_server_puts_it_on_and_takes_it_off(saved):
    family, path, painted = saved
    if family == "pixart":
        pytest.skip("its pipeline takes no LoRA in the studio")
    pipe = tiny_pipeline(family)
    plain = paint(pipe, family)
    with loras_applied(pipe, [Lora(name="ink", scale=1.0)], {"ink": path}):
        torch.testing.assert_close(paint(pipe, family), painted, atol=1e-5, rtol=1e-5)
    assert torch.equal(paint(pipe, family), plain)
    assert not pipe.transformer._forward_pre_hooks


def test_other_programs_cannot_read_it(saved, tmp_path):
    family, path, _ = saved
    for dialect in ("diffusers", "peft", "comfyui", "kohya", "onetrainer"):
        with pytest.raises(LoraFileError, match=r"TD-LoRA \(experts mixed by the timestep\), not a LoRA of two"):
            convert(path, dialect, output=tmp_path / "other.safetensors")
    kind = FluxLoraLoaderMixin if family == "flux" else SanaLoraLoaderMixin
    loader = type("Loader", (kind,), {})()
    with pytest.raises(ValueError, match="nvalid LoRA checkpoint"):
        loader.load_lora_weights(str(path.parent), weight_name=path.name)


def changed(saved, tmp_path, change, metadata=None):
    """A copy of a file with other tensors or metadata."""
    _, path, _ = saved
    with safe_open(path, "pt") as file:
        held = file.metadata()
    target = tmp_path / "changed.safetensors"
    save_file(change(load_file(path)), target, held if metadata is None else metadata)
    return target


def other_layer(tensors):
    return {key.replace("to_q", "to_z"): tensor for key, tensor in tensors.items()}


def without_one(tensors):
    return dict(list(tensors.items())[1:])


def smaller(tensors):
    return {key: tensor[:, :2].contiguous() if "timed_A" in key else tensor for key, tensor in tensors.items()}


SETTINGS = '{"scale": 1, "timestep": {"name": "t", "factor": %d, "offset": 0}}'


@pytest.mark.parametrize(
    ("change", "metadata", "error", "words"),
    [
        (other_layer, None, LoraMisfitError, r"keys are of no linear layer of it: .*to_z"),
        (without_one, None, LoraFileError, r"lacks timed_\w+"),
        (smaller, None, LoraFileError, r"timed_A\.weight has the shape"),
        (dict, {}, LoraFileError, "lost or damaged"),
        (dict, {"td_lora": SETTINGS % 0}, LoraFileError, "factor"),
        (dict, {"td_lora": SETTINGS % 1}, LoraMisfitError, "'t'"),
    ],
    ids=["layer", "missing", "size", "metadata", "factor", "argument"],
)
def test_what_does_not_fit_changes_nothing(saved, tmp_path, change, metadata, error, words):
    family = saved[0]
    pipe, file = tiny_pipeline(family), changed(saved, tmp_path, change, metadata)
    attributes = set(vars(pipe.transformer))
    with pytest.raises(error, match=words):
        load_lora(pipe, file)
    assert not any(isinstance(module, ExpertLinear) for module in pipe.transformer.modules())
    assert not pipe.transformer._forward_pre_hooks
    assert set(vars(pipe.transformer)) == attributes


def test_kinds_do_not_stand_beside_each_other(saved, tmp_path):
    family, path, _ = saved
    plain = tiny_pipeline(family)
    settings = AdapterSettings("lora", 2)
    add_adapter(plain.transformer, settings)
    other = save_adapter(plain.transformer, tmp_path / "plain.safetensors", settings, {})
    for first, second in ((path, other), (other, path)):
        pipe = tiny_pipeline(family)
        load_lora(pipe, first, "one")
        with pytest.raises(LoraFileError, match="unload_lora"):
            load_lora(pipe, second, "two")


def test_networks_in_bfloat16_keep_their_dtype(saved):
    family, path, _ = saved
    pipe = tiny_pipeline(family)
    pipe.transformer.to(torch.bfloat16)
    load_lora(pipe, path, "ink")
    assert {one.dtype for one in expert_tensors(pipe.transformer, "ink").values()} == {torch.bfloat16}
    layer = next(iter(expert_layers(pipe.transformer, "ink").values()))
    layer.readers["ink"].features = torch.zeros(1, 32)
    assert layer(torch.ones(1, 3, layer.in_features, dtype=torch.bfloat16)).dtype == torch.bfloat16
