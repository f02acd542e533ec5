"""Dense attention by plain products in bfloat16: as near the truth as torch's fused kernel, or left to it."""

import pytest
import torch
import torch.nn.functional as F

from dit.attention import attention, attention_reference
from dit.attention.kernels import products


def draw(batch: int, count: int, heads: int, width: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, count, heads, width).bfloat16() for _ in range(3)]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every processor count as one that multiplies fast."""
    monkeypatch.setattr(products, "has_fast_products", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(products, "is_zen4", lambda: False)


def test_memory_is_used_again_in_and_out_of_inference_mode() -> None:
    query, key, value = draw(1, 256, 2, 64)
    with torch.inference_mode():
        inside = products.attend_all(query, key, value, 0.125)
    again = [products.attend_all(query, key, value, 0.125) for _ in range(2)]
    assert all(torch.equal(one, inside) for one in again)


@pytest.mark.parametrize("spread", [1.0, 1.3, 1.6, 2.5, 4.0])
@pytest.mark.parametrize(("count", "heads", "width"), [(256, 4, 64), (300, 3, 72), (1024, 2, 128)])
def test_error_is_at_most_one_and_a_half_times_that_of_the_fused_kernel(
    count: int, heads: int, width: int, spread: float
) -> None:
    query, key, value = draw(2, count, heads, width)
    query, key = query * spread, key * spread  # scores from flat to peaky
    truth = attention_reference(query.double(), key.double(), value.double())
    fused = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    out = products.attend_all(query, key, value, width**-0.5)
    error, least = (float((x.double() - truth).norm() / truth.norm()) for x in (out, fused))
    assert error < 1.5 * least
    assert torch.equal(attention(query, key, value), out)  # what our networks call
    assert torch.equal(attention(query, key, value, backend="products"), out)


def test_masked_keys_are_left_out() -> None:
    query, key, value = draw(2, 256, 2, 64)
    mask = torch.rand(2, 256) > 0.3
    mask[1] = False
    out = attention(query, key, value, mask)
    truth = attention_reference(query[:1], key[:1], value[:1], mask[:1])
    assert float((out[:1] - truth).float().norm() / truth.float().norm()) < 0.01
    assert out[1].eq(0).all()


@pytest.mark.parametrize("case", ["float32", "short", "gradient", "pairs", "causal", "grouped"])
def test_other_calls_are_left_to_torch(case: str) -> None:
    query, key, value = draw(1, 64 if case == "short" else 256, 2, 64)
    if case == "float32":
        query, key, value = query.float(), key.float(), value.float()
    query.requires_grad_(case == "gradient")
    if case == "grouped":
        key, value = key[:, :, :1], value[:, :, :1]
    mask = torch.rand(256, 256) > 0.3 if case == "pairs" else None
    options = {"is_causal": case == "causal", "enable_gqa": case == "grouped"}
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), mask, **options)
    assert torch.equal(products.dispatch(query, key, value, mask, **options), expected.transpose(1, 2))


def test_other_backends_stay_what_they_are() -> None:
    query, key, value = draw(1, 256, 2, 64)
    native = attention(query, key, value, backend="native")
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    assert torch.equal(native, expected)
    assert not torch.equal(attention(query, key, value), expected)


def test_float32_is_exact_and_left_to_torch_where_that_is_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (x.float() for x in draw(2, 520, 3, 64))
    truth = attention_reference(query, key, value)
    mask = torch.rand(2, 520) > 0.3
    for fast in (True, False):
        monkeypatch.setattr(products, "has_fast_products", lambda dtype, is_fast=fast: is_fast)
        torch.testing.assert_close(attention(query, key, value), truth, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            attention(query, key, value, mask), attention_reference(query, key, value, mask), rtol=1e-5, atol=1e-6
        )
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    assert torch.equal(attention(query, key, value), expected)


def test_short_sequences_are_left_to_the_fused_kernel_where_avx512_is_computed_in_halves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short, long = draw(1, 300, 2, 64), draw(1, 512, 2, 64)
    assert products.suits(*short)
    monkeypatch.setattr(products, "is_zen4", lambda: True)
    assert not products.suits(*short)
    assert products.suits(*long)
