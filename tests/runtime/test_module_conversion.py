"""Linear layers are converted by one protocol, and the same layers come back: an int8 format and LoRA show it."""

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.runtime.attachment import AttachError, Attachment, Mechanism
from dit.runtime.families import family_of
from dit.runtime.module_conversion import LinearConversion, convert_linears, linear_places
from dit.runtime.stages import Stage
from tests.families.networks import tiny_transformer
from tests.families.test_runs import recorded
from tests.families.tiny import tiny_pipeline

NAMES = ("text_dit", "flux", "wan")


class Int8Linear(nn.Module):
    """Weights in int8 with a scale for each output, products in the input's dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()  # (O, I)
        scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127  # (O, 1)
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))  # (O, I)
        self.register_buffer("scale", scale)  # (O, 1)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        return self.codes * self.scale  # (O, I)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class Int8:
    def __init__(self) -> None:
        self.names: list[str] = []

    def convert(self, name: str, linear: nn.Linear) -> nn.Module:
        self.names.append(name)
        return Int8Linear(linear)


class LowRankLinear(nn.Module):
    def __init__(self, linear: nn.Module, rank: int) -> None:
        super().__init__()
        self.base_layer = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features))  # (R, I)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))  # (O, R)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.down.mT @ self.up.mT


class LowRank:
    def convert(self, name: str, linear: nn.Linear) -> nn.Module | None:
        return LowRankLinear(linear, 2) if name.endswith(("to_q", "to_v")) else None


class Quantized(Mechanism):
    name, stage = "quantized", Stage.QUANTIZATION

    def __init__(self, *components: str) -> None:
        self.converter, self.conversions = Int8(), {}
        self.components = components or None

    def install(self, attachment: Attachment) -> None:
        for name, model in attachment.models.items():
            if name not in self.conversions:  # it may be lifted off and put back
                self.conversions[name] = LinearConversion(model, self.converter)
            self.conversions[name].install(attachment)


def outputs(name: str, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**{**recorded(name)[1][0].inputs, "return_dict": False})[0]


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def picture(model: nn.Module) -> tuple:
    """Everything that could tell that a network was converted."""
    return [*model.named_modules()], list(model.state_dict()), [list(part._modules) for part in model.modules()]


@pytest.mark.parametrize("name", NAMES)
def test_int8_weights_replace_the_layers_and_leave(name: str) -> None:
    model = tiny_transformer(name)
    row = family_of(model)
    before, expected = picture(model), outputs(name, model)
    plain = {place.name for place in linear_places(model)}
    converter = Int8()
    with convert_linears(model, converter, lambda name, _: not row.skips(name)) as conversion:
        assert list(conversion.converted) == converter.names
        assert set(converter.names) == {name for name in plain if not row.skips(name)}
        assert 1e-4 < error(outputs(name, model), expected) < 0.05
        kept = [place.name for place in linear_places(model)]
        assert kept == [name for name in kept if row.skips(name)]
        assert all(type(model.get_submodule(name)) is Int8Linear for name in converter.names)
    assert picture(model) == before, "not the same objects at the same places"
    assert torch.equal(outputs(name, model), expected)


@pytest.mark.parametrize("name", NAMES)
def test_low_rank_adapters_are_converters_too(name: str) -> None:
    """They begin as nothing, learn alone, and names stay those of the network."""
    model = tiny_transformer(name).requires_grad_(False)
    row, expected = family_of(model), outputs(name, model)
    layers, targets = row.attention_layers(model), row.lora_target_names(model)
    conversion = convert_linears(model, LowRank())
    assert torch.equal(outputs(name, model), expected)
    assert row.attention_layers(model) == layers
    assert row.lora_target_names(model) == targets
    result = model(**{**recorded(name)[1][0].inputs, "return_dict": False})[0]
    result.square().mean().backward()
    learning = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert {name.rpartition(".")[2] for name in learning} == {"down", "up"}
    assert len(learning) == 2 * len(conversion.converted)
    conversion.undo()
    assert torch.equal(outputs(name, model), expected)


def test_layers_under_adapters_are_quantized() -> None:
    model = tiny_transformer("text_dit")
    before = picture(model)
    # 1. what an adapter holds is a linear layer like all others
    adapted = convert_linears(model, LowRank())
    quantized = convert_linears(model, Int8())
    assert all(type(module.base_layer) is Int8Linear for module in adapted.converted.values())
    assert not any("base_layer" in name for name in quantized.converted), "names are those of the network"
    # 2. the layer under an adapter stands in the adapter: each leaves without the other's help
    adapted.undo()
    quantized.undo()
    assert picture(model) == before


def test_peft_adapters_stay_as_they_are() -> None:
    model = tiny_transformer("text_dit")
    names = {place.name for place in linear_places(model)}
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    expected = outputs("text_dit", model)
    with convert_linears(model, Int8()) as conversion:
        assert set(conversion.converted) == names, "the layers that are adapted, and not the adapters"
        assert 1e-4 < error(outputs("text_dit", model), expected) < 0.05
    assert torch.equal(outputs("text_dit", model), expected)


# --------------------------------------------------------------------------------- mechanisms


def test_a_mechanism_converts_and_is_lifted_without_converting_again() -> None:
    class Beneath(Mechanism):
        name, stage = "beneath", Stage.COORDINATES

        def install(self, attachment: Attachment) -> None:
            attachment.after(attachment.models["transformer"], lambda *_: None)

    model = tiny_transformer("text_dit")
    before, expected, mechanism = picture(model), outputs("text_dit", model), Quantized()
    with mechanism.attach(model):
        quantized = outputs("text_dit", model)
        assert 1e-4 < error(quantized, expected) < 0.05
        with Beneath().attach(model):
            assert torch.equal(outputs("text_dit", model), quantized)
        assert len(mechanism.converter.names) == len(set(mechanism.converter.names))
    assert picture(model) == before
    assert torch.equal(outputs("text_dit", model), expected)


def test_a_text_encoder_is_quantized_for_a_pipeline() -> None:
    pipe = tiny_pipeline("wan")
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = pipe.text_encoder(tokens)[0]
        with Quantized("text_encoder").attach(pipe) as attachment:
            assert 1e-4 < error(pipe.text_encoder(tokens)[0], expected) < 0.05
            assert not any(isinstance(part, Int8Linear) for part in pipe.transformer.modules())
            assert attachment.report()["places"] == len(attachment.mechanism.converter.names)
        assert torch.equal(pipe.text_encoder(tokens)[0], expected)


def test_a_mechanism_does_not_leave_while_another_module_stands_there() -> None:
    model = tiny_transformer("text_dit")
    attachment = Quantized().attach(model)
    layer = model.transformer_blocks[0].attn
    replacement, layer.to_q = layer.to_q, nn.Identity()
    with pytest.raises(AttachError, match="to_q"):
        attachment.detach()
    layer.to_q = replacement
    attachment.detach()
    assert not any(isinstance(part, Int8Linear) for part in model.modules())


# ----------------------------------------------------------------------------------- what is refused


def test_a_layer_in_two_places_has_one_replacement() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Sequential(shared, nn.ReLU()))
    converter = Int8()
    with convert_linears(model, converter) as conversion:
        assert converter.names == ["0"]
        assert list(conversion.converted) == ["0", "1.0"]
        assert model[0] is model[1][0]
        assert isinstance(model[0], Int8Linear)
    assert model[0] is model[1][0] is shared


def test_torchs_own_attention_keeps_its_projection() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    assert [place.name for place in linear_places(model)] == ["1"]


def test_replacements_follow_the_mode_of_their_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4).eval(), nn.Linear(4, 4).train())
    convert_linears(model, Int8())
    assert [part.training for part in model] == [False, True]


def test_nothing_to_convert_is_refused() -> None:
    model = tiny_transformer("text_dit")
    with pytest.raises(ValueError, match="TextDiT"):
        convert_linears(model, Int8(), lambda name, linear: False)


def test_an_offloaded_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0]._hf_hook = object()
    with pytest.raises(ValueError, match="offload"):
        convert_linears(model, Int8())


def test_undo_in_the_wrong_order_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    conversion = convert_linears(model, Int8())
    replacement, stranger = model[1], nn.Identity()
    model[1] = stranger
    with pytest.raises(ValueError, match="1 was replaced"):
        conversion.undo()
    assert isinstance(model[0], Int8Linear)
    model[1] = replacement
    conversion.undo()
    conversion.undo()
    assert all(type(part) is nn.Linear for part in model)


def test_a_converter_that_fails_changes_nothing() -> None:
    class Failing:
        def convert(self, name: str, linear: nn.Linear) -> nn.Module:
            if name == "1":
                raise OSError("half way")
            return Int8Linear(linear)

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(OSError, match="half way"):
        convert_linears(model, Failing())
    assert all(type(part) is nn.Linear for part in model)
