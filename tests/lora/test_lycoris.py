"""LoHa, LoKr and DoRA on a pipeline of ours and one of diffusers: trained, written, read, weighed, taken off."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from dit.lora.adapters import AdapterSettings, add_adapter, save_adapter
from dit.lora.files import LoraFileError, LoraMisfitError
from pipelines import load_lora, unload_lora
from pipelines.lora.files import adaptable_layers
from tests.families.tiny import tiny_call, tiny_pipeline

KINDS = ("loha", "lokr", "dora")
FAMILIES = ("text_dit", "flux")


def paint(pipe, family):
    output = pipe(**{**tiny_call(family), "num_inference_steps": 1})
    return torch.as_tensor(output.images)


def adapted(family, kind):
    """A pipeline whose adapters do something: they start as nothing, so every factor gets random values."""
    pipe, settings = tiny_pipeline(family), AdapterSettings(kind, rank=2, alpha=3.0)
    add_adapter(pipe.transformer, settings)
    generator = torch.Generator().manual_seed(0)
    for parameter in pipe.transformer.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.3 * noise
    return pipe, settings


@pytest.fixture(scope="module", params=[(family, kind) for family in FAMILIES for kind in KINDS], ids="-".join)
def saved(request, tmp_path_factory):
    """Family, kind, the folder or file that was written, and the image that the live adapters make."""
    family, kind = request.param
    pipe, settings = adapted(family, kind)
    path = tmp_path_factory.mktemp("saved") / "ink.safetensors"
    written = save_adapter(pipe.transformer, path, settings, {})
    return family, kind, written if kind == "dora" else written.parent, paint(pipe, family)


def test_a_fresh_pipeline_paints_the_same_and_comes_back(saved):
    family, kind, path, painted = saved
    pipe = tiny_pipeline(family)
    weights, plain = {name: one.clone() for name, one in pipe.transformer.state_dict().items()}, paint(pipe, family)
    before = torch.get_rng_state()
    load_lora(pipe, path, "ink")
    assert torch.equal(torch.get_rng_state(), before) or kind == "dora"
    torch.testing.assert_close(paint(pipe, family), painted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(painted, plain, atol=1e-3)

    pipe.set_adapters("ink", 0.5)
    half = paint(pipe, family)
    assert not torch.allclose(half, painted, atol=1e-3)
    pipe.set_adapters("ink", 1.0)
    torch.testing.assert_close(paint(pipe, family), painted, atol=1e-5, rtol=1e-5)

    unload_lora(pipe)
    after = pipe.transformer.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
    assert torch.equal(paint(pipe, family), plain)


def test_the_deltas_are_those_of_peft(saved, tmp_path):
    """PEFT itself, reading the folder it knows, changes every weight alike."""
    family, kind, path, _ = saved
    if kind == "dora":
        pytest.skip("diffusers' file, which PEFT doesn't read")
    pipe, bare = tiny_pipeline(family), tiny_pipeline(family).transformer
    load_lora(pipe, path, "ink")
    merged = peft.PeftModel.from_pretrained(bare, path).merge_and_unload()
    start = tiny_pipeline(family).transformer.state_dict()
    changed = 0
    for name, layer in adaptable_layers(merged).items():
        ours, delta = pipe.transformer.get_submodule(name), layer.weight - start[f"{name}.weight"]
        if hasattr(ours, "base_layer"):
            torch.testing.assert_close(ours.get_delta_weight("ink"), delta, atol=1e-5, rtol=1e-4)
            changed += 1
        else:
            assert not delta.any()
    assert changed > 3


def spoilt(path, folder, change, **settings):
    """A copy of a folder with other tensors or settings."""
    folder.mkdir()
    config = json.loads((path / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(change(load_file(path / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    return folder


def other_layer(tensors):
    return {key.replace("to_q", "to_z"): tensor for key, tensor in tensors.items()}


def without_one(tensors):
    return dict(list(tensors.items())[1:])


def one_more(tensors):
    return {**tensors, "base_model.model.proj_out.weight": torch.ones(2, 2)}


def as_it_is(tensors):
    return tensors


@pytest.mark.parametrize(
    ("change", "settings", "error", "words"),
    [
        (other_layer, {}, LoraMisfitError, r"no linear layer of it: .*to_z"),
        (without_one, {}, LoraMisfitError, r"1 are missing: .*"),
        (one_more, {}, LoraMisfitError, r"1 of \d+ keys .*proj_out\.weight"),
        (as_it_is, {"r": 3}, LoraFileError, r"has the shape|have no place"),
        (as_it_is, {"r": 0}, LoraFileError, "expected at least 1"),
        (as_it_is, {"alpha": None}, LoraFileError, "no alpha"),
        (as_it_is, {"rank_pattern": {"(a|b)*c": 2}}, LoraFileError, "expected names of layers"),
    ],
    ids=["layer", "missing", "more", "rank", "none", "alpha", "expression"],
)
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_what_does_not_fit_changes_nothing(kind, change, settings, error, words, tmp_path):
    trained, how = adapted("text_dit", kind)
    path = save_adapter(trained.transformer, tmp_path / "ink.safetensors", how, {}).parent
    pipe = tiny_pipeline("text_dit")
    with pytest.raises(error, match=words):
        load_lora(pipe, spoilt(path, tmp_path / "spoilt", change, **settings))
    assert not any(hasattr(module, "base_layer") for module in pipe.transformer.modules())
    assert not hasattr(pipe.transformer, "peft_config")


def test_ranks_and_alphas_of_single_layers_are_kept(tmp_path):
    """A layer with a rank and an alpha of its own, as the patterns of the configuration say."""
    net = tiny_pipeline("text_dit").transformer
    names = [name for name in adaptable_layers(net) if name.endswith(("to_q", "to_k"))]
    patterns = {"rank_pattern": {names[0]: 3}, "alpha_pattern": {names[1]: 7.0}}
    config = peft.LoHaConfig(r=2, alpha=4.0, target_modules=names, init_weights=False, **patterns)
    model = peft.get_peft_model(net, config)
    model.save_pretrained(tmp_path)
    pipe = tiny_pipeline("text_dit")
    load_lora(pipe, tmp_path, "ink")
    for name in names:
        theirs = model.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(pipe.transformer.get_submodule(name).get_delta_weight("ink"), theirs)


def test_kinds_do_not_stand_beside_each_other(tmp_path):
    paths = {}
    for kind in ("loha", "lora"):
        pipe, settings = adapted("text_dit", kind)
        written = save_adapter(pipe.transformer, tmp_path / kind / "ink.safetensors", settings, {})
        paths[kind] = written if kind == "lora" else written.parent
    for first, second in (("loha", "lora"), ("lora", "loha")):
        pipe = tiny_pipeline("text_dit")
        load_lora(pipe, paths[first], "one")
        with pytest.raises(LoraFileError, match="unload_lora"):
            load_lora(pipe, paths[second], "two")
    pipe = tiny_pipeline("text_dit")
    load_lora(pipe, paths["loha"], "one")
    with pytest.raises(LoraFileError, match="in use already"):
        load_lora(pipe, paths["loha"], "one")
    load_lora(pipe, paths["loha"], "two")
    pipe.set_adapters(["one", "two"], [0.5, 0.5])
    both = paint(pipe, "text_dit")
    pipe.set_adapters("one", 1.0)
    torch.testing.assert_close(paint(pipe, "text_dit"), both, atol=1e-4, rtol=1e-4)


def test_a_network_without_adapter_methods_has_none_left_behind(tmp_path):
    pipe = tiny_pipeline("pixart")
    before = set(vars(pipe.transformer))
    with pytest.raises(LoraMisfitError):
        load_lora(pipe, {"nowhere.lora_A.weight": torch.ones(1, 2), "nowhere.lora_B.weight": torch.ones(2, 1)})
    assert set(vars(pipe.transformer)) == before
