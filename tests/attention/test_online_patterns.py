"""Online patterns equal slow definitions written out pair by pair, on random small grids and layouts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit.attention import TokenGrid, block_sparse_attention, pattern, pattern_info
from dit.attention.block_map import BlockMap
from dit.attention.patterns.sol import sol_tau
from dit.attention.patterns.svg2 import ClusterState, cluster
from tests.attention.online_cases import (
    Case,
    best,
    best_mass,
    cases,
    mean,
    pooled_scores,
    random_case,
    visual_blocks,
    visual_visits,
)

few = settings(max_examples=25, deadline=None)
ONLINE = [
    "pooled_topk",
    "pooled_topp",
    "topk_topp",
    "antidiagonal",
    "sale",
    "sol",
    "subblock",
    "draft",
    "cube",
    "svg",
    "svg2",
    "vertical_slash",
    "skip_softmax",
]


def run(name: str, case: Case, **params: object) -> tuple[BlockMap, Tensor, list[list[int]], list[list[int]]]:
    """Compute a pattern; returns the map, the visits of visual blocks, and the blocks of queries and keys."""
    block_map = pattern(name, case.grid, query=case.query, key=case.key, **case.where, **params)
    return block_map, visual_visits(block_map), visual_blocks(block_map.queries), visual_blocks(block_map.keys)


def assert_rows(visits: Tensor, wanted) -> None:
    """Compare visits (B, K, n, m) with what a function of sample, head and row says."""
    for b, h, i in torch.cartesian_prod(*map(torch.arange, visits.shape[:3])).tolist():
        assert visits[b, h, i].nonzero().flatten().tolist() == sorted(wanted(b, h, i)), (b, h, i)


@few
@given(cases(), st.sampled_from([0.0, 0.2, 0.34, 0.5, 1.0]), st.sampled_from(["ceil", "floor", "nearest"]))
def test_pooled_topk_takes_the_largest_scores(case: Case, keep: float, rounding: str) -> None:
    _, visits, queries, keys = run("pooled_topk", case, keep=keep, rounding=rounding)
    scores = pooled_scores(case, queries, keys)
    exact = round(keep * len(keys), 9)
    count = {"ceil": math.ceil(exact), "floor": math.floor(exact), "nearest": math.floor(exact + 0.5)}[rounding]
    assert_rows(visits, lambda b, h, i: best(scores[b, h, i], max(count, 1)))


@few
@given(cases(), st.floats(0, 0.99), st.booleans(), st.sampled_from([0.0, 0.5]))
def test_pooled_topp_stops_when_the_mass_is_reached(case: Case, p: float, crossing: bool, least: float) -> None:
    _, visits, queries, keys = run("pooled_topp", case, p=p, crossing=crossing, least=least)
    mass = pooled_scores(case, queries, keys).softmax(-1)
    fewest = max(math.floor(least * len(keys)), 1)
    assert_rows(visits, lambda b, h, i: best_mass(mass[b, h, i], p, crossing, fewest))


@few
@given(cases(), st.sampled_from([0.1, 0.4]), st.sampled_from([0.2, 0.7]))
def test_topk_topp_is_the_union(case: Case, keep: float, p: float) -> None:
    where = {"key_block": None, **case.where}
    both = pattern("topk_topp", case.grid, query=case.query, key=case.key, keep=keep, p=p, **where)
    one, other = (
        pattern(name, case.grid, query=case.query, key=case.key, **case.where, **params)
        for name, params in (("pooled_topk", {"keep": keep}), ("pooled_topp", {"p": p}))
    )
    assert torch.equal(both.visits, one.visits | other.visits)


@few
@given(cases(), st.integers(0, 2))
def test_masked_tokens_are_kept_out_of_means(case: Case, seed: int) -> None:
    mask = torch.rand(case.query.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[:, case.grid.visual_start] = True
    query, key = (x.masked_fill(~mask[..., None, None], torch.nan) for x in (case.query, case.key))
    _, visits, queries, keys = run("pooled_topk", Case(case.grid, query, key, case.where), keep=0.4, key_mask=mask)
    scores = pooled_scores(case, queries, keys, mask)
    assert_rows(visits, lambda b, h, i: best(scores[b, h, i], max(math.ceil(round(0.4 * len(keys), 9)), 1)))


@few
@given(cases(), st.sampled_from([-0.2, 0.2, 0.6]), st.sampled_from([0.3, 1.0]))
def test_blocks_of_unlike_tokens_are_visited_by_all(case: Case, similarity: float, p: float) -> None:
    _, visits, queries, keys = run("pooled_topp", case, p=p, crossing=False, similarity=similarity)
    scores = pooled_scores(case, queries, keys)

    def loose(x: Tensor, block: list[int]) -> bool:
        units = [x[one] / x[one].norm() for one in block]
        cosines = [float(one @ other) for one in units for other in units]
        return not (sum(cosines) / len(cosines) if cosines else 0.0) > similarity

    def wanted(b: int, h: int, i: int) -> set[int]:
        bad = {j for j, block in enumerate(keys) if loose(case.key[b, :, h], block)}
        if p == 1 or loose(case.query[b, :, h], queries[i]):
            return set(range(len(keys)))
        row = scores[b, h, i].clone()
        row[list(bad)] = -torch.inf
        return bad | set(best_mass(row.softmax(-1).nan_to_num(0), p, False))

    assert_rows(visits, wanted)


@few
@given(cases(key_blocks=False), st.integers(1, 4), st.sampled_from([0.317, 0.813]))
def test_antidiagonal_sums_products_of_reversed_groups(case: Case, stride: int, p: float) -> None:
    _, visits, blocks, _ = run("antidiagonal", case, stride=stride, p=p)
    groups = [[block[at : at + stride] for at in range(0, len(block), stride)] for block in blocks]

    def group_score(b: int, h: int, left: list[int], right: list[int]) -> float:
        pairs = [
            float(case.query[b, left[stride - 1 - a], h].double() @ case.key[b, right[a], h].double())
            for a in range(stride)
            if a < len(right) and stride - 1 - a < len(left)
        ]
        return sum(pairs) / 8**0.5 / stride

    def wanted(b: int, h: int, i: int) -> list[int]:
        mass = torch.zeros(len(blocks), dtype=torch.float64)
        for left in groups[i]:
            exponentials = [[math.exp(group_score(b, h, left, right)) for right in some] for some in groups]
            total = sum(map(sum, exponentials))
            mass += torch.tensor([sum(some) / total for some in exponentials], dtype=torch.float64)
        return best_mass(mass / mass.sum(), p) if groups[i] else best_mass(mass, p)

    assert_rows(visits, wanted)


@few
@given(cases(), st.sampled_from([0.0, 0.7, -1000.0, 1000.0]), st.sampled_from(["diagonal", "exact"]), st.integers(0, 1))
def test_sol_compares_with_mean_and_deviation(case: Case, tau: float, deviation: str, diagonal: int) -> None:
    _, visits, queries, keys = run("sol", case, tau=tau, deviation=deviation, diagonal=diagonal)
    c = math.log2(math.e) / 8**0.5
    live = [j for j, block in enumerate(keys) if block]

    def wanted(b: int, h: int, i: int) -> set[int]:
        q = mean(case.query[b, :, h], queries[i])
        means = torch.stack([mean(case.key[b, :, h], keys[j]) for j in live])
        apart = means - means.mean(0)
        if deviation == "diagonal":
            variance = c * c * (q.square() * apart.square().mean(0)).sum()
        else:
            variance = c * c * (apart @ q).square().mean()
        threshold = c * q @ means.mean(0) + tau * (variance + 1e-6).sqrt()
        chosen = {j for j, row in zip(live, means, strict=True) if c * q @ row > threshold}
        return chosen | near(queries[i], keys, diagonal)

    assert_rows(visits, wanted)


def near(query: list[int], keys: list[list[int]], width: int) -> set[int]:
    """Return the blocks with a token of the query block, and so many on both sides."""
    own = [j for j, block in enumerate(keys) if set(block) & set(query)]
    return {j for j in range(len(keys)) if any(abs(j - one) <= width for one in own)}


@few
@given(cases(layouts=("morton", "raster", "tile")), st.floats(0.05, 1))
def test_sol_finds_the_threshold_of_a_density(case: Case, density: float) -> None:
    _, visits, queries, keys = run("sol", case, density=density, diagonal=0)
    least = run("sol", case, tau=1e6, diagonal=0)[1]
    rows, columns = (torch.tensor([len(block) for block in some]).double() for some in (queries, keys))
    pairs = rows[:, None] * columns / case.grid.visual_length**2

    def share(some: Tensor) -> float:
        return float((some * pairs).sum((-2, -1)).mean())

    assert share(visits) <= max(density, share(least)) + 1e-6
    tau = sol_tau(case.grid, case.query, case.key, density, diagonal=0, **case.where)
    assert torch.equal(run("sol", case, tau=tau, diagonal=0)[1], visits)
    # one more pair of blocks would be too much
    lower = run("sol", case, tau=tau - 1e-3 * max(abs(tau), 1), diagonal=0)[1]
    assert bool((lower == visits).all()) or share(lower) > density


@few
@given(cases(), st.sampled_from([(1, 1), (2, 3), (4, 4)]), st.sampled_from([1, 4]))
def test_subblock_sums_exponentials_of_cells(case: Case, cells: tuple[int, int], multiple: int) -> None:
    params = {"keep": 0.3, "query_cells": cells[0], "key_cells": cells[1], "multiple": multiple}
    _, visits, queries, keys = run("subblock", case, **params)

    def cut(blocks: list[list[int]], number: int) -> list[list[list[int]]]:
        size = -(-max(map(len, blocks)) // number)
        return [[block[at : at + size] for at in range(0, len(block), size)] for block in blocks]

    left, right = cut(queries, cells[0]), cut(keys, cells[1])
    count = max(math.ceil(round(0.3 * len(keys), 9)), 1)
    count = min(math.ceil(count / multiple) * multiple, len(keys))

    def wanted(b: int, h: int, i: int) -> list[int]:
        row = torch.full((len(keys),), -torch.inf, dtype=torch.float64)
        for j, cells_of in enumerate(right):
            terms = [
                mean(case.query[b, :, h], one) @ mean(case.key[b, :, h], other) / 8**0.5
                for one in left[i]
                for other in cells_of
            ]
            if terms:
                row[j] = torch.stack(terms).logsumexp(0)
        return best(row, count)

    assert_rows(visits, wanted)


@few
@given(cases(layouts=("raster",)), st.sampled_from([0.1, 0.3, 1.0]), st.sampled_from(["connected", "patches"]))
def test_draft_takes_the_best_pairs_of_a_head(case: Case, keep: float, form: str) -> None:
    case = Case(case.grid, case.query, case.key, {"form": form, "block": case.where["block"], "patch": (2, 3)})
    _, visits, queries, keys = run("draft", case, keep=keep)
    probability = pooled_scores(case, queries, keys).softmax(-1)
    pairs = len(queries) ** 2
    count = max(math.floor(round(keep * pairs, 9) + 0.5), 1)
    if form == "patches":
        count = min(pairs - int(round((1 - keep) * pairs, 9)) + 1, pairs)
    for b, h in torch.cartesian_prod(*map(torch.arange, visits.shape[:2])).tolist():
        chosen = {divmod(one, len(keys)) for one in best(probability[b, h].flatten(), count)}
        rows = {i for i, _ in chosen}
        chosen |= {(i, i) for i in range(len(queries)) if i not in rows}
        assert {tuple(pair) for pair in visits[b, h].nonzero().tolist()} == chosen


@few
@given(cases(layouts=("raster",)), st.sampled_from(["jensen", "largest", "tails"]), st.integers(1, 2))
def test_estimates_of_draft(case: Case, estimate: str, tails: int) -> None:
    case = Case(case.grid, case.query, case.key, {"block": case.where["block"]})
    value = {"jensen": True, "largest": 0.3, "tails": tails}[estimate]
    _, visits, blocks, _ = run("draft", case, keep=0.3, **{estimate: value})
    scores = pooled_scores(case, blocks, blocks)
    count = max(math.floor(0.3 * len(blocks) ** 2 + 0.5), 1)
    for b, h in torch.cartesian_prod(*map(torch.arange, visits.shape[:2])).tolist():
        q, k = case.query[b, :, h].double(), case.key[b, :, h].double()
        table = scores[b, h].clone()
        for i, rows in enumerate(blocks):
            for j, columns in enumerate(blocks):
                if estimate == "jensen":
                    products = mean(q.square(), rows) @ mean(k.square(), columns)
                    table[i, j] += max(float(products - mean(q, rows) ** 2 @ mean(k, columns) ** 2), 0) / 16
                elif estimate == "largest":
                    table[i, j] = q[rows].amax(0) @ k[columns].amax(0) / 8**0.5
                elif len(columns) > 1:
                    apart = [float((k[one] - mean(k, columns)).square().sum()) for one in columns]
                    far = [columns[one] for one in best(torch.tensor(apart), tails)]
                    singles = [mean(q, rows) @ k[one] / 8**0.5 for one in far]
                    others = [one for one in columns if one not in far]
                    if others:
                        singles.append(mean(q, rows) @ mean(k, others) / 8**0.5 + math.log(len(others)))
                    table[i, j] = torch.stack(singles).logsumexp(0)
        probability = table.softmax(-1)
        if estimate == "largest":
            probability = 0.7 * scores[b, h].softmax(-1) + 0.3 * probability
        chosen = {divmod(one, len(blocks)) for one in best(probability.flatten(), count)}
        chosen |= {(i, i) for i in range(len(blocks)) if all(row != i for row, _ in chosen)}
        assert {tuple(pair) for pair in visits[b, h].nonzero().tolist()} == chosen


@few
@given(cases(layouts=("tile",)), st.sampled_from([0.1, 0.45]))
def test_cube_rounds_down_and_sees_itself(case: Case, keep: float) -> None:
    case = Case(case.grid, case.query, case.key, {"tile": case.where["tile"]})
    _, visits, blocks, _ = run("cube", case, keep=keep)
    scores = pooled_scores(case, blocks, blocks)
    count = max(math.floor(round(keep * len(blocks), 9)), 1)
    assert_rows(visits, lambda b, h, i: {i, *best(scores[b, h, i], count)})


@few
@given(cases(), st.sampled_from([0.001, 0.1, 0.7, 1.0]))
def test_skip_softmax_follows_the_running_maximum(case: Case, threshold: float) -> None:
    _, visits, queries, keys = run("skip_softmax", case, threshold=threshold)
    exact = case.grid.exact_positions().tolist()

    def wanted(b: int, h: int, i: int) -> set[int]:
        chosen = set()
        for row in queries[i]:
            scores = case.key[b, :, h].double() @ case.query[b, row, h].double() / 8**0.5
            running = max([float(scores[one]) for one in exact], default=-math.inf)
            for j, block in enumerate(keys):
                if block:
                    peak = float(scores[block].max())
                    running = max(running, peak)
                    if peak - running >= math.log(threshold):
                        chosen.add(j)
        return chosen

    assert_rows(visits, wanted)


@few
@given(cases(), st.sampled_from([0.01, 0.2, 2.0]), st.integers(0, 1), st.integers(0, 1))
def test_sale_compares_four_bits_with_what_is_near(case: Case, threshold: float, local: int, sinks: int) -> None:
    where = {"key_block": None, **case.where}
    case = Case(case.grid, case.query, case.key, where)
    _, visits, queries, keys = run("sale", case, threshold=threshold, local=local, sinks=sinks)
    exact = case.grid.exact_positions().tolist()

    def four_bits(x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 7
        return torch.where(step > 0, (x / step).round() * step, 0)

    def wanted(b: int, h: int, i: int) -> set[int]:
        q, k = case.query[b, :, h], case.key[b, :, h]
        k = k - k.mean(0)
        estimates = (four_bits(q - q.mean(0)) @ four_bits(k).T + q.mean(0) @ k.T) / 8**0.5
        always = near(queries[i], keys, local) | set(range(min(sinks, len(keys))))
        chosen = set(always)
        for row in queries[i]:
            seen = [one for j in always for one in keys[j]] + exact
            level = ((k[seen] @ q[row]) / 8**0.5).logsumexp(0) if seen else torch.tensor(-torch.inf)
            for j, block in enumerate(keys):
                if block and bool((estimates[row, block].exp() >= threshold * level.exp()).any()):
                    chosen.add(j)
        return chosen

    assert_rows(visits, wanted)


@few
@given(cases(layouts=("raster",)), st.booleans())
def test_svg_takes_the_better_mask_of_each_head(case: Case, with_value: bool) -> None:
    value = case.key.flip(1) if with_value else None
    density = min(2 * case.grid.exact_length / case.grid.length + 0.3, 1.0)
    if density <= 2 * case.grid.exact_length / case.grid.length:
        return
    params = {"density": density, "block": 3}
    both = [pattern(name, case.grid, **params) for name in ("svg_spatial", "svg_temporal")]
    got = pattern("svg", case.grid, query=case.query, key=case.key, value=value, queries=10**6, **params)
    visual = slice(case.grid.visual_start, case.grid.visual_start + case.grid.visual_length)
    scores = torch.einsum("bnke,bmke->bknm", case.query, case.key)[:, :, visual] / 8**0.5
    errors, masks = [], []
    for one in both:
        mask = BlockMap(one.queries, one.keys, one.visits).to_mask()[0, 0]
        seen = scores.masked_fill(~mask[visual], -torch.inf).softmax(-1) - scores.softmax(-1)
        if value is None:
            errors.append((scores.softmax(-1) * ~mask[visual]).sum((-2, -1)))
        else:
            errors.append(torch.einsum("bknm,bmke->bkne", seen, value).square().mean((-2, -1)))
        masks.append(mask)
    mask = got.to_mask()
    for b, h in torch.cartesian_prod(*map(torch.arange, mask.shape[:2])).tolist():
        if abs(float(errors[0][b, h] - errors[1][b, h])) > 1e-6:
            assert torch.equal(mask[b, h], masks[int(errors[1][b, h] < errors[0][b, h])])


@few
@given(cases(layouts=("raster",)), st.floats(0, 0.99), st.sampled_from([0.0, 0.5]))
def test_svg2_weighs_clusters_by_size(case: Case, p: float, least: float) -> None:
    state = ClusterState()
    params = {"query_clusters": 3, "key_clusters": 5, "iterations": 3, "state": state, "p": p, "least": least}
    block_map = pattern("svg2", case.grid, query=case.query, key=case.key, **params)
    visits = visual_visits(block_map)
    assert state.query is not None
    assert state.key is not None
    for b, h in torch.cartesian_prod(*map(torch.arange, visits.shape[:2])).tolist():
        queries, keys = visual_blocks(block_map.queries, b, h), visual_blocks(block_map.keys, b, h)
        everywhere = list(range(case.grid.visual_start, case.grid.visual_start + case.grid.visual_length))
        assert sorted(one for block in queries for one in block) == everywhere
        assert sorted(one for block in keys for one in block) == everywhere
        for i, rows in enumerate(queries):
            if not rows:
                continue
            q = mean(case.query[b, :, h], rows)
            mass = torch.zeros(len(keys), dtype=torch.float64)
            for j, columns in enumerate(keys):
                mass[j] = len(columns) * math.exp(q @ mean(case.key[b, :, h], columns) / 8**0.5)
            chosen = best_mass(mass / mass.sum(), p, least=max(math.floor(least * len(keys)), 1))
            assert visits[b, h, i].nonzero().flatten().tolist() == sorted(chosen)


def test_clusters_are_those_of_k_means_and_start_from_a_state() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2, 3, 60, 4, generator=generator)
    start = points[:, :, :7]
    labels, means, _ = cluster(points, start, 4)
    for b in range(2):
        for h in range(3):
            centroids, near_ = [start[b, h, one] for one in range(7)], []
            for _ in range(4):
                near_ = [min(range(7), key=lambda c: float((x - centroids[c]).norm())) for x in points[b, h]]
                members = [[x for x, one in zip(points[b, h], near_, strict=True) if one == c] for c in range(7)]
                centroids = [torch.stack(some).mean(0) if some else centroids[c] for c, some in enumerate(members)]
            assert labels[b, h].tolist() == near_
            torch.testing.assert_close(means[b, h], torch.stack(centroids))
    # a warm start continues where the last one ended
    case = random_case(3, 2, 6, 6, 0, "last", 0)
    state, whole = ClusterState(), ClusterState()
    params = {"query_clusters": 4, "key_clusters": 6, "query": case.query, "key": case.key}
    pattern("svg2", case.grid, iterations=2, state=state, **params)
    warm = pattern("svg2", case.grid, warm_iterations=3, state=state, **params)
    cold = pattern("svg2", case.grid, iterations=5, state=whole, **params)
    assert torch.equal(warm.to_mask(), cold.to_mask())
    other = TokenGrid(1, 5, 5)
    small = torch.randn(1, 25, 2, 8, generator=generator)
    pattern("svg2", other, query=small, key=small, query_clusters=30, state=state)
    shapes = [None if one is None else tuple(one.shape) for one in (state.query, state.key)]
    assert shapes == [(1, 2, 25, 8), (1, 2, 1, 8)]


@few
@given(cases(key_blocks=False, layouts=("raster", "hilbert")), st.sampled_from([0.0, 0.3]))
def test_vertical_slash_sums_columns_and_diagonals(case: Case, share: float) -> None:
    _, visits, blocks, _ = run("vertical_slash", case, verticals=share, slashes=share, queries=10**6)
    count = len(blocks)
    scores = torch.einsum("bnke,bmke->bknm", case.query.double(), case.key.double()) / 8**0.5
    mass = scores.softmax(-1)
    for b, h in torch.cartesian_prod(*map(torch.arange, visits.shape[:2])).tolist():
        pairs = torch.stack([torch.stack([mass[b, h][i][:, j].sum() for j in blocks]) for i in blocks])
        columns = best(pairs.sum(0), max(math.ceil(round(share * count, 9)), 1))
        along = [
            sum(float(pairs[i, i + o]) for i in range(count) if 0 <= i + o < count) for o in range(1 - count, count)
        ]
        slashes = best(torch.tensor(along), max(math.ceil(round(share * (2 * count - 1), 9)), 1))
        for i in range(count):
            wanted = set(columns) | {i} | {i + one - count + 1 for one in slashes}
            assert set(visits[b, h, i].nonzero().flatten().tolist()) == wanted & set(range(count))


@pytest.mark.parametrize("name", ONLINE)
def test_a_batch_is_its_samples_and_bfloat16_is_scored_in_float32(name: str) -> None:
    case = random_case(1, 3, 6, 7, 5, "first", 2)  # two samples
    query, key = case.query.bfloat16(), case.key.bfloat16()
    params = {"density": 0.6} if name == "svg" else {}
    both = pattern(name, case.grid, query=query, key=key, **params)
    for sample in range(2):
        alone = pattern(name, case.grid, query=query[sample, None].float(), key=key[sample, None].float(), **params)
        assert torch.equal(alone.to_mask()[0], both.to_mask()[sample])
    assert pattern_info(name).online
    assert pattern_info(name).summary


@pytest.mark.parametrize("name", ONLINE)
def test_nan_is_computed_as_dense_attention_does(name: str) -> None:
    case = random_case(4, 2, 6, 6, 3, "last", 0)
    query, key = case.query.clone(), case.key
    query[0, 5, 1] = torch.nan
    params = {"density": 0.5} if name == "svg" else {}
    block_map = pattern(name, case.grid, query=query, key=key, **params)
    out = block_sparse_attention(query, key, key, block_map, kernel="reference")
    assert bool(out[0, 5, 1].isnan().all())
    assert int(out.isnan().any(-1).sum()) == 1
    key = key.clone()
    key[0, 7, 0, 2] = torch.nan
    block_map = pattern(name, case.grid, query=case.query, key=key, **params)
    out = block_sparse_attention(case.query, key, key, block_map, kernel="reference")
    assert not bool(out[0, :, 1].isnan().any())
    if name not in ("svg", "vertical_slash"):  # both look at a few queries, whose mass is then unknown
        assert bool(out[0, :, 0].isnan().any(-1).all())


def test_ties_go_to_the_first_blocks() -> None:
    grid = TokenGrid(1, 8, 8)
    same = torch.ones(1, 64, 1, 4)
    block_map = pattern("pooled_topk", grid, query=same, key=same, keep=0.25, block=8)
    assert block_map.visits[0, 0].nonzero()[:, 1].tolist() == [0, 1] * 8
    block_map = pattern("pooled_topp", grid, query=same, key=same, p=0.3, block=8)
    assert block_map.visits[0, 0].nonzero()[:, 1].tolist() == [0, 1, 2] * 8
    block_map = pattern("draft", grid, query=same, key=same, keep=1 / 16, block=8)
    assert block_map.visits[0, 0].nonzero().tolist() == [[0, j] for j in range(4)] + [[i, i] for i in range(1, 8)]


def test_budget_of_subblock_is_that_of_sglang() -> None:
    grid = TokenGrid(59, 64, 10)  # 37760 tokens are 590 blocks of 64
    x = torch.randn(1, grid.length, 1, 2, generator=torch.Generator().manual_seed(0))
    block_map = pattern("subblock", grid, query=x, key=x, keep=0.25)
    assert block_map.visits.shape[2:] == (590, 590)
    assert block_map.visits.sum(-1).unique().tolist() == [152]


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("pooled_topk", {"keep": 1.5}, "keep is 1.5"),
        ("pooled_topk", {"rounding": "up"}, "rounding is 'up'"),
        ("pooled_topk", {"layout": "spiral"}, "use one of raster"),
        ("pooled_topk", {"layout": "tile"}, "give layout 'tile' a tile"),
        ("pooled_topk", {"window": (1, 3, 3)}, "use it with layout 'tile'"),
        ("pooled_topk", {"layout": "tile", "tile": (1, 2, 2), "key_block": 4}, "leave it out"),
        ("pooled_topk", {"diagonal": -1}, "diagonal is -1"),
        ("pooled_topp", {"p": -0.1}, "p is -0.1"),
        ("antidiagonal", {"stride": 0}, "at least 1"),
        ("sol", {"deviation": "sample"}, "'diagonal' or 'exact'"),
        ("sol", {"density": 2.0}, "density is 2.0"),
        ("subblock", {"query_cells": 0}, "at least 1"),
        ("draft", {"form": "round"}, "'connected' or 'patches'"),
        ("draft", {"jensen": True, "tails": 1}, "use one of them"),
        ("draft", {"anchors": True, "keep": 0.01, "block": 4}, "keep more"),
        ("svg", {"queries": 0}, "at least 1"),
        ("svg2", {"query_clusters": 0}, "at least 1"),
        ("vertical_slash", {"queries": 0}, "at least 1"),
        ("skip_softmax", {"threshold": 0.0}, "more than 0"),
        ("sale", {"threshold": 0.0}, "more than 0"),
    ],
)
def test_wrong_parameters_say_the_remedy(name: str, params: dict, message: str) -> None:
    case = random_case(0, 2, 4, 4, 0, "last", 0)
    with pytest.raises(ValueError, match=message):
        pattern(name, case.grid, query=case.query, key=case.key, **params)
