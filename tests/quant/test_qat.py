"""Training with rounded weights: what it rounds, what it gains, its annealing, what is stored, and runs that use it."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from apps.training.config import ConfigError
from apps.training.loop import Trainer
from apps.training.task import load_config
from dit.models.text_dit import TextDiT
from dit.quant.formats import grouped, weight_format
from dit.quant.linear import QuantLinear
from dit.quant.quantize import quantize_
from dit.quant.scheme import Scheme
from dit.quant.training import (
    TrainedLinear,
    TrainedQuantization,
    annealing,
    convert_trained,
    prepare_training,
    trained_layers,
)
from dit.runtime.metrics import relative_error
from tests.training.helpers import TINY_RUN, assert_resumes_exactly

STEPS = 100


def network() -> nn.Sequential:
    """Return layers with normal weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32))
    for one in net.parameters():
        nn.init.normal_(one, std=0.1)
    return net


def trained_layer(scheme: Scheme, columns: int = 96, **settings) -> TrainedLinear:
    torch.manual_seed(1)
    return TrainedLinear(nn.Linear(columns, 40), scheme, TrainedQuantization(**settings))


@pytest.fixture(scope="module")
def trained():
    """A network that imitates its own exact outputs in 4 bits, before and after; inputs and true outputs."""
    exact = network()
    x = torch.randn(1024, 64)
    y = exact(x).detach()
    net = copy.deepcopy(exact)
    names = prepare_training(net, TrainedQuantization("w4a4"))
    before = copy.deepcopy(net)
    optimizer, layers = torch.optim.AdamW(net.parameters(), 1e-3), trained_layers([net])
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / STEPS)
        rows = torch.randint(0, len(x), (128,))
        optimizer.zero_grad()
        (net(x[rows]) - y[rows]).square().mean().backward()
        if step < 0.9 * STEPS:
            optimizer.step()
        else:
            with annealing(layers):
                optimizer.step()
    return exact, names, before, net, x, y


def test_training_beats_rounding(trained) -> None:
    exact, names, before, net, x, y = trained
    rounded = copy.deepcopy(exact)
    quantize_(rounded, "int8", "w4a4")
    assert names == ["0", "2"]
    with torch.no_grad():
        errors = [relative_error(one(x), y) for one in (before, rounded, net)]
    assert errors[2] < 0.92 * errors[1]
    assert errors[2] < 0.85 * errors[0]


def test_what_was_trained_is_what_is_stored(trained) -> None:
    *_, net, x, _ = trained
    stored = copy.deepcopy(net)
    assert convert_trained(stored) == ["0", "2"]
    for name in ("0", "2"):
        assert isinstance(stored.get_submodule(name), QuantLinear)
        assert torch.equal(stored.get_submodule(name).effective_weight(), net.get_submodule(name).rounded_weight())
    with torch.no_grad():
        assert relative_error(stored(x), net(x)) < 2e-3  # an input on the edge may round to either side
        assert relative_error(stored[0](x), net[0](x)) < 1e-6
    with pytest.raises(ValueError, match="not prepared"):
        convert_trained(stored)
    with pytest.raises(ValueError, match="quantized already"):
        prepare_training(stored, TrainedQuantization())


@pytest.mark.parametrize(
    ("weights", "group", "columns"),
    [
        ("int8", None, 96),
        ("int6", None, 96),
        ("int4", None, 96),
        ("int4", 32, 80),
        ("e2m1", None, 96),
        ("nvfp4", None, 96),
    ],
)
def test_every_format_is_stored_exactly(weights: str, group: int | None, columns: int) -> None:
    layer = trained_layer(Scheme(weights, group, "none"), columns)
    made = layer.quantized()
    assert torch.equal(made.effective_weight(), layer.rounded_weight())
    assert torch.equal(made.bias, layer.bias)
    x = torch.randn(5, columns)
    with torch.no_grad():
        assert relative_error(made(x), layer(x)) < 1e-6


def test_the_range_follows_from_the_mean_magnitude() -> None:
    """StatsQ: 2 mean magnitudes of the row, as in the authors' code; larger weights are cut off."""
    layer = trained_layer(Scheme("e1m2", 0, "none"), width=2.0)
    with torch.no_grad():
        layer.weight.normal_()
    bound = 2 * layer.weight.abs().mean(1, keepdim=True)
    largest = layer.rounded_weight().abs().amax(1, keepdim=True)
    torch.testing.assert_close(largest, bound, rtol=5e-3, atol=0)  # scales are bfloat16
    wide = trained_layer(Scheme("int8", None, "none"))
    torch.testing.assert_close(wide.rounded_weight().abs().amax(1), wide.weight.detach().abs().amax(1))


def test_padding_is_no_weight() -> None:
    layer = trained_layer(Scheme("int4", 64, "none"), 80, width=2.0)
    with torch.no_grad():
        layer.weight.fill_(0.5).mul_(torch.randn(40, 80).sign())
    assert relative_error(layer.rounded_weight(), layer.weight.detach()) < 0.1  # the last group has 16 of 64


def test_the_gradient_passes_straight_through() -> None:
    layer = trained_layer(Scheme("int4", None, "int4"))
    x = torch.randn(3, 96, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.rounded_weight().sum(0).expand(3, -1))
    seen = torch.autograd.grad(layer(x.detach()).sum(), layer.weight)[0]
    assert torch.equal(seen[0], seen[1])  # the rounded inputs, whatever the weights are
    assert relative_error(seen[0], x.detach().sum(0)) < 0.2


def test_annealing_holds_what_is_settled() -> None:
    layer = trained_layer(Scheme("int4", None, "none"), boundary=0.1)
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1, weight_decay=0.5)
    layer(torch.randn(8, 96)).square().mean().backward()
    optimizer.step()  # momentum
    settled, before = layer.settled(), layer.weight.detach().clone()
    layer.weight.grad = torch.ones_like(layer.weight)
    with annealing([layer]) as share:
        assert not layer.weight.grad[settled].any()
        optimizer.step()
    assert share == pytest.approx(settled.float().mean().item())
    assert 0.7 < share < 0.9  # 0.2 of the way between two levels is free
    assert torch.equal(layer.weight[settled], before[settled])
    assert (layer.weight[~settled] != before[~settled]).all()


def test_what_is_free_lies_between_two_levels() -> None:
    layer = trained_layer(Scheme("int8", None, "none"), boundary=0.05)
    step = layer.quantized().stored["weight_scale"][:, None]  # (N, 1)
    place = (layer.weight / step).detach()
    place = (place - place.floor() - 0.5).abs()
    assert (place[~layer.settled()] <= 0.0501).all()
    assert (place[layer.settled()] >= 0.0499).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [({"bits": "w3a8"}, "w8a8"), ({"width": 0.0}, "width"), ({"boundary": 0.6}, "boundary is 0.6")],
)
def test_settings_are_checked(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainedQuantization(**given)


def test_what_is_not_trained_is_refused() -> None:
    for part in ({"rotate": 32}, {"alpha": 0.5}, {"rank": 4}):
        with pytest.raises(ValueError, match="without balance"):
            trained_layer(replace(Scheme(), **part))
    with pytest.raises(ValueError, match="no linear layer"):
        prepare_training(nn.Sequential(nn.Linear(4, 8)), TrainedQuantization())


# ------------------------------------------------------------------------------- runs

CONFIG = """
[task]
kind = "text_to_image"
preview_steps = 1

[data]
vae = "VAE"
resolution = 32
pool_size = 16
tokenizer_captions = 50
validation_examples = 2

[model]
patch_size = 2
num_layers = 1
num_attention_heads = 2
attention_head_dim = 16

[model.text]
vocab_size = 300
d_model = 16
d_kv = 8
d_ff = 16
num_layers = 1
num_heads = 2

[quantization]
bits = "w4a8"
anneal_fraction = 0.5
boundary = 0.1
"""


@pytest.fixture
def configured(tmp_path):
    """Writes a tiny configuration and returns a loader that takes overrides."""
    from dit.tokenizers import ViTAutoencoder

    torch.manual_seed(0)
    ViTAutoencoder(
        latent_channels=4, patch_size=8, encoder_dim=32, encoder_layers=1, decoder_dim=32, decoder_layers=1,
        refiner_channels=8, sample_size=32,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    path = tmp_path / "run.toml"
    path.write_text(TINY_RUN + CONFIG.replace("VAE", str(tmp_path / "vae")))

    def load(*overrides, output="runs"):
        return load_config(path, [f'run.output="{tmp_path / output}"', "run.preview_every=0", *overrides])

    return load


def test_a_run_resumes_exactly_and_exports_what_it_trained(configured) -> None:
    """It pauses where the annealing begins."""
    folder = assert_resumes_exactly(lambda output: configured(output=output), 3)
    weights, averages = (load_file(folder / f"checkpoint-000006/{name}.safetensors") for name in ("weights", "ema"))
    assert not [name for name in weights if "weight_" in name]  # the same names as without rounding
    export = folder / "export/transformer"
    config = json.loads((export / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "tessera"
    loaded = TextDiT.from_pretrained(export, torch_dtype=torch.float32)
    layers = {name: one for name, one in loaded.named_modules() if isinstance(one, QuantLinear)}
    assert len(layers) >= 4
    name, layer = next((name, one) for name, one in layers.items() if one.scheme.weights == "int4")
    again = TrainedLinear(nn.Linear(layer.in_features, layer.out_features), layer.scheme, TrainedQuantization("w4a8"))
    again.weight = nn.Parameter(averages[f"transformer/{name}.weight"])
    assert torch.equal(layer.effective_weight(), again.rounded_weight())
    fmt = weight_format("int4")
    assert (
        fmt.unpack(layer.stored, layer.in_features, 64).unique().numel()
        <= 16 * grouped(again.weight, 64)[..., 0].numel()
    )


def test_the_last_steps_hold_settled_weights(configured) -> None:
    trainer = Trainer(configured("quantization.anneal_fraction=1", "quantization.boundary=1e-4"))
    layer = trainer.rounded.layers[0]
    before = layer.weight.detach().clone()
    assert trainer.run() == "finished"
    assert (layer.weight == before).float().mean() > 0.95
    assert isinstance(trainer.task.transformer, TextDiT)


def test_networks_that_are_not_there_are_named(configured) -> None:
    with pytest.raises(ConfigError, match="this task trains text_encoder, transformer"):
        Trainer(configured('quantization.networks=["unet"]'))
    with pytest.raises(ConfigError, match=r"quantization\.bits is"):
        configured("quantization.bits=w3a8")
