"""Compressed caches: equal to the slow reference, within their budget, and honest about their size."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit.cache import POLICIES, CachePlan, ScaleKVCache, plan_cache
from dit.cache.plan import TABLES, find_table, histories
from dit.cache.policies import smooth_scores, spread_positions
from dit.cache.storage import Int8Tokens
from dit.layers.scales import scale_grids, token_counts
from tests.cache.reference import SlowCache

SCALES = (1, 2, 3, 4, 6)
COUNTS, GRIDS = token_counts(scale_grids(SCALES)), scale_grids(SCALES)
LAYERS, ROWS, HEADS, WIDTH = 3, 2, 2, 8
INFINITY = token_counts(scale_grids((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)))
COMPRESSING = [policy for policy in POLICIES if policy != "full"]


class Uneven:
    """Gives the first layer as much as the two others together, as far as there is so much."""

    def divide(self, scale: int, average: int, held: int) -> list[int]:
        first = min(2 * average - 1, held)
        rest = (LAYERS * average - first) // 2
        return [first, rest, LAYERS * average - first - rest]


def make(policy: str, budget: float = 0.4, kv_dtype: str = "auto", **settings: int) -> ScaleKVCache:
    plan = plan_cache(policy, COUNTS, LAYERS, budget, profile=Uneven(), **settings)
    return ScaleKVCache(COUNTS, LAYERS, ROWS, HEADS, WIDTH, plan=plan, kv_dtype=kv_dtype, grids=GRIDS)


def draw(scale: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * scale + layer)
    query, key, value = torch.randn(3, ROWS, COUNTS[scale], HEADS, WIDTH, generator=generator)
    return 3 * query, key, value


def run(cache: ScaleKVCache, scales: int = len(COUNTS)) -> list[tuple[Tensor, Tensor]]:
    """All calls of a network; returns the rows that attention saw."""
    rows = []
    for scale in range(scales):
        for layer in range(LAYERS):
            query, key, value = draw(scale, layer)
            seen = cache.append(layer, scale, key, value)
            rows.append((seen[0].clone(), seen[1].clone()))
            cache.evict(layer, query, *seen)
    return rows


@pytest.mark.parametrize("policy", COMPRESSING)
@pytest.mark.parametrize(("budget", "observe", "pool"), [(0.4, 4, 1), (0.7, 9, 3), (0.1, 4, 5)])
def test_equals_the_slow_reference(policy: str, budget: float, observe: int, pool: int) -> None:
    cache = make(policy, budget, observe=observe, pool=pool)
    slow = SlowCache(policy, cache.plan.capacities, COUNTS, observe, 4, pool)
    for place, (keys, values) in enumerate(run(cache)):
        scale, layer = divmod(place, LAYERS)
        expected = slow.step(layer, scale, *draw(scale, layer))
        assert torch.equal(keys, expected[0])
        assert torch.equal(values, expected[1])


@pytest.mark.parametrize("policy", COMPRESSING)
@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5, 1.0])
def test_keeps_to_the_budget(policy: str, budget: float) -> None:
    cache, token = make(policy, budget), 2 * ROWS * HEADS * WIDTH * 4
    base, past = round(budget * sum(COUNTS[:-1])), histories(COUNTS)
    for scale in range(len(COUNTS) - 1):
        run_scale(cache, scale)
        assert cache.nbytes == LAYERS * min(base, past[scale + 1]) * token
        assert [cache.length(layer) for layer in range(LAYERS)] == list(cache.plan.capacities[scale + 1])
    assert cache.plan.share == pytest.approx(budget, abs=0.5 / sum(COUNTS[:-1]))
    run_scale(cache, len(COUNTS) - 1)
    report = cache.report()
    assert cache.nbytes == 0
    assert report.stored_bytes == cache.planned_nbytes
    assert report.stored_bytes <= report.peak_bytes == cache.peak_nbytes
    assert report.full_bytes == LAYERS * sum(COUNTS[:-1]) * token


def run_scale(cache: ScaleKVCache, scale: int) -> None:
    for layer in range(LAYERS):
        query, key, value = draw(scale, layer)
        cache.evict(layer, query, *cache.append(layer, scale, key, value))


@pytest.mark.parametrize("policy", COMPRESSING)
def test_a_budget_of_everything_changes_nothing(policy: str) -> None:
    for found, expected in zip(run(make(policy, 1.0)), run(make("full")), strict=True):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def held_bytes(cache: ScaleKVCache) -> list[int]:
    """Run all scales; returns the bytes that all layers hold after each of them evicted."""
    held = []
    for scale in range(len(COUNTS)):
        for layer in range(LAYERS):
            query, key, value = draw(scale, layer)
            cache.evict(layer, query, *cache.append(layer, scale, key, value))
            tensors = [one for tokens in cache._buffers.kept if tokens for one in vars(tokens).values()]
            held.append(sum(one.untyped_storage().nbytes() for one in tensors))
    return held


def test_the_peak_is_what_is_really_held() -> None:
    """Counted at every moment: what all layers hold, and the workspace."""
    cache, token = make("scalekv", 0.5), 2 * ROWS * HEADS * WIDTH * 4
    held = held_bytes(cache)
    assert max(held) == cache.plan.max_stored() * token
    assert cache.peak_nbytes == max(held) + cache._buffers.workspace.nbytes


@pytest.mark.parametrize(("policy", "budget"), [("full", 1.0), ("scalekv", 0.5)])
def test_the_bytes_of_eight_bits_are_what_is_really_held(policy: str, budget: float) -> None:
    """A layer that evicts holds its row twice, or the row and what stays of it."""
    cache = make(policy, budget, kv_dtype="int8")
    held, after = held_bytes(cache), LAYERS - 1
    report = cache.report()
    assert max(held[after::LAYERS]) == report.stored_bytes == cache.planned_nbytes
    row = max(sum(COUNTS[: scale + 1]) for scale in range(len(COUNTS) - 1)) if policy == "full" else 0
    assert max(held) + row * cache._buffers.token_nbytes <= report.peak_bytes - cache._buffers.workspace.nbytes


@pytest.mark.parametrize(("name", "bars"), [("Infinity-2B", (0.102, 0.25)), ("Infinity-8B", (0.102, 0.25))])
def test_released_tables(name: str, bars: tuple[float, float]) -> None:
    """The authors' numbers, to the token; a tenth of the history, a quarter of the released code's peak."""
    table = TABLES[name]
    assert find_table(table.num_layers, table.hidden_size, 13) is table
    plan = plan_cache("scalekv", INFINITY, table.num_layers, 650 / 6425, table=table)
    rows = {8: (920, 632), 9: (1490, 594), 10: (2510, 526), 11: (4100, 420), 12: (6385, 465)}
    if name == "Infinity-8B":
        rows = {8: (909, 629), 9: (1464, 584), 10: (2463, 503), 11: (4054, 374), 12: (6200, 200)}
    for scale, (drafter, refiner) in rows.items():
        row = plan.capacities[scale]
        drafters = table.drafters[scale]
        assert [held for layer, held in enumerate(row) if layer in drafters] == [drafter] * len(drafters)
        assert {held for layer, held in enumerate(row) if layer not in drafters} == {refiner}
        assert sum(row) / (table.num_layers * 6425) <= bars[0]
    assert plan.capacities[7] == (345 + 576 - 400,) * table.num_layers  # short histories are kept whole
    heads = table.hidden_size // 128
    cache = ScaleKVCache(INFINITY, table.num_layers, 2, heads, 128, dtype=torch.bfloat16, device="meta", plan=plan)
    released = table.num_layers * sum(INFINITY) * 2 * table.hidden_size * (4 + 2)
    assert cache.peak_nbytes / released < bars[1]


def test_eight_bits_take_half_of_bfloat16_and_stay_close() -> None:
    exact, packed = run(make("full")), run(make("full", kv_dtype="int8"))
    for (key, value), (key8, value8) in zip(exact, packed, strict=True):
        assert (key - key8).norm() / key.norm() < 0.006
        assert (value - value8).norm() / value.norm() < 0.008
    counts = INFINITY[:10]
    small, large = (
        ScaleKVCache(counts, 1, 1, 1, 128, kv_dtype=kind, dtype=torch.bfloat16, device="meta")
        for kind in ("int8", "auto")
    )
    assert 0.5 < small.planned_nbytes / large.planned_nbytes < 0.52


def tokens(count: int, seed: int, rows: int = 2, heads: int = 3) -> Tensor:
    return torch.randn(rows, heads, count, 16, generator=torch.Generator().manual_seed(seed))


def written(stored: Int8Tokens) -> tuple[Tensor, Tensor]:
    keys, values = torch.empty(2, *stored.keys.shape)
    stored.write_into(keys, values)
    return keys, values


def test_keys_lose_the_mean_of_their_scale_and_values_have_a_step_a_channel() -> None:
    shared, loud = 30 * torch.randn(2, 3, 1, 16), torch.ones(16)
    loud[3] = 100.0
    keys, values = tokens(40, 0) + shared, tokens(40, 1) * loud
    found = written(Int8Tokens.of(keys, values))
    plain = (keys.abs().amax(-1, keepdim=True) / 127, values.abs().amax(-1, keepdim=True) / 127)
    for exact, rounded, step in zip((keys, values), found, plain, strict=True):
        alone = (exact / step).round() * step  # one step a token, nothing taken off
        assert (rounded - exact)[..., :3].norm() < 0.3 * (alone - exact)[..., :3].norm()


def test_what_is_stored_once_is_never_rounded_again() -> None:
    parts = [(tokens(count, 2 * count), 3 * tokens(count, 2 * count + 1)) for count in (1, 4, 9)]
    each = [written(Int8Tokens.of(*part)) for part in parts]
    first, *others = (Int8Tokens.of(*part) for part in parts)
    for other in others:
        first = first.joined(other)
    for found, expected in zip(written(first), zip(*each, strict=True), strict=True):
        assert torch.equal(found, torch.cat(expected, dim=2))
    index = torch.stack([torch.randperm(14)[:5].sort().values for _ in range(6)]).view(2, 3, 5)
    some = first.gathered(index)
    wide = index[..., None].expand(-1, -1, -1, 16)
    for found, expected in zip(written(some), written(first), strict=True):
        assert torch.equal(found, expected.gather(2, wide))
    assert some.nbytes == 2 * 3 * (5 * (2 * 16 + 3) + 3 * 4 * 16)


def test_tokens_of_any_size_keep_their_digits() -> None:
    for scale in (1e-9, 1e-4, 1e6):
        keys, values = scale * tokens(30, 0), scale * tokens(30, 1)
        for found, exact in zip(written(Int8Tokens.of(keys, values)), (keys, values), strict=True):
            assert (found - exact).norm() < 0.01 * exact.norm()
    zeros = torch.zeros(1, 1, 3, 16)
    assert not any(one.any() for one in written(Int8Tokens.of(zeros, zeros)))


def test_compress_leaves_what_is_in_eight_bits_as_it_is() -> None:
    cache = make("full", kv_dtype="int8")
    run(cache, 3)
    held = [cache.stored(layer) for layer in range(LAYERS)]
    cache.compress(plan_cache("window", COUNTS, LAYERS, 0.3))
    for layer in range(LAYERS):
        assert all(torch.equal(a, b) for a, b in zip(cache.stored(layer), held[layer], strict=True))


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_select_moves_rows_of_what_is_kept(kv_dtype: str) -> None:
    cache = make("scalekv", kv_dtype=kv_dtype)
    run(cache, 4)
    before = [cache.stored(layer) for layer in range(LAYERS)]
    rows = torch.tensor([1, 1, 0])
    cache.select(rows)
    for layer in range(LAYERS):
        for found, expected in zip(cache.stored(layer), before[layer], strict=True):
            assert torch.equal(found, expected[rows])
    key = draw(4, 0)[1][rows]
    seen, _ = cache.append(0, 4, key, key)
    assert torch.equal(seen[:, -COUNTS[4] :], key)


def test_compress_switches_in_the_midst_of_a_run() -> None:
    """As if the plan had begun with the scale that comes next."""
    cache = make("full")
    run(cache, 3)
    held = [tuple(part.clone() for part in cache.stored(layer)) for layer in range(LAYERS)]
    cache.compress(plan_cache("window", COUNTS, LAYERS, 0.3))
    for layer in range(LAYERS):
        assert all(torch.equal(a, b) for a, b in zip(cache.stored(layer), held[layer], strict=True))
    run_scale(cache, 3)
    assert [cache.length(layer) for layer in range(LAYERS)] == [9] * LAYERS
    assert torch.equal(cache.stored(1)[0], draw(3, 1)[1][:, -9:].transpose(1, 2))
    run_scale(cache, 4)


def test_pruned_scales_bring_fewer_tokens() -> None:
    for cache in (make("full"), make("snapkv")):
        run(cache, 2)
        query, key, value = (x[:, :4] for x in draw(2, 0))
        seen = cache.append(0, 2, key, value)
        assert seen[0].shape[1] == 9
        cache.evict(0, query, *seen)


def test_observing_queries_are_the_centres_of_patches() -> None:
    assert spread_positions((4, 4), 16, 4).tolist() == [0, 2, 8, 10]
    assert spread_positions((8, 8), 64, 16).tolist() == [8 * y + x for y in (0, 2, 4, 6) for x in (0, 2, 4, 6)]
    wide = spread_positions((4, 16), 64, 16)
    assert len(wide) == 16
    assert len({int(i) // 16 for i in wide}) == 2
    assert spread_positions((2, 2), 4, 16).tolist() == [0, 1, 2, 3]
    assert len(spread_positions(None, 50, 7)) == 7
    smoothed = smooth_scores(torch.tensor([[[0.0, 1, 0, 0, 2]]]), 3)
    assert torch.allclose(smoothed, torch.tensor([[[1.0, 1.001, 1, 2, 2.002]]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "half"}, "'full', 'window'"),
        ({"budget": 0.0}, "above 0 and up to 1"),
        ({"budget": -0.1}, "above 0 and up to 1"),
        ({"budget": 1.5}, "above 0 and up to 1"),
        ({"budget": 0.001}, "keeps none; use at least"),
        ({"policy": "scalekv"}, "calibrate any other"),
        ({"pool": 4}, "odd"),
        ({"observe": 0}, "observe is 0"),
    ],
)
def test_impossible_plans_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_cache(**{"policy": "window", "token_counts": COUNTS, "num_layers": LAYERS, **arguments})


def test_plans_of_other_schedules_and_unfinished_layers_are_refused() -> None:
    plan = plan_cache("window", COUNTS, LAYERS, 0.5)
    with pytest.raises(ValueError, match="make the plan for this network and schedule"):
        ScaleKVCache(COUNTS[:-1], LAYERS, ROWS, HEADS, WIDTH, plan=plan)
    with pytest.raises(ValueError, match="make the plan for this network and schedule"):
        ScaleKVCache(COUNTS, LAYERS + 1, ROWS, HEADS, WIDTH, plan=plan)
    with pytest.raises(ValueError, match="holds 5 scales, the schedule 2"):
        CachePlan("window", (1, 4), plan.capacities)
    assert plan.first(3).token_counts == COUNTS[:3]
    with pytest.raises(ValueError, match="'int8'"):
        ScaleKVCache(COUNTS, LAYERS, ROWS, HEADS, WIDTH, kv_dtype="int4")
    cache = make("window")
    _, key, value = draw(0, 0)
    row = cache.append(0, 0, key, value)
    with pytest.raises(ValueError, match="not settled"):
        cache.append(1, 0, key, value)
    with pytest.raises(ValueError, match="in pairs"):
        cache.evict(1, key, *row)
    with pytest.raises(ValueError, match="between two scales"):
        cache.compress(replace(plan, policy="streaming"))
