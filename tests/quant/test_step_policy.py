"""Precision by step: diffusers' format of policies, which steps keep 16 bits, and the choice by calibration."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.cosmos.mixed_precision import (
    FIRST_LAST_N_FP8_POLICY,
    Cosmos3MixedPrecisionConfig,
    parse_diffusion_step_policy,
)

from dit.quant import QuantLinear, TesseraQuantConfig, quantize_
from dit.quant.step_choice import StepNoise, choose_policy, choose_steps, measure_noise
from dit.quant.step_policy import StepPolicy
from dit.quant.step_precision import PrecisionByStep, quantized_layers_in
from dit.runtime.hooks import AttachError
from dit.runtime.step_context import StepContext, next_run, step_scope
from sampling.step_tracker import track_steps
from tests.families.networks import tiny_transformer
from tests.families.tiny import tiny_pipeline
from tests.runtime.truth import guided_call


@pytest.fixture(autouse=True)
def _small_layers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny networks are quantized too."""
    monkeypatch.setattr("dit.quant.roles.LEAST_WIDTH", 8)


def quantized(name: str = "text_dit", bits: str = "w8a8") -> Any:
    """Return a tiny pipeline that is quantized without calibration."""
    pipe = tiny_pipeline(name)
    quantize_(pipe, "int8", bits)
    return pipe


def call(pipe: Any, name: str) -> None:
    pipe(**guided_call(pipe, name, guided=True))


# ------------------------------------------------------------------------- the format


def test_the_published_policy_is_read_and_written_as_diffusers_has_it() -> None:
    policy = StepPolicy.from_dict(FIRST_LAST_N_FP8_POLICY)
    assert (policy.first, policy.last, policy.overlap, policy.reasoner) == (3, 3, True, "a16")
    assert policy.to_dict() == FIRST_LAST_N_FP8_POLICY
    config = TesseraQuantConfig(runtime={"diffusion_step_policy": policy.to_dict()})
    again = TesseraQuantConfig.from_dict(config.to_dict()).diffusion_step_policy
    assert again is not None
    assert StepPolicy.from_dict(again) == policy


@pytest.mark.parametrize("policy", [StepPolicy(), StepPolicy(2, 1), StepPolicy(3, 4, overlap=False)])
def test_diffusers_reads_our_policies_and_means_the_same_steps(policy: StepPolicy) -> None:
    parsed = parse_diffusion_step_policy(policy.to_dict())
    theirs = Cosmos3MixedPrecisionConfig(
        "fp8", parsed.first_steps, parsed.last_steps, parsed.reasoner_policy, parsed.overlap
    )
    for steps in (1, 2, 5, 6, 20):
        for step in range(steps):
            assert policy.is_full(step, steps) == theirs.use_high_precision(step, steps), (step, steps)


def test_ranges_of_noise_levels_survive_a_file() -> None:
    policy = StepPolicy(first=1, levels=((0.5, 0.25), (0.1, 0.0)))
    assert StepPolicy.from_dict(policy.to_dict()) == policy
    kept = [policy.is_full(step, 5, sigma) for step, sigma in enumerate((1.0, 0.7, 0.4, 0.2, 0.05))]
    assert kept == [True, False, True, False, True]
    assert not policy.is_full(3, 5, math.nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version is 2"),
        ({"type": "every_third"}, "type is 'every_third'"),
        ({"index_space": "sigma"}, "index_space is 'sigma'"),
        ({"scope": ["transformer", "vae"]}, "scope is"),
        ({"overlap": "a8"}, "overlap is 'a8'"),
        ({"first_steps": {"count": -1, "mode": "a16"}}, "count of first_steps is -1"),
        ({"first_steps": 3}, "first_steps is 3"),
        ({"reasoner": "a4"}, "reasoner is 'a4'"),
        ({"ranges": [{"from": 1.0, "to": 0.0, "mode": "a16"}]}, "ranges is"),
        ({"type": "noise_levels", "index_space": "sigma"}, "ranges is"),
        ({"type": "noise_levels", "index_space": "sigma", "ranges": [{"from": 0.1, "mode": "a16"}]}, "ranges holds"),
    ],
)
def test_policies_that_are_not_understood_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepPolicy.from_dict({**StepPolicy(1, 1).to_dict(), **change})


def test_an_incomplete_policy_is_refused_as_by_diffusers() -> None:
    incomplete = {name: value for name, value in StepPolicy(1, 1).to_dict().items() if name != "overlap"}
    with pytest.raises(ValueError, match="lacks overlap"):
        StepPolicy.from_dict(incomplete)
    with pytest.raises(ValueError, match="overlap"):
        parse_diffusion_step_policy(incomplete)


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="first is -1"):
        StepPolicy(first=-1)
    with pytest.raises(ValueError, match="levels holds"):
        StepPolicy(levels=((0.1, 0.5),))


# ------------------------------------------------------------------------ the mechanism


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record the precision of each call of a quantized layer."""
    calls: list[bool] = []
    multiply = QuantLinear._multiply

    def watched(self: QuantLinear, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.full_precision)
        return multiply(self, *args, **kwargs)

    monkeypatch.setattr(QuantLinear, "_multiply", watched)
    return calls


@pytest.mark.parametrize("name", ["text_dit", "wan"])
def test_both_branches_of_guidance_follow_the_policy(name: str, seen: list[bool]) -> None:
    """One pipeline has both branches in a batch, the other calls the network for each."""
    pipe = quantized(name)
    with track_steps(pipe) or pytest.fail("it has a tracker"), PrecisionByStep(StepPolicy(1, 1)).attach(pipe) as handle:
        call(pipe, name)
        report = handle.report()
    steps = len(report["strip"])
    assert report["strip"] == "F" + "q" * (steps - 2) + "F"
    assert (report["steps"], report["full_precision_steps"]) == (steps, 2)
    assert not report["inactive"]
    calls = len(seen) // steps
    assert len(seen) == calls * steps
    assert [set(seen[step * calls : (step + 1) * calls]) for step in range(steps)] == [
        {letter == "F"} for letter in report["strip"]
    ]
    assert not any(layer.full_precision for layer in quantized_layers_in(pipe.transformer)), "undone"


def test_full_precision_everywhere_is_the_network_with_16_bit_activations() -> None:
    pipe, weights_only = quantized(), quantized(bits="w8a16")
    arguments = {**guided_call(pipe, "text_dit", guided=True), "output_type": "latent"}

    def generate(one: Any) -> torch.Tensor:
        return one(**{**arguments, "generator": torch.Generator().manual_seed(0)}).images

    plain = generate(pipe)
    with PrecisionByStep(StepPolicy(levels=((2.0, 0.0),))).attach(pipe):
        full = generate(pipe)
    torch.testing.assert_close(full, generate(weights_only), atol=1e-4, rtol=1e-4)
    assert not torch.equal(full, plain)
    assert torch.equal(generate(pipe), plain), "nothing is left of it"


def test_calls_without_a_known_step_are_quantized_and_counted() -> None:
    pipe = quantized()
    layer = quantized_layers_in(pipe.transformer)[0]
    with PrecisionByStep(StepPolicy(first=9)).attach(pipe.transformer) as handle:
        for here in (StepContext(next_run(), 0, 2, 1.0, 1000.0), None):
            with step_scope(here):
                handle.mechanism._enter(handle, [layer])  # pyright: ignore
            assert layer.full_precision == (here is not None)
        assert handle.report()["inactive"] == {"no step context": 1}


def test_plain_networks_are_refused() -> None:
    with pytest.raises(AttachError, match="quantize the network first"):
        PrecisionByStep(StepPolicy(1, 1)).attach(tiny_transformer("text_dit"))


# --------------------------------------------------------------------------- the choice


def noise(error: list[float], slowdown: float = 1.5) -> StepNoise:
    sigmas = tuple(np.linspace(1.0, 1.0 / len(error), len(error)).tolist())
    return StepNoise(sigmas, tuple(error), (1.0,) * len(error), slowdown)


def test_the_best_steps_within_the_time_are_chosen() -> None:
    measured = noise([1.0] * 10)  # a step costs 5 % of a run
    assert measured.step_cost == pytest.approx(0.05)
    one = choose_steps(measured, 0.05)
    assert one.policy == StepPolicy(0, 1), "equal errors count most where nothing repairs them"
    assert one.time <= 0.05
    three = choose_steps(noise([900.0, 1, 1, 1, 1, 1, 1, 1, 1, 1]), 0.15)
    assert three.policy == StepPolicy(1, 2)
    assert three.full_steps == (0, 8, 9)
    assert three.removed == pytest.approx(three.noise.effects()[[0, 8, 9]].sum())
    assert choose_steps(measured, 0.0).policy == StepPolicy()
    assert choose_steps(noise([1.0] * 10, slowdown=1.01), 0.05).full_steps == tuple(range(10)), "nearly free"


def test_any_steps_can_be_chosen_by_noise_level() -> None:
    measured = noise([1, 1, 1, 1, 500.0, 400.0, 1, 1, 1, 1])
    choice = choose_steps(measured, 0.10, windows=False)
    assert choice.full_steps == (4, 5)
    assert len(choice.policy.levels) == 1, "neighbours are one range"
    kept = [choice.policy.is_full(step, 10, sigma) for step, sigma in enumerate(measured.sigmas)]
    assert [step for step, is_full in enumerate(kept) if is_full] == [4, 5]
    assert choice.removed > choose_steps(measured, 0.10).removed


@pytest.mark.parametrize("name", ["text_dit", "wan"])
def test_noise_is_measured_after_guidance_with_both_ways_of_batching(name: str) -> None:
    pipe = quantized(name)
    with track_steps(pipe) or pytest.fail("it has a tracker"):
        arguments = {key: value for key, value in guided_call(pipe, name, guided=True).items() if key != "generator"}
        found = measure_noise(pipe, [arguments.pop("prompt")], **arguments)
    assert len(found.error) == len(found.sigmas) >= 2
    assert all(0 < error < 0.05 * signal for error, signal in zip(found.error, found.signal, strict=True))
    assert found.effects().sum() == pytest.approx(1.0)
    assert found.slowdown > 0


def test_the_measured_effect_is_that_on_the_result() -> None:
    """One step quantized, all others not: its error at the end is the share that was predicted, in order."""
    pipe = quantized(bits="w8a8")
    arguments = {**guided_call(pipe, "text_dit", guided=True), "output_type": "latent", "num_inference_steps": 4}
    del arguments["generator"]

    def generate(levels: tuple[tuple[float, float], ...]) -> torch.Tensor:
        with PrecisionByStep(StepPolicy(levels=levels)).attach(pipe):
            return pipe(**arguments, generator=torch.Generator().manual_seed(0)).images

    prompt = arguments["prompt"]
    found = measure_noise(pipe, [prompt], **{key: value for key, value in arguments.items() if key != "prompt"})
    exact = generate(((9.0, 0.0),))
    errors = []
    for sigma in found.sigmas:
        others = ((9.0, sigma + 1e-3), (sigma - 1e-3, 0.0))
        errors.append(float((generate(others) - exact).square().sum()))
    assert int(np.argmax(errors)) == int(np.argmax(found.effects()))


def test_what_can_not_be_measured_is_refused() -> None:
    pipe = quantized()
    with pytest.raises(ValueError, match="at least one prompt"):
        choose_policy(pipe, [])
    with pytest.raises(ValueError, match="limit is -1"):
        choose_policy(pipe, ["a cat"], -1)
    untracked = quantized("wan")
    arguments = guided_call(untracked, "wan", guided=True)
    with pytest.raises(ValueError, match="StepTracker"):
        measure_noise(untracked, ["a cat"], call=lambda pipe, prompt, seed: pipe(**arguments))
    with pytest.raises(ValueError, match="runs of one length"):
        measure_noise(pipe, ["a cat"], call=lambda pipe, prompt, seed: None)
