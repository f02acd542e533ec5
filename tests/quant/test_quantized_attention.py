"""Attention in few bits: its error, what smoothing and blocks are good for, its masks, and the backends."""

import warnings
from functools import partial

import pytest
import torch
from torch import Tensor

from dit.attention import TokenGrid, attention, attention_backend_table, attention_reference
from dit.attention.kernels.quantized import AttentionBits, attend_by_kernel, choose_axes, quantized_attention
from dit.attention.layout import axes_layout
from dit.quant.attention_maps import quantize_adalog, quantize_even
from dit.runtime.metrics import relative_error

GRID = TokenGrid(8, 8, 8)


def normal(length: int = 200, seed: int = 0, heads: int = 2) -> Tensor:
    """Return normal numbers, (1, N, K, 64)."""
    return torch.randn(1, length, heads, 64, generator=torch.Generator().manual_seed(seed))


def error(query: Tensor, key: Tensor, value: Tensor, **options) -> float:
    """Return the relative error against attention in float64."""
    return relative_error(quantized_attention(query, key, value, **options), attention_reference(query, key, value))


@pytest.fixture(scope="module")
def places() -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a head that attends to its own place in all frames, (1, 512, 1, 64)."""
    place = torch.arange(GRID.length) % 64
    key = normal(64, 1, 1)[:, place] + 0.3 * normal(512, 2, 1)
    return key + 0.3 * normal(512, 3, 1), key, normal(512, 4, 1) + 1


def test_the_error_of_eight_bits() -> None:
    """On normal numbers, whose softmax is flat; the share of scores, of weights and values, and both."""
    given = normal(), normal(seed=1), normal(seed=2)
    assert error(*given, qk_bits=None, pv_bits=None) < 1e-6
    assert 0.009 < error(*given, pv_bits=None) < 0.014
    assert 0.007 < error(*given, qk_bits=None) < 0.011
    assert 0.012 < error(*given) < 0.017
    assert 0.2 < error(*given, qk_bits=4, pv_bits=4) < 0.35
    assert error(*given, qk_bits=8, pv_bits=4) < error(*given, qk_bits=4, pv_bits=4)


def test_smoothing_takes_off_what_all_keys_share() -> None:
    query, value = normal(), normal(seed=2)
    key = normal(seed=1) + 8 * normal(1, 3)  # a mean in each channel
    assert error(query, key, value) < 0.017
    assert error(query, key, value, smooth_k=False) > 3 * error(query, key, value)


def test_smoothing_takes_off_what_queries_of_a_block_share() -> None:
    query = normal() + 4 * normal(1, 3)
    given = query, normal(seed=1), normal(seed=2)
    assert error(*given, qk_bits=None, pv_bits=None, smooth_q=True) < 1e-6
    assert error(*given, qk_bits=4, pv_bits=None, smooth_q=True) < 0.4 * error(*given, qk_bits=4, pv_bits=None)


def test_smoothing_takes_off_what_values_share() -> None:
    given = normal(), normal(seed=1), normal(seed=2) + 8 * normal(1, 3)
    assert error(*given, qk_bits=None, pv_bits=None, smooth_v=True) < 1e-6
    assert error(*given, qk_bits=None, pv_bits=4, smooth_v=True) < 0.5 * error(*given, qk_bits=None, pv_bits=4)


def test_a_step_a_block_and_an_order_of_tokens_keep_small_weights(places) -> None:
    """PAROAttention's two findings: blocks instead of rows, and an order in which their weights are alike."""
    ordered = {"layout": axes_layout(GRID, "hwt", 64)}
    block, row = error(*places, **ordered), error(*places, **ordered, weight_steps="row")
    raster = error(*places)
    assert block < 0.7 * row
    assert block < 0.5 * raster
    assert error(*places, **ordered, qk_bits=None, pv_bits=None) < 1e-6


def test_the_order_is_found_for_each_head(places) -> None:
    frame = torch.arange(GRID.length) // 64
    key = normal(8, 5, 1)[:, frame] + 0.3 * normal(512, 6, 1)
    found = choose_axes(torch.cat([places[0], 2 * key], 2), torch.cat([places[1], key], 2), GRID)
    assert found[0][0] != "t"  # a block holds all frames of a few places
    assert found[1][0] == "t"
    assert set(choose_axes(normal(64), normal(64, 1), TokenGrid(1, 8, 8), block=8)) <= {"thw", "twh"}  # two differ


def test_weights_may_have_levels_of_their_own() -> None:
    query = 2 * normal()
    given = query, normal(seed=1), normal(seed=2)
    even = error(*given, qk_bits=None, map_quantizer=partial(quantize_even, bits=4))
    assert error(*given, qk_bits=None, map_quantizer=partial(quantize_adalog, bits=4, q=20)) < 0.4 * even


@pytest.mark.parametrize("kind", ["keys", "pairs", "scores"])
def test_masks(kind: str) -> None:
    query, key, value = normal(100), normal(130, 1), normal(130, 2)
    generator = torch.Generator().manual_seed(3)
    mask = {
        "keys": torch.rand(1, 130, generator=generator) < 0.6,
        "pairs": torch.rand(1, 2, 100, 130, generator=generator) < 0.6,
        "scores": 3 * torch.randn(1, 1, 100, 130, generator=generator),
    }[kind]
    exact = attention_reference(query, key, value, mask)
    assert relative_error(quantized_attention(query, key, value, mask, qk_bits=None, pv_bits=None), exact) < 1e-6
    assert relative_error(quantized_attention(query, key, value, mask), exact) < 0.03


def test_what_is_hidden_has_no_say() -> None:
    query, key, value = normal(70), normal(70, 1), normal(70, 2)
    mask = torch.arange(70)[None] < 50
    seen = quantized_attention(query, key[:, :50], value[:, :50])
    key[:, 50:], value[:, 50:] = 1e6, torch.inf
    assert torch.allclose(quantized_attention(query, key, value, mask), seen, atol=1e-6)
    assert not quantized_attention(query, key, value.nan_to_num(posinf=1), mask & False, smooth_v=True).any()


def test_the_result_has_the_dtype_of_the_query() -> None:
    given = [x.bfloat16() for x in (normal(), normal(seed=1), normal(seed=2))]
    assert quantized_attention(*given).dtype == torch.bfloat16
    assert error(*given) < 0.02


# -------------------------------------------------------------------------- the backends


@pytest.mark.parametrize(("name", "most"), [("int8", 0.017), ("int4", 0.35)])
def test_backends_say_that_they_emulate(name: str, most: float) -> None:
    given = normal(), normal(seed=1), normal(seed=2)
    with pytest.warns(RuntimeWarning, match=f"'{name}' emulates its integers here"):
        out = attention(*given, backend=name)
    assert relative_error(out, attention_reference(*given)) < most
    assert attention_backend_table()[name].can_run("cpu", torch.bfloat16, mask=True) == ""
    assert "no int32" in attention_backend_table()[name].can_run("cpu", torch.int32)


def test_a_backend_knows_the_arguments_of_diffusers() -> None:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    query, key = normal(60, heads=4), normal(60, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for options in ({"is_causal": True}, {"scale": 0.05}, {}):
            both = [
                dispatch_attention_fn(query, key, key, enable_gqa=True, **options, backend=name)
                for name in ("int8", "reference")
            ]
            assert relative_error(*both) < 0.03


def test_what_has_no_meaning_is_refused() -> None:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    x = normal(20)
    with pytest.raises(ValueError, match="no dropout"):
        dispatch_attention_fn(x, x, x, dropout_p=0.1, backend="int8")
    with pytest.raises(ValueError, match="no gradient"):
        quantized_attention(x.clone().requires_grad_(), x, x)
    with pytest.raises(ValueError, match="self-attention"):
        quantized_attention(x, x, x, layout=axes_layout(GRID, "thw"))
    with pytest.raises(ValueError, match="don't fit"):
        quantized_attention(x, x, normal(19))
    for options, message in (({"qk": 9}, "qk_bits is 9"), ({"block": 0}, "block"), ({"weight_steps": "all"}, "'row'")):
        with pytest.raises(ValueError, match=message):
            AttentionBits(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_the_kernel_is_for_gpus() -> None:
    assert "no CUDA device" in attention_backend_table()["int8"].can_run("cuda", torch.bfloat16)
    with pytest.raises(ValueError, match="use 'native'"):
        attend_by_kernel(*[normal(20)] * 3)
