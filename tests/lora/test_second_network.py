"""LoRA files on the second network of a pipeline with two (Wan 2.2), as by diffusers' own loader."""

import pytest
import torch

from dit.lora.adapters import AdapterSettings, add_adapter, save_adapter
from dit.lora.timestep_experts import TimestepArgument, readers_of
from pipelines import load_lora, unload_lora
from tests.families.tiny import tiny_call, tiny_pipeline
from tests.families.tiny_video_families import BUILDERS

SECOND = "transformer_2"


def generate(pipe):
    return torch.as_tensor(pipe(**{**tiny_call("wan"), "num_inference_steps": 4, "output_type": "np"}).frames)


@pytest.fixture(scope="module")
def pipe():
    return BUILDERS["wan22"]()


def written(folder, name, algorithm="lora", seed=1):
    """Writes an adapter of the tiny Wan network with random values."""
    network, settings = BUILDERS["wan22"]().transformer_2, AdapterSettings(algorithm=algorithm, rank=2)
    add_adapter(network, settings, timestep=TimestepArgument() if algorithm == "td_lora" else None)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return save_adapter(network, folder / name, settings, {})


def adapted(pipe):
    return {name for name in ("transformer", SECOND) if getattr(getattr(pipe, name), "peft_config", None)}


def test_it_goes_where_diffusers_puts_it(pipe, tmp_path):
    file = written(tmp_path, "one.safetensors")
    bare = generate(pipe)
    pipe.load_lora_weights(str(file), load_into_transformer_2=True)
    theirs = generate(pipe)
    pipe.unload_lora_weights()
    for choice in ({"network": SECOND}, {"load_into_transformer_2": True}):
        load_lora(pipe, file, **choice)
        assert adapted(pipe) == {SECOND}
        assert torch.equal(generate(pipe), theirs)
        unload_lora(pipe)
        assert adapted(pipe) == set()
        assert torch.equal(generate(pipe), bare)
    assert not torch.equal(theirs, bare)


@pytest.mark.parametrize("algorithm", ["loha", "lokr", "td_lora"])
def test_other_adapters_go_there_too(algorithm, pipe, tmp_path):
    file = written(tmp_path, "other" if algorithm != "td_lora" else "other.safetensors", algorithm)
    bare = generate(pipe)
    load_lora(pipe, file, network=SECOND)
    assert not torch.equal(generate(pipe), bare)
    assert not readers_of(pipe.transformer)
    unload_lora(pipe)
    assert torch.equal(generate(pipe), bare)
    assert not readers_of(pipe.transformer_2)


def test_each_network_may_have_its_own(pipe, tmp_path):
    files = [written(tmp_path, f"{seed}.safetensors", seed=seed) for seed in (1, 2)]
    load_lora(pipe, files[0], "noisy")
    first = generate(pipe)
    load_lora(pipe, files[1], "clean", network=SECOND)
    assert adapted(pipe) == {"transformer", SECOND}
    both = generate(pipe)
    pipe.set_adapters(["noisy", "clean"], [1.0, 0.0])
    assert torch.equal(generate(pipe), first)
    pipe.set_adapters(["noisy", "clean"], [1.0, 1.0])
    assert torch.equal(generate(pipe), both)
    unload_lora(pipe)
    assert adapted(pipe) == set()


def test_what_names_no_network_is_refused(pipe, tmp_path):
    file = written(tmp_path, "one.safetensors")
    for refused, said in (
        ({"network": "unet"}, "network='unet'.*transformer or transformer_2"),
        ({"network": "transformer", "load_into_transformer_2": True}, "name different networks"),
    ):
        with pytest.raises(ValueError, match=said):
            load_lora(pipe, file, **refused)
    with pytest.raises(ValueError, match="this WanPipeline has no such network"):
        load_lora(tiny_pipeline("wan"), file, network=SECOND)
    assert adapted(pipe) == set()
