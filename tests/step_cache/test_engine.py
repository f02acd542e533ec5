"""The cache as a mechanism: executed calls equal the mask, runs and branches never mix, nothing stays behind."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from dit.runtime.families import family_of
from dit.runtime.hooks import AttachError
from sampling.step_cache import StepCache
from sampling.step_cache.forecasters import Newton, Reuse
from sampling.step_cache.gates import FirstBlock, InputRate, Interval, Mask, ModulatedInput
from sampling.step_cache.regions import Blocks, Modules, Output
from tests.families.tiny import TINY_NAMES, VARIANTS, tiny_pipeline
from tests.runtime.truth import guided_call
from tests.step_cache.loops import Loop, same

MASK = (True, True, False, True, False, False, True, True)
REGIONS = {"output": Output(), "blocks": Blocks(1), "whole stack": Blocks(0), "modules": Modules()}


def cache(mask: tuple[bool, ...] = MASK, **parts: object) -> StepCache:
    return StepCache(Mask(mask), **parts)


# ----------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("name", [name for name in (*TINY_NAMES, *VARIANTS) if name != "sana_sprint"])
def test_every_family_runs_the_mask_and_forgets(name: str) -> None:
    pipe = tiny_pipeline(name)
    arguments = {**guided_call(pipe, name, guided=True), "num_inference_steps": 5}
    calls = []
    blocks = family_of(pipe.transformer).blocks(pipe.transformer, refiners=False)
    blocks[-1][1].register_forward_pre_hook(lambda *_: calls.append(1))

    def paint() -> torch.Tensor:
        return torch.as_tensor(pipe(**{**arguments, "generator": torch.Generator().manual_seed(5)})[0])

    plain, clean = paint(), len(calls)
    pictures = {}
    for kind, forecaster in (("newton", Newton()), ("reuse", Reuse())):
        calls.clear()
        with StepCache(Interval(2, first=2, offset=1), forecaster).attach(pipe) as attached:
            pictures[kind] = paint()
            report = attached.report()
        steps = max(len(strip) for strip in report["strip"].values())
        assert set(report["strip"].values()) == {("CC.C.C.C.C")[:steps]}
        assert len(calls) * 2 * steps == clean * 2 * ("CC.C.C.C.C")[:steps].count("C")
        assert report["inactive"] == {}
        assert report["cost"] == pytest.approx(("CC.C.C.C.C")[:steps].count("C") / steps)
    assert not torch.equal(pictures["newton"], pictures["reuse"]), "a forecast is no reuse"
    assert not torch.equal(pictures["newton"], plain)
    assert torch.equal(paint(), plain), "something stayed behind"


@pytest.mark.parametrize("name", TINY_NAMES)
def test_blocks_of_every_family(name: str) -> None:
    pipe = tiny_pipeline(name)
    arguments = {**guided_call(pipe, name, guided=False), "num_inference_steps": 4}

    def paint() -> torch.Tensor:
        return torch.as_tensor(pipe(**{**arguments, "generator": torch.Generator().manual_seed(5)})[0])

    plain = paint()
    found = {}
    for head, forecaster in ((0, Newton()), (1, Newton()), (1, Reuse())):
        with StepCache(Interval(2, first=2, offset=1), forecaster, Blocks(head)).attach(pipe) as attached:
            found[head, type(forecaster)] = paint()
            again = paint()
            report = attached.report()
        assert torch.equal(found[head, type(forecaster)], again), "the second run differs from the first"
        assert report["inactive"] == {}
    assert not torch.equal(found[1, Newton], found[1, Reuse])
    assert torch.equal(paint(), plain)


# --------------------------------------------------------------------------------- loops


@pytest.mark.parametrize("region", REGIONS)
def test_budget_of_all_steps_changes_no_bit(region: str) -> None:
    loop = Loop()
    plain = loop()
    with cache((True,) * 8, region=REGIONS[region]).attach(loop.model) as attached:
        assert same(loop(), plain)
        assert attached.report()["cost"] == 1.0
    assert same(loop(), plain)


def test_forecast_is_the_line_in_sigma() -> None:
    loop = Loop()
    with cache().attach(loop.model):
        outputs = loop()
    for step, anchors in ((2, (1, 0)), (4, (3, 1)), (5, (3, 1))):
        new, old, here = (loop.sigmas[i] for i in (*anchors, step))
        line = outputs[anchors[0]] + (here - new) / (new - old) * (outputs[anchors[0]] - outputs[anchors[1]])
        torch.testing.assert_close(outputs[step], line, rtol=1e-5, atol=1e-6)
    assert [step for step, _ in loop.calls] == [0, 1, 3, 6, 7]


@pytest.mark.parametrize("region", REGIONS)
def test_interrupted_run_leaves_no_mark(region: str) -> None:
    loop = Loop()
    with cache(region=REGIONS[region]).attach(loop.model):
        fresh = loop()
        loop(until=4)
        assert same(loop(), fresh)
        loop(noise=loop.noise.repeat(2, 1, 1, 1)[:1])
        assert same(loop(), fresh)


def test_batch_may_change_between_runs_and_within_one() -> None:
    loop = Loop(batch=2)
    with cache().attach(loop.model) as attached:
        fresh = loop()
        small = loop(noise=loop.noise[:1])
        assert same(loop(), fresh)
        assert same(loop(noise=loop.noise[:1]), small)
        assert attached.report()["inactive"] == {}


@pytest.mark.parametrize("region", ["output", "blocks", "modules"])
def test_branches_never_mix(region: str) -> None:
    """The unconditional branch is called in steps 2 to 6 only: counting calls would give it the other's tensors."""
    both = Loop(branches=("cond", "uncond"))
    with cache(region=REGIONS[region]).attach(both.model) as attached:
        both(lambda step, branch: branch == "cond" or 2 <= step <= 6)
        strips = attached.report()["strip"]
        inactive = attached.report()["inactive"]
    assert strips == {"cond": "CC.C..CC", "uncond": "  CC..C"}, "a branch without history is computed"
    assert inactive == {"nothing computed yet to forecast from": 1}


def test_uncond_forecast_is_made_of_uncond_outputs_only() -> None:
    loop = Loop(branches=("cond", "uncond"))
    with cache().attach(loop.model):
        outputs = loop(lambda step, branch: branch == "cond" or 2 <= step <= 6)
    order = [(s, b) for s in range(8) for b in ("cond", "uncond") if b == "cond" or 2 <= s <= 6]
    found = dict(zip(order, outputs, strict=False))
    new, old, here = (loop.sigmas[i] for i in (3, 2, 5))
    line = found[3, "uncond"] + (here - new) / (new - old) * (found[3, "uncond"] - found[2, "uncond"])
    torch.testing.assert_close(found[5, "uncond"], line, rtol=1e-5, atol=1e-6)


def test_a_branch_that_pauses_is_computed_when_it_returns() -> None:
    loop = Loop(branches=("cond", "uncond"))
    with cache((True, True, False, False, False, False, False, True)).attach(loop.model) as attached:
        loop(lambda step, branch: branch == "cond" or step in (0, 1, 5))
        report = attached.report()
    assert report["strip"]["uncond"] == "CC   C"
    assert report["inactive"] == {"the branch was not called in the step before": 1}


def test_without_a_step_context_or_with_gradients_everything_is_computed() -> None:
    loop = Loop()
    with cache().attach(loop.model) as attached:
        arguments = loop.noise, loop.text["cond"], torch.tensor([500.0])
        loop.model(*arguments)
        with torch.no_grad():
            loop.model(*arguments)
        assert attached.report()["inactive"] == {"no step context": 2}
        assert attached.report()["asked"] == 0


def test_memory_is_three_latents_at_most() -> None:
    loop = Loop()
    for order in (0, 1, 2):
        with cache(forecaster=Newton(order)).attach(loop.model) as attached:
            loop()
            assert attached.report()["state_bytes"] == (order + 1) * loop.noise.nbytes


def test_decisions_can_be_followed() -> None:
    loop, seen = Loop(), []
    watched = cache()
    watched.on_decision = lambda here, computed: seen.append((here.step, computed))
    with watched.attach(loop.model) as attached:
        loop()
        assert attached.report()["strip"] == {"cond": "CC.C..CC"}
    assert seen == list(enumerate(MASK))


# ------------------------------------------------------------------------------ refusals


def test_no_stacking_on_a_cache_of_diffusers_and_none_on_ours() -> None:
    loop = Loop(layers=3)
    loop.model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(AttachError, match="already caches steps"):
        cache().attach(loop.model)
    loop.model.disable_cache()
    plain = loop()
    with cache().attach(loop.model):
        with pytest.raises(AttachError, match="detach it before"):
            loop.model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(AttachError, match="already has a mechanism"):
            cache().attach(loop.model)
    assert same(loop(), plain)
    loop.model.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    assert not same(loop(), plain), "diffusers' cache works on our network"


def test_what_cannot_be_done_is_refused() -> None:
    loop = Loop()
    with pytest.raises(AttachError, match=r"no module of TextDiT matches.*transformer_blocks"):
        cache(region=Modules((r"transformer_block\.\d+\.attention",))).attach(loop.model)
    with pytest.raises(AttachError, match="too few"):
        cache(region=Blocks(1, 1)).attach(loop.model)
    with pytest.raises(AttachError, match=r"use the region Blocks\(\)"):
        StepCache(FirstBlock()).attach(loop.model)
    with pytest.raises(AttachError, match=r"head=1"):
        StepCache(FirstBlock(), region=Blocks(0)).attach(loop.model)
    with pytest.raises(AttachError, match=r"head=0"):
        StepCache(ModulatedInput(), region=Blocks(1)).attach(loop.model)
    with cache((True, False)).attach(loop.model), pytest.raises(ValueError, match="2 steps but the run has 8"):
        loop()
    with pytest.raises(ValueError, match="no step cache"):
        StepCache.preset("magic")
    with pytest.raises(ValueError, match="no parameter tresh"):
        StepCache.preset("fbcache", tresh=1)
    with pytest.raises(ValueError, match="not be negative"):
        StepCache(InputRate(), warmup=-1)
