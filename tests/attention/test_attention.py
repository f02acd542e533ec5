"""Every kernel behind `attention` equals the slow reference."""

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend

from dit.attention import attention, attention_reference


def tensors(requires_grad: bool):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 3, 8, generator=generator) for n in (5, 7, 7))
    mask = torch.tensor([[True] * 7, [True, True, False, True, False, False, False]])
    return [x.requires_grad_(requires_grad) for x in (query, key, value)], mask


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
    import dit.attention as module

    original = module.dispatch_attention_fn
    monkeypatch.setattr(module, "dispatch_attention_fn", lambda *a, **k: called.append(1) or original(*a, **k))
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
