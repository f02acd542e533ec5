"""Quantized checkpoints of other libraries: their layouts, names, and the weights that they dequantize to."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import BFLQuantizationConfig, DiTTransformer2DModel, Flux2Transformer2DModel, FluxTransformer2DModel
from diffusers.quantizers.bfl.utils import dequantize_fp8r, dequantize_nvfp4, quantize_fp8r, quantize_nvfp4
from safetensors.torch import save_file
from torch import Tensor, nn

from dit.quant import QuantLinear
from dit.quant.importers import import_quantized, importer_names, load_quantized, read_checkpoint
from dit.quant.importers.nunchaku import GELU_SHIFT
from dit.quant.importers.nunchaku_packing import (
    unpack_awq,
    unpack_codes,
    unpack_float8_scales,
    unpack_projection,
    unpack_scales,
)
from dit.runtime.metrics import relative_error
from tests.quant.golden_imports import COLUMNS, ROWS, STORED, SUMS, sums, tensors, weight
from tests.quant.nunchaku_files import (
    AwqLayer,
    SvdLayer,
    pack_awq,
    pack_codes,
    pack_float8_scales,
    pack_projection,
    pack_scales,
)
from tests.quant.publisher_files import publishers_file, two_stream_answer, two_streams


def small() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    return network.eval()


@torch.no_grad()
def answer(network: Any) -> Tensor:
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return network(sample, timestep=torch.tensor([7, 7]), class_labels=torch.tensor([1, 3])).sample


def layers_of(network: nn.Module) -> dict[str, QuantLinear]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, QuantLinear)}


def plain_copy(make: Callable[[], Any], state: dict[str, Tensor], weights: dict[str, Tensor]) -> Any:
    """A network that is not quantized, with the weights that the quantized layers stand for."""
    network = make()
    own = network.state_dict()
    network.load_state_dict({name: (weights | state).get(name, value).float() for name, value in own.items()})
    return network


# ------------------------------------------------------------------------------ scaled floats


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_layouts_of_scaled_floats(kind: str, tmp_path: Path) -> None:
    network = small()
    state, weights = dict(network.state_dict()), {}
    for name in [name for name in state if ".attn1.to_" in name or ".ff.net." in name]:
        if not name.endswith("weight"):
            continue
        layer = name.removesuffix(".weight")
        if kind == "fp8":
            state[name], state[f"{layer}.weight_scale"] = quantize_fp8r(state[name])
            weights[name] = dequantize_fp8r(state[name], state[f"{layer}.weight_scale"])
        else:
            parts = quantize_nvfp4(state[name])
            state |= dict(zip((name, f"{layer}.weight_scale", f"{layer}.weight_scale_2"), parts, strict=True))
            state[f"{layer}.input_scale"] = torch.tensor(1.0)
            weights[name] = dequantize_nvfp4(*parts)
    target = small()
    config = import_quantized(target, state, activations="none")
    assert config.source == "bfl"
    found = layers_of(target)
    assert set(found) == {name.removesuffix(".weight") for name in weights} == set(config.layers)
    for name, layer in found.items():
        assert torch.equal(layer.effective_weight(), weights[f"{name}.weight"])
    reference = plain_copy(small, {}, weights)
    assert relative_error(answer(target), answer(reference)) < 1e-5
    target.save_pretrained(tmp_path)
    assert torch.equal(answer(DiTTransformer2DModel.from_pretrained(tmp_path)), answer(target))
    assert {layer.scheme.activations for layer in _imported(state).values()} == {"fp8" if kind == "fp8" else "none"}


def _imported(state: dict[str, Tensor], **options: Any) -> dict[str, QuantLinear]:
    network = small()
    import_quantized(network, state, **options)
    return layers_of(network)


def test_one_scale_for_all_rows_and_static_activations() -> None:
    state = dict(small().state_dict())
    name = "transformer_blocks.0.ff.net.2"
    codes = (state[f"{name}.weight"] * 100).to(torch.float8_e4m3fn)
    state |= {
        f"{name}.weight": codes,
        f"{name}.weight_scale": torch.tensor(0.01),
        f"{name}.input_scale": torch.tensor(0.5),
    }
    layer = _imported(state)[name]
    assert torch.equal(layer.effective_weight(), codes.float() * torch.tensor(0.01))
    assert layer.scheme.static
    assert layer.stored["input_scale"].tolist() == [0.5]
    assert not _imported(state, activations="none")[name].scheme.static


def test_a_publishers_single_file_is_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    network = two_streams()
    file = tmp_path / "klein-fp8.safetensors"
    save_file(publishers_file(network), file)
    network.save_config(tmp_path)
    config = BFLQuantizationConfig(compute_dtype=torch.float32)
    theirs = Flux2Transformer2DModel.from_single_file(
        str(file), config=str(tmp_path), quantization_config=config, torch_dtype=torch.float32
    )
    ours = load_quantized(Flux2Transformer2DModel, file, dict(network.config), dtype=torch.float32, activations="none")
    assert set(layers_of(ours)) == {
        name for name, layer in theirs.named_modules() if type(layer).__name__ == "BFLFP8RLinear"
    }
    assert relative_error(two_stream_answer(ours), two_stream_answer(theirs)) < 1e-5
    assert relative_error(two_stream_answer(ours), two_stream_answer(network)) < 0.1


# ------------------------------------------------------------------------------ SVDQuant: packing


def sha(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def known_codes(rows: int, columns: int, lowest: int) -> Tensor:
    n, k = torch.arange(rows)[:, None], torch.arange(columns)[None]
    return ((n * 7 + k * 3 + n * k // 5) % 16 + lowest).int()


def known_numbers(*shape: int) -> Tensor:
    return ((torch.arange(torch.Size(shape).numel()).view(shape) * 37 % 251) - 125).float() / 64


def test_packing_is_that_of_deepcompressor() -> None:
    # The hashes are those of what NunchakuWeightPacker and pack_w4 make of the same numbers.
    rows, columns = 256, 384
    codes, scales = known_codes(rows, columns, -8), known_numbers(rows, columns // 64).bfloat16()
    packed = pack_codes(codes)
    assert sha(packed) == "3455eeca2b79ba1d"
    assert torch.equal(unpack_codes(packed), (codes & 15).to(torch.uint8))
    assert sha(pack_scales(scales)) == "acb3c478c29f24c4"
    assert torch.equal(unpack_scales(pack_scales(scales), rows), scales)
    bias = known_numbers(rows, 1).bfloat16()
    assert sha(pack_scales(bias)) == "317cc51f8a688e08"
    assert torch.equal(unpack_scales(pack_scales(bias).flatten(), rows), bias)
    small_scales = known_numbers(rows, columns // 16).abs().to(torch.float8_e4m3fn)
    assert sha(pack_float8_scales(small_scales)) == "1138a9ccbc1903c0"
    assert torch.equal(unpack_float8_scales(pack_float8_scales(small_scales), rows).float(), small_scales.float())
    down, up = known_numbers(32, columns).bfloat16(), known_numbers(rows, 32).bfloat16()
    assert sha(pack_projection(down, down=True)) == "d340f6640d3f981b"
    assert torch.equal(unpack_projection(pack_projection(down, down=True), down=True), down)
    assert sha(pack_projection(up, down=False)) == "700f2c774d347aa8"
    assert torch.equal(unpack_projection(pack_projection(up, down=False), down=False), up)
    plain = known_codes(rows, columns, 0)
    assert sha(pack_awq(plain)) == "34b9d1ca1811bbfc"
    assert torch.equal(unpack_awq(pack_awq(plain)), plain.to(torch.uint8))


def test_sizes_that_are_no_tiles() -> None:
    with pytest.raises(ValueError, match="does not consist of tiles of 128 x 32 bytes"):
        unpack_codes(torch.zeros(100, 64, dtype=torch.int8))
    with pytest.raises(ValueError, match="100 packed numbers are not those of 128 rows"):
        unpack_scales(torch.zeros(100), 128)
    with pytest.raises(ValueError, match="tiles of 16 x 16"):
        unpack_projection(torch.zeros(128, 10), down=True)
    with pytest.raises(ValueError, match=r"expected int32 \(N / 4, K / 2\)"):
        unpack_awq(torch.zeros(4, 16, dtype=torch.int32))


# ------------------------------------------------------------------------------ SVDQuant: files

WIDTH = 128


def dual(device: str = "cpu") -> FluxTransformer2DModel:
    torch.manual_seed(0)
    with torch.device(device):
        network = FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(16, 24, 24),
        )  # fmt: skip
    return network.eval()


@torch.no_grad()
def dual_answer(network: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return network(
        hidden_states=torch.randn(1, 9, 4, generator=generator),
        encoder_hidden_states=torch.randn(1, 4, 32, generator=generator),
        pooled_projections=torch.randn(1, 32, generator=generator),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(9, 3),
        txt_ids=torch.zeros(4, 3),
    ).sample


DOUBLE = {
    "qkv_proj": (3 * WIDTH, WIDTH), "qkv_proj_context": (3 * WIDTH, WIDTH), "out_proj": (WIDTH, WIDTH),
    "out_proj_context": (WIDTH, WIDTH), "mlp_fc1": (4 * WIDTH, WIDTH), "mlp_fc2": (WIDTH, 4 * WIDTH),
    "mlp_context_fc1": (4 * WIDTH, WIDTH), "mlp_context_fc2": (WIDTH, 4 * WIDTH),
}  # fmt: skip
SINGLE = {
    "qkv_proj": (3 * WIDTH, WIDTH), "out_proj": (WIDTH, WIDTH), "mlp_fc1": (4 * WIDTH, WIDTH),
    "mlp_fc2": (WIDTH, 4 * WIDTH),
}  # fmt: skip
IN_NETWORK = {
    "out_proj": "attn.to_out.0", "out_proj_context": "attn.to_add_out", "mlp_fc1": "ff.net.0.proj",
    "mlp_fc2": "ff.net.2", "mlp_context_fc1": "ff_context.net.0.proj", "mlp_context_fc2": "ff_context.net.2",
}  # fmt: skip
QKV = {"qkv_proj": ("to_q", "to_k", "to_v"), "qkv_proj_context": ("add_q_proj", "add_k_proj", "add_v_proj")}


def svdquant_file(*, is_float: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A single file of the first generation of names, and the weights and biases that it stands for."""
    torch.manual_seed(1)
    shift = 0.0 if is_float else GELU_SHIFT
    file: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}

    def put(name: str, values: Tensor, bias: Tensor) -> None:
        expected[f"{name}.weight"], expected[f"{name}.bias"] = values, bias

    def made(sizes: tuple[int, int], prefix: str) -> SvdLayer:
        outer = torch.full((sizes[0],), 0.5 if "mlp" in prefix else 0.25) if is_float else None
        layer = SvdLayer(*sizes, is_float=is_float, outer=outer, is_fused=prefix.endswith("out_proj"))
        file.update(layer.tensors(prefix, old=True))
        return layer

    block = "transformer_blocks.0"
    for own, sizes in DOUBLE.items():
        layer = made(sizes, f"{block}.{own}")
        if own in QKV:
            for part, values, bias in zip(QKV[own], layer.weight().chunk(3), layer.full_bias().chunk(3), strict=True):
                put(f"{block}.attn.{part}", values, bias)
        else:
            put(f"{block}.{IN_NETWORK[own]}", layer.weight(), layer.full_bias(shift if "fc2" in own else 0.0))
    block = "single_transformer_blocks.0"
    single = {own: made(sizes, f"{block}.{own}") for own, sizes in SINGLE.items()}
    qkv = single["qkv_proj"]
    for part, values, bias in zip(QKV["qkv_proj"], qkv.weight().chunk(3), qkv.full_bias().chunk(3), strict=True):
        put(f"{block}.attn.{part}", values, bias)
    put(f"{block}.proj_mlp", single["mlp_fc1"].weight(), single["mlp_fc1"].full_bias())
    joined = torch.cat([single["out_proj"].weight(), single["mlp_fc2"].weight()], 1)
    put(f"{block}.proj_out", joined, single["out_proj"].full_bias() + single["mlp_fc2"].full_bias(shift))
    for name, splits in (
        ("transformer_blocks.0.norm1", 6),
        ("transformer_blocks.0.norm1_context", 6),
        (f"{block}.norm", 3),
    ):
        awq = AwqLayer(splits * WIDTH, WIDTH)
        file.update(awq.tensors(f"{name}.linear"))
        values = awq.weight().view(WIDTH, splits, WIDTH).transpose(0, 1).reshape(splits * WIDTH, WIDTH)
        bias = awq.bias.float().view(WIDTH, splits).T.clone()
        bias[[1, -2]] -= 1
        put(f"{name}.linear", values, bias.flatten())
    for name, tensor in dual().state_dict().items():
        if name in expected:
            continue
        old = name
        for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            old = old.replace(f"attn.{part}", part)
        file[old] = tensor
    return file, expected


@pytest.mark.parametrize("is_float", [False, True], ids=["int4", "nvfp4"])
def test_a_single_file_of_nunchaku(is_float: bool, tmp_path: Path) -> None:
    tensors_of, expected = svdquant_file(is_float=is_float)
    path = tmp_path / "svdq.safetensors"
    metadata = {"config": json.dumps(dict(dual().config)), "quantization_config": json.dumps({"rank": 16})}
    save_file(tensors_of, path, metadata=metadata)
    network = load_quantized(FluxTransformer2DModel, path, dtype=torch.float32)
    found = layers_of(network)
    assert {f"{name}.weight" for name in found} == {name for name in expected if name.endswith("weight")}
    for name, layer in found.items():
        assert relative_error(layer.effective_weight(), expected[f"{name}.weight"]) < 1e-6, name
        assert relative_error(layer.bias, expected[f"{name}.bias"]) < 1e-5, name
    assert found["single_transformer_blocks.0.proj_out"].scheme.rank == 32
    assert found["transformer_blocks.0.attn.to_out.0"].scheme.alpha is None
    reference = plain_copy(dual, {}, expected)
    assert relative_error(dual_answer(network), dual_answer(reference)) < 0.01  # branches have 16 bits
    network.save_pretrained(tmp_path / "ours")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(dual_answer(again), dual_answer(network))
    assert again.config.quantization_config.source == "nunchaku"


def test_activations_of_four_bits_on_request() -> None:
    state, _ = svdquant_file(is_float=False)
    network, exact = dual("meta"), dual("meta")
    import_quantized(network, state, activations="int4")
    import_quantized(exact, state)
    layer = layers_of(network)["transformer_blocks.0.attn.to_q"]
    assert (layer.scheme.activations, layer.scheme.activation_group) == ("int4", 64)
    assert 0.001 < relative_error(dual_answer(network), dual_answer(exact)) < 0.5


@pytest.mark.parametrize("is_float", [False, True], ids=["int4", "nvfp4"])
def test_a_folder_of_nunchaku_lite(is_float: bool, tmp_path: Path) -> None:
    network = small()
    state = dict(network.state_dict())
    linear, modulation = "transformer_blocks.0.ff.net.2", "transformer_blocks.0.norm1.linear"
    sizes = {name: network.get_submodule(name).weight.shape for name in (linear, modulation)}
    torch.manual_seed(3)
    layer = SvdLayer(
        *sizes[linear], is_float=is_float, outer=torch.rand(sizes[linear][0]).bfloat16() if is_float else None
    )
    awq = AwqLayer(*sizes[modulation])
    for name in sizes:
        del state[f"{name}.weight"]
    state |= layer.tensors(linear) | awq.tensors(modulation)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "diffusion_pytorch_model.safetensors"
    )
    targets = {"precision": "nvfp4" if is_float else "int4", "group_size": 16 if is_float else 64, "rank": 16}
    quantization = {"quant_method": "nunchaku_lite", "svdq_w4a4": {**targets, "targets": [linear]}}
    content = {**json.loads(network.to_json_string()), "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(content))
    loaded = load_quantized(DiTTransformer2DModel, tmp_path, dtype=torch.float32)
    found = layers_of(loaded)
    assert set(found) == set(sizes)
    assert relative_error(found[linear].effective_weight(), layer.weight()) < 1e-6
    assert torch.equal(found[linear].bias, layer.bias.float())  # no shift, although a GELU stands before
    assert relative_error(found[modulation].effective_weight(), awq.weight()) < 1e-6  # rows in their own order
    assert torch.equal(found[modulation].bias, awq.bias.float())
    assert bool(torch.isfinite(answer(loaded)).all())


def test_sizes_are_padded_to_tiles() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(192, 80)

    torch.manual_seed(4)
    layer, network = SvdLayer(80, 192), Net()
    import_quantized(network, layer.tensors("layer"))
    assert relative_error(network.layer.effective_weight(), layer.weight()) < 1e-6
    fine = SvdLayer(80, 192)
    fine.scales = (torch.rand(80, 3) * 0.01 + 0.001).half()  # has digits that bfloat16 lacks
    network = Net()
    config = import_quantized(network, fine.tensors("layer"))
    assert config.layers["layer"].weights == "int4_group_fp32"
    assert relative_error(network.layer.effective_weight(), fine.weight()) < 1e-6


# ------------------------------------------------------------------------------ torchao, SDNQ, bitsandbytes


class One(nn.Module):
    """A network of one layer, and one that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(COLUMNS, ROWS)
        self.norm = nn.LayerNorm(ROWS)


def stored_in(case: str, **changes: Tensor) -> dict[str, Tensor]:
    found = {f"layer.{name}": tensor for name, tensor in {**tensors(case), **changes}.items()}
    others = {name: torch.randn_like(value) for name, value in One().state_dict().items() if "layer.weight" not in name}
    return found | others


def import_case(case: str, state: dict[str, Tensor], **options: Any) -> QuantLinear:
    network = One()
    import_quantized(network, state, CONFIGS.get(case), **options)
    assert torch.equal(network.norm.weight, state["norm.weight"])
    assert torch.equal(network.layer.bias, state["layer.bias"])
    return network.layer  # pyright: ignore


CONFIGS: dict[str, dict[str, Any]] = {
    "torchao int8": {"quant_method": "torchao", "quant_type": {"_type": "Int8DynamicActivationInt8WeightConfig"}},
    "sdnq uint4": {"quant_method": "sdnq", "weights_dtype": "uint4"},
    "sdnq svd": {"quant_method": "sdnq", "weights_dtype": "uint4"},
    "sdnq int4": {"quant_method": "sdnq", "weights_dtype": "int4"},
    "bitsandbytes nested": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}  # fmt: skip


@pytest.mark.parametrize("case", STORED)
def test_weights_are_those_that_the_library_dequantizes_to(case: str) -> None:
    layer = import_case(case, stored_in(case))
    found = layer.effective_weight()
    # The golden weights of bitsandbytes are bfloat16; SDNQ's branch has 32 bits there and 16 here.
    rounded = found.bfloat16().float() if case.startswith("bitsandbytes") and "int8" not in case else found
    tolerance = 1e-2 if case == "sdnq svd" else 1e-6
    assert sums(rounded) == pytest.approx(SUMS[case], rel=tolerance)
    assert relative_error(found, weight()) < (0.01 if "int8" in case else 0.1)
    dynamic = {"torchao int8": "int8"}.get(case, "none")
    assert layer.scheme.activations == dynamic
    x = torch.randn(5, COLUMNS)
    expected = x @ found.T + layer.bias
    assert relative_error(layer(x), expected) < (0.02 if dynamic == "int8" else 5e-3)


def test_activations_can_be_asked_for() -> None:
    for case in ("bitsandbytes int8", "sdnq int8"):
        layer = import_case(case, stored_in(case), activations="int8")
        assert layer.scheme.activations == "int8"
        x = torch.randn(5, COLUMNS)
        assert relative_error(layer(x), x @ weight().T + layer.bias) < 0.02


def test_sdnqs_layout_for_its_own_products() -> None:
    plain = tensors("sdnq int8")
    state = stored_in("sdnq int8", weight=plain["weight"].T.contiguous(), scale=plain["scale"].T.contiguous())
    network = One()
    import_quantized(network, state, {"quant_method": "sdnq", "use_quantized_matmul": True, "weights_dtype": "int8"})
    layer: Any = network.layer
    assert torch.equal(layer.effective_weight(), plain["weight"].float() * plain["scale"])
    assert layer.scheme.activations == "int8"


# ------------------------------------------------------------------------------ what can't be imported

NAN = torch.tensor(torch.nan)


def spoil(case: str, **changes: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return stored_in(case, **changes), CONFIGS.get(case, {})


def without(case: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = stored_in(case)
    del state[name]
    return state, CONFIGS.get(case, {})


Made = Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]
SDNQ = {"quant_method": "sdnq"}


def blocks_of_float8() -> tuple[dict[str, Tensor], dict[str, Any]]:
    state, _ = without("sdnq fp8", "layer.scale")
    return state | {"layer.weight_scale": torch.ones(8, 2)}, {}


REFUSED: dict[str, tuple[Made, str]] = {
    "no library": (lambda: (One().state_dict(), {}), "a checkpoint with no quantization_config and tensors such as"),
    "other library": (
        lambda: (stored_in("sdnq int8"), {"quant_method": "quanto"}),
        "quant_method 'quanto'.*known are those of",
    ),
    "NaN": (lambda: spoil("sdnq int8", scale=NAN.expand(8, 1)), "layer: weight_scale holds NaN"),
    "scales missing": (lambda: without("torchao int8", "layer._weight_scale"), "lacks layer._weight_scale"),
    "bias missing": (lambda: without("torchao int8", "layer.bias"), "lacks the bias of layer"),
    "zero points": (
        lambda: spoil("torchao int8", _weight_zero_point=torch.ones(8, 1).char()),
        "zero points that aren't 0",
    ),
    "other torchao layout": (
        lambda: spoil("torchao int8", _weight_scale_and_zero=NAN),
        "_weight_scale_and_zero belongs to a layout",
    ),
    "eight bits in groups": (
        lambda: spoil("torchao int8", _weight_scale=torch.ones(8, 2)),
        "groups of codes of more than 4 bits",
    ),
    "hadamard": (lambda: (stored_in("sdnq int8"), {**SDNQ, "use_hadamard": True}), "made with use_hadamard"),
    "unknown 4 bits": (lambda: (stored_in("sdnq int4"), SDNQ), "of a kind that no configuration names"),
    "other 4 bits": (
        lambda: (stored_in("sdnq int4"), {**SDNQ, "weights_dtype": "float4_e2m1fn"}),
        "stored as float4_e2m1fn",
    ),
    "other network": (lambda: spoil("sdnq uint4", weight=torch.zeros(300).byte()), "not those of 4 bits for 8 x 64"),
    "fp4": (
        lambda: ({"layer.weight.quant_state.bitsandbytes__fp4": torch.zeros(3).byte()}, {}),
        "fp4 of bitsandbytes can't be",
    ),
    "quantization state": (
        lambda: spoil("bitsandbytes plain", **{"weight.quant_state.bitsandbytes__nf4": torch.zeros(3).byte()}),
        "is no quantization state",
    ),
    "table": (
        lambda: spoil("bitsandbytes plain", **{"weight.quant_map": torch.zeros(16)}),
        "is not the table of NF4",
    ),
    "blocks of float8": (blocks_of_float8, "a scale a block of float8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_imported_leaves_the_network_alone(case: str) -> None:
    make, message = REFUSED[case]
    state, config = make()
    network = One()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        import_quantized(network, state, config)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_other_networks_are_refused() -> None:
    state = stored_in("sdnq int8")
    with pytest.raises(ValueError, match="has no such layer"):
        import_quantized(nn.Sequential(nn.Linear(64, 8)), state)
    network = One()
    network.norm = nn.LayerNorm(9)
    with pytest.raises(ValueError, match=r"norm\.weight is \(8,\) in the checkpoint and \(9,\)"):
        import_quantized(network, state)
    del network.norm
    with pytest.raises(ValueError, match="has no place for 2 tensors of the checkpoint, norm"):
        import_quantized(network, state)
    with torch.device("meta"):
        empty = One()
    with pytest.raises(ValueError, match=r"lacks 1 tensors of One, norm\.weight first"):
        import_quantized(empty, {name: value for name, value in state.items() if name != "norm.weight"})
    import_quantized(empty, state)
    with pytest.raises(ValueError, match="is quantized already"):
        import_quantized(empty, state)
    with pytest.raises(ValueError, match="activations is 'int5'"):
        import_quantized(One(), state, activations="int5")
    tensors_of, _ = svdquant_file(is_float=False)
    with pytest.raises(ValueError, match="has no place for the layer"):
        import_quantized(small(), tensors_of)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no safetensors file"):
        read_checkpoint(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"quantization_config": "[1]"})
    with pytest.raises(ValueError, match="is a list, expected an object"):
        read_checkpoint(tmp_path / "a.safetensors")
    save_file(stored_in("sdnq int8"), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="has no configuration of the network"):
        load_quantized(DiTTransformer2DModel, tmp_path / "b.safetensors")
    assert importer_names()[0] == "nunchaku"
