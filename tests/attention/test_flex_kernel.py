"""The flex kernel: maps of uniform blocks become BlockMasks, others are refused with the reason."""

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from dit.attention import TokenGrid, block_sparse_attention
from dit.attention.block_map import TokenRule, make_block_map
from dit.attention.kernels import flex, reference
from dit.attention.kernels.contract import Tail
from dit.attention.layout import axes_layout, raster_layout

GRID = TokenGrid(2, 4, 4, 5, "last")  # blocks of 8, and the last one of 5
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")


class Thirds(TokenRule):
    def allowed(self, query, key):
        return (query + 2 * key) % 3 > 0


def inputs(batch=2, heads=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, GRID.length, heads, 8, generator=generator) for _ in range(3)]


def a_map(axes="thw", heads=(1, 1), **options):
    layout = axes_layout(GRID, axes, 8)
    generator = torch.Generator().manual_seed(1)
    visits = torch.rand(*heads, 4, 4, generator=generator) < 0.6
    return make_block_map(layout, visits, **options)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ruled", [False, True])
@pytest.mark.parametrize("heads", [(1, 1), (2, 2)])
def test_equals_the_reference(heads, ruled, masked):
    block_map = a_map("hwt", heads, rule=Thirds() if ruled else None)
    if ruled and heads == (1, 1):
        block_map = block_map.prune()
    mask = torch.rand(2, GRID.length, generator=torch.Generator().manual_seed(2)) < 0.7 if masked else None
    options = {"scale": 0.4, "key_mask": mask, "return_lse": True}
    out, lse = flex.attend(*inputs(), block_map, **options)
    expected, expected_lse = reference.attend(*inputs(), block_map, **options)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=2e-6)


def test_a_block_without_keys_gives_zeros():
    layout = raster_layout(TokenGrid(1, 4, 4), 8)
    block_map = make_block_map(layout, torch.tensor([[True, True], [False, False]]))
    x = torch.randn(1, 16, 1, 8, generator=torch.Generator().manual_seed(0))
    out, lse = flex.attend(x, x, x, block_map, scale=1.0, return_lse=True)
    assert not out[:, 8:].any()
    assert bool(lse[..., 8:].isneginf().all())
    assert out[:, :8].all()


def test_whole_and_partial_blocks_are_told_apart():
    block_map = a_map(rule=Thirds()).prune()
    mask = flex.to_block_mask(block_map)
    partial = torch.zeros(5, 5, dtype=torch.bool)
    whole = torch.zeros(5, 5, dtype=torch.bool)
    for row in range(5):
        partial[row, mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].long()] = True
        whole[row, mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].long()] = True
    assert torch.equal(partial, block_map.partial[0, 0])
    assert torch.equal(whole, (block_map.visits & ~block_map.partial)[0, 0])
    assert whole[4].all()  # text is exact
    alive = torch.ones(1, GRID.length, dtype=torch.bool)
    alive[0, 3] = False  # of the first block
    assert flex.to_block_mask(block_map, alive).full_kv_num_blocks[0, 0, 4] == 4


def test_other_maps_are_refused():
    ragged = make_block_map(raster_layout(GRID, 7), torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"flex: its blocks of queries have 4 to 7 tokens"):
        block_sparse_attention(*inputs(), ragged, kernel="flex")
    pooled = torch.zeros(2, 2, 5, 8)
    tail = Tail(pooled, pooled, torch.zeros(1, 1, 5))
    with pytest.raises(ValueError, match="no tail"):
        block_sparse_attention(*inputs(), a_map(), kernel="flex", tail=tail)


def test_gradients():
    leaves = [x.requires_grad_() for x in inputs()]
    grads = [
        torch.autograd.grad(block_sparse_attention(*leaves, a_map("hwt"), kernel=name).square().sum(), leaves)
        for name in ("flex", "reference")
    ]
    for one, slow in zip(*grads, strict=True):
        torch.testing.assert_close(one, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None or not Path(sysconfig.get_paths()["include"], "Python.h").exists(),
    reason="compiling for a CPU needs g++ and Python.h",
)
def test_compiled():
    grid = TokenGrid(2, 16, 16)
    generator = torch.Generator().manual_seed(1)
    block_map = make_block_map(raster_layout(grid, 128), torch.rand(4, 4, generator=generator) < 0.6, rule=Thirds())
    x = torch.randn(1, 512, 2, 64, generator=generator)
    out = block_sparse_attention(x, x, x, block_map, kernel="flex_compiled")
    expected = block_sparse_attention(x, x, x, block_map, kernel="reference")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
