"""Quantized networks in diffusers and transformers: on the fly, in memory, saved, sharded, reloaded, damaged."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiTTransformer2DModel, PipelineQuantizationConfig
from diffusers.pipelines.cosmos.mixed_precision import FIRST_LAST_N_FP8_POLICY, parse_diffusion_step_policy
from diffusers.quantizers import auto
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from dit.quant import QuantLinear, TesseraQuantConfig, quantize_
from dit.quant.marking import unmark_quantized
from dit.quant.registration import METHOD, register_when_imported
from dit.quant.scheme import Scheme
from dit.quant.tensor_files import TensorFiles
from dit.runtime.metrics import relative_error
from pipelines.loading.load import load_pipeline
from tests.pipes.tiny import tiny_text_to_image_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(layers: int = 2) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    return network.eval()


@torch.no_grad()
def answer(network: Any) -> Tensor:
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([1, 3])
    return network(sample.to(network.dtype), timestep=torch.tensor([7, 7]), class_labels=labels).sample


def bits_of(network: Any, *, of_quantized_only: bool = False) -> dict[str, Tensor]:
    """All tensors as bytes, float8 included."""
    layers = [name for name, layer in network.named_modules() if isinstance(layer, QuantLinear)]
    own = {f"{name}.{key}" for name in layers for key in network.get_submodule(name).state_dict() if key != "bias"}
    state = network.state_dict()
    chosen = own if of_quantized_only else set(state)
    return {name: state[name].detach().contiguous().view(-1).view(torch.uint8) for name in chosen}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved network that is not quantized."""
    folder = tmp_path_factory.mktemp("plain")
    make().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network quantized in memory and saved."""
    folder = tmp_path_factory.mktemp("saved")
    network = make()
    quantize_(network, "viditq", "w4a8")
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved network that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# ------------------------------------------------------------------------------ loading and saving


@pytest.mark.parametrize(
    ("recipe", "bits"), [("viditq", "w8a8"), ("viditq", "w4a8"), ("fp8", "fp8"), ("svdquant", "nvfp4")]
)
def test_quantized_while_it_is_loaded_saved_and_loaded_again(
    recipe: str, bits: str, plain: Path, tmp_path: Path
) -> None:
    config = TesseraQuantConfig(recipe, bits)
    quantized = [
        DiTTransformer2DModel.from_pretrained(plain, torch_dtype=dtype, quantization_config=config) for dtype in DTYPES
    ]
    first = quantized[0]
    assert config.layers is None, "a caller's configuration must not change"
    assert relative_error(answer(first), answer(make())) < 0.2
    for other in quantized[1:]:
        assert same(bits_of(first, of_quantized_only=True), bits_of(other, of_quantized_only=True))
    for network in quantized[:2]:
        folder = tmp_path / str(network.dtype)
        network.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
        for dtype in DTYPES:
            again = DiTTransformer2DModel.from_pretrained(folder, torch_dtype=dtype)
            assert same(bits_of(network, of_quantized_only=True), bits_of(again, of_quantized_only=True))
        again = DiTTransformer2DModel.from_pretrained(folder, torch_dtype=network.dtype)
        assert same(bits_of(network), bits_of(again))
        assert torch.equal(answer(network), answer(again))
        assert again.config.quantization_config == network.config.quantization_config


@pytest.mark.parametrize(
    ("recipe", "bits"),
    [
        ("int8", "w6a8"),
        ("svdquant", "w4a4"),
        ("nvfp4", "nf4"),
        ("nvfp4", "mxfp4"),
        ("fp4dit", "e3m0-int8"),
        ("fp4dit", "e2m1-int6"),
    ],
)
def test_quantized_in_memory_saved_and_loaded(recipe: str, bits: str, tmp_path: Path) -> None:
    network = make()
    quantize_(network, recipe, bits, skip=["transformer_blocks.1.ff"])
    network.save_pretrained(tmp_path)
    again = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert same(bits_of(network), bits_of(again))
    assert torch.equal(answer(network), answer(again))
    assert type(again.transformer_blocks[1].ff.net[2]) is torch.nn.Linear
    again.save_pretrained(tmp_path)  # over the files that it came from
    assert same(bits_of(network), bits_of(DiTTransformer2DModel.from_pretrained(tmp_path)))


def test_a_pipeline_and_its_text_encoder(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    pipe = tiny_text_to_image_pipeline()
    encoder = T5Config(
        vocab_size=len(pipe.tokenizer), d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, pad_token_id=0
    )
    pipe.register_modules(text_encoder=T5EncoderModel(encoder).eval(), transformer=_wider(64))
    pipe.save_pretrained(folder)
    mapping = {"transformer": TesseraQuantConfig(), "text_encoder": TesseraQuantConfig(bits="w4a8")}
    chosen = PipelineQuantizationConfig(quant_mapping=mapping)
    quantized = load_pipeline(folder, device="cpu", quantization_config=chosen)
    assert _layers(quantized.transformer)
    assert {layer.scheme.weights for layer in _layers(quantized.text_encoder)} == {"int4", "int8"}
    quantized.save_pretrained(tmp_path / "quantized", max_shard_size="20KB")
    again = load_pipeline(tmp_path / "quantized", device="cpu")
    assert same(bits_of(quantized.transformer), bits_of(again.transformer))
    assert same(bits_of(quantized.text_encoder), bits_of(again.text_encoder))
    assert torch.equal(_paint(again), _paint(quantized))
    both = PipelineQuantizationConfig(
        quant_backend=METHOD, quant_kwargs={"bits": "w8a8"}, components_to_quantize=["transformer"]
    )
    assert _layers(load_pipeline(folder, device="cpu", quantization_config=both).transformer)


def _wider(text_dim: int) -> Any:
    from dit.models.text_dit import TextDiT

    torch.manual_seed(0)
    network = TextDiT(
        in_channels=4,
        patch_size=2,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=32,
        text_dim=text_dim,
        sample_size=4,
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def _paint(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a red apple", generator=torch.Generator().manual_seed(3), num_inference_steps=1, output_type="pt"
    ).images


def _layers(network: Any) -> list[QuantLinear]:
    return [layer for layer in network.modules() if isinstance(layer, QuantLinear)]


def test_a_text_encoder_in_memory_and_in_any_dtype(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = T5Config(
        vocab_size=50, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    encoder = T5EncoderModel(settings).eval()
    tokens = torch.arange(10)[None]
    before = encoder(tokens).last_hidden_state
    quantize_(encoder, "svdquant", "w4a8")
    assert relative_error(encoder(tokens).last_hidden_state, before) < 0.2
    encoder.save_pretrained(tmp_path)
    for dtype in DTYPES:
        again: Any = T5EncoderModel.from_pretrained(tmp_path, dtype=dtype)
        assert same(bits_of(encoder, of_quantized_only=True), bits_of(again, of_quantized_only=True))
        assert again.dtype == dtype
    again = T5EncoderModel.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).last_hidden_state, encoder(tokens).last_hidden_state)
    dequantized = again.dequantize()
    assert not _layers(dequantized)
    assert relative_error(dequantized(tokens).last_hidden_state, encoder(tokens).last_hidden_state) < 0.05


def test_a_process_that_only_imports_pipelines(saved: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = T5EncoderModel(T5Config(vocab_size=50, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4)).eval()
    quantize_(encoder, "int8", "w8a8")
    encoder.save_pretrained(tmp_path / "encoder")
    code = """
import sys
import pipelines
from transformers import T5EncoderModel
from diffusers import DiTTransformer2DModel
assert "dit.quant.linear" not in sys.modules
networks = [DiTTransformer2DModel.from_pretrained(sys.argv[1]), T5EncoderModel.from_pretrained(sys.argv[2])]
from dit.quant import QuantLinear
print([sum(type(layer) is QuantLinear for layer in network.modules()) for network in networks])
"""
    run = [sys.executable, "-c", code, str(saved), str(tmp_path / "encoder")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = [len(_layers(DiTTransformer2DModel.from_pretrained(saved))), len(_layers(encoder))]
    assert done.stdout.strip() == str(expected)


def test_memory_while_loading(tmp_path: Path) -> None:
    network = DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    quantize_(network, "int8", "w8a8")
    network.to(torch.device("cpu"))
    network.save_pretrained(tmp_path / "large")
    make().save_pretrained(tmp_path / "small", max_shard_size="1GB")
    code = """
import sys
from pathlib import Path
import torch
import pipelines
from diffusers import DiTTransformer2DModel
from dit.quant import TesseraQuantConfig
from pipelines.loading.memory import peak_memory
DiTTransformer2DModel.from_pretrained(sys.argv[2], quantization_config=TesseraQuantConfig(recipe="int8"))  # imports
Path("/proc/self/clear_refs").write_text("5")
before = peak_memory()
network = DiTTransformer2DModel.from_pretrained(sys.argv[1])
for name, tensor in network.state_dict().items():
    tensor.sum() if tensor.dtype != torch.int8 else tensor.max()  # nothing waits in a file
held = sum(one.numel() * one.element_size() for one in network.parameters())
print((peak_memory() - before) / held, held)
"""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory of a part of a run can only be read on Linux")
    run = [sys.executable, "-c", code, str(tmp_path / "large"), str(tmp_path / "small")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ratio, held = (float(one) for one in done.stdout.split())
    assert held > 50e6
    assert ratio <= 1.15


# ------------------------------------------------------------------------------ a quantized network is a network


def test_adapters_are_trained_on_quantized_layers(saved: Path) -> None:
    network: Any = DiTTransformer2DModel.from_pretrained(saved)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q", "to_v"]), network)
    sample = torch.randn(1, 4, 8, 8)
    network(sample, timestep=torch.tensor([7]), class_labels=torch.tensor([1])).sample.square().mean().backward()
    trained = {name: one.grad for name, one in network.named_parameters() if "lora_" in name}
    assert len(trained) == 8
    assert all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in trained.values())
    assert any("lora_B" in name and float(gradient.abs().max()) > 0 for name, gradient in trained.items())


def test_casts_are_refused_and_devices_are_not(saved: Path) -> None:
    network = DiTTransformer2DModel.from_pretrained(saved)
    expected = answer(network)
    with pytest.raises(ValueError, match="quantized"):
        network.to(torch.bfloat16)
    assert torch.equal(answer(network.to("cpu")), expected)


def test_it_can_be_offloaded_layer_by_layer(plain: Path) -> None:
    chosen = TesseraQuantConfig("int8", "w8a8")
    network = DiTTransformer2DModel.from_pretrained(plain, quantization_config=chosen)
    expected = answer(network)  # weights are prepacked now, where the processor has kernels for that
    cpu_offload(network, execution_device=torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(answer(network), expected)
    for layer in _layers(network):
        assert all(tensor.is_meta for tensor in layer.stored.values())
        assert layer._weights is None, "memory that offloading gave back is kept"


def test_it_can_be_dequantized(saved: Path, tmp_path: Path) -> None:
    network = DiTTransformer2DModel.from_pretrained(saved)
    for layer in _layers(network):
        layer.full_precision = True
    expected = answer(network)
    network.dequantize()
    assert not _layers(network)
    assert relative_error(answer(network), expected) < 1e-4
    network.save_pretrained(tmp_path)
    again = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(answer(again), answer(network))
    network.to(torch.bfloat16)


def test_marks_can_be_taken_back() -> None:
    network: Any = make()
    quantize_(network, "int8", "w8a8")
    assert network.hf_quantizer.is_serializable
    unmark_quantized(network)
    assert not hasattr(network, "hf_quantizer")
    assert "quantization_config" not in network.config


def test_one_layer_may_be_chosen_by_hand(plain: Path) -> None:
    layers = {
        "transformer_blocks.0.attn1.to_q": Scheme("int4", 32),
        "transformer_blocks.1.ff.net.2": {"weights": "fp8"},
    }
    network = DiTTransformer2DModel.from_pretrained(plain, quantization_config=TesseraQuantConfig(layers=layers))
    found = {name: layer.scheme for name, layer in network.named_modules() if isinstance(layer, QuantLinear)}
    assert set(found) == set(layers)
    assert found["transformer_blocks.0.attn1.to_q"].group == 32
    chosen = TesseraQuantConfig(modules_to_not_convert=["transformer_blocks.0", ".*norm1", "proj_out_1"])
    partly = DiTTransformer2DModel.from_pretrained(plain, quantization_config=chosen)
    names = [name for name, layer in partly.named_modules() if isinstance(layer, QuantLinear)]
    assert names
    assert all(name.startswith("transformer_blocks.1.") and "norm1" not in name for name in names)


# ------------------------------------------------------------------------------ registration


def test_registration_is_done_once_and_takes_nobodys_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(auto.AUTO_QUANTIZER_MAPPING), list(sys.meta_path)
    register_when_imported()
    assert (auto.AUTO_QUANTIZER_MAPPING, sys.meta_path) == before
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] is TesseraQuantConfig
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, METHOD, auto.GGUFQuantizer)
    with pytest.raises(ValueError, match="already; checkpoints of tessera can't be loaded beside that package"):
        register_when_imported()
    assert auto.AUTO_QUANTIZER_MAPPING[METHOD] is auto.GGUFQuantizer


@pytest.mark.parametrize(
    "first",
    [
        "import pipelines, dit.quant.diffusers_config",
        "import transformers.quantizers.auto, dit.quant.diffusers_quantizer",
    ],
)
def test_any_order_of_imports_registers(first: str) -> None:
    code = f"""
{first}
import sys
from diffusers.quantizers import auto
from transformers.quantizers import auto as other
assert all("{METHOD}" in mapping for one in (auto, other)
           for mapping in (one.AUTO_QUANTIZER_MAPPING, one.AUTO_QUANTIZATION_CONFIG_MAPPING))
print([one for one in sys.meta_path if "dit" in type(one).__module__])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", "a hook stayed behind"


# ------------------------------------------------------------------------------ configuration


def test_a_configuration_comes_back() -> None:
    schemes = [Scheme("int4", 64, rank=8), Scheme(), Scheme("int4", 64, rank=8)]
    layers = {f"blocks.{index}.to_q": scheme for index, scheme in enumerate(schemes)}
    runtime = {"diffusion_step_policy": FIRST_LAST_N_FP8_POLICY, "of somebody else": [1, None]}
    config = TesseraQuantConfig("svdquant", "w4a8", ["proj_out"], layers, runtime=runtime)
    written = json.loads(json.dumps(config.to_dict()))
    assert len(written["layers"]["schemes"]) == 2
    assert written["runtime"] == runtime
    again = TesseraQuantConfig.from_dict(written)
    assert again == config
    assert again.layers == layers
    assert again.diffusion_step_policy == FIRST_LAST_N_FP8_POLICY
    assert parse_diffusion_step_policy(written["runtime"]["diffusion_step_policy"]).first_steps == 3
    assert "3 in 2 schemes" in repr(config)
    assert TesseraQuantConfig().to_diff_dict() == {"quant_method": METHOD}
    assert json.loads(config.to_json_string())["recipe"] == "svdquant"
    assert dict(config)["bits"] == "w4a8"
    assert config.quant_method.value == METHOD
    assert config.replace(bits="w8a8").bits == "w8a8"
    assert config.bits == "w4a8"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "version of quantization_config is 2, and this tessera reads up to 1"),
        ({"version": 2, "of_the_future": 1}, "reads up to 1: install a newer one"),
        ({"version": "one"}, "version of quantization_config is 'one'"),
        ({"recipe": "int9"}, "recipe is 'int9'; use one of int8"),
        ({"bits": "w3a3"}, "bits is 'w3a3'"),
        ({"recipe": None}, "give both, or layers"),
        ({"modules_to_not_convert": "proj"}, "use a list of regular expressions"),
        ({"modules_to_not_convert": ["("]}, "no regular expression"),
        ({"layers": {}}, "layers is {}"),
        ({"layers": {"a b": {}}}, "names 'a b', which can't be the name of a layer"),
        ({"layers": {"to_q": {"weights": "int5"}}}, "the scheme of 'to_q' can't be used: weights is 'int5'"),
        ({"layers": {"to_q": {"size": 5}}}, "a scheme has no size"),
        ({"layers": {"to_q": 3}}, "the scheme of 'to_q' is 3"),
        ({"layers": {"schemes": [{}], "scheme_of": {"to_q": 1}}}, "scheme_of 'to_q' is 1, expected 0 to 0"),
        ({"layers": {"schemes": {}, "scheme_of": {}}}, "must hold a list 'schemes'"),
        ({"runtime": [1]}, "runtime can't be stored as a JSON object: it is a list"),
        ({"size": 4}, "unknown fields: size; known are bits"),
        ({"quant_method": "gguf"}, "this is a configuration of 'tessera'"),
    ],
)
def test_configurations_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("{", r"\{").replace("[", r"\[")):
        TesseraQuantConfig.from_dict(fields)


# ------------------------------------------------------------------------------ damaged files

LAYER = "transformer_blocks.0.attn1.to_q"


def spoil_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def spoil_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content["quantization_config"])
    path.write_text(json.dumps(content))


def set_tensor(tensors: dict[str, Tensor], name: str, value: Tensor) -> None:
    tensors[f"{LAYER}.{name}"] = value


def regroup(config: dict[str, Any]) -> None:
    for scheme in config["layers"]["schemes"]:
        if scheme.get("weights") == "int4":
            scheme["group"] = 32


DAMAGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "scale is NaN": (lambda t: t[f"{LAYER}.weight_scale"].fill_(torch.nan), f"{LAYER}: weight_scale holds NaN"),
    "scale is negative": (lambda t: t[f"{LAYER}.weight_scale"].neg_(), f"{LAYER}: weight_scale has 64 of 64 values"),
    "code out of range": (lambda t: t[f"{LAYER}.weight_zero"].fill_(99), f"{LAYER}: .*weight_zero values above 15"),
    "tensor is missing": (lambda t: t.pop(f"{LAYER}.weight_multiplier"), f"{LAYER}.weight_multiplier first"),
    "other dtype": (lambda t: set_tensor(t, "weight_scale", torch.ones(64).bfloat16()), "weight_scale is .*bfloat16"),
    "other shape": (lambda t: set_tensor(t, "weight", torch.ones(64, 31).byte()), f"{LAYER}.weight is"),
    "a stranger's tensor": (lambda t: set_tensor(t, "weight_scale_2", torch.ones(())), "weight_scale_2 belongs to a q"),
}  # fmt: skip
CONFIG_DAMAGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "other group": (regroup, "weight_multiplier is .* its scheme in config.json asks for"),
    "newer version": (lambda c: c.update(version=9), "version of quantization_config is 9"),
    "layer of another network": (
        lambda c: c["layers"]["scheme_of"].update(nowhere=0),
        "names the linear layer 'nowhere'",
    ),
    "layer that is none": (lambda c: c["layers"]["scheme_of"].update(pos_embed=0), "has a PatchEmbed there"),
    "layer left out": (lambda c: c["layers"]["scheme_of"].pop(LAYER), "belongs to a quantized layer that the layers"),
    "open scheme": (lambda c: c["layers"]["schemes"][0].update(alpha="search"), "is not resolved"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_weights(case: str, copy: Path) -> None:
    change, message = DAMAGES[case]
    spoil_weights(copy, change)
    with pytest.raises(ValueError, match=message):
        DiTTransformer2DModel.from_pretrained(copy)


@pytest.mark.parametrize("case", CONFIG_DAMAGES)
def test_damaged_configurations(case: str, copy: Path) -> None:
    change, message = CONFIG_DAMAGES[case]
    spoil_config(copy, change)
    with pytest.raises(ValueError, match=message):
        DiTTransformer2DModel.from_pretrained(copy)


def test_load_pipeline_refuses_before_it_reads_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_text_to_image_pipeline()
    pipe.register_modules(transformer=_wider(16))
    quantize_(pipe, "int8", "w8a8")
    pipe.save_pretrained(tmp_path)
    folder = tmp_path / "transformer"
    monkeypatch.setattr(type(pipe), "from_pretrained", None)  # it never comes to that
    content = (folder / "config.json").read_text()
    cases: list[tuple[Callable[[Any], Any], str]] = [
        (lambda c: c.update(version=9), "quantization_config can't be used: version"),
        (lambda c: c["layers"]["schemes"][0].update(weights="fp8"), "is stored as I8, expected F8_E4M3"),
        (
            lambda c: c["layers"]["schemes"][0].update(weights="int4", group=64),
            "tensors of quantized layers are missing",
        ),
        (lambda c: c["layers"]["scheme_of"].popitem(), "belongs to a quantized layer that the layers"),
        (
            lambda c: c.update(layers={f"a.{index}": {} for index in range(500)}),
            "it names 500 layers, and the weight files",
        ),
    ]
    for change, message in cases:
        (folder / "config.json").write_text(content)
        spoil_config(folder, change)
        with pytest.raises(ValueError, match=message):
            load_pipeline(tmp_path, device="cpu")


def test_nothing_to_quantize_and_weights_that_are_nan(plain: Path, tmp_path: Path) -> None:
    everything = TesseraQuantConfig(modules_to_not_convert=[".*"])
    with pytest.raises(ValueError, match="DiTTransformer2DModel has no linear layer to quantize"):
        DiTTransformer2DModel.from_pretrained(plain, quantization_config=everything)
    folder = Path(shutil.copytree(plain, tmp_path / "copy"))
    spoil_weights(folder, lambda tensors: tensors[f"{LAYER}.weight"][0, 0].fill_(torch.nan))
    with pytest.raises(ValueError, match=f"{LAYER} holds NaN"):
        DiTTransformer2DModel.from_pretrained(folder, quantization_config=TesseraQuantConfig())


def test_tensors_are_read_as_they_are_stored(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "b": torch.randn(7).bfloat16(),
        "c": torch.tensor(2.5),
        "d": torch.zeros(0, 4, dtype=torch.uint8),
        "e": torch.randint(-9, 9, (2, 2, 2)),
    }
    path = tmp_path / "some.safetensors"
    save_file(tensors, path)
    files = TensorFiles([path, tmp_path / "pickle.bin"])
    for name, tensor in tensors.items():
        read = files.read(name)
        assert read is not None
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    assert files.read("nothing") is None
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(OSError, match="was cut short"):
        [files.read(name) for name in tensors]
    path.write_bytes(b"no such file at all")
    with pytest.raises(ValueError, match="is no safetensors file"):
        TensorFiles([path])
