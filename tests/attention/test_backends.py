"""The table says of each backend whether it can run; ours can be chosen wherever diffusers' can."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

from dit.attention import AttentionBackend, attention, attention_backend_table, attention_reference, backends
from dit.runtime.diffusers_compat import (
    active_attention_backend,
    attention_backend_names,
    register_attention_backend,
    unregister_attention_backend,
)
from tests.families.networks import tiny_transformer


def tokens(count: int, seed: int, heads: int = 4) -> torch.Tensor:
    return torch.randn(2, count, heads, 8, generator=torch.Generator().manual_seed(seed))


def reason(name: str, **options: object) -> str:
    return attention_backend_table()[name].can_run("cpu", torch.float32, **options)


def test_the_table_has_all_of_diffusers_and_ours() -> None:
    table = attention_backend_table()
    assert {member.value for member in AttentionBackendName.__members__.values()} == set(table)
    assert [name for name, one in table.items() if one.is_ours] == ["int4", "int8", "products", "reference"]
    assert all(one.name == name for name, one in table.items())


def test_each_reason_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason("native") == reason("native", mask=True) == reason("reference", mask=True) == ""
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert reason("xformers") == "xformers is not installed"
    assert "torch_npu" in reason("_native_npu")
    assert "'_flash_3'" in reason("_flash_3")  # another package than FlashAttention 2's


def test_masks_and_dtypes_count() -> None:
    assert reason("_native_flash") == ""
    assert "mask" in reason("_native_flash", mask=True)
    assert attention_backend_table()["reference"].can_run("cpu", torch.bfloat16, 80) == ""
    assert attention_backend_table()["native"].can_run("cpu", torch.int32) != ""


def test_products_say_where_they_would_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that they don't cover go to torch's own kernel, so a choice that could cover none is refused."""
    products = attention_backend_table()["products"]
    assert "for CPUs, not for cuda" in products.can_run("cuda", torch.bfloat16)
    assert "no float16" in products.can_run("cpu", torch.float16)
    monkeypatch.setattr(backends.products, "has_fast_products", lambda dtype: dtype == torch.bfloat16)
    assert products.can_run("cpu", torch.bfloat16) == ""
    assert "no faster" in products.can_run("cpu", torch.float32)


def test_nothing_is_downloaded_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "attention", lambda *_, **__: pytest.fail("a call would fetch the kernel"))
    hub = [one for name, one in attention_backend_table().items() if "hub" in name]
    assert hub
    assert all("downloads" in one.can_run("cpu", torch.bfloat16) for one in hub)
    assert not [one for one in backends.offered_backends() if one.fetches]


def test_without_a_call_only_requirements_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "attention", lambda *_, **__: pytest.fail("called"))
    assert reason("native", call=False) == ""
    assert "torch_npu" in reason("_native_npu", call=False)


# -------------------------------------------------------------------------- the reference


def test_the_reference_can_be_chosen_for_a_call_and_for_all() -> None:
    query, key = tokens(5, 0), tokens(7, 1)
    slow = attention_reference(query, key, key)
    assert torch.equal(attention(query, key, key, backend="reference"), slow)
    with attention_backend("reference"):
        assert active_attention_backend() == "reference"
        assert torch.equal(attention(query, key, key), slow)
    assert not torch.equal(attention(query, key, key), slow)  # the same but for the last bits


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"enable_gqa": True}, {"scale": 0.3}, {"attn_mask": torch.randn(2, 4, 5, 5)}]
)
def test_the_reference_knows_the_arguments_of_diffusers(options: dict) -> None:
    key = tokens(5, 1, heads=2 if "enable_gqa" in options else 4)
    both = [dispatch_attention_fn(tokens(5, 0), key, key, **options, backend=name) for name in ("native", "reference")]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)


def test_the_reference_refuses_dropout() -> None:
    with pytest.raises(ValueError, match=r"0\.1"):
        dispatch_attention_fn(*[tokens(5, 0)] * 3, dropout_p=0.1, backend="reference")


@pytest.mark.parametrize("name", ["text_dit", "flux", "wan"])
def test_networks_can_be_set_to_the_reference(name: str) -> None:
    model = tiny_transformer(name)
    layers = [part for part in model.modules() if hasattr(getattr(part, "processor", None), "_attention_backend")]
    with attention_backend(active_attention_backend()):  # diffusers changes the active one for good
        model.set_attention_backend("reference")
        assert {part.processor._attention_backend.value for part in layers} == {"reference"}
        model.reset_attention_backend()


# -------------------------------------------------------------------------- our own kernels


@pytest.fixture
def doubled():
    """A backend that returns twice the query, and what it was called with."""
    seen = SimpleNamespace(calls=[])

    def function(query, key, value, attn_mask=None):
        seen.calls.append(attn_mask)
        return 2 * query

    register_attention_backend("doubled", function)
    yield seen
    unregister_attention_backend("doubled")


def test_a_registered_function_serves_calls(doubled: SimpleNamespace) -> None:
    query, mask = tokens(5, 0), torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(attention(query, query, query, mask, backend="doubled"), 2 * query)
    assert doubled.calls[0].shape == (2, 1, 1, 5)
    assert "doubled" in attention_backend_names()
    assert AttentionBackendName("doubled").value == "doubled"


def test_a_registered_function_survives_compilation(doubled: SimpleNamespace) -> None:
    compiled = torch.compile(lambda x: attention(x, x, x, backend=member), backend="eager", fullgraph=True)
    member = AttentionBackendName("doubled")
    assert torch.equal(compiled(tokens(5, 0)), 2 * tokens(5, 0))


def test_what_is_taken_back_leaves_no_trace() -> None:
    before = attention_backend_names(), list(AttentionBackendName), dict(AttentionBackendName._value2member_map_)
    register_attention_backend("passing", lambda query, key, value: query)
    unregister_attention_backend("passing")
    after = attention_backend_names(), list(AttentionBackendName), dict(AttentionBackendName._value2member_map_)
    assert after == before
    with pytest.raises(ValueError, match="passing"):
        attention(tokens(5, 0), tokens(5, 0), tokens(5, 0), backend="passing")
    with pytest.raises(ValueError, match="passing"):
        unregister_attention_backend("passing")


@pytest.mark.parametrize("name", ["native", "reference", "Mine"])
def test_a_name_that_is_taken_or_not_in_lower_case_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        backends.register_backend(AttentionBackend(name, is_ours=True), attention_reference)
    assert "Mine" not in attention_backend_table()


def test_the_active_backend_cannot_be_taken_back(doubled: SimpleNamespace) -> None:
    with attention_backend("doubled"), pytest.raises(ValueError, match="active"):
        unregister_attention_backend("doubled")
