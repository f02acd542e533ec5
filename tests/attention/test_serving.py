"""The callable for serving engines: geometry from their parameters, dense where the settings say so, no guesses."""

import tomllib
from importlib import import_module

import pytest
import torch

from dit.attention import TokenGrid, attention, block_sparse_attention, pattern, serving
from dit.attention.serving import ServingSettings, sparse_attention
from tests.architecture.sources import ROOT

GEOMETRY = {"latent_shape": torch.tensor([[4, 8, 12]] * 2), "patch_size": torch.tensor([[1, 2, 2]] * 2)}
WINDOW = {"pattern": "neighborhood", "params": {"window": [1, 3, 3], "tile": [1, 2, 2]}}


def tensors(length=96, heads=2):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, length, 2, 8, generator=generator)
    return query, *(torch.randn(2, length, heads, 8, generator=generator) for _ in range(2))


def call(*tokens, scale=0.3, **params):
    tokens = tokens or tensors()
    return sparse_attention(*tokens, {**GEOMETRY, **params}, is_causal=False, softmax_scale=scale)


def expected(query, key, value, grid=TokenGrid(4, 4, 6), scale=0.3, **options):  # noqa: B008
    block_map = pattern("neighborhood", grid, window=(1, 3, 3), tile=(1, 2, 2))
    return block_sparse_attention(query, key, value, block_map, scale=scale, **options)


def test_the_entry_point_names_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["vllm_omni.sparse_attn"]["tessera"].partition(":")
    assert getattr(import_module(module), name) is sparse_attention


def test_the_pattern_on_the_grid_of_the_engine():
    out = call(tessera=WINDOW)
    torch.testing.assert_close(out, expected(*tensors()))
    assert not torch.allclose(out, attention(*tensors(), scale=0.3), atol=1e-2)
    torch.testing.assert_close(call(tessera={**WINDOW, "grid": [4, 4, 6]}, latent_shape=None, patch_size=None), out)
    torch.testing.assert_close(call(tessera=WINDOW, scale=None), expected(*tensors(), scale=8**-0.5))
    query, key, value = tensors(heads=1)
    shared = call(query, key, value, tessera=WINDOW)
    torch.testing.assert_close(shared, expected(query, *(x.expand(-1, -1, 2, -1) for x in (key, value))))


def test_static_maps_are_made_once():
    serving._static_map.cache_clear()
    call(tessera=WINDOW)
    call(tessera={**WINDOW, "params": {"window": (1, 3, 3), "tile": (1, 2, 2)}})
    assert serving._static_map.cache_info().misses == 1


def test_text_and_masks():
    mask = torch.ones(2, 101, dtype=torch.bool)
    mask[1, 98:] = False
    settings = {**WINDOW, "text_position": "last"}
    out = call(*tensors(101), tessera=settings, attn_mask=mask)
    grid = TokenGrid(4, 4, 6, 5, "last")
    torch.testing.assert_close(out, expected(*tensors(101), grid=grid, key_mask=mask))
    with pytest.raises(ValueError, match="only masks of keys"):
        call(*tensors(101), tessera=settings, attn_mask=torch.randn(2, 1, 101, 101))


def test_online_patterns_and_corrections():
    settings = {"pattern": "pooled_topk", "params": {"keep": 0.3, "block": 16}, "correction": "pooled_tail"}
    dense = attention(*tensors(), scale=0.3)
    errors = [
        (call(tessera={**settings, "correction": name}) - dense).norm() / dense.norm()
        for name in ("none", "pooled_tail")
    ]
    assert 0 < errors[1] < errors[0]


@pytest.mark.parametrize(
    ("settings", "step", "is_dense"),
    [({"dense_steps": 3}, [2, 5], True), ({"dense_steps": 3}, [3, 5], False), ({"dense_steps": 3}, 2, True),
     ({"min_tokens": 97}, 9, True), ({"min_tokens": 96}, 9, False)],
)  # fmt: skip
def test_steps_and_sequences_that_stay_dense(settings, step, is_dense):
    step = torch.tensor(step) if isinstance(step, list) else step
    out = call(tessera={**WINDOW, **settings}, denoise_step_idx=step)
    wanted = attention(*tensors(), scale=0.3) if is_dense else expected(*tensors())
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "'pattern'"),
        ({"tessera": {"pattern": "dense", "taus": 1}}, "dense_steps"),
        ({"tessera": {"pattern": "no"}}, "no attention pattern 'no'"),
        ({"tessera": {"pattern": "dense", "correction": "residual"}}, "keeps tensors"),
        ({"tessera": {"pattern": "dense", "dense_steps": -1}}, "at least 0"),
        ({"tessera": {**WINDOW, "dense_steps": 1}}, "denoise_step_idx"),
        ({"tessera": WINDOW, "latent_shape": None}, "set grid"),
        ({"tessera": WINDOW, "latent_shape": torch.tensor([[4, 8, 12], [2, 8, 12]])}, "the same for all samples"),
        ({"tessera": WINDOW, "latent_shape": (4, 8, 10)}, r"leaves 16; set grid and text_position"),
        ({"tessera": {**WINDOW, "text_position": "last"}}, "leaves 0"),
    ],
)
def test_what_does_not_fit_is_refused(params, message):
    with pytest.raises(ValueError, match=message):
        call(**params)


def test_other_attention_is_refused():
    query, key, value = tensors()
    with pytest.raises(ValueError, match="self-attention"):
        sparse_attention(query, key, value, {"tessera": WINDOW}, is_causal=True, softmax_scale=None)
    with pytest.raises(ValueError, match="95 keys"):
        sparse_attention(query, key[:, 1:], value[:, 1:], {"tessera": WINDOW}, is_causal=False, softmax_scale=None)
    assert ServingSettings.of(WINDOW).choice.pattern == "neighborhood"
