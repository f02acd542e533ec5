import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from dit.runtime.state import StateStore, layer_key, named_layers, unwrap
from dit.runtime.step_context import StepContext, current_step, next_run, step_scope
from tests.pipes.tiny import tiny_components


def at(run: int, step: int = 0) -> StepContext:
    return StepContext(run, step, 4, 0.5, 500.0)


def test_scopes_nest_and_end() -> None:
    assert current_step() is None
    with step_scope(at(1)), step_scope(at(2)) as inner:
        assert current_step() is inner
    with pytest.raises(RuntimeError, match="inside"), step_scope(at(1)):
        raise RuntimeError("inside")
    assert current_step() is None
    assert next_run() < next_run()


@pytest.mark.parametrize("step", [-1, 4])
def test_step_outside_the_run(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} is outside the run: expected 0 to 3"):
        at(1, step)


def test_branches_layers_and_mechanisms_are_apart() -> None:
    store = StateStore()
    places = [(a, b, c) for a in "mn" for b in ("x", "y") for c in ("cond", "uncond")]
    for number, place in enumerate(places):
        store.set(*place, torch.tensor(number))
    assert [store.get(*place).item() for place in places] == list(range(8))
    assert store.get("m", "x", "all") is None
    store.drop("m")
    assert len(store) == 4
    assert [(layer, branch) for layer, branch, _ in store.entries("n")] == [place[1:] for place in places[4:]]


def test_a_new_run_finds_nothing_of_the_last() -> None:
    store = StateStore()
    with step_scope(at(1)):
        store.set("m", "layer", "all", torch.ones(3))
    with step_scope(at(1, step=1)):
        assert store.get("m", "layer", "all") is not None
    with step_scope(at(2)):
        assert store.get("m", "layer", "all") is None
        store.set("m", "layer", "all", torch.zeros(3))
    assert len(store) == 1
    assert not store.reset(2)
    assert store.reset(None)
    assert len(store) == 0


def test_bytes_count_storages_once() -> None:
    store = StateStore()
    tensor = torch.zeros(10, 10)
    store.set("m", "a", "all", {"whole": tensor, "rows": (tensor[:2], [tensor[2:]])})
    store.set("n", "a", "all", torch.zeros(5, dtype=torch.bfloat16))
    assert store.nbytes("m") == 400
    assert store.nbytes() == 410


def test_offload_moves_and_get_brings_back() -> None:
    store = StateStore()
    store.set("m", "a", "all", (torch.ones(4), {"k": torch.ones(2)}))
    store.offload("meta")
    assert {tensor.device.type for tensor in (store.get("m", "a", "all")[0], store.get("m", "a", "all")[1]["k"])} == {
        "meta"
    }
    store.set("m", "a", "all", (torch.ones(4), 3))
    store.offload("cpu")
    value = store.get("m", "a", "all", device="cpu")
    assert torch.equal(value[0], torch.ones(4))
    assert value[1] == 3


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("blocks.0.attn.to_q", "blocks.0.attn.to_q"),
        ("_orig_mod.blocks.0.attn", "blocks.0.attn"),
        ("blocks.0._orig_mod.attn.to_q.base_layer", "blocks.0.attn.to_q"),
        ("base_model.model.blocks.0.attn.to_q.base_layer", "blocks.0.attn.to_q"),
        ("module._orig_mod.blocks.1", "blocks.1"),
        ("blocks.0.module.net", "blocks.0.module.net"),
    ],
)
def test_layer_keys(name: str, key: str) -> None:
    assert layer_key(name) == key


def test_keys_outlive_lora_and_compile() -> None:
    model = tiny_components()["transformer"]
    before = [name for name, module in named_layers(model) if isinstance(module, nn.Linear)]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"]), model)
    compiled = torch.compile(model)
    layers = dict(named_layers(compiled))
    assert set(before) <= set(layers)
    assert type(layers["transformer_blocks.0.attn.to_q"]).__name__ == "Linear"
    assert hasattr(layers["transformer_blocks.0.attn.to_q"], "lora_A"), "the wrapper, not what it wraps"
    assert unwrap(compiled) is model
    assert unwrap(model) is model
