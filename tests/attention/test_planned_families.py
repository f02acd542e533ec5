"""A plan on a tiny network of every family: attached in one call, dense to the last bit, gone without a trace."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dit.attention.decisions import Decision
from dit.attention.grid import TokenGrid
from dit.attention.inputs import Inputs
from dit.attention.plan import AttentionPlan
from dit.attention.planned_layer import PlannedLayer
from dit.runtime.families import family_of
from dit.runtime.hooks import AttachError
from tests.attention.tiny_networks import NAMES, SPARSE, call, case
from tests.families.networks import tiny_transformer

SKIP = {"block": 4, "correction": "none"}


def test_there_are_more_than_twenty() -> None:
    assert len(SPARSE) >= 20
    assert {"ltx2", "hunyuan_video15", "qwen_image", "kandinsky5", "chroma", "krea2"} <= set(SPARSE)


@pytest.mark.parametrize("name", NAMES)
def test_dense_plan_and_detaching_change_no_bit(name: str) -> None:
    model, inputs = case(name)
    before = call(model, inputs)
    processors = [getattr(part, "processor", None) for part in model.modules()]
    with AttentionPlan.uniform("dense").attach(model) as handle:
        assert torch.equal(call(model, inputs), before)
        report = handle.report()
        assert report["sparse"] == 0
        assert report["dense"] == sum(report["dense_reasons"].values()) > 0
    assert torch.equal(call(model, inputs), before)
    assert [getattr(part, "processor", None) for part in model.modules()] == processors
    assert not any(vars(one).get("_attention_backend") for one in processors if hasattr(one, "__dict__"))


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_plan_reaches_every_layer_among_image_tokens(name: str) -> None:
    model, inputs = case(name)
    before = call(model, inputs)
    with AttentionPlan.uniform("skip", **SKIP).attach(model) as handle:
        after = call(model, inputs)
        report = handle.report()
    assert not torch.equal(after, before)
    assert after.isfinite().all()
    layers = family_of(model).attention_layers(model)
    wanted = [layer.name for layer in layers if layer.kind in ("self", "joint") and layer.axes in ("thw", "hw")]
    assert [one for one, found in report["layers"].items() if found["sparse"]] == wanted
    assert all(one["density"] < 1 for one in report["layers"].values() if one["sparse"])
    assert not report["unreached"]


@pytest.mark.parametrize("name", SPARSE)
def test_a_full_map_gives_what_dense_attention_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels and masks run: the map visits every block, and doesn't say so."""
    model, inputs = case(name)
    before = call(model, inputs)
    monkeypatch.setattr("dit.attention.block_map.BlockMap.is_dense", property(lambda self: False))
    plan = AttentionPlan.uniform("skip", **SKIP, guards=None)
    monkeypatch.setattr("dit.attention.map_cache.pattern", full_pattern)
    with plan.attach(model) as handle:
        after = call(model, inputs)
        assert handle.report()["density"] == 1.0
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def full_pattern(name: str, grid: TokenGrid, **params: Any) -> Any:
    from dit.attention.patterns import pattern

    return pattern("dense", grid, block=4)


@pytest.mark.parametrize("name", SPARSE)
def test_exact_tokens_are_those_that_the_latents_do_not_change(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = case(name)
    seen: list[tuple[TokenGrid, Tensor]] = []
    sparse = PlannedLayer._sparse

    def record(self: PlannedLayer, inputs: Inputs, decision: Decision, *rest: Any) -> Tensor:
        if self.index == first:
            seen.append((decision.grid, inputs.value))
        return sparse(self, inputs, decision, *rest)

    monkeypatch.setattr(PlannedLayer, "_sparse", record)
    row = family_of(model)
    trunk = row.blocks(model, refiners=False)[0][0]
    names = [layer.name for layer in row.attention_layers(model) if layer.kind in ("self", "joint", "unknown")]
    first = next(index for index, one in enumerate(names) if one.startswith(trunk))
    argument = row.latent_argument
    latents = inputs[argument]
    other = [one + 1 for one in latents] if isinstance(latents, list) else latents + 1
    with AttentionPlan.uniform("skip", **SKIP).attach(model):
        call(model, inputs)
        count = len(seen)
        call(model, {**inputs, argument: other})
    grid = seen[0][0]
    changed = (seen[0][1] != seen[count][1]).flatten(2).any(-1).any(0)  # (N,)
    for kind, start, stop in grid.segments:
        if kind != "extra":  # padding of images may have seen them in a refiner
            assert bool((changed[start:stop] == (kind == "visual")).all()), kind


def test_linear_attention_is_refused() -> None:
    with pytest.raises(AttachError, match=r"no layer of transformer_blocks\.0\.attn1.*softmax"):
        AttentionPlan.uniform("skip", **SKIP).attach(tiny_transformer("sana"))
