"""LoRA files in the layouts of other tools: all load with the right scale, and what doesn't fit is refused."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from apps import cli
from pipelines.lora.files import LoraFileError, find_lora_file
from pipelines.next_scale import NextScaleClassToImagePipeline
from tests.families.tiny import tiny_call, tiny_pipeline
from tests.models import tiny_next_scale
from tests.pipes.tiny import tiny_text_to_image_pipeline

LAYERS = {"transformer_blocks.0.attn.to_q": (2, 5.0), "transformer_blocks.1.ff.net.2": (3, 1.5)}
"""Layer -> rank and alpha."""


def factors(network, seed=0):
    """Random factors for `LAYERS`: layer -> (A, B, alpha / rank)."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (rank, alpha) in LAYERS.items():
        outer, inner = network.get_submodule(name).weight.shape
        down, up = (torch.randn(shape, generator=generator) for shape in ((rank, inner), (outer, rank)))
        made[name] = (down, up, alpha / rank)
    return made


def merged(made, scale=1.0):
    """The images of the tiny pipeline with W + scale * B A instead of W."""
    pipe = tiny_pipeline("text_dit")
    for name, (down, up, own) in made.items():
        pipe.transformer.get_submodule(name).weight.data += scale * own * up @ down
    return pipe(**tiny_call("text_dit")).images


def config_of(**changes):
    ranks = {name: rank for name, (rank, _) in LAYERS.items()}
    alphas = {name: alpha for name, (_, alpha) in LAYERS.items()}
    return {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 5.0,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != 2},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != 5},
        "target_modules": list(LAYERS),
        **changes,
    }


def write(folder, layout, made, config=None):
    """Write a LoRA file in one layout."""
    config = config or config_of()
    metadata, file, ends = {}, folder / "ink.safetensors", ("lora_A", "lora_B")
    prefix = {"peft": "base_model.model.", "comfy": "diffusion_model.", "comfy_down": "diffusion_model.",
              "prefixed": "transformer.", "peft_prefixed": "base_model.model.transformer."}.get(layout, "")  # fmt: skip
    if layout.startswith("peft"):
        file = folder / "adapter_model.safetensors"
        (folder / "adapter_config.json").write_text(json.dumps(config))
    elif layout in ("bare", "prefixed"):
        metadata["lora_adapter_metadata"] = json.dumps({prefix + key: value for key, value in config.items()})
    if layout in ("comfy_down", "kohya"):
        ends = ("lora_down", "lora_up")
    tensors = {}
    for name, (down, up, scale) in made.items():
        layer = f"lora_unet_{name.replace('.', '_')}" if layout == "kohya" else prefix + name
        tensors |= {f"{layer}.{ends[0]}.weight": down, f"{layer}.{ends[1]}.weight": up}
        if layout in ("comfy", "comfy_down", "kohya"):
            tensors[f"{layer}.alpha"] = torch.tensor(scale * down.shape[0])
    save_file(tensors, file, metadata=metadata)
    return file


LAYOUTS = ("bare", "prefixed", "peft", "peft_prefixed", "comfy", "comfy_down", "kohya")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_the_merged_weights(layout, tmp_path):
    pipe = tiny_pipeline("text_dit")
    plain = pipe(**tiny_call("text_dit")).images
    made = factors(pipe.transformer)
    file = write(tmp_path, layout, made)
    pipe.load_lora_weights(file, adapter_name="ink")
    wanted = merged(made)
    assert (wanted - plain).abs().max() > 1e-2
    torch.testing.assert_close(pipe(**tiny_call("text_dit")).images, wanted, atol=1e-5, rtol=0)
    half = pipe(**tiny_call("text_dit"), attention_kwargs={"scale": 0.5}).images
    torch.testing.assert_close(half, merged(made, 0.5), atol=1e-5, rtol=0)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path)  # the folder does too
    torch.testing.assert_close(pipe(**tiny_call("text_dit")).images, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["text_dit", "class_dit", "next_scale"])
def test_what_the_model_itself_saves_loads(kind, tmp_path):
    """`save_lora_adapter` names no component and keeps alpha in its metadata."""
    if kind == "next_scale":
        network = tiny_next_scale.transformer()
        reference = network.state_dict()
        pipe = NextScaleClassToImagePipeline(transformer=network, vae=tiny_next_scale.tokenizer())
    else:
        pipe = tiny_pipeline(kind)
        network, reference = pipe.transformer, pipe.transformer.state_dict()
    name = "transformer_blocks.1.attn.to_q"
    network.add_adapter(LoraConfig(r=2, lora_alpha=9, target_modules=["to_q", "to_v"], init_lora_weights=False))
    network.save_lora_adapter(tmp_path)
    layer = network.get_submodule(name)
    wanted = layer.base_layer.weight + layer.get_delta_weight("default")
    network.delete_adapters("default")
    pipe.load_lora_weights(tmp_path, adapter_name="mine")
    layer = network.get_submodule(name)
    torch.testing.assert_close(layer.base_layer.weight + layer.get_delta_weight("mine"), wanted)
    pipe.unload_lora_weights()
    assert network.state_dict().keys() == reference.keys()


def test_peft_writes_a_folder_that_loads(tmp_path):
    pipe = tiny_pipeline("text_dit")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "net.2"], init_lora_weights=False, use_rslora=True)
    wrapped = get_peft_model(tiny_pipeline("text_dit").transformer, config)
    wrapped.save_pretrained(tmp_path)
    wanted = wrapped.merge_and_unload().state_dict()["transformer_blocks.0.attn.to_q.weight"]
    pipe.load_lora_weights(tmp_path / "adapter_model.safetensors", adapter_name="peft")
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    torch.testing.assert_close(layer.base_layer.weight + layer.get_delta_weight("peft"), wanted)
    assert layer.scaling["peft"] == pytest.approx(6 / math.sqrt(4))


def test_peft_without_its_configuration_is_told(tmp_path, caplog):
    pipe = tiny_pipeline("text_dit")
    file = write(tmp_path, "peft", factors(pipe.transformer))
    (tmp_path / "adapter_config.json").unlink()
    pipe.load_lora_weights(file)
    assert "adapter_config.json" in caplog.text
    assert "alpha is not known" in caplog.text


def test_tensors_and_convolutions(tmp_path):
    """A dict loads as a file does; the patch embedding of DiT is a convolution."""
    pipe = tiny_pipeline("class_dit")
    conv = pipe.transformer.patch_embed
    outer, inner, *kernel = conv.weight.shape if conv.weight.ndim == 4 else (*conv.weight.shape,)
    made = (torch.randn(2, inner, *kernel), torch.randn(outer, 2, *(1 for _ in kernel)))
    pipe.load_lora_weights({"patch_embed.lora_A.weight": made[0], "patch_embed.lora_B.weight": made[1]}, "mine")
    delta = pipe.transformer.patch_embed.get_delta_weight("mine")
    torch.testing.assert_close(delta.flatten(1), made[1].flatten(1) @ made[0].flatten(1), atol=1e-5, rtol=0)


# ----------------------------------------------------------------------- refusals

LAYER = "transformer_blocks.0.attn.to_q"


DOWN, UP = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
FOREIGN = "transformer_blocks.77.attn.to_q"


def with_value(tensor, value):
    return torch.cat([tensor.flatten()[:-1], torch.tensor([value])]).reshape(tensor.shape)


SPOILT = {
    "nan": lambda lora: {**lora, UP: with_value(lora[UP], math.nan)},
    "inf": lambda lora: {**lora, DOWN: with_value(lora[DOWN], -math.inf)},
    "no B": lambda lora: {key: value for key, value in lora.items() if key != UP},
    "no A": lambda lora: {key: value for key, value in lora.items() if key != DOWN},
    "shape": lambda lora: {**lora, DOWN: torch.zeros(2, 99)},
    "ranks": lambda lora: {**lora, UP: torch.zeros(32, 5)},
    "rank 0": lambda lora: {**lora, DOWN: torch.zeros(0, 32), UP: torch.zeros(32, 0)},
    "vector": lambda lora: {**lora, DOWN: torch.zeros(32)},
    "int": lambda lora: {**lora, DOWN: torch.zeros(2, 32, dtype=torch.int64)},
    "alpha": lambda lora: {**lora, f"{LAYER}.alpha": torch.ones(3)},
    "alpha nan": lambda lora: {**lora, f"{LAYER}.alpha": torch.tensor(math.nan)},
    "empty": lambda lora: {},
    "other model": lambda lora: {key.replace("transformer_blocks", "blocks"): value for key, value in lora.items()},
    "part": lambda lora: {
        **lora,
        f"{FOREIGN}.lora_A.weight": torch.zeros(2, 32),
        f"{FOREIGN}.lora_B.weight": torch.zeros(32, 2),
    },
    "dora": lambda lora: {**lora, f"{LAYER}.dora_scale": torch.zeros(32)},
    "text encoder": lambda lora: {**lora, **{f"text_encoder.q.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}},
}

REFUSED = {
    "nan": ["lora_B.weight", "1 values", "NaN or infinite"],
    "inf": ["lora_A.weight", "NaN or infinite"],
    "no B": [LAYER, "lacks its factor B"],
    "no A": [LAYER, "lacks its factor A"],
    "shape": ["lora_A.weight", "(2, 99)", "expected (2, 32)"],
    "ranks": ["lora_B.weight", "(32, 5)", "expected (32, 2)"],
    "rank 0": ["rank of at least 1"],
    "vector": ["(32,)", "expected (32, 32)"],
    "int": ["torch.int64", "floating-point"],
    "alpha": ["alpha has 3 values"],
    "alpha nan": ["alpha", "NaN or infinite"],
    "empty": ["no tensors"],
    "other model": ["none of it", "4 of 4 keys", "blocks.0.attn.to_q", "transformer_blocks.N.attn.to_q"],
    "part": ["only a part", "2 of 6 keys", "transformer_blocks.77", "transformer_blocks.N.attn.to_q"],
    "dora": ["only a part", "dora_scale"],
    "text encoder": ["only a part", "text_encoder.q"],
}


@pytest.mark.parametrize("how", REFUSED)
def test_spoilt_files_are_refused_and_leave_no_trace(how, tmp_path):
    pipe = tiny_pipeline("text_dit")
    before = list(pipe.transformer.state_dict())
    tensors = {}
    for name, (down, up, _) in factors(pipe.transformer).items():
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(SPOILT[how](tensors), tmp_path / "ink.safetensors")
    with pytest.raises(LoraFileError) as refused:
        pipe.load_lora_weights(tmp_path / "ink.safetensors", adapter_name="ink")
    assert all(word in str(refused.value) for word in ("ink.safetensors", *REFUSED[how])), refused.value
    assert list(pipe.transformer.state_dict()) == before
    assert not getattr(pipe.transformer, "peft_config", {})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 7, "rank_pattern": {}}, ["the rank 7", "has 2"]),
        ({"r": "2", "rank_pattern": {}}, ["r is '2'", "expected a number"]),
        ({"lora_alpha": math.nan}, ["lora_alpha is nan"]),
        ({"alpha_pattern": [1]}, ["alpha_pattern is a list"]),
        ({"alpha_pattern": {"(a+)+$": 1}}, ["alpha_pattern has '(a+)+$'", "names of layers"]),
        ({"peft_type": "LOHA"}, ["peft_type='LOHA'"]),
        ({"use_rslora": "yes"}, ["use_rslora is 'yes'"]),
    ],
)
def test_spoilt_configurations_are_refused(changes, words, tmp_path):
    pipe = tiny_pipeline("text_dit")
    for layout in ("peft", "bare"):
        folder = tmp_path / layout
        folder.mkdir()
        file = write(folder, layout, factors(pipe.transformer), config_of(**changes))
        with pytest.raises(LoraFileError) as refused:
            pipe.load_lora_weights(file)
        assert all(word in str(refused.value) for word in (file.name, *words)), refused.value


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "{", ""])
def test_configurations_that_are_no_json(text, tmp_path):
    pipe = tiny_pipeline("text_dit")
    file = write(tmp_path, "peft", factors(pipe.transformer))
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(LoraFileError, match=r"adapter_model\.safetensors can't be read.*adapter_config\.json"):
        pipe.load_lora_weights(file)


def test_files_that_are_not_there_or_no_safetensors(tmp_path):
    pipe = tiny_pipeline("text_dit")
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(LoraFileError, match=r"a\.safetensors can't be read"):
        pipe.load_lora_weights(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"")
    with pytest.raises(LoraFileError, match=r"no folder with one LoRA file .*a\.safetensors, b\.safetensors"):
        find_lora_file(tmp_path)
    with pytest.raises(LoraFileError, match=r"no LoRA file 'c\.safetensors'"):
        pipe.load_lora_weights(tmp_path, weight_name="c.safetensors")
    with pytest.raises(FileNotFoundError, match="check the path"):
        pipe.load_lora_weights(tmp_path / "nowhere.safetensors")
    with pytest.raises(OSError, match=r"someone/lora"):
        pipe.load_lora_weights("someone/lora")
    with pytest.raises(TypeError, match="doesn't take wieght_name"):
        pipe.load_lora_weights(tmp_path, wieght_name="a")


def test_a_repository_of_peft_in_the_cache(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--lora"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    pipe = tiny_pipeline("text_dit")
    made = factors(pipe.transformer)
    write(snapshot, "peft", made)
    pipe.load_lora_weights("someone/lora", cache_dir=tmp_path)
    torch.testing.assert_close(pipe(**tiny_call("text_dit")).images, merged(made), atol=1e-5, rtol=0)


# ---------------------------------------------------------- engine and command line


@pytest.mark.parametrize("layout", ["bare", "peft", "comfy_down"])
def test_the_command_line_takes_every_layout(layout, tmp_path, capsys):
    pipe = tiny_text_to_image_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    made = factors(pipe.transformer)
    (tmp_path / "lora").mkdir()
    pictures = []
    for scale in ("0", "1"):
        words = ["generate", "a red apple", "--model", str(tmp_path / "model"), "--steps", "2", "--device", "cpu"]
        file = str(write(tmp_path / "lora", layout, made))
        with pytest.raises(SystemExit) as left:
            cli.main([*words, "--seed", "1", "--lora", file, "--lora-scale", scale, "-o", str(tmp_path / "a.png")])
        assert left.value.code == 0, capsys.readouterr().err
        pictures.append((tmp_path / "a.png").read_bytes())
        (tmp_path / "a.png").unlink()
    assert pictures[0] != pictures[1]


def test_the_command_line_says_why_a_file_does_not_fit(tmp_path, capsys):
    pipe = tiny_text_to_image_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    file = write(tmp_path, "bare", factors(pipe.transformer))
    tensors = load_file(file)
    tensors[f"{LAYER}.lora_A.weight"][0] = math.nan
    save_file(tensors, file)
    words = ["generate", "a red apple", "--model", str(tmp_path / "model"), "--steps", "2", "--device", "cpu"]
    with pytest.raises(SystemExit) as left:
        cli.main([*words, "--lora", str(file), "-o", str(tmp_path / "a.png")])
    told = capsys.readouterr().err
    assert left.value.code == 2
    assert "Traceback" not in told
    assert all(word in " ".join(told.split()) for word in ("ink.safetensors", "NaN or infinite"))


def test_a_lora_of_a_foreign_pipeline_is_checked_too(tmp_path):
    """Its family's loader decides what fits; values and pairs are checked before."""
    from apps.service.lora import LoraError, loras_applied
    from apps.service.option_values import Lora

    pipe = tiny_pipeline("sana")
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path, get_peft_model_state_dict(pipe.transformer), weight_name="good.safetensors")
    pipe.transformer.delete_adapters("default")
    good = load_file(tmp_path / "good.safetensors")
    first = min(key for key in good if "lora_B" in key)
    save_file({key: value for key, value in good.items() if key != first}, tmp_path / "half.safetensors")
    good[first][0] = math.nan
    save_file(good, tmp_path / "nan.safetensors")
    files = {name: tmp_path / f"{name}.safetensors" for name in ("good", "half", "nan")}
    with loras_applied(pipe, [Lora(name="good")], files):
        assert pipe.get_active_adapters()
    for name, word in (("half", "lacks its factor B"), ("nan", "NaN or infinite")):
        with pytest.raises(LoraError, match=word), loras_applied(pipe, [Lora(name=name)], files):
            pytest.fail("it was taken")
