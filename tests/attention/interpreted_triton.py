"""Tests of the Triton kernel in its interpreter: `test_triton` runs them in a process with TRITON_INTERPRET=1."""

import math

import pytest
import torch

from dit.attention import TokenGrid, block_sparse_attention
from dit.attention.block_map import TokenRule, make_block_map
from dit.attention.kernels import reference, triton, triton_lists
from dit.attention.kernels.contract import Tail
from dit.attention.kernels.triton import TritonOptions
from dit.attention.layout import axes_layout, cluster_layout, raster_layout, tile_layout

GRID = TokenGrid(3, 6, 7, 11, "first", 5)


class Thirds(TokenRule):
    def allowed(self, query, key):
        return (query + key) % 3 > 0


def inputs(grid, width=16, dtype=torch.float32, batch=1, heads=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, grid.length, heads, width, generator=generator).to(dtype) for _ in range(3)]


def random_map(layout, density=0.4, heads=1, batch=1, **options):
    generator = torch.Generator().manual_seed(1)
    visits = torch.rand(batch, heads, layout.visual_count, layout.visual_count, generator=generator) < density
    return make_block_map(layout, visits, **options)


def random_tail(block_map, key, dtype=None):
    generator = torch.Generator().manual_seed(2)
    shape = (key.shape[0], key.shape[2], block_map.keys.count, key.shape[3])
    pooled = [torch.randn(shape, generator=generator).to(dtype or key.dtype) for _ in range(2)]
    return Tail(*pooled, torch.rand(1, 1, block_map.keys.count, generator=generator) * 3)


def run(function, query, key, value, block_map, **options):
    return function(query, key, value, block_map, scale=query.shape[-1] ** -0.5, return_lse=True, **options)


def errors(query, key, value, block_map, key_mask=None, tail=None, **options):
    """Relative error of the output and largest error of the LSE against float64."""
    out, lse = run(triton.attend, query, key, value, block_map, key_mask=key_mask, tail=tail, **options)
    wide = (x.double() for x in (query, key, value))
    truth, true_lse = run(reference.attend, *wide, block_map, key_mask=key_mask, tail=tail)
    assert torch.equal(lse.isneginf(), true_lse.isneginf())
    finite = true_lse.isfinite()
    return (out.double() - truth).norm() / truth.norm(), (lse - true_lse)[finite].abs().max()


@pytest.mark.parametrize(
    ("dtype", "width"),
    [(torch.float32, 64), (torch.float32, 72), (torch.bfloat16, 64), (torch.bfloat16, 72), (torch.float16, 128)],
)
def test_error_at_most_twice_that_of_dense(dtype, width):
    layout = raster_layout(TokenGrid(2, 8, 16), 64)
    query, key, value = inputs(layout.grid, width, dtype, heads=1)
    error, lse_error = errors(query, key, value, random_map(layout))
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    everything = make_block_map(layout, torch.ones(layout.count, layout.count, dtype=torch.bool))
    truth, _ = run(reference.attend, query.double(), key.double(), value.double(), everything)
    of_dense = (dense.transpose(1, 2).double() - truth).norm() / truth.norm()
    assert error <= 2 * of_dense
    assert lse_error < 4e-6  # it is float32 in all of them
    assert errors(query, key, value, everything)[0] <= 2 * of_dense


@pytest.mark.parametrize(
    ("kind", "masked", "use_tma"),
    [("raster", True, False), ("axes", False, True), ("tile", True, True), ("clusters", False, False),
     ("clusters", True, True)],
)  # fmt: skip
def test_any_layout_mask_and_tail(kind, masked, use_tma):
    labels = torch.randint(0, 5, (2, 2, GRID.visual_length), generator=torch.Generator().manual_seed(3))
    layout = {
        "raster": lambda: raster_layout(GRID, 48),
        "axes": lambda: axes_layout(GRID, "hwt", 30),
        "tile": lambda: tile_layout(GRID, (2, 4, 4)),
        "clusters": lambda: cluster_layout(GRID, labels, 6),  # the last one is empty
    }[kind]()
    batch = 2 if kind == "clusters" else 1  # the interpreter computes program after program
    query, key, value = inputs(GRID, 24, batch=batch)
    block_map = random_map(layout, heads=2, batch=batch)
    key_mask = torch.rand(batch, GRID.length, generator=torch.Generator().manual_seed(4)) < 0.7 if masked else None
    tail = random_tail(block_map, key) if masked else None
    error, lse_error = errors(query, key, value, block_map, key_mask, tail, options=TritonOptions(use_tma=use_tma))
    assert error < 1e-6
    assert lse_error < 4e-6


@pytest.mark.parametrize("per_head", [False, True])
def test_pairs_of_a_rule(per_head):
    layout = tile_layout(GRID, (2, 4, 4))
    block_map = random_map(layout, 0.6, heads=2, rule=Thirds())
    if per_head:  # the first head asks nowhere
        partial = torch.stack([torch.zeros_like(block_map.visits[0, 0]), block_map.visits[0, 1]])[None]
        block_map = type(block_map)(layout, layout, block_map.visits, Thirds(), partial)
    query, key, value = inputs(GRID, 16)
    options = TritonOptions(block_m=16, block_n=32) if per_head else TritonOptions()  # several pieces a block
    assert max(errors(query, key, value, block_map, options=options)) < 4e-6
    if not per_head:
        assert max(errors(query, key, value, block_map.prune())) < 4e-6


def test_a_rule_that_allows_everything_needs_no_bits():
    class Everything(TokenRule):
        def allowed(self, query, key):
            return torch.ones(torch.broadcast_shapes(query.shape, key.shape), dtype=torch.bool)

    block_map = random_map(raster_layout(GRID, 48), rule=Everything())
    assert triton_lists.lists_of(block_map, 64, 64).bits is None
    assert max(errors(*inputs(GRID), block_map)) < 4e-6


def test_keys_in_order_are_not_copied():
    whole = random_map(raster_layout(TokenGrid(2, 8, 16), 64))
    assert triton_lists.lists_of(whole, 64, 64).source is None
    assert triton_lists.lists_of(random_map(raster_layout(GRID, 48)), 64, 64).source is not None
    query, key, value = inputs(whole.keys.grid, 32)
    by_heads = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    assert max(errors(*by_heads, whole)) < 4e-6


def test_empty_rows_and_masked_keys_without_numbers():
    grid = TokenGrid(1, 6, 8)
    layout = raster_layout(grid, 16)
    visits = torch.eye(3, dtype=torch.bool)
    visits[1, 1] = False
    block_map = make_block_map(layout, visits)
    query, key, value = inputs(grid)
    key_mask = torch.ones(1, 48, dtype=torch.bool)
    key_mask[:, 5:9] = False
    key[:, 5:9] = value[:, 5:9] = math.nan
    out, lse = run(triton.attend, query, key, value, block_map, key_mask=key_mask)
    assert out.isfinite().all()
    assert not out[:, 16:32].any()
    assert bool(lse[..., 16:32].isneginf().all())
    query[0, 3] = math.nan
    for options in (TritonOptions(), TritonOptions(int8_scores=True), TritonOptions(skip_below=0.1)):
        out, _ = run(triton.attend, query, key, value, block_map, key_mask=key_mask, options=options)
        assert torch.equal(out.isnan().any(-1).any(-1)[0].nonzero().flatten(), torch.tensor([3]))
    value[0, 40] = math.nan  # seen by the last block only
    out, _ = run(triton.attend, query, key, value, block_map, key_mask=key_mask)
    assert out[0, 32:].isnan().all()
    assert not out[0, :3].isnan().any()


@pytest.mark.parametrize(("fp8", "most", "use_tma"), [(False, 0.015, False), (True, 0.045, True)])
def test_numbers_in_eight_bits(fp8, most, use_tma):
    layout = tile_layout(GRID, (2, 4, 4))
    block_map = random_map(layout)
    query, key, value = inputs(GRID, 72, torch.bfloat16, heads=1)
    key = (
        key + 8 * torch.randn(1, 1, 1, 72, generator=torch.Generator().manual_seed(5)).bfloat16()
    )  # channels that stand out
    options = TritonOptions(int8_scores=True, fp8_values=fp8, use_tma=use_tma)
    key_mask = torch.ones(1, GRID.length, dtype=torch.bool)
    key_mask[:, :4] = False
    error, lse_error = errors(query, key, value, block_map, key_mask, random_tail(block_map, key), options=options)
    assert error < most
    assert lse_error < 0.1  # of scores near 8


def test_skipped_softmax():
    """Leaving out what is far below the largest score changes little, and leaves out something."""
    layout = raster_layout(TokenGrid(2, 8, 16), 32)
    block_map = make_block_map(layout, torch.ones(8, 8, dtype=torch.bool))
    query, key, value = inputs(layout.grid, 16, heads=1)
    key[:, 64:128] *= 0.01
    query, key = query + 2, key + torch.where(torch.arange(256) < 64, 2.0, 0.0)[:, None, None]
    exact = errors(query, key, value, block_map)[0]
    skipped = errors(query, key, value, block_map, options=TritonOptions(skip_below=1e-3))[0]
    assert exact < 2e-6 < skipped < 1e-2


def test_the_public_call():
    grid = TokenGrid(1, 6, 7, 11, "first", 5)
    block_map = random_map(raster_layout(grid, 16))
    query, key, value = inputs(grid, 64, torch.bfloat16)
    exact = block_sparse_attention(query, key, value, block_map, kernel="reference").float()
    for name, most in (("triton", 0.01), ("triton_int8", 0.02), ("triton_int8_fp8", 0.05)):
        out = block_sparse_attention(query, key, value, block_map, kernel=name).float()
        assert (out - exact).norm() < most * exact.norm(), name
    with pytest.raises(ValueError, match="512 wide"):
        block_sparse_attention(*inputs(grid, 512), block_map, kernel="triton")


@pytest.mark.parametrize("options", [{"skip_below": 1.0}, {"block_m": 48}, {"block_n": 16}])
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TritonOptions(**options)
