"""Maps of groups of heads are joined exactly, and a plan whose heads differ is computed in one launch."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit.attention import TokenGrid, TokenRule, block_sparse_attention, pattern
from dit.attention.block_map import BlockMap, RulesByHead, make_block_map
from dit.attention.corrections.pooled import pooled_tail
from dit.attention.inputs import Inputs, head_slice, pick_heads
from dit.attention.kernels.contract import sparse_kernel
from dit.attention.kernels.native import attend_native
from dit.attention.layout import cluster_layout, morton_layout, raster_layout, tile_layout
from dit.attention.map_cache import MapCache
from dit.attention.merged_map import can_merge, merge_heads
from dit.attention.plan import AttentionPlan, Choice, PlanEntry
from dit.attention.planned_layer import PlannedLayer
from dit.runtime.families.tokens import TokenLayout
from dit.runtime.state import StateStore
from dit.runtime.step_context import StepContext, next_run, step_scope

GRID = TokenGrid(3, 4, 5, text_length=7, text_position="first", extra_length=3)
B, E = 2, 8


class Near(TokenRule):
    """Tokens whose raster indices differ by at most a width."""

    def __init__(self, width: int) -> None:
        self.width = width

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        return (query - key).abs() <= self.width


def random_visits(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.5


def raster(*heads: int) -> BlockMap:
    layout = raster_layout(GRID, 8)
    return make_block_map(layout, random_visits(0, *heads, layout.visual_count, layout.visual_count))


def finer_keys() -> BlockMap:
    queries, keys = raster_layout(GRID, 8), raster_layout(GRID, 4)
    return make_block_map(queries, random_visits(1, queries.visual_count, keys.visual_count), keys=keys)


def tiles_with_a_rule() -> BlockMap:
    layout = tile_layout(GRID, (1, 2, 3))
    visits = random_visits(2, layout.visual_count, layout.visual_count)
    return make_block_map(layout, visits, rule=Near(9)).prune()


def curve_that_asks_everywhere() -> BlockMap:
    layout = morton_layout(GRID, 16)
    return make_block_map(layout, random_visits(3, layout.visual_count, layout.visual_count), rule=Near(20))


def clusters() -> BlockMap:
    """Two heads with an order of their own in each sample."""
    labels = torch.randint(0, 5, (B, 2, GRID.visual_length), generator=torch.Generator().manual_seed(4))
    layout = cluster_layout(GRID, labels, 6)  # the last cluster is empty
    return make_block_map(layout, random_visits(5, B, 2, 6, 6))


PARTS: dict[str, list[tuple[Callable[[], BlockMap], tuple[int, ...]]]] = {
    "one order": [(raster, (1, 2)), (lambda: raster(1, 2), (0, 3))],
    "other blocks of keys": [(raster, (0,)), (finer_keys, (1, 2))],
    "a rule and none": [(tiles_with_a_rule, (0, 2)), (raster, (1,))],
    "two rules": [(curve_that_asks_everywhere, (3, 1)), (tiles_with_a_rule, (0,)), (raster, (2,))],
    "orders by sample": [(clusters, (4, 0)), (tiles_with_a_rule, (1, 3)), (lambda: raster(B, 1), (2,))],
}


def parts_of(name: str) -> tuple[list[BlockMap], list[tuple[int, ...]], BlockMap]:
    maps, heads = [make() for make, _ in PARTS[name]], [some for _, some in PARTS[name]]
    return maps, heads, merge_heads(maps, heads)


def by_part(maps: list[BlockMap], heads: list[tuple[int, ...]], compute: Callable[..., Tensor]) -> Tensor:
    """Return (B, K, ...) of all heads from what `compute(map, heads)` returns of each part."""
    numbers = [head for group in heads for head in group]
    found = [compute(one, group).expand(B, len(group), -1, -1) for one, group in zip(maps, heads, strict=True)]
    return torch.cat(found, dim=1)[:, torch.tensor(numbers).argsort()]


@pytest.mark.parametrize("name", PARTS)
def test_the_joined_map_has_the_pairs_of_its_parts(name: str) -> None:
    maps, heads, joined = parts_of(name)
    expected = by_part(maps, heads, lambda one, _: one.to_mask())
    assert torch.equal(joined.to_mask().expand_as(expected), expected)
    rows = torch.tensor([0, 8, 9, 40, 69])
    some = joined.row_mask(rows)
    assert torch.equal(some.expand(*expected.shape[:2], *some.shape[2:]), expected[:, :, rows])
    assert joined.token_density() == pytest.approx(float(expected.double().mean()))


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("has_tail", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_kernels_compute_it_as_they_compute_its_parts(name: str, has_tail: bool, has_mask: bool) -> None:
    maps, heads, joined = parts_of(name)
    torch.manual_seed(0)
    count = sum(map(len, heads))
    query, key, value = (torch.randn(B, GRID.length, count, E) for _ in range(3))
    mask = torch.rand(B, GRID.length) > 0.2 if has_mask else None

    def part(one: BlockMap, some: tuple[int, ...]) -> Tensor:
        q, k, v = (x[:, :, list(some)] for x in (query, key, value))
        tail = pooled_tail(k, v, one, mask) if has_tail else None
        out = block_sparse_attention(q, k, v, one, kernel="reference", key_mask=mask, tail=tail)
        return out.transpose(1, 2)

    expected = by_part(maps, heads, part).transpose(1, 2)  # (B, N, K, E)
    tail = pooled_tail(key, value, joined, mask) if has_tail else None
    for kernel in ("gather", "gather", "reference"):  # prepared, as it was prepared
        out = block_sparse_attention(query, key, value, joined, kernel=kernel, key_mask=mask, tail=tail)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["two rules", "orders by sample"])
def test_gradients_are_those_of_the_parts(name: str) -> None:
    _, heads, joined = parts_of(name)
    torch.manual_seed(0)
    given = [torch.randn(B, GRID.length, sum(map(len, heads)), E, requires_grad=True) for _ in range(3)]
    found = []
    for kernel in ("gather", "reference"):
        out = block_sparse_attention(*given, joined, kernel=kernel)  # pyright: ignore[reportCallIssue]
        found.append(torch.autograd.grad(out.square().sum(), given))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def tasks_kept(block_map: BlockMap) -> list[Any]:
    return next(value for name, value in block_map.cache.items() if isinstance(name, tuple) and name[0] == "gather")


@pytest.mark.parametrize("small", [False, True])
def test_heads_of_one_map_share_its_lists(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large blocks are computed by map, so that nothing is copied; small ones together."""
    if not small:
        monkeypatch.setattr("dit.attention.kernels.gather_tasks.LEAST_ROWS", 1)
        monkeypatch.setattr("dit.attention.kernels.gather_tasks.score_bytes", lambda dtype: 1)
    maps, heads, joined = parts_of("a rule and none")
    assert [members for _, members in joined.parts or ()] == heads
    query = torch.randn(B, GRID.length, 3, E)
    out = block_sparse_attention(query, query, query, joined, kernel="gather")
    expected = block_sparse_attention(query, query, query, joined, kernel="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert {task.rows.ndim for task in tasks_kept(joined) if task.hidden is not None} == {2 if small else 1}
    # a map that is joined with others, too, prepares nothing again
    monkeypatch.setattr("dit.attention.kernels.gather_tasks.lists_of", lambda *_: pytest.fail("listed again"))
    other = merge_heads(maps, [(1, 2), (0,)])
    out = block_sparse_attention(query, query, query, other, kernel="gather")
    expected = block_sparse_attention(query, query, query, other, kernel="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_blocks_of_several_maps_are_one_task() -> None:
    _, heads, joined = parts_of("one order")
    query = torch.randn(B, GRID.length, 4, E)
    block_sparse_attention(query, query, query, joined, kernel="gather")
    mixed = [set(task.heads.flatten().tolist()) for task in tasks_kept(joined)]
    assert any(one & set(heads[0]) and one & set(heads[1]) for one in mixed)


def test_lists_of_large_maps_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit.attention.kernels.gather_tasks.LIST_BYTES", 0)
    monkeypatch.setattr("dit.attention.kernels.gather_tasks.COPIED_BYTES", 0)
    monkeypatch.setattr("dit.attention.kernels.gather_lists.RULE_BYTES", 0)
    for name in ("two rules", "orders by sample"):
        maps, _, joined = parts_of(name)
        query = torch.randn(B, GRID.length, sum(len(members) for _, members in joined.parts or ()), E)
        out = block_sparse_attention(query, query, query, joined, kernel="gather")
        expected = block_sparse_attention(query, query, query, joined, kernel="reference")
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        assert not any(isinstance(key, tuple) for one in (joined, *maps) for key in one.cache)


def test_heads_of_a_joined_map_can_be_taken_out() -> None:
    _, _, joined = parts_of("two rules")
    every = joined.to_mask()
    assert torch.equal(joined.for_heads(slice(1, 3)).to_mask(), every[:, 1:3])
    assert torch.equal(joined.for_heads(torch.tensor([3, 0])).to_mask(), every[:, [3, 0]])


def test_what_a_kernel_cannot_compute_stays_apart() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    plain, tiles, curve, finer = raster(), tiles_with_a_rule(), curve_that_asks_everywhere(), finer_keys()
    assert can_merge([plain, curve, tiles, finer], "auto", cpu)
    assert can_merge([plain, raster(1, 2)], "auto", cuda)
    assert not can_merge([plain, tiles], "auto", cuda), "a rule and orders that differ"
    assert not can_merge([plain, finer], "triton", cuda), "pieces of one size for all heads"
    assert not can_merge([plain, raster(1, 2)], "natten", cpu)
    other = pattern("dense", TokenGrid(3, 4, 5), block=8)
    assert not can_merge([plain, other], "auto", cpu)
    with pytest.raises(ValueError, match="can't be joined"):
        merge_heads([plain, other], [(0,), (1,)])
    with pytest.raises(ValueError, match="each head once"):
        merge_heads([plain, plain], [(0,), (0, 1)])
    with pytest.raises(ValueError, match=r"2 heads doesn't fit the heads \[0\]"):
        merge_heads([raster(1, 2)], [(0,)])
    joined = merge_heads([tiles, curve], [(0,), (1,)])
    assert isinstance(joined.rule, RulesByHead)
    query = torch.zeros(1, GRID.length, 2, E)
    assert "different rules" in sparse_kernel("flex").refusal(query, query, joined)
    with pytest.raises(ValueError, match="of_head"):
        joined.rule.allowed(torch.tensor(0), torch.tensor(0))


# ----------------------------------------------------------------------------------------- in a layer


def test_heads_at_equal_distances_are_not_copied() -> None:
    x = torch.randn(1, 3, 6, 2)
    for heads in ((1, 2, 3), (0, 2, 4), (5,)):
        assert pick_heads(x, heads).data_ptr() == x[:, :, heads[0]].data_ptr()
        assert torch.equal(pick_heads(x, heads), x[:, :, list(heads)])
    assert head_slice((0, 1, 3)) is None
    assert torch.equal(pick_heads(x, (0, 1, 3)), x[:, :, [0, 1, 3]])


CHOICES: list[tuple[str, dict[str, Any]]] = [
    ("svg_spatial", {"density": 0.7, "block": 8}),
    ("svg_temporal", {"density": 0.7, "block": 16}),
    ("neighborhood", {"window": (3, 3, 3)}),
    ("pooled_topk", {"keep": 0.3, "block": 8, "key_block": 4}),
    ("pooled_topk", {"keep": 0.5, "block": 16, "layout": "hilbert"}),
    ("dense", {}),
]
CORRECTIONS: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("pooled_tail", {}),
    ("pooled_tail", {"mode": "centroid"}),
    ("linear_complement", {}),
    ("linear_complement", {"alpha": (0.25,)}),  # one for each head of a group: it stays by itself
    ("residual", {"refresh_every": 2}),
    ("ratio_residual", {"refresh_every": 2}),
]
LAYOUT = TokenLayout(GRID.shape, GRID.text_length, "before", GRID.extra_length)


def layer_of(plan: AttentionPlan) -> PlannedLayer:
    note: Any = SimpleNamespace(layout=LAYOUT, reason="")

    def dense(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, *rest: Any) -> Tensor:
        mask = None if attn_mask is None else attn_mask[:, None, None]
        return attend_native(query, key, value, mask)

    parts = ("joint", "thw", plan, note, MapCache(plan), StateStore(), "planned_attention", dense)
    return PlannedLayer(0, "layer", 0, 1, *parts)


def run(plan: AttentionPlan, heads: int, mask: Tensor | None, steps: int = 4) -> tuple[list[Tensor], PlannedLayer]:
    layer, generator, number, found = layer_of(plan), torch.Generator().manual_seed(7), next_run(), []
    for step in range(steps):
        given = [torch.randn(B, GRID.length, heads, E, generator=generator) for _ in range(3)]
        with step_scope(StepContext(number, step, steps, 1 - step / steps, 1.0)):
            found.append(layer(Inputs(*given, attn_mask=mask)))
    return found, layer


@pytest.mark.parametrize("seed", range(6))
def test_a_random_plan_gives_what_it_gives_group_by_group(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, heads = torch.Generator().manual_seed(seed), 7
    picks = torch.randint(0, len(CHOICES), (heads,), generator=generator).tolist()
    fixes = torch.randint(0, len(CORRECTIONS), (2,), generator=generator).tolist()
    entries = []
    for head, pick in enumerate(picks):
        name, params = CHOICES[pick]
        correction = CORRECTIONS[fixes[head % 2]] if name != "dense" else ("none", {})
        if correction[1].get("alpha"):
            correction = (correction[0], {"alpha": 0.25 if head % 3 else (0.25,) * _group_size(picks, pick, head)})
        entries.append(PlanEntry(Choice(name, params, *correction), heads=(head,)))
    plan = AttentionPlan.of_entries(entries, heads=heads)
    mask = None
    if seed % 2:
        mask = torch.ones(B, GRID.length, dtype=torch.bool)
        mask[0, 4:7] = False
    together, layer = run(plan, heads, mask)
    monkeypatch.setattr("dit.attention.planned_layer.can_merge", lambda maps, *_: len(maps) == 1)
    apart, other = run(plan, heads, mask)
    for one, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6)
    found, expected = layer.statistics, other.statistics
    assert found.kernels["auto"] <= expected.kernels["auto"]
    for name in ("sparse", "dense", "refreshes", "reasons", "choices"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.report()["density"] == pytest.approx(expected.report()["density"])
    assert found.report()["token_density"] == pytest.approx(expected.report()["token_density"])


def _group_size(picks: list[int], pick: int, head: int) -> int:
    """Return how many heads have this pick and this head's remainders: an alpha for each."""
    return sum(one == pick and other % 2 == head % 2 and other % 3 == 0 for other, one in enumerate(picks))


def test_one_launch_for_heads_of_one_correction() -> None:
    entries = [PlanEntry(Choice(*CHOICES[pick], "residual"), heads=(head,)) for head, pick in enumerate((0, 1, 2, 0))]
    _, layer = run(AttentionPlan.of_entries(entries, heads=4), 4, None)
    assert layer.statistics.kernels == {"auto": 4}
    assert layer.statistics.refreshes == 3, "one of three choices, at the first step"
    assert len(layer.store.entries("planned_attention")) == 1
    first = layer.maps.merged(*_two(layer), keep=True)
    assert first.cache["density"] == pytest.approx(first.density())
    assert layer.maps.merged(*_two(layer), keep=True) is first, "joined maps of static patterns are kept"
    assert layer.maps.merged(*_two(layer), keep=False) is not first


def _two(layer: PlannedLayer) -> tuple[tuple[BlockMap, BlockMap], tuple[tuple[int, ...], tuple[int, ...]]]:
    tokens = torch.zeros(1, GRID.length, 2, E)
    inputs = Inputs(tokens, tokens, tokens)
    maps = [layer.maps.get(Choice(*CHOICES[pick], "residual"), GRID, inputs) for pick in (0, 1)]
    return (maps[0], maps[1]), ((0,), (1,))


def test_a_step_cache_is_asked_for_the_refreshes_of_joined_heads() -> None:
    fix = ("residual", {"refresh_every": 3})
    entries = [PlanEntry(Choice(*CHOICES[pick], *fix), heads=(head,)) for head, pick in enumerate((0, 1, 5))]
    layer, number, wanted = layer_of(AttentionPlan.of_entries(entries, heads=3)), next_run(), []
    tokens = torch.randn(B, GRID.length, 3, E)
    for step in range(7):
        with step_scope(StepContext(number, step, 7, 1 - step / 7, 1.0)) as here:
            assert here is not None
            wanted.append(layer.refreshes(here))
            layer(Inputs(tokens, tokens, tokens))
    assert [step for step, one in enumerate(wanted) if one] == [3, 6]
