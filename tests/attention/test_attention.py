"""Every kernel behind `attention` equals the slow reference, and parts merge to the whole."""

import math

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend

from dit.attention import attention, attention_reference, functional, log_sum_exp, merge_attention


def tensors(requires_grad: bool = False):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 3, 8, generator=generator) for n in (5, 7, 7))
    mask = torch.tensor([[True] * 7, [True, True, False, True, False, False, False]])
    return [x.requires_grad_(requires_grad) for x in (query, key, value)], mask


def scores_in_float64(query, key, mask=None):
    """Pair by pair, (B, K, N, M): written without anything of `dit.attention`."""
    out = torch.empty(len(query), query.shape[2], query.shape[1], key.shape[1], dtype=torch.float64)
    for row, head, i, j in torch.cartesian_prod(*map(torch.arange, out.shape)).tolist():
        out[row, head, i, j] = torch.dot(query[row, i, head].double(), key[row, j, head].double()) / math.sqrt(8)
        if mask is not None and not mask[row, j]:
            out[row, head, i, j] = -math.inf
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_equals_the_reference(masked, training):
    (query, key, value), mask = tensors(training)
    mask = mask if masked else None
    out = attention(query, key, value, mask)
    expected = attention_reference(query, key, value, mask)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    if training:
        grads = torch.autograd.grad(out.square().sum(), (query, key, value))
        slow = torch.autograd.grad(expected.square().sum(), (query, key, value))
        for a, b in zip(grads, slow, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_named_backend_is_used_in_training_too(monkeypatch):
    (query, key, value), _ = tensors(True)
    called = []
    original = functional.dispatch_attention_fn
    monkeypatch.setattr(functional, "dispatch_attention_fn", lambda *a, **k: called.append(1) or original(*a, **k))
    with attention_backend("native"):
        attention(query, key, value)
    assert not called  # plain products
    attention(query, key, value, backend="native")
    with attention_backend("_native_math"):
        attention(query, key, value)
    assert len(called) == 2


def test_a_row_without_keys_is_finite_in_training():
    (query, key, value), mask = tensors(True)
    mask[1] = False
    assert attention(query, key, value, mask).isfinite().all()


@pytest.mark.parametrize("training", [False, True])
def test_the_scale_replaces_the_usual_one(training):
    (query, key, value), mask = tensors(training)
    out = attention(query, key, value, mask, scale=0.5)
    torch.testing.assert_close(out, attention(query * 0.5 * math.sqrt(8), key, value, mask), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attention_reference(query, key, value, mask, 0.5), out, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------ log-sum-exp


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("backend", [None, "native", "_native_math", "reference", "flex"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lse_equals_an_independent_one(backend, masked, dtype):
    (query, key, value), mask = tensors()
    query, key, value = (x.to(dtype) for x in (query, key, value))
    mask = mask if masked else None
    out, lse = attention(query, key, value, mask, backend=backend, return_lse=True)
    assert (lse.shape, lse.dtype) == ((2, 3, 5), torch.float32)
    expected = scores_in_float64(query, key, mask).exp().sum(-1).log()
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=2e-6)
    assert torch.equal(out, attention(query, key, value, mask, backend=backend)), "asking for the LSE changed the bits"


def test_the_reference_returns_the_same_lse():
    (query, key, value), mask = tensors()
    out, lse = attention_reference(query, key, value, mask, return_lse=True)
    torch.testing.assert_close(lse, log_sum_exp(query, key, mask), rtol=1e-6, atol=1e-6)
    assert torch.equal(out, attention_reference(query, key, value, mask))


def test_lse_has_gradients():
    (query, key, value), mask = tensors(True)
    _, lse = attention(query, key, value, mask, return_lse=True)
    grad = torch.autograd.grad(lse.sum(), query)[0]
    weights = scores_in_float64(query.detach(), key.detach(), mask).softmax(-1)  # (B, K, N, M)
    expected = torch.einsum("bknm,bmke->bnke", weights, key.detach().double()) / math.sqrt(8)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_lse_in_parts_is_the_same(monkeypatch):
    (query, key, _), _ = tensors()
    mask = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.3
    whole = log_sum_exp(query, key, mask), log_sum_exp(query, key)
    monkeypatch.setattr(functional, "SCORES_AT_ONCE", 2 * 2 * 3 * 7)  # two queries at a time
    torch.testing.assert_close((log_sum_exp(query, key, mask), log_sum_exp(query, key)), whole, rtol=1e-6, atol=1e-6)


def test_lse_of_shared_keys_is_refused():
    (query, key, value), _ = tensors()
    with pytest.raises(ValueError, match="return_lse"):
        attention(query, key, value, parallel_config=object(), return_lse=True)


# ------------------------------------------------------------------------------------ merge


@pytest.mark.parametrize("cuts", [(3, 4), (1, 5, 1), (7,), (0, 7)])
@pytest.mark.parametrize("masked", [False, True])
def test_parts_merge_to_the_whole(cuts, masked):
    (query, key, value), mask = tensors()
    mask = mask if masked else None  # the second row may look nowhere in the last parts
    parts = []
    for start, count in zip([sum(cuts[:index]) for index in range(len(cuts))], cuts, strict=True):
        some = slice(start, start + count)
        one = None if mask is None else mask[:, some]
        parts.append(attention(query, key[:, some], value[:, some], one, return_lse=True))
    out, lse = merge_attention(*zip(*parts, strict=True))
    whole, whole_lse = attention_reference(query, key, value, mask, return_lse=True)
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-6, atol=1e-6)


def test_parts_of_very_different_size_merge():
    (query, key, value), _ = tensors()
    key = torch.cat([key[:, :4] * 40, key[:, 4:]], dim=1)  # exp of these scores overflows float32
    parts = [attention(query, key[:, s], value[:, s], return_lse=True) for s in (slice(0, 4), slice(4, 7))]
    out, _ = merge_attention(*zip(*parts, strict=True))
    torch.testing.assert_close(out, attention_reference(query, key, value), rtol=1e-5, atol=1e-6)


def test_nothing_to_look_at_gives_zeros():
    (query, key, value), mask = tensors()
    mask[1] = False
    out, lse = merge_attention(*zip(*[attention(query, key, value, mask, return_lse=True)] * 2, strict=True))
    assert torch.equal(lse[1], torch.full_like(lse[1], -math.inf))
    assert not out[1].any()
    torch.testing.assert_close(out[0], attention(query, key, value)[0], rtol=1e-5, atol=1e-6)
    poisoned = torch.full_like(out, math.nan)
    out, _ = merge_attention([poisoned, out], [torch.full_like(lse, -math.inf), lse])
    assert out.isfinite().all()


def test_gradients_flow_through_a_merge():
    (query, key, value), _ = tensors(True)
    parts = [attention(query, key[:, s], value[:, s], return_lse=True) for s in (slice(0, 3), slice(3, 7))]
    merged = torch.autograd.grad(merge_attention(*zip(*parts, strict=True))[0].square().sum(), (query, key, value))
    whole = torch.autograd.grad(attention_reference(query, key, value).square().sum(), (query, key, value))
    for a, b in zip(merged, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [(0, 0), (2, 1)])
def test_a_merge_needs_an_lse_for_each_part(counts):
    with pytest.raises(ValueError, match=rf"{counts[0]}.*{counts[1]}"):
        merge_attention([torch.zeros(1, 1, 1, 1)] * counts[0], [torch.zeros(1, 1, 1)] * counts[1])
