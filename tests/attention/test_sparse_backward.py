"""Gradients of kernels without any: those of the slow reference, checked against differences too."""

import math

import pytest
import torch

from dit.attention import TokenGrid, block_sparse_attention
from dit.attention.block_map import BlockMap, TokenRule, make_block_map
from dit.attention.kernels import backward, reference
from dit.attention.kernels.contract import KERNELS, SparseKernel, Tail, register_kernel
from dit.attention.layout import cluster_layout, raster_layout, tile_layout

GRID = TokenGrid(2, 3, 4, 3, "last", 2)
SCALE = 0.4


class Thirds(TokenRule):
    def allowed(self, query, key):
        return (query + 2 * key) % 3 > 0


def a_map(kind: str) -> BlockMap:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (2, 2, GRID.visual_length), generator=generator)
    layout = {
        "raster": lambda: raster_layout(GRID, 5),
        "tiles": lambda: tile_layout(GRID, (2, 2, 3)),
        "clusters": lambda: cluster_layout(GRID, labels, 4),
    }[kind]()
    heads = {"raster": (1, 1), "tiles": (2, 2), "clusters": (2, 2)}[kind]
    visits = torch.rand(*heads, layout.visual_count, layout.visual_count, generator=generator) < 0.5
    visits[..., 0, :] = False  # sees exact tokens only
    return make_block_map(layout, visits, rule=None if kind == "clusters" else Thirds())


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, GRID.length, 2, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [x.to(dtype).requires_grad_() for x in parts]


def a_tail(block_map: BlockMap, dtype=torch.float32) -> Tail:
    generator = torch.Generator().manual_seed(2)
    shape = (2, 2, block_map.keys.count, 6)
    pooled = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2)]
    count = torch.rand(block_map.visits.shape[0], 1, block_map.keys.count, generator=generator) * 2
    return Tail(*pooled, count.to(dtype).requires_grad_())


def a_mask() -> torch.Tensor:
    mask = torch.ones(2, GRID.length, dtype=torch.bool)
    mask[0, ::3] = mask[1, 20:] = False
    return mask


@pytest.mark.parametrize("tailed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["raster", "tiles", "clusters"])
def test_equals_the_gradients_of_the_reference(kind, masked, tailed, monkeypatch):
    monkeypatch.setattr(backward, "SCORES_AT_ONCE", 200)  # one or two heads at a time
    block_map = a_map(kind)
    leaves, tail = inputs(), a_tail(block_map) if tailed else None
    wanted = [*leaves, *([tail.key, tail.value, tail.log_count] if tail is not None else [])]
    options = {"scale": SCALE, "key_mask": a_mask() if masked else None, "tail": tail, "return_lse": True}
    generator = torch.Generator().manual_seed(3)
    weights = (
        torch.randn(2, GRID.length, 2, 6, generator=generator),
        torch.randn(2, 2, GRID.length, generator=generator),
    )

    def grads(function, *arguments):
        out, lse = function(*arguments, *leaves, block_map, **options)
        lse = lse.masked_fill(lse.isneginf(), 0)
        return torch.autograd.grad((out * weights[0]).sum() + (lse * weights[1]).sum(), wanted)

    for ours, slow in zip(grads(backward.differentiable, reference.attend), grads(reference.attend), strict=True):
        assert ours.dtype == slow.dtype
        assert slow.abs().max() > 0
        torch.testing.assert_close(ours, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tailed", [False, True])
def test_equals_differences(tailed):
    block_map = a_map("tiles")
    leaves, tail = inputs(torch.float64), a_tail(block_map, torch.float64) if tailed else None
    pooled = [] if tail is None else [tail.key, tail.value]

    def function(query, key, value, *pooled):
        some = None if tail is None else Tail(*pooled, tail.log_count.detach())
        out, _ = backward.differentiable(
            reference.attend, query, key, value, block_map, scale=SCALE, key_mask=a_mask(), tail=some
        )
        return out[0]  # one sample is enough

    assert torch.autograd.gradcheck(function, (*leaves, *pooled), eps=1e-5, atol=1e-4, fast_mode=True)


def test_gradients_flow_through_means():
    """A tail made of the keys passes its gradients on to them."""
    block_map = a_map("raster")
    query, key, value = inputs()
    blocks = torch.nn.functional.one_hot(block_map.keys.block_of()[0, 0]).float()  # (M, m)
    count = blocks.sum(0)

    def grads(function, *arguments):
        pooled = [torch.einsum("bmke,mn->bkne", x, blocks / count) for x in (key, value)]
        tail = Tail(*pooled, count.log()[None, None])
        out, _ = function(*arguments, query, key, value, block_map, scale=SCALE, tail=tail)
        return torch.autograd.grad(out.square().sum(), (query, key, value))

    for ours, slow in zip(grads(backward.differentiable, reference.attend), grads(reference.attend), strict=True):
        torch.testing.assert_close(ours, slow, rtol=1e-4, atol=1e-5)


def test_empty_rows_and_numbers_that_are_none():
    """Masked keys may hold anything, rows without keys have no gradient."""
    grid = TokenGrid(1, 4, 4)
    block_map = make_block_map(raster_layout(grid, 4), torch.eye(4, dtype=torch.bool) & (torch.arange(4) > 0))
    query, key, value = (torch.randn(1, 16, 1, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    key[:, 5] = value[:, 5] = math.nan
    leaves = [x.requires_grad_() for x in (query, key, value)]
    mask = torch.arange(16)[None] != 5
    out, lse = backward.differentiable(
        reference_without_nan, *leaves, block_map, scale=1.0, key_mask=mask, return_lse=True
    )
    assert lse is not None
    assert bool(lse[..., :4].isneginf().all())
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(one.isfinite().all() for one in grads)
    assert not grads[0][:, :4].any()
    assert not grads[1][:, [0, 1, 2, 3, 5]].any()
    assert grads[2][:, 6:].all()


def reference_without_nan(query, key, value, block_map, **options):
    return reference.attend(query, key.nan_to_num(0), value.nan_to_num(0), block_map, **options)


def test_the_public_call_gives_gradients_to_every_kernel(monkeypatch):
    def attend(query, key, value, block_map, **options):
        with torch.no_grad():
            return reference.attend(query, key, value, block_map, **options)

    monkeypatch.setitem(KERNELS, "without_gradient", "reference")
    register_kernel(SparseKernel("without_gradient", attend, has_tail=True))
    block_map, leaves = a_map("tiles"), inputs()
    found = [
        torch.autograd.grad(block_sparse_attention(*leaves, block_map, kernel=name).square().sum(), leaves)
        for name in ("reference", "without_gradient", "gather")
    ]
    for ours in found[1:]:
        for one, slow in zip(ours, found[0], strict=True):
            torch.testing.assert_close(one, slow, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not block_sparse_attention(*leaves, block_map, kernel="gather").requires_grad


def test_half_precision():
    block_map = a_map("tiles")
    leaves = inputs(torch.bfloat16)
    out, _ = backward.differentiable(reference.attend, *leaves, block_map, scale=SCALE)
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    wide = [x.detach().float().requires_grad_() for x in leaves]
    exact = torch.autograd.grad(reference.attend(*wide, block_map, scale=SCALE)[0].square().sum(), wide)
    for one, slow in zip(grads, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.float() - slow).norm() < 0.02 * slow.norm()
