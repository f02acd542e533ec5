"""Presets against the methods' own implementations: equal decisions, outputs within 1e-6.

diffusers' caches run as shipped. cache-dit is an extra; where it is missing its test is skipped.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

from dit.runtime.metrics import relative_error
from sampling.step_cache import StepCache
from tests.families.tiny import tiny_pipeline
from tests.runtime.truth import guided_call
from tests.step_cache.loops import Loop

FAMILIES = ("flux", "wan", "qwen_image")
STEPS = 10
MODULES = {
    "flux": (r"(single_)?transformer_blocks\.\d+\.attn", r"transformer_blocks\.\d+\.ff"),
    "wan": (r"blocks\.\d+\.attn\d", r"blocks\.\d+\.ffn"),
    "qwen_image": (r"transformer_blocks\.\d+\.attn", r"transformer_blocks\.\d+\.img_mlp"),
}


@contextmanager
def watched(pipe: Any) -> Iterator[list[torch.Tensor]]:
    """The outputs of the network, in the order of the calls."""
    outputs: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output.sample).clone())

    handle = pipe.transformer.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def run(name: str, on: Callable[[Any], Any]) -> tuple[list[torch.Tensor], Any]:
    pipe = tiny_pipeline(name)
    arguments = {**guided_call(pipe, name, guided=True), "num_inference_steps": STEPS}
    state = on(pipe)
    with watched(pipe) as outputs:
        pipe(**{**arguments, "generator": torch.Generator().manual_seed(5)})
    return outputs, state.report() if state is not None else None


def check(name: str, theirs: Any, ours: StepCache) -> dict[str, str]:
    plain, _ = run(name, lambda pipe: None)
    expected, _ = run(name, lambda pipe: pipe.transformer.enable_cache(theirs))
    found, report = run(name, ours.attach)
    assert len(expected) == len(found) == len(plain)
    assert any(relative_error(a, b) > 1e-6 for a, b in zip(expected, plain, strict=True)), "nothing was cached"
    worst = max(relative_error(a, b) for a, b in zip(found, expected, strict=True))
    assert worst <= 1e-6, f"differs by {worst}"
    return report["strip"]


@pytest.mark.parametrize(("name", "threshold"), [("flux", 0.3), ("wan", 0.1), ("qwen_image", 0.3)])
def test_fbcache_is_that_of_diffusers(name: str, threshold: float) -> None:
    strips = check(name, FirstBlockCacheConfig(threshold=threshold), StepCache.preset("fbcache", threshold=threshold))
    for strip in strips.values():
        assert "." in strip
        assert "C" in strip[2:]


@pytest.mark.parametrize("name", FAMILIES)
def test_magcache_is_that_of_diffusers(name: str) -> None:
    ratios = [1.0, 1.2, 1.1, 1.05, 1.02, 0.99, 1.01, 0.97, 0.93, 0.9]
    config = MagCacheConfig(0.12, 2, 0.2, STEPS, ratios)
    ours = StepCache.preset("magcache", threshold=0.12, max_skips=2, ratios=tuple(ratios))
    strips = check(name, config, ours)
    assert all("." in strip and "C" in strip[3:] for strip in strips.values())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_taylorseer_is_that_of_diffusers(name: str, order: int) -> None:
    patterns = MODULES[name]
    config = TaylorSeerCacheConfig(
        cache_interval=3,
        disable_cache_before_step=3,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=list(patterns),
    )
    ours = StepCache.preset("taylorseer", every=3, first=3, order=order, patterns=patterns)
    strips = check(name, config, ours)
    assert set(strips.values()) == {"CCC.C..C.."}


def test_taylorseer_of_diffusers_finds_nothing_where_ours_refuses_or_works() -> None:
    """The defaults of diffusers hook no module of Wan, and nobody is told; ours find attention and feed-forward."""
    plain, _ = run("wan", lambda pipe: None)
    theirs, _ = run("wan", lambda pipe: pipe.transformer.enable_cache(TaylorSeerCacheConfig()))
    assert all(torch.equal(a, b) for a, b in zip(plain, theirs, strict=True))
    _, report = run("wan", StepCache.preset("taylorseer").attach)
    assert report["cost"] < 1


@pytest.mark.skipif(find_spec("cache_dit") is None, reason="cache-dit is not installed (extra: bench)")
@pytest.mark.parametrize("order", [None, 1, 2])
@pytest.mark.parametrize("tail", [0, 1])
def test_dbcache_is_that_of_cache_dit(order: int | None, tail: int) -> None:
    import cache_dit

    # cache-dit's series has no slope before its fourth computed step; from the sixth on the two are the same.
    threshold, warmup = 0.3, 6
    theirs, ours = Loop(steps=16, layers=4), Loop(steps=16, layers=4)
    plain = theirs()
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=tail,
        residual_diff_threshold=threshold,
        max_warmup_steps=warmup,
        max_continuous_cached_steps=2,
        num_inference_steps=16,
        enable_separate_cfg=False,
    )
    adapter = cache_dit.BlockAdapter(
        transformer=theirs.model,
        blocks=theirs.model.transformer_blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_3,
    )
    taylor = None if order is None else cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
    cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=taylor)
    expected = theirs()
    cache = StepCache.preset("dbcache", threshold=threshold, head=1, tail=tail, warmup=warmup, max_skips=2, order=order)
    with cache.attach(ours.model) as attached:
        found = ours()
        strip = attached.report()["strip"]["cond"]
    assert "." in strip
    assert "C" in strip[warmup:]
    assert any(not torch.equal(a, b) for a, b in zip(plain, expected, strict=True))
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) <= 1e-6
