"""The generalized Hilbert curve, blocks of frames, blocks that are always visited, and presets."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.attention import TokenGrid, pattern, pattern_info
from dit.attention.frame_blocks import frame_blocks, frame_layout
from dit.attention.hilbert import hilbert_layout, hilbert_order
from dit.attention.layout import raster_layout, tile_layout
from dit.attention.patterns.draft import edge_visits
from dit.attention.patterns.layouts import diagonal_visits, forced_visits, neighbour_visits, window_visits
from dit.attention.patterns.presets import PRESETS, preset
from tests.attention.online_cases import Case, best, pooled_scores, random_case, visual_blocks, visual_visits

few = settings(max_examples=40, deadline=None)


@few
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_hilbert_passes_all_tokens_by_steps_to_neighbors(frames: int, height: int, width: int) -> None:
    order = hilbert_order(frames, height, width)
    assert sorted(order.tolist()) == list(range(frames * height * width))
    places = torch.stack(TokenGrid(frames, height, width).coordinates(order), dim=-1)
    steps = places.diff(dim=0).abs()
    if all(size % 2 == 0 for size in (frames, height, width)):
        assert bool((steps.sum(-1) == 1).all())
    assert float((steps.sum(-1) == 1).float().mean()) > 0.4 or len(steps) < 2


def test_hilbert_is_the_curve_of_the_published_code() -> None:
    # gilbert_xyz2d(x, y, z, width=4, height=2, depth=2) and (3, 3, 1), read along the curve
    assert hilbert_order(2, 2, 4).tolist() == [0, 4, 12, 8, 9, 13, 5, 1, 2, 6, 14, 10, 11, 15, 7, 3]
    assert hilbert_order(1, 3, 3).tolist() == [0, 1, 4, 3, 6, 7, 8, 5, 2]
    assert hilbert_layout(TokenGrid(2, 2, 4, 3, "first"), 5).sizes.flatten().tolist() == [5, 5, 5, 1, 3]


@few
@given(st.integers(1, 11), st.integers(1, 11), st.integers(1, 20))
def test_blocks_of_frames_are_connected_and_of_equal_size(height: int, width: int, block: int) -> None:
    labels = frame_blocks(height, width, block)
    sizes = labels.flatten().bincount()
    assert len(sizes) == -(-height * width // block)
    assert int(sizes.max()) <= block
    assert int(sizes.max() - sizes.min()) <= 1
    for label in range(len(sizes)):
        cells = {tuple(cell) for cell in (labels == label).nonzero().tolist()}
        found = todo = {min(cells)}
        while todo:
            beside = {(r + a, c + b) for r, c in todo for a, b in ((0, 1), (0, -1), (1, 0), (-1, 0))}
            todo = (beside & cells) - found
            found = found | todo
        assert found == cells


def test_blocks_of_frames_are_squares_where_they_fit() -> None:
    squares = torch.arange(4).view(2, 1, 2, 1).expand(2, 8, 2, 8).reshape(16, 16)
    labels = frame_blocks(16, 16, 64)
    pairs = {tuple(pair) for pair in torch.stack([labels.flatten(), squares.flatten()], 1).tolist()}
    assert len(pairs) == 4
    grid = TokenGrid(3, 5, 7, 2, "last")
    for block in visual_blocks(frame_layout(grid, 12)):
        assert len({one // 35 for one in block}) == 1


@few
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 7), st.integers(1, 7), st.integers(0, 2))
def test_blocks_that_are_always_visited(t: int, h: int, w: int, block: int, key_block: int, width: int) -> None:
    grid = TokenGrid(t, h, w, 2, "first")
    queries, keys = hilbert_layout(grid, block), hilbert_layout(grid, key_block)
    rows, columns = visual_blocks(queries), visual_blocks(keys)
    place = [torch.stack(grid.coordinates(torch.tensor(block_) - 2), -1) for block_ in rows]
    key_place = [torch.stack(grid.coordinates(torch.tensor(block_) - 2), -1) for block_ in columns]
    diagonal, beside = diagonal_visits(queries, keys, width), neighbour_visits(queries, keys)
    for i, j in itertools.product(range(len(rows)), range(len(columns))):
        away = (place[i][:, None] - key_place[j]).abs().amax(-1)
        assert beside[i, j] == (away <= 1).any()
        first = i * block // key_block - width
        last = (min((i + 1) * block, grid.visual_length) - 1) // key_block + width
        assert diagonal[i, j] == (first <= j <= last)
    tiles = tile_layout(grid, (2, 2, 2))
    window = window_visits(grid, (2, 2, 2), (3, 1, 4))
    corners = [torch.stack(grid.coordinates(torch.tensor(one[0]) - 2)) // 2 for one in visual_blocks(tiles)]
    for i, j in itertools.product(range(len(corners)), repeat=2):
        assert window[i, j] == bool(((corners[i] - corners[j]).abs() <= torch.tensor([1, 0, 2])).all())
    both = forced_visits(tiles, tiles, diagonal=0, window=(3, 1, 4), neighbours=False)
    assert both is not None
    assert torch.equal(both, window | torch.eye(len(corners), dtype=torch.bool))


@few
@given(st.integers(0, 999), st.sampled_from([0.0, 0.3, 1.0]))
def test_what_is_on_top_does_not_compete(seed: int, keep: float) -> None:
    case = random_case(seed, 2, 3, 5, 2, "last", 0)
    params = {"keep": keep, "on_top": True, "block": 4, "key_block": 3, "diagonal": 0}
    block_map = pattern("pooled_topk", case.grid, query=case.query, key=case.key, **params)
    visits, rows, columns = visual_visits(block_map), visual_blocks(block_map.queries), visual_blocks(block_map.keys)
    scores = pooled_scores(case, rows, columns)
    for b, h, i in itertools.product(*map(range, visits.shape[:3])):
        own = {j for j, block in enumerate(columns) if set(block) & set(rows[i])}
        free = [j for j in range(len(columns)) if j not in own]
        count = max(-(-round(keep * len(free) * 1000) // 1000), 1)
        chosen = own | {free[one] for one in best(scores[b, h, i][free], count)}
        assert set(visits[b, h, i].nonzero().flatten().tolist()) == chosen


@pytest.mark.parametrize("keep", [0.3, 0.6])
def test_anchors_take_the_place_of_the_weakest_pairs(keep: float) -> None:
    case = random_case(5, 3, 5, 7, 0, "last", 0)
    params = {"query": case.query, "key": case.key, "keep": keep, "block": 6}
    plain, anchored = (pattern("draft", case.grid, anchors=anchors, **params) for anchors in (False, True))
    layout = anchored.queries
    edges = edge_visits(layout)
    blocks = visual_blocks(layout)
    for i, j in itertools.product(range(len(blocks)), repeat=2):
        touch = any(one // 35 == two // 35 and _distance(one, two) == 1 for one in blocks[i] for two in blocks[j])
        assert edges[i, j] == (touch or i == j)
    assert bool(anchored.visits[..., edges].all())
    assert int(anchored.visits.sum()) == 4 * round(keep * len(blocks) ** 2)
    others = anchored.visits & ~edges
    scores = pooled_scores(Case(case.grid, case.query, case.key, {}), blocks, blocks).softmax(-1)
    left = plain.visits & ~edges & ~anchored.visits
    assert float(scores.masked_fill(~others, 2).flatten(2).amin()) > 0
    for b, h in itertools.product(range(2), range(2)):
        if bool(left[b, h].any()):
            assert scores[b, h][left[b, h]].max() <= scores[b, h][others[b, h]].min()


def _distance(one: int, other: int) -> int:
    return abs(one % 35 // 7 - other % 35 // 7) + abs(one % 7 - other % 7)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_patterns_with_parameters(name: str) -> None:
    case = random_case(2, 4, 16, 16, 3, "first", 0)
    target, params = preset(name)
    assert set(params) <= set(pattern_info(target).parameters)
    if params.get("anchors"):
        params["keep"] = 0.7  # a grid as small as this has many edges
    params = json.loads(json.dumps(params))  # as a plan keeps them
    block_map = pattern(target, case.grid, query=case.query, key=case.key, **params)
    assert bool(visual_visits(block_map).any(-1).all())
    assert 0 < block_map.density() <= 1


def test_a_preset_can_be_changed_and_must_exist() -> None:
    assert preset("nabla", p=0.5) == ("pooled_topp", {**PRESETS["nabla"][1], "p": 0.5})
    with pytest.raises(ValueError, match="use one of sparge"):
        preset("flash")
    grid = TokenGrid(1, 4, 4)
    x = torch.zeros(1, 16, 1, 4)
    with pytest.raises(ValueError, match="the layout is of the grid"):
        pattern("pooled_topk", grid, query=x, key=x, layout=raster_layout(TokenGrid(1, 4, 5)))
