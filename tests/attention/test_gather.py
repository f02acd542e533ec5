"""The gather kernel equals the reference on any map, order, mask and tail."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit.attention import TokenGrid, TokenRule, block_sparse_attention
from dit.attention.block_map import BlockMap, make_block_map
from dit.attention.kernels import gather_lists, gather_tasks, rows
from dit.attention.kernels.contract import Tail
from dit.attention.layout import Layout, axes_layout, cluster_layout, morton_layout, raster_layout, tile_layout

GRID = TokenGrid(3, 5, 7, text_length=9, text_position="first", extra_length=4)
B, K, E = 2, 3, 8


class Near(TokenRule):
    """Tokens whose raster indices differ by at most a width."""

    def __init__(self, width: int) -> None:
        self.width = width

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query - key).abs() <= self.width


LAYOUTS: dict[str, Callable[[], Layout]] = {
    "raster": lambda: raster_layout(GRID, 16),
    "tiles": lambda: tile_layout(GRID, (2, 2, 4)),
    "morton": lambda: morton_layout(GRID, 16),
    "axes": lambda: axes_layout(GRID, "hwt", 16),
    "clusters": lambda: cluster_layout(GRID, torch.randint(0, 5, (B, K, 105)), 6),  # the last one is empty
}


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def compare(block_map: BlockMap, **options: Any) -> None:
    query, key, value = (draw(B, GRID.length, K, E) for _ in range(3))
    expected, expected_lse = block_sparse_attention(
        query, key, value, block_map, kernel="reference", return_lse=True, **options
    )
    for _ in range(2):  # prepared, then as it was prepared
        out, lse = block_sparse_attention(query, key, value, block_map, kernel="gather", return_lse=True, **options)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-6)
    out = block_sparse_attention(query, key, value, block_map, kernel="gather", **options)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("has_tail", [False, True])
@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("heads", [(1, 1), (1, K), (B, K)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_map(layout: str, heads: tuple[int, int], has_mask: bool, has_tail: bool) -> None:
    torch.manual_seed(0)
    order = LAYOUTS[layout]()
    visits = torch.rand(*heads, order.visual_count, order.visual_count) > 0.6
    visits[..., 0, :] = False  # a block without a visual key
    tail = None
    if has_tail:
        counts = order.sizes.float().log()
        counts[..., order.visual_count :] = -torch.inf
        tail = Tail(draw(B, K, order.count, E), draw(B, K, order.count, E), counts)
    mask = torch.rand(B, GRID.length) > 0.2 if has_mask else None
    compare(make_block_map(order, visits), key_mask=mask, tail=tail)
    if order.is_shared:
        for width in (20, -1):  # -1: no pair of visual tokens counts
            rule = make_block_map(order, visits, rule=Near(width))
            compare(rule, key_mask=mask, tail=tail)
            compare(rule.prune(), key_mask=mask, tail=tail)


def test_queries_without_keys_get_zeros() -> None:
    grid = TokenGrid(1, 4, 8)
    layout = raster_layout(grid, 8)
    visits = torch.eye(4, dtype=torch.bool)
    visits[1] = False
    query = draw(1, 32, 2, 4)
    out, lse = block_sparse_attention(
        query, query, query, make_block_map(layout, visits), kernel="gather", return_lse=True
    )
    assert out[:, 8:16].eq(0).all()
    assert lse[..., 8:16].isneginf().all()
    assert lse[..., :8].isfinite().all()
    none = torch.zeros(1, 32, dtype=torch.bool)
    out, lse = block_sparse_attention(
        query, query, query, make_block_map(layout, visits), kernel="gather", return_lse=True, key_mask=none
    )
    assert out.eq(0).all()
    assert lse.isneginf().all()


def test_nan_stays_with_those_who_see_it() -> None:
    layout = raster_layout(TokenGrid(1, 4, 8), 8)
    value = draw(1, 32, 1, 4)
    value[0, 3] = torch.nan
    query = draw(1, 32, 1, 4)
    block_map = make_block_map(layout, torch.eye(4, dtype=torch.bool))
    out = block_sparse_attention(query, query, value, block_map, kernel="gather")
    assert out[:, :8].isnan().any()
    assert out[:, 8:].isfinite().all()


@pytest.mark.parametrize("return_lse", [False, True])
def test_nan_in_a_sampled_key_stays_with_those_who_see_it(return_lse: bool) -> None:
    """In bfloat16 a sample of all keys tells the level of all queries."""
    layout = raster_layout(TokenGrid(1, 16, 16), 64)
    query, key, value = (draw(1, 256, 2, 16, dtype=torch.bfloat16) for _ in range(3))
    key[0, 0] = torch.nan
    block_map = make_block_map(layout, torch.eye(4, dtype=torch.bool))
    options: Any = {"kernel": "gather", "return_lse": return_lse}
    found = block_sparse_attention(query, key, value, block_map, **options)
    out = found[0] if return_lse else found
    assert out[:, :64].isnan().all()
    assert out[:, 64:].isfinite().all()


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("spread", [1.0, 2.5])
def test_bfloat16_is_near_the_fused_kernel(spread: float, return_lse: bool) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(1, 32, 32)
    query, key, value = (draw(1, 1024, 2, 64) for _ in range(3))
    query, key = query * spread, key * spread
    rounded = [x.bfloat16() for x in (query, key, value)]
    everything = torch.ones(8, 8, dtype=torch.bool)
    block_map = make_block_map(raster_layout(grid, 128), everything)
    truth = block_sparse_attention(*(x.double() for x in rounded), block_map, kernel="reference")
    fused = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in rounded)).transpose(1, 2)
    if return_lse:
        out, lse = block_sparse_attention(*rounded, block_map, kernel="gather", return_lse=True)
        _, expected = block_sparse_attention(*rounded, block_map, kernel="reference", return_lse=True)
        assert float((lse - expected).abs().max()) < (0.05 if spread > 1 else 0.01)
    else:
        out = block_sparse_attention(*rounded, block_map, kernel="gather")
    error, least = (float((x.double() - truth).norm() / truth.norm()) for x in (out, fused))
    # scores in bfloat16 without a level taken off them would be 2 and 10 times as far off
    assert error < least * (2.5 if return_lse else 1.6)


def test_large_maps_keep_no_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather_tasks, "LIST_BYTES", 0)
    monkeypatch.setattr(gather_lists, "RULE_BYTES", 0)
    layout = raster_layout(GRID, 16)
    block_map = make_block_map(layout, torch.ones(layout.visual_count, layout.visual_count, dtype=torch.bool))
    compare(block_map)
    assert not any(isinstance(name, tuple) for name in block_map.cache)  # no lists
    compare(make_block_map(layout, block_map.visits[0, 0, :-1, :-1], rule=Near(9)).prune())


@pytest.mark.parametrize("library", ["mkl", "fused kernel", "oneDNN"])
@pytest.mark.parametrize("fused_keys", [0, 10**6])
def test_float32_by_any_library(library: str, fused_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """MKL's products, torch's fused kernel, and oneDNN's products where torch has them."""
    if library == "oneDNN" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch has no oneDNN here")
    monkeypatch.setattr(gather_tasks, "FUSED_KEYS", fused_keys)
    monkeypatch.setattr(rows, "mkl_is_slow", lambda: library != "mkl")
    for module in (gather_tasks, rows):
        monkeypatch.setattr(module, "has_fast_onednn", lambda: library == "oneDNN")
    monkeypatch.setattr(rows, "MIN_MACS", 0)
    torch.manual_seed(0)
    layout = raster_layout(GRID, 16)
    visits = torch.rand(1, K, layout.visual_count, layout.visual_count) > 0.5
    compare(make_block_map(layout, visits))
    compare(make_block_map(layout, visits), key_mask=torch.rand(B, GRID.length) > 0.2)
    compare(make_block_map(layout, visits, rule=Near(9)).prune())
    counts = layout.sizes.float().log()
    counts[..., layout.visual_count :] = -torch.inf
    tail = Tail(draw(B, K, layout.count, E), draw(B, K, layout.count, E), counts)
    compare(make_block_map(layout, visits, rule=Near(9)).prune(), tail=tail)


def test_a_query_whose_first_keys_are_all_hidden_sees_the_others() -> None:
    """torch's fused kernel looks at 512 keys at a time."""
    torch.manual_seed(0)
    query, key, value = draw(1, 4, 8), draw(1, 700, 8), draw(1, 700, 8)
    hidden = torch.zeros(4, 600).masked_fill(torch.arange(4)[:, None] < 2, -torch.inf)
    for given in (hidden, hidden[None], hidden.isneginf()):
        out, lse = rows.attend_rows(query, key, value, 0.5, hidden=given, return_lse=True)
        scores = query @ key.mT * 0.5
        scores[..., :600] += hidden
        torch.testing.assert_close(out, scores.softmax(-1) @ value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_behind_a_rule(dtype: torch.dtype) -> None:
    """Pairs that don't count are hidden by adding -inf to their scores, which would make NaN of NaN."""
    layout = raster_layout(TokenGrid(1, 4, 8), 8)
    query, key, value = (draw(1, 32, 2, 4, dtype=dtype) for _ in range(3))
    key[0, 0] = torch.nan
    block_map = make_block_map(layout, torch.ones(4, 4, dtype=torch.bool), rule=Near(3))
    out = block_sparse_attention(query, key, value, block_map, kernel="gather")
    assert out[:, :4].isnan().all()
    assert out[:, 4:].isfinite().all()


def test_threads_change_nothing_but_rounding() -> None:
    torch.manual_seed(0)
    layout = raster_layout(GRID, 16)
    block_map = make_block_map(layout, torch.rand(1, K, layout.visual_count, layout.visual_count) > 0.5)
    query = draw(B, GRID.length, K, E)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = block_sparse_attention(query, query, query, block_map, kernel="gather")
        torch.set_num_threads(3)
        together = block_sparse_attention(query, query, query, block_map, kernel="gather")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)
