"""The mechanism: guards, masks, sinks, steps, compiled code, gradients, resolutions, other mechanisms."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dit.attention import TokenGrid, attention_reference, pattern
from dit.attention.choices import StaysDense
from dit.attention.inputs import Inputs
from dit.attention.key_masks import read_mask
from dit.attention.map_cache import KEPT_MAPS, MapCache, with_sinks
from dit.attention.plan import FIRST_FRAME, AttentionPlan, Choice, Guards, PlanEntry
from dit.attention.sequences import grid_of
from dit.runtime.diffusers_compat import active_attention_backend, attention_backend_names
from dit.runtime.families.tokens import TokenLayout
from dit.runtime.hooks import AttachError
from dit.runtime.step_context import StepContext, next_run, step_scope
from tests.attention.tiny_networks import call, case
from tests.families.networks import tiny_transformer

SKIP: dict[str, Any] = {"block": 4, "correction": "none"}


def wan_inputs(height: int = 8, width: int = 12, frames: int = 2, batch: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(batch, 4, frames, height, width, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, 5, 16, generator=generator),
    }


def at(step: int, steps: int = 10, branch: str = "all", run: int = 0) -> StepContext:
    return StepContext(run or RUN, step, steps, 1 - step / steps, 1000.0 - step, branch)


RUN = next_run()


# ------------------------------------------------------------------------------------ guards


def test_guards_keep_steps_and_layers_dense() -> None:
    model, inputs = tiny_transformer("wan"), wan_inputs()
    plain = call(model, inputs)
    guards = Guards(dense_first=0.3, dense_last=1, dense_layers=(-1,), sigma_range=(0.0, 0.6))
    with AttentionPlan.uniform("skip", **SKIP, guards=guards).attach(model) as handle:
        changed = []
        for step in range(10):
            with step_scope(at(step)):
                changed.append(not torch.equal(call(model, inputs), plain))
        report = handle.report()
    assert [step for step in range(10) if changed[step]] == [4, 5, 6, 7, 8]
    assert report["layers"]["blocks.1.attn1"]["reasons"] == {"the layer is dense": 10}
    reasons = report["layers"]["blocks.0.attn1"]["reasons"]
    assert reasons == {"steps at the ends are dense": 4, "noise levels outside of sigma_range are dense": 1}


def test_a_plan_that_needs_the_step_says_that_nobody_tells_it() -> None:
    model: Any = tiny_transformer("wan")
    with AttentionPlan.uniform("skip", **SKIP, guards=Guards(dense_first=0.5)).attach(model) as handle:
        call(model, wan_inputs())
        assert handle.report()["dense_reasons"] == {"no step context": 2}


def test_short_sequences_are_dense() -> None:
    model: Any = tiny_transformer("wan")
    with AttentionPlan.uniform("skip", **SKIP, guards=Guards(min_tokens=49)).attach(model) as handle:
        call(model, wan_inputs())  # 2 x 4 x 6 tokens
        call(model, wan_inputs(frames=3))
        assert (handle.report()["sparse"], handle.report()["dense"]) == (2, 2)


def test_sinks_are_seen_by_all() -> None:
    grid = TokenGrid(3, 2, 4, 3, "first")
    plain = pattern("skip", grid, block=5)
    found = with_sinks(plain, (FIRST_FRAME,), False).to_mask()[0, 0]
    first = slice(grid.visual_start, grid.visual_start + 8)
    assert bool(found[:, first].all())
    assert not bool(found[3:, 18:].any()), "the last frame is seen by text only"
    rows = with_sinks(plain, (("blocks", 4, 5),), True).to_mask()[0, 0]
    assert bool(rows[3 + 20 : 3 + 24].all()), "its queries see all"
    assert bool(rows[:, 3 + 20 : 3 + 24].all())
    assert with_sinks(plain, (), True) is plain


# ------------------------------------------------------------------------------------- masks


def masks_of_keys() -> dict[str, Tensor]:
    keys = torch.tensor([[1, 1, 1, 0, 0, 1], [1] * 6], dtype=torch.bool)
    return {
        "rows of keys": keys,
        "four axes": keys[:, None, None],
        "expanded": keys[:, None, None].expand(2, 1, 6, 6),
        "repeated": keys[:, None, None].repeat(1, 3, 6, 1),
        "added": torch.where(keys, 0.0, -1e4)[:, None, None],
        "both sides": keys[:, None, None] & keys[:, None, :, None],
    }


@pytest.mark.parametrize("name", masks_of_keys())
def test_masks_of_keys_are_read(name: str) -> None:
    found = read_mask(masks_of_keys()[name], 6, 6, 2)
    assert torch.equal(found.keys, masks_of_keys()["rows of keys"])
    assert (found.rows is not None) == (name == "both sides")


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.ones(1, 1, 6, 6, dtype=torch.bool).tril(), "pairs"),
        (torch.full((1, 1, 1, 6), -0.5), "values"),
        (torch.ones(1, 1, 6, 7, dtype=torch.bool), "shape"),
        (torch.stack([torch.ones(1, 1, 6), torch.ones(1, 1, 6).tril()], 1).bool()[..., :1, :], "head"),
        (torch.zeros(2, 1, 1, 6, dtype=torch.bool), "no key"),
    ],
)
def test_other_masks_stay_dense(mask: Tensor, reason: str) -> None:
    with pytest.raises(StaysDense, match=reason):
        read_mask(mask, 6, 6, 2)


def test_a_mask_of_all_keys_is_none() -> None:
    assert read_mask(torch.ones(2, 1, 1, 6, dtype=torch.bool), 6, 6, 2) == (None, None)
    assert read_mask(None, 6, 6, 2) == (None, None)


# ------------------------------------------------------------------------------------- grids


def test_a_sequence_that_is_no_grid_stays_dense() -> None:
    layout = TokenLayout((2, 3, 4), 5, "before", 2)
    assert grid_of(layout, "joint", "thw", 31) == TokenGrid(2, 3, 4, 5, "first", 2)
    assert grid_of(layout, "self", "thw", 26) == TokenGrid(2, 3, 4, extra_length=2)
    assert grid_of(layout, "self", "hw", 12) == TokenGrid(1, 3, 4)
    ragged = TokenLayout((2, 3, 4), 5, "before", 0, (3, 5))
    for wrong, kind, axes, length in (
        (layout, "joint", "thw", 30),
        (layout, "self", "thw", 31),
        (layout, "self", "t", 2),
        (TokenLayout((2, 3, 4), 5, "unknown"), "joint", "thw", 29),
        (ragged, "joint", "thw", 29),
    ):
        with pytest.raises(StaysDense):
            grid_of(wrong, kind, axes, length)
    assert grid_of(TokenLayout((2, 3, 4), 5, "after", 0, (3, 5)), "joint", "thw", 27).text_length == 3


def test_a_resolution_of_as_many_tokens_gets_its_own_map() -> None:
    """8 x 12 and 12 x 8 latents make sequences of one length."""
    model, sizes = tiny_transformer("wan"), ((8, 12), (12, 8), (4, 24), (8, 12))
    plan = AttentionPlan.uniform("neighborhood", window=(1, 3, 3), correction="none")
    alone = []
    for height, width in sizes:
        with plan.attach(model):
            alone.append(call(model, wan_inputs(height, width)))
    with plan.attach(model) as handle:
        for (height, width), expected in zip(sizes, alone, strict=True):
            assert torch.equal(call(model, wan_inputs(height, width)), expected)
        assert handle.report()["maps"] == 3


def test_kept_maps_are_bounded() -> None:
    plan = AttentionPlan.uniform("skip", **SKIP)
    tokens = torch.zeros(1, 4, 1, 4)
    maps, inputs = MapCache(plan), Inputs(tokens, tokens, tokens)
    for width in range(1, KEPT_MAPS + 5):
        maps.get(plan.choices[0], TokenGrid(1, 1, width), inputs)
    assert len(maps) == KEPT_MAPS
    kept = maps.get(plan.choices[0], TokenGrid(1, 1, 9), inputs)
    assert kept is maps.get(plan.choices[0], TokenGrid(1, 1, 9), inputs)
    assert kept.queries.grid == TokenGrid(1, 1, 9)


def test_a_plan_for_one_grid_refuses_others() -> None:
    model: Any = tiny_transformer("wan")
    plan = AttentionPlan.uniform("skip", **SKIP).for_model(model, (2, 4, 6))
    with plan.attach(model):
        call(model, wan_inputs())
        with pytest.raises(AttachError, match=r"\(2, 4, 6\).*\(2, 6, 4\).*regrid"):
            call(model, wan_inputs(12, 8))
    with plan.regrid((2, 6, 4)).attach(model) as handle:
        call(model, wan_inputs(12, 8))
        assert handle.report()["sparse"] == 2


# ------------------------------------------------------------------------- heads and branches


def test_heads_compute_what_the_plan_says_of_each() -> None:
    model, inputs = tiny_transformer("wan"), wan_inputs(batch=2)
    seen: dict[str, tuple[Tensor, ...]] = {}
    entries = [PlanEntry(Choice("skip", {"block": 4}), layers=(0,), heads=(1,))]
    with AttentionPlan.of_entries(entries, layers=2, heads=2).attach(model) as handle:
        mechanism: Any = handle.mechanism
        layer = mechanism.layers[0]
        sparse = layer._sparse

        def record(inputs: Any, *rest: Any) -> Tensor:
            out = sparse(inputs, *rest)
            seen["call"] = (inputs.query, inputs.key, inputs.value, out)
            return out

        layer._sparse = record
        call(model, inputs)
        report = handle.report()["layers"]
    query, key, value, out = seen["call"]
    exact = attention_reference(query, key, value)
    torch.testing.assert_close(out[:, :, 0], exact[:, :, 0])
    assert bool((out[:, :, 1] == 0).all()), "without text, skipped heads are zero"
    assert report["blocks.0.attn1"]["density"] == 0.5
    assert report["blocks.1.attn1"]["reasons"] == {"the plan says dense": 1}


def test_a_correction_keeps_its_state_by_branch() -> None:
    model: Any = tiny_transformer("wan")
    inputs = {"cond": wan_inputs(), "uncond": {**wan_inputs(), "encoder_hidden_states": torch.ones(1, 5, 16)}}
    plan = AttentionPlan.uniform("skip", block=4, correction="residual", correction_params={"refresh_every": 4})

    def run(*branches: str) -> dict[str, list[Tensor]]:
        number, found = next_run(), {branch: [] for branch in branches}
        with plan.attach(model) as handle:
            for step in range(6):
                for branch in branches:
                    with step_scope(at(step, branch=branch, run=number)):
                        found[branch].append(call(model, inputs[branch]))
            assert handle.report()["state_bytes"] > 0
        return found

    both, cond = run("cond", "uncond"), run("cond")
    assert all(torch.equal(*pair) for pair in zip(both["cond"], cond["cond"], strict=True))
    exact = call(model, inputs["cond"])
    torch.testing.assert_close(both["cond"][0], exact)  # a refresh computes the dense result


def test_corrections_ask_step_caches_for_their_steps() -> None:
    model: Any = tiny_transformer("wan")
    plan = AttentionPlan.uniform("skip", block=4, correction="residual", correction_params={"refresh_every": 4})
    with plan.attach(model) as handle:
        wanted = []
        for step in range(9):
            with step_scope(at(step)):
                wanted.append(handle.mechanism.needs_step(handle, at(step)))
                call(model, wan_inputs())
    assert [step for step in range(1, 9) if wanted[step]] == [4, 8]


# ----------------------------------------------------------------------------- compiled code


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["wan", "cogvideox", "flux"])
def test_compiles_as_one_graph(name: str, backend: str) -> None:
    model, inputs = case(name)
    plain = call(model, inputs)
    torch.compiler.reset()
    with AttentionPlan.uniform("skip", **SKIP).attach(model) as handle:
        expected = call(model, inputs)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        sparse = handle.report()["sparse"]
        for _ in range(2):
            torch.testing.assert_close(call(compiled, inputs), expected)
        assert handle.report()["sparse"] == 3 * sparse, "counted when the graph runs"
    assert torch.equal(call(model, inputs), plain)
    torch.compiler.reset()


def test_compiled_code_reads_grid_and_step_when_it_runs() -> None:
    model: Any = tiny_transformer("wan")
    torch.compiler.reset()
    plan = AttentionPlan.uniform("neighborhood", window=(1, 3, 3), correction="none", guards=Guards(dense_first=5))
    with plan.attach(model):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for size in ((8, 12), (12, 8)):
            for step in (0, 7):
                with step_scope(at(step)):
                    inputs = wan_inputs(*size)
                    torch.testing.assert_close(call(compiled, inputs), call(model, inputs))
    torch.compiler.reset()


def test_gradients_pass_through_compiled_code() -> None:
    model, inputs, found = tiny_transformer("pixart"), case("pixart")[1], []
    plan = AttentionPlan.uniform("neighborhood", window=(1, 3, 3), correction="none", kernel="reference")
    torch.compiler.reset()
    for compiled in (False, True):
        with plan.attach(model):
            runs = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
            model.zero_grad()
            runs(**inputs)[0].square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.compiler.reset()
    assert len(found[0]) == len(found[1]) == len(list(model.parameters()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------ others


def test_the_global_backend_and_the_list_of_names_stay() -> None:
    model: Any = tiny_transformer("wan")
    names = attention_backend_names()
    before = active_attention_backend()
    with AttentionPlan.uniform("skip", **SKIP).attach(model):
        call(model, wan_inputs())
        assert (active_attention_backend(), attention_backend_names()) == (before, names)
        assert all("tessera" in one.processor._attention_backend.value for one in [model.blocks[0].attn1])
        assert model.blocks[0].attn2.processor._attention_backend is None
    assert (active_attention_backend(), attention_backend_names()) == (before, names)


def test_two_plans_refuse_each_other() -> None:
    model: Any = tiny_transformer("wan")
    with (
        AttentionPlan.uniform("skip", **SKIP).attach(model),
        pytest.raises(AttachError, match="already has a mechanism of this name"),
    ):
        AttentionPlan.uniform("dense").attach(model)


def test_measured_error_is_that_of_the_outputs() -> None:
    model: Any = tiny_transformer("wan")
    with AttentionPlan.uniform("skip", **SKIP).attach(model, measure_error=16) as handle:
        call(model, wan_inputs())
        assert handle.report()["error"] == pytest.approx(1.0)  # zeros instead of the output
    with AttentionPlan.uniform("skip", **SKIP).attach(model) as handle:
        call(model, wan_inputs())
        assert handle.report()["error"] is None


def test_clusters_of_a_branch_are_where_the_next_step_starts() -> None:
    model: Any = tiny_transformer("wan")
    plan = AttentionPlan.uniform("svg2", query_clusters=4, key_clusters=6, iterations=3, correction="none")
    with plan.attach(model) as handle:
        for step in range(2):
            with step_scope(at(step)):
                call(model, wan_inputs())
        kept = handle.state.entries("planned_attention")
        assert [(layer, branch) for layer, branch, _ in kept] == [
            (f"blocks.{index}.attn1#None.{plan.choices[0]}.pattern", "all") for index in range(2)
        ]
        assert all(value["clusters"].query.shape[2] == 4 for _, _, value in kept)


@pytest.mark.parametrize("name", ["pooled_topk", "sol", "subblock", "draft", "cube", "svg", "sale", "antidiagonal"])
def test_online_patterns_leave_padded_text_out(name: str) -> None:
    """A network with masked text: what the padding holds changes nothing."""
    model, inputs = case("krea2")
    other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    other["encoder_hidden_states"][0, 3:] += 1
    params = {"density": 0.6} if name == "svg" else {}
    with AttentionPlan.uniform(name, correction="none", **params).attach(model) as handle:
        torch.testing.assert_close(call(model, other), call(model, inputs))
        assert handle.report()["sparse"] == 4
