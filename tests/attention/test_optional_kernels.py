"""The adapters of natten and xformers, with stand-ins that compute slowly what those say they do."""

import importlib.util
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dit.attention import TokenGrid, block_sparse_attention, pattern
from dit.attention.block_map import make_block_map
from dit.attention.kernels import contract, natten, xformers
from dit.attention.kernels.contract import sparse_kernel
from dit.attention.layout import axes_layout, cluster_layout, tile_layout
from dit.attention.patterns.neighborhood import axis_table


def inputs(grid, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, grid.length, 2, 8, generator=generator) for _ in range(3)]


def slow(query, key, value, mask, scale):
    """Attend among (B, N, K, E) where the mask (N, M) is True; return the LSE too, (B, N, K)."""
    scores = torch.einsum("bnke,bmke->bnkm", query, key) * scale
    scores = scores.masked_fill(~mask[:, None], -math.inf)
    return torch.einsum("bnkm,bmke->bnke", scores.softmax(-1), value), scores.logsumexp(-1)


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(contract, "find_spec", lambda name: object())

    def neighborhood(
        query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=1.0, return_lse=False
    ):
        sizes = query.shape[1:-2]
        options = [
            one if isinstance(one, tuple) else (one,) * len(sizes) for one in (kernel_size, stride, dilation, is_causal)
        ]
        assert min(options[0]) > 1, "natten's smallest window is 2"
        mask = torch.ones(1, 1, dtype=torch.bool)
        for one in zip(sizes, *options, strict=True):
            mask = torch.kron(mask.int(), axis_table(*one).int()).bool()
        flat = [x.flatten(1, -3) for x in (query, key, value)]
        out, lse = slow(*flat, mask, scale)
        out, lse = out.view(query.shape), lse.view(query.shape[:-1])
        return (out, lse) if return_lse else out

    fake = ModuleType("natten")
    fake.na1d = fake.na2d = fake.na3d = neighborhood
    monkeypatch.setitem(sys.modules, "natten", fake)

    def from_seqlens(q_seqlen, kv_seqlen=None, device=None):
        return q_seqlen, kv_seqlen or q_seqlen

    def forward(query, key, value, attn_bias, scale=1.0):
        parts = [torch.ones(rows, columns, dtype=torch.bool) for rows, columns in zip(*attn_bias, strict=True)]
        out, lse = slow(query, key, value, torch.block_diag(*parts), scale)
        return out, lse.transpose(1, 2)

    bias = ModuleType("xformers.ops.fmha.attn_bias")
    bias.BlockDiagonalMask = SimpleNamespace(from_seqlens=from_seqlens)
    functions = ModuleType("xformers.ops.fmha")
    functions.memory_efficient_attention_forward = lambda *args, **options: forward(*args, **options)[0]
    functions.memory_efficient_attention_forward_requires_grad = forward
    for module in (ModuleType("xformers"), ModuleType("xformers.ops"), functions, bias):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    natten._trial.cache_clear()
    xformers._trial.cache_clear()
    yield
    natten._trial.cache_clear()
    xformers._trial.cache_clear()


def assert_equals_the_reference(kernel, block_map):
    found = block_sparse_attention(*inputs(block_map.queries.grid), block_map, kernel=kernel, return_lse=True)
    slowly = block_sparse_attention(*inputs(block_map.queries.grid), block_map, kernel="reference", return_lse=True)
    torch.testing.assert_close(found, slowly, rtol=1e-5, atol=2e-6)
    assert torch.equal(block_sparse_attention(*inputs(block_map.queries.grid), block_map, kernel=kernel), found[0])


NEIGHBORHOODS = [
    ((3, 4, 6), {"window": (2, 3, 3)}),
    ((4, 6, 4), {"window": (4, 3, 2), "stride": (2, 2, 1), "causal": (True, False, False)}),
    ((1, 8, 6), {"window": (1, 3, 4), "dilation": (1, 2, 1)}),  # of an image
    ((2, 8, 6), {"window": (1, 3, 6)}),  # frame by frame
    ((3, 2, 4), {"window": (3, 1, 1)}),  # along time only
]


@pytest.mark.parametrize(("shape", "params"), NEIGHBORHOODS)
def test_natten_equals_the_reference(shape, params, stand_ins):
    assert_equals_the_reference("natten", pattern("neighborhood", TokenGrid(*shape), **params, tile=(1, 2, 2)))


@pytest.mark.skipif(importlib.util.find_spec("natten") is None, reason="natten is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("shape", "params"), NEIGHBORHOODS[:3])
def test_the_real_natten(shape, params):
    assert_equals_the_reference("natten", pattern("neighborhood", TokenGrid(*shape), **params, tile=(1, 2, 2)))


def test_natten_refuses_other_maps(stand_ins):
    grid = TokenGrid(2, 6, 6)

    def reason(block_map):
        return sparse_kernel("natten").refusal(*inputs(block_map.queries.grid)[:2], block_map)

    whole = pattern("neighborhood", grid, window=3, tile=(1, 2, 2))
    assert "larger than the grid" not in reason(whole)
    assert "only" in reason(pattern("dense", grid))
    assert "text" in reason(pattern("neighborhood", TokenGrid(2, 6, 6, 3, "last"), window=2))
    assert "larger than the grid (2, 6, 6)" in reason(pattern("neighborhood", grid, window=2, dilation=(1, 4, 1)))
    assert "single token" in reason(pattern("neighborhood", grid, window=1))
    visits = whole.visits.clone()
    visits[0, 0, 0] = False
    assert "isn't all" in reason(type(whole)(whole.queries, whole.keys, visits, whole.rule, whole.partial))
    nowhere = torch.zeros_like(visits)
    assert "isn't all" in reason(type(whole)(whole.queries, whole.keys, whole.visits, whole.rule, nowhere))


GRID = TokenGrid(2, 4, 4, 3, "last")


def windows(grid=GRID):
    layout = tile_layout(grid, (1, 2, 2))
    frame = torch.arange(8) // 4
    return make_block_map(layout, frame[:, None] == frame)


def test_xformers_equals_the_reference(stand_ins):
    assert_equals_the_reference("xformers", windows())
    assert_equals_the_reference("xformers", pattern("dense", TokenGrid(1, 4, 4)))
    layout = axes_layout(TokenGrid(1, 4, 4), "hwt", 4)
    visits = torch.eye(4, dtype=torch.bool)
    visits[2] = False  # these queries have no key
    assert_equals_the_reference("xformers", make_block_map(layout, visits))
    assert_equals_the_reference("xformers", make_block_map(layout, torch.zeros_like(visits)))


def test_neighbors_that_see_the_same_are_one_sequence():
    sequences = xformers._sequences(windows())
    assert sequences.row_counts == [16, 16, 3]
    assert sequences.column_counts == [19, 19, 35]


def test_xformers_refuses_other_maps(stand_ins):
    grid = TokenGrid(1, 8, 8)

    def reason(block_map):
        return sparse_kernel("xformers").refusal(*inputs(grid)[:2], block_map)

    labels = torch.randint(0, 4, (2, 2, 64), generator=torch.Generator().manual_seed(1))
    assert "heads" in reason(make_block_map(cluster_layout(grid, labels, 4), torch.eye(4, dtype=torch.bool)))
    assert "some pairs" in reason(pattern("neighborhood", grid, window=(1, 3, 3)))
    band = torch.ones(16, 16, dtype=torch.bool).tril(6).triu(-6)
    assert "at most 4" in reason(make_block_map(axes_layout(grid, "thw", 4), band))


@pytest.mark.parametrize("name", ["natten", "xformers"])
def test_masks_are_refused_and_packages_named(name, stand_ins, monkeypatch):
    block_map = (
        windows(TokenGrid(2, 4, 4)) if name == "xformers" else pattern("neighborhood", TokenGrid(2, 4, 4), window=2)
    )
    mask = torch.ones(2, 32, dtype=torch.bool)
    with pytest.raises(ValueError, match="key_mask"):
        block_sparse_attention(*inputs(block_map.queries.grid), block_map, kernel=name, key_mask=mask)
    monkeypatch.setattr(contract, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"{name} is not installed"):
        block_sparse_attention(*inputs(block_map.queries.grid), block_map, kernel=name)


@pytest.mark.parametrize("name", ["natten", "xformers"])
def test_a_failed_trial_is_the_reason(name, stand_ins, monkeypatch):
    def fail(*args, **options):
        raise NotImplementedError("no operator here\nfor this")

    block_map = (
        windows(TokenGrid(2, 4, 4)) if name == "xformers" else pattern("neighborhood", TokenGrid(2, 4, 4), window=2)
    )
    module, function = {
        "natten": ("natten", "na2d"),
        "xformers": ("xformers.ops.fmha", "memory_efficient_attention_forward"),
    }[name]
    monkeypatch.setattr(sys.modules[module], function, fail)
    with pytest.raises(ValueError, match=f"{name}: {name} can't: no operator here;? ?"):
        block_sparse_attention(*inputs(block_map.queries.grid), block_map, kernel=name)
