"""Corrections: what they give against slow definitions, when they refresh, and how much nearer to dense they come."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apps.benchmarks.attention_corrections import between_steps_errors, left_out_errors
from apps.benchmarks.run import run
from dit.attention import BlockMap, Layout, TokenGrid, attention_reference, block_sparse_attention
from dit.attention.block_map import make_block_map
from dit.attention.corrections import Correction, CorrectionCall, StateEntry, correction, correction_names
from dit.attention.corrections.blocks import gather_blocks, scatter_blocks
from dit.attention.corrections.pooled import pooled_tail
from dit.attention.kernels.contract import Tail
from dit.attention.layout import cluster_layout, raster_layout, tile_layout
from dit.runtime.state import StateStore
from dit.runtime.step_context import StepContext, next_run


def make_call(
    query: Tensor, key: Tensor, value: Tensor, block_map: BlockMap, key_mask: Tensor | None = None, **where: object
) -> CorrectionCall:
    """Return a call that the reference kernel computes."""

    def sparse(*, tail: Tail | None = None, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
        out, lse = block_sparse_attention(
            query, key, value, block_map, kernel="reference", key_mask=key_mask, tail=tail, return_lse=True
        )
        return out, lse if return_lse else None

    def dense(*, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
        out, lse = attention_reference(query, key, value, key_mask, return_lse=True)
        return out, lse if return_lse else None

    scale = query.shape[-1] ** -0.5
    return CorrectionCall(query, key, value, block_map, scale, sparse, dense, key_mask, **where)  # pyright: ignore


def draw(seed: int, grid: TokenGrid, layout: str, heads: int = 2, width: int = 8) -> CorrectionCall:
    """Draw a small call: a random map over equal, ragged or per-head blocks, some keys dead."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(2, grid.length, heads, width, generator=generator)

    layouts = {
        "raster": lambda: raster_layout(grid, 5),
        "tile": lambda: tile_layout(grid, (2, 2, 3)),
        "cluster": lambda: cluster_layout(
            grid, torch.randint(0, 4, (2, heads, grid.visual_length), generator=generator), 5
        ),
    }
    chosen: Layout = layouts[layout]()
    count = chosen.visual_count
    visits = torch.rand(2, heads, count, count, generator=generator) < 0.4
    key_mask = torch.rand(2, grid.length, generator=generator) < 0.8
    return make_call(normal(), normal(), normal(), make_block_map(chosen, visits), key_mask)


GRIDS = st.builds(
    lambda t, h, w, text: TokenGrid(t, h, w, text, "first" if text else "none"),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 3),
)
LAYOUTS = st.sampled_from(["raster", "tile", "cluster"])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), GRIDS, LAYOUTS)
def test_pooled_tail_equals_a_softmax_with_one_term_for_each_block_left_out(
    seed: int, grid: TokenGrid, layout: str
) -> None:
    call = draw(seed, grid, layout)
    expected = slow_pooled_tail(call)
    assert torch.allclose(correction("pooled_tail")(call), expected, atol=1e-5)


def slow_pooled_tail(call: CorrectionCall, centroid: bool = False) -> Tensor:
    """Compute the corrected output query by query, in float64."""
    out = torch.zeros_like(call.query)
    queries, keys = call.block_map.queries.block_of(), call.block_map.keys.block_of()
    for b, n, k in torch.cartesian_prod(*(torch.arange(size) for size in call.query.shape[:3])).tolist():
        of_queries, of_keys = queries[b % len(queries), k % queries.shape[1]], keys[b % len(keys), k % keys.shape[1]]
        visited = call.block_map.visits[b % len(call.block_map.visits), k % call.block_map.visits.shape[1]]
        alive = call.key_mask[b] if call.key_mask is not None else torch.ones_like(of_keys, dtype=torch.bool)
        q, key, value = (x.double() for x in (call.query[b, n, k], call.key[b, :, k], call.value[b, :, k]))
        own = of_queries[n]
        means = torch.stack(
            [key[(of_keys == j) & alive].mean(0) for j in range(call.block_map.keys.visual_count)]
        ).nan_to_num()
        counts = [int(((of_keys == j) & alive).sum()) for j in range(call.block_map.keys.visual_count)]
        full = [j for j, one in enumerate(counts) if one]
        center = means[full].mean(0) if full else torch.zeros_like(q)
        terms = [(key[j] @ q, 1, value[j]) for j in range(len(key)) if alive[j] and visited[own, of_keys[j]]]
        for j in full:
            if not visited[own, j]:
                mean_query = call.query[b, :, k].double()[of_queries == own].mean(0)
                score = (means[j] - center) @ mean_query + center @ q if centroid else means[j] @ q
                terms.append((score, counts[j], value[(of_keys == j) & alive].mean(0)))
        if terms:
            weights = torch.tensor([count * (score * call.scale).exp() for score, count, _ in terms])
            out[b, n, k] = (weights[:, None] * torch.stack([one for *_, one in terms])).sum(0) / weights.sum()
    return out


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), GRIDS, LAYOUTS)
def test_centroid_mode_scores_pooled_keys_by_the_mean_query(seed: int, grid: TokenGrid, layout: str) -> None:
    call = draw(seed, grid, layout)
    expected = slow_pooled_tail(call, centroid=True)
    assert torch.allclose(correction("pooled_tail", mode="centroid")(call), expected, atol=1e-5)


def test_tail_leaves_exact_blocks_and_dead_keys_out() -> None:
    grid = TokenGrid(1, 2, 4, 3, "last")
    layout = raster_layout(grid, 4)
    key = torch.arange(11.0)[None, :, None, None]
    key_mask = torch.ones(1, 11, dtype=torch.bool)
    key_mask[0, [0, 4, 5, 6, 7]] = False
    tail = pooled_tail(key, 2 * key, make_block_map(layout, torch.zeros(2, 2, dtype=torch.bool)), key_mask)
    assert tail.key[0, 0, :2, 0].tolist() == [2.0, 0.0]
    assert tail.value[0, 0, 0, 0] == 4
    assert tail.log_count[0, 0].tolist() == [pytest.approx(1.0986, abs=1e-4), -torch.inf, -torch.inf]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), GRIDS, LAYOUTS)
def test_linear_complement_equals_its_slow_definition(seed: int, grid: TokenGrid, layout: str) -> None:
    call = draw(seed, grid, layout)
    alpha = torch.rand(2, call.block_map.queries.count, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(
        correction("linear_complement", alpha=alpha)(call), slow_complement(call, alpha.double()), atol=1e-5
    )


def slow_complement(call: CorrectionCall, alpha: Tensor) -> Tensor:
    """SLA2's Eq. 13 to 17 with an N x M matrix of weights."""
    assert call.key_mask is not None
    features = [x.double().softmax(-1).transpose(1, 2) for x in (call.query, call.key)]
    visited = call.block_map.to_mask()  # (B', K', N, M)
    weights = (features[0] @ features[1].mT).masked_fill(visited | ~call.key_mask[:, None, None], 0)  # (B, K, N, M)
    total = weights.sum(-1, keepdim=True)
    linear = (weights @ call.value.double().transpose(1, 2) / total.clamp(min=1e-300)).transpose(1, 2)
    blocks = call.block_map.queries.block_of().expand(2, 2, -1)  # (B, K, N)
    share = alpha.expand(2, -1, -1).gather(2, blocks)
    share = torch.where(total[..., 0] > 0, share, 1.0).transpose(1, 2)[..., None]
    return (share * call.sparse()[0].double() + (1 - share) * linear).float()


def test_linear_complement_refuses_an_alpha_that_does_not_fit() -> None:
    call = draw(0, TokenGrid(1, 4, 4), "raster")
    with pytest.raises(ValueError, match=r"with 2 heads and 4 blocks"):
        correction("linear_complement", alpha=torch.full((3,), 0.5))(call)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
        correction("linear_complement", alpha=1.5)


def test_linear_adds_a_projection_of_linear_attention_to_all_keys() -> None:
    call = draw(3, TokenGrid(2, 3, 4), "tile")
    assert call.key_mask is not None
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    features = [x.double().softmax(-1).transpose(1, 2) for x in (call.query, call.key)]
    weights = (features[0] @ features[1].mT).masked_fill(~call.key_mask[:, None, None], 0)
    linear = weights @ call.value.double().transpose(1, 2) / (weights.sum(-1, keepdim=True) + 1e-5)
    expected = call.sparse()[0] + linear.transpose(1, 2).float() @ weight.mT
    assert torch.allclose(correction("linear", weight=weight)(call), expected, atol=1e-5)
    assert torch.equal(correction("linear", weight=0.0)(call), call.sparse()[0])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), GRIDS, LAYOUTS)
def test_blocks_are_gathered_and_scattered_back(seed: int, grid: TokenGrid, layout: str) -> None:
    call = draw(seed, grid, layout)
    blocks, place = gather_blocks(call.query, call.block_map.queries)
    assert torch.equal(scatter_blocks(blocks, place), call.query)
    assert torch.allclose(blocks.sum((2, 3)), call.query.sum(1), atol=1e-4)  # what fills up is zero


# ------------------------------------------------------------------- between steps


def steps_of(
    fix: Correction, count: int = 12, epsilon: float = 0.1, keep: str = "cond"
) -> tuple[list[float], list[bool], StateStore]:
    """Run a correction over steps whose inputs drift; return the errors and which steps were exactly dense."""
    store, run = StateStore(), next_run()
    generator = torch.Generator().manual_seed(0)
    grid = TokenGrid(1, 16, 16)
    visits = torch.rand(1, 2, 16, 16, generator=generator) < 0.34
    block_map = make_block_map(raster_layout(grid, 16), visits)
    tensors = [torch.randn(1, 256, 2, 16, generator=generator) for _ in range(3)]
    errors, exact = [], []
    for step in range(count):
        context = StepContext(run, step, count, 1 - step / count, 1000.0, keep)
        call = make_call(*tensors, block_map, step=context, state=StateEntry(store, "attention", "blocks.0", keep))  # pyright: ignore
        out, dense = fix(call), call.dense()[0]
        errors.append(float((out - dense).norm() / dense.norm()))
        exact.append(torch.equal(out, dense))
        tensors = [x + epsilon * torch.randn(x.shape, generator=generator) for x in tensors]
    return errors, exact, store


@pytest.mark.parametrize("name", ["residual", "ratio_residual"])
def test_refresh_steps_are_exactly_dense(name: str) -> None:
    _, exact, store = steps_of(correction(name, refresh_every=5))
    assert [step for step, one in enumerate(exact) if one] == [0, 5, 10]
    assert correction(name).anchors([1.0] * 12) == [0, 5, 10]
    assert store.nbytes("attention") == correction(name).kept_bytes(torch.empty(1, 256, 2, 16))


def test_refresh_by_sigma() -> None:
    fix = correction("ratio_residual", refresh_sigmas=[0.76, 0.5])  # sigmas are 1, 11/12, 10/12, 9/12, ...
    _, exact, _ = steps_of(fix)
    assert [step for step, one in enumerate(exact) if one] == [0, 3, 6]
    assert fix.anchors([1 - step / 12 for step in range(12)]) == [0, 3, 6]


def test_a_refresh_that_a_step_cache_skips_is_made_up_for() -> None:
    fix = correction("residual", refresh_every=5)
    query = torch.randn(1, 4, 1, 4)
    grid = TokenGrid(1, 1, 4)
    block_map = make_block_map(raster_layout(grid, 1), torch.eye(4, dtype=torch.bool))
    state = StateEntry(StateStore(), "attention", "blocks.0", "all")
    seen = []
    for step in (0, 1, 4, 6, 7, 10):
        context = StepContext(1, step, 20, 0.5, 500.0)
        seen.append(fix.must_refresh(query, context, state))
        fix(make_call(query, query, query, block_map, step=context, state=state))
    assert seen == [True, False, False, True, False, True]


def test_another_shape_refreshes_and_branches_are_kept_apart() -> None:
    fix, store = correction("residual"), StateStore()
    context = StepContext(1, 0, 20, 0.5, 500.0)
    entry = StateEntry(store, "attention", "blocks.0", "cond")
    query = torch.randn(1, 4, 1, 4)
    block_map = make_block_map(raster_layout(TokenGrid(1, 1, 4), 1), torch.eye(4, dtype=torch.bool))
    fix(make_call(query, query, query, block_map, step=context, state=entry))
    later = StepContext(1, 1, 20, 0.5, 500.0)
    assert not fix.must_refresh(query, later, entry)
    assert fix.must_refresh(torch.randn(2, 4, 1, 4), later, entry)
    assert fix.must_refresh(query, later, StateEntry(store, "attention", "blocks.0", "uncond"))


def test_kept_tensors_are_of_the_wished_dtype_and_device() -> None:
    _, _, store = steps_of(correction("ratio_residual", dtype="bfloat16", device="cpu"), count=2)
    ((_, _, kept),) = store.entries("attention")
    assert (kept["residual"].dtype, kept["ratio"].dtype) == (torch.bfloat16, torch.float32)
    assert kept["residual"].device.type == "cpu"


def test_without_a_step_the_error_says_the_remedy() -> None:
    call = draw(0, TokenGrid(1, 4, 4), "raster")
    with pytest.raises(ValueError, match=r"no step context.*pooled_tail"):
        correction("residual")(call)


def test_drift_and_clip() -> None:
    unclipped = correction("ratio_residual", drift=0.5, clip=None)
    clipped = correction("ratio_residual", drift=0.5)
    constant = correction("ratio_residual", drift=0.0)
    errors = [steps_of(fix, count=5, epsilon=0.0)[0] for fix in (unclipped, clipped, constant)]
    assert max(errors[2]) < 1e-6  # what doesn't change is exact
    assert errors[0][1] < 1e-6 < errors[0][2]  # the first sparse step has no drift
    assert errors[1][4] < errors[0][4]


def test_a_pooled_tail_is_worth_most_where_scores_are_flat() -> None:
    layout = tile_layout(TokenGrid(4, 16, 16), (4, 4, 4))
    flat, peaky = (left_out_errors(kind, layout, heads=1) for kind in ("flat", "peaky"))
    assert flat["density"] == 0.125
    assert 2.5 < flat["none"] / flat["pooled_tail"] < 5
    assert flat["pooled_tail"] < flat["pooled_tail, centroid"] < flat["none"] / 2
    assert flat["pooled_tail"] <= flat["linear_complement"] < flat["none"] / 2
    assert peaky["pooled_tail"] < peaky["none"]


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.3])
def test_ratio_and_residual_beat_the_residual_alone_which_beats_nothing(epsilon: float) -> None:
    errors = between_steps_errors(epsilon, length=1024)
    assert errors["residual"] < 0.6 * errors["none"]
    assert errors["ratio_residual"] == pytest.approx(0.59 * errors["residual"], rel=0.08)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("pooled_tail", {"mode": "rows"}, "'row' or 'centroid'"),
        ("residual", {"refresh_every": 0}, "at least 1"),
        ("residual", {"refresh_sigmas": []}, "one or more"),
        ("ratio_residual", {"clip": 0.5}, "at least 1, or None"),
        ("residual", {"drift": 0.1}, "takes no drift; it takes refresh_every"),
        ("tail", {}, "use one of none, pooled_tail"),
    ],
)
def test_wrong_settings_say_what_is_accepted(name: str, params: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        correction(name, **params)


def test_every_correction_is_registered_and_documented() -> None:
    from dit.attention.corrections import correction_type

    for name in correction_names():
        kind = correction_type(name)
        assert kind.name == name
        assert kind.__doc__


def test_the_benchmark_has_both_tables(tmp_path: Path) -> None:
    report = run("attention-corrections", smoke=True, output=tmp_path / "report.json", json_output=True)
    assert len(report["tables"]["left out"]) == 4
    for row in report["tables"]["between steps"]:
        assert row["ratio_residual"] < row["residual"] < row["none"]
