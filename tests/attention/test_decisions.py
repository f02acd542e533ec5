"""What a kind of call computes is decided once, and anew when grid, step, density or costs say otherwise."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit.attention import TokenGrid, decisions
from dit.attention.choices import Choice, Guards, StaysDense
from dit.attention.costs import AttentionCosts
from dit.attention.decisions import Decisions
from dit.attention.inputs import CallKind, Inputs
from dit.attention.map_cache import SAME, MapCache
from dit.attention.plan import AttentionPlan, PlanEntry
from dit.attention.planned_layer import PlannedLayer
from dit.runtime.families.tokens import TokenLayout
from dit.runtime.hooks import AttachError
from dit.runtime.state import StateStore
from dit.runtime.step_context import StepContext, next_run, step_scope

COSTS = AttentionCosts("made up", {"native float32": (1000.0, 2000.0), "sparse float32": (1000.0, 2000.0)}, 0.0, 0.0)
"""So slow that nothing but the share of pairs decides."""
TOPK = Choice("pooled_topk", {"keep": 0.25, "block": 64})


@pytest.fixture(autouse=True)
def _made_up_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "attention_costs", lambda device: COSTS)


def call(length: int = 1024, heads: int = 2, **other: Any) -> CallKind:
    tokens = torch.empty(1, length, heads, 64)
    return Inputs(tokens, tokens, tokens, **other).kind


def decide(plan: AttentionPlan, layout: TokenLayout | None = None) -> Decisions:
    note: Any = SimpleNamespace(layout=layout or TokenLayout((4, 16, 16)), reason="nobody knows")
    return Decisions(plan, MapCache(plan), note, 0, 2, "self", "thw")


def at(step: int, steps: int = 10) -> StepContext:
    return StepContext(1, step, steps, 1 - step / steps, 1.0)


def test_a_call_that_comes_again_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made = decide(AttentionPlan.of_entries([PlanEntry(TOPK, heads=(1,))], heads=2))
    first = made.of(call(), at(2))
    monkeypatch.setattr(AttentionPlan, "resolve", lambda *_: pytest.fail("resolved again"))
    monkeypatch.setattr(Decisions, "_pays", lambda *_: pytest.fail("weighed again"))
    assert made.of(call(), at(2)) is made.of(call(), at(7)) is first, "a plan that doesn't ask for the step"


def test_a_decision_follows_the_densities_that_are_learned() -> None:
    made = decide(AttentionPlan.uniform("pooled_topk", keep=0.25, block=64, correction="none"))
    grid, choice = TokenGrid(4, 16, 16), made.plan.choices[0]  # pyright: ignore[reportAttributeAccessIssue]
    assert made.of(call(), None).pays
    made.maps.note_density(choice, grid, 0.95)
    assert not made.of(call(), None).pays
    made.maps.note_density(choice, TokenGrid(1, 32, 32), 0.1)
    assert not made.of(call(), None).pays, "another grid's"
    version = made.maps.version
    made.maps.note_density(choice, grid, 0.95 * (1 - SAME / 2))
    assert made.maps.version == version, "about the same"
    made.maps.note_density(choice, grid, 0.5)
    assert made.of(call(), None).pays


def test_a_decision_follows_costs_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    made = decide(AttentionPlan.uniform("pooled_topk", keep=0.25, block=64, correction="none"))
    assert made.of(call(), None).pays
    dear = AttentionCosts("made up", {"native float32": (1000.0, 2000.0), "sparse float32": (9000.0, 9000.0)}, 0.0)
    monkeypatch.setattr(decisions, "attention_costs", lambda device: dear)
    assert not made.of(call(), None).pays


def test_a_resolution_change_is_decided_anew() -> None:
    """Grids of as many tokens, and back."""
    made = decide(AttentionPlan.uniform("svg_spatial", density=0.3, block=64))
    shapes = ((4, 16, 16), (1, 32, 32), (16, 8, 8), (4, 16, 16))
    for shape in shapes:
        made.note.layout = TokenLayout(shape)
        assert made.of(call(), None).grid == TokenGrid(*shape)
    made.note.layout = TokenLayout((4, 16, 17))
    with pytest.raises(StaysDense, match="another length"):
        made.of(call(), None)
    made.note.layout = None
    with pytest.raises(StaysDense, match="nobody knows"):
        made.of(call(), None)
    bound = decide(AttentionPlan.uniform("svg_spatial", density=0.3).regrid((4, 16, 16)))
    bound.of(call(), None)
    bound.note.layout = TokenLayout((1, 32, 32))
    for _ in range(2):
        with pytest.raises(AttachError, match="regrid"):
            bound.of(call(), None)


def test_guards_are_asked_at_every_step() -> None:
    guards = Guards(dense_first=2, dense_last=1, sigma_range=(0.0, 0.7), min_tokens=100)
    made = decide(AttentionPlan.uniform("svg_spatial", density=0.3, guards=guards))
    sparse = []
    for _ in range(2):  # as it was decided, too
        for step in range(10):
            try:
                made.of(call(), at(step))
                sparse.append(step)
            except StaysDense:
                pass
    assert sparse == [3, 4, 5, 6, 7, 8] * 2
    with pytest.raises(StaysDense, match="no step context"):
        made.of(call(), None)
    with pytest.raises(StaysDense, match="min_tokens"):
        made.of(call(64), at(5))
    with pytest.raises(StaysDense, match="causal"):
        made.of(call(is_causal=True), at(5))
    assert made.of(call(), at(5, 10)).pays


def test_parts_of_a_plan_are_found_by_noise_level() -> None:
    entries = [PlanEntry(TOPK, sigma=(0.5, 2.0)), PlanEntry(Choice("svg_spatial"), sigma=(0.0, 0.49))]
    made = decide(AttentionPlan.of_entries(entries))
    names = [made.of(call(), at(step)).groups[0].choice.pattern for step in (0, 4, 7, 9, 2)]
    assert names == ["pooled_topk", "pooled_topk", "svg_spatial", "svg_spatial", "pooled_topk"]


def test_refreshes_and_corrections_count() -> None:
    def pays(**options: Any) -> bool:
        plan = AttentionPlan.uniform("svg_spatial", density=0.6, block=64, **options)
        return decide(plan).of(call(), at(5)).pays

    assert pays(correction="none")
    assert pays(correction="residual", correction_params={"refresh_every": 5})
    assert not pays(correction="residual", correction_params={"refresh_every": 2})
    assert not pays(correction="residual", correction_params={"refresh_sigmas": (0.9, 0.7, 0.5, 0.3)})
    kept = ("residual", {"refresh_every": 5})
    parts = [PlanEntry(Choice("svg_spatial", {"density": 0.6, "block": 64 + number}, *kept), (low, low + 0.19))
             for number, low in enumerate((0.0, 0.2, 0.4, 0.6, 0.8))]  # fmt: skip
    made = decide(AttentionPlan.of_entries(parts))
    assert not made.of(call(), at(5)).pays, "the first of each two steps refreshes"
    assert made.of(call(), at(50, 100)).pays


# ------------------------------------------------------------------------- patterns that follow the step


def frames_layer(plan: AttentionPlan, frames: int) -> PlannedLayer:
    note: Any = SimpleNamespace(layout=TokenLayout((frames, 2, 3)), reason="")

    def dense(query: Tensor, *_: Any) -> Tensor:
        return torch.zeros_like(query)

    store = StateStore()
    return PlannedLayer(0, "layer", 0, 1, "self", "thw", plan, note, MapCache(plan), store, "planned_attention", dense)


def test_anchors_of_lvsa_follow_the_step() -> None:
    """A frame is an anchor, which all frames see, at every fourth step."""
    frames, size = 8, 6
    lvsa = {"window": 0, "first": 0, "interval": 4}
    layer = frames_layer(AttentionPlan.uniform("lvsa", **lvsa, offset="step", correction="none"), frames)
    tokens = torch.randn(1, frames * size, 1, 4)
    inputs, run = Inputs(tokens, tokens, tokens), next_run()
    for step in range(20):
        with step_scope(StepContext(run, step, 20, 1 - step / 20, 1.0)):
            out = layer(inputs)
        fixed = frames_layer(AttentionPlan.uniform("lvsa", **lvsa, offset=step, correction="none"), frames)
        torch.testing.assert_close(out, fixed(inputs))
    assert len(layer.maps) == frames, "one map for each of the steps after which they repeat"
    assert layer.statistics.report()["density"] == pytest.approx(2 / frames)
    layer(inputs)
    assert layer.statistics.reasons == {"no step context": 1}
    still = frames_layer(AttentionPlan.uniform("lvsa", **lvsa, correction="none"), frames)
    for step in (0, 1):
        with step_scope(StepContext(run, step, 20, 0.5, 1.0)):
            still(inputs)
    assert len(still.maps) == 1
