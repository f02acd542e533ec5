"""Guidance on fewer calls, the solver of second order, and presets for few steps."""

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.guiders import ClassifierFreeGuidance

from dit.runtime.hooks import attachments
from sampling.few_step import few_step, few_step_names
from sampling.guidance_caching import CachedGuidance, guider_interval
from sampling.schedulers import FlowMatchAB2Scheduler
from sampling.step_cache import StepCache
from sampling.step_cache.call import join, split
from sampling.step_cache.gates import Mask
from tests.families.tiny import tiny_pipeline
from tests.runtime.truth import guided_call

STEPS = 6


def paint(pipe: Any, name: str, guided: bool = True, **overrides: Any) -> torch.Tensor:
    arguments = {**guided_call(pipe, name, guided), "num_inference_steps": STEPS, **overrides}
    return torch.as_tensor(pipe(**{**arguments, "generator": torch.Generator().manual_seed(5)})[0])


def rows(pipe: Any) -> list[int]:
    """Samples in each call of the network's first linear layer."""
    found: list[int] = []
    first = next(part for part in pipe.transformer.modules() if isinstance(part, torch.nn.Linear | torch.nn.Conv2d))
    first.register_forward_pre_hook(lambda module, args: found.append(len(args[0])))
    return found


# ------------------------------------------------------------------------------ intervals


GUIDED = ("text_dit", "dit", "sd3", "pixart", "flux", "wan", "qwen_image", "z_image", "hunyuan_dit", "sana", "lumina2",
          "cogvideox", "mochi", "latte")  # fmt: skip


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_everywhere_and_nowhere(name: str) -> None:
    pipe = tiny_pipeline(name)
    guided, plain = paint(pipe, name), paint(pipe, name, guided=False)
    with CachedGuidance().attach(pipe) as attached:
        assert torch.equal(paint(pipe, name), guided)
        assert attached.report()["uncond_skipped"] == []
    with CachedGuidance(interval=(1e6, 1e7)).attach(pipe) as attached:
        torch.testing.assert_close(paint(pipe, name), plain, rtol=1e-4, atol=1e-4)
        assert attached.report()["uncond_skipped"] == list(range(STEPS))
        assert attached.report()["inactive"] == {}
    assert torch.equal(paint(pipe, name), guided)


def test_interval_is_that_of_our_own_pipeline_and_saves_its_calls() -> None:
    pipe = tiny_pipeline("text_dit")
    ours = paint(pipe, "text_dit", guidance_interval=(0.3, 0.9))
    sizes = rows(pipe)
    with CachedGuidance(interval=(0.3, 0.9)).attach(pipe) as attached:
        torch.testing.assert_close(paint(pipe, "text_dit"), ours, rtol=1e-4, atol=1e-5)
        steps = attached.report()["uncond_computed"]
    assert 0 < len(steps) < STEPS
    assert sum(size > 1 for size in sizes) == len(steps)


@pytest.mark.parametrize("name", ["text_dit", "wan"])
def test_old_differences_stand_in(name: str) -> None:
    pipe = tiny_pipeline(name)
    exact = paint(pipe, name)
    with CachedGuidance(every=2).attach(pipe) as attached:
        guidance_cached = paint(pipe, name)
        report = attached.report()
        again = paint(pipe, name)
    assert report["uncond_computed"] == [0, 1, 2, 4]
    assert report["uncond_skipped"] == [3, 5]
    assert torch.equal(guidance_cached, again)
    unguided = paint(pipe, name, guided=False)
    assert 0 < (guidance_cached - exact).norm() < 0.5 * (unguided - exact).norm()


def test_beside_a_step_cache() -> None:
    pipe = tiny_pipeline("text_dit")
    cache = StepCache(Mask((True, True, False, True, False, True)))
    with cache.attach(pipe) as cached, CachedGuidance(interval=(0.0, 0.9)).attach(pipe):
        one, two = paint(pipe, "text_dit"), paint(pipe, "text_dit")
        strips = cached.report()["strip"]
    assert attachments(pipe) == [], "a step tracker was left behind"
    assert torch.equal(one, two)
    assert set(strips) == {"all", "cond"}, "the steps without guidance have a track of their own"


@pytest.mark.parametrize("name", ["text_dit", "sd3", "cogvideox", "wan"])
@pytest.mark.parametrize(
    ("preset", "params"),
    [("taylorseer", {"every": 3, "first": 2}), ("fora", {"every": 2}), ("easycache", {"threshold": 9.0, "warmup": 1})],
)
def test_what_a_step_cache_keeps_of_both_branches_serves_calls_of_one(name: str, preset: str, params: dict) -> None:
    """The cache skips the same steps as without the other, and errors add up at most."""
    pipe = tiny_pipeline(name)

    def run() -> torch.Tensor:
        return paint(pipe, name, num_inference_steps=8)

    exact = run()
    with StepCache.preset(preset, **params).attach(pipe) as cache:
        cached, (alone, *_) = run(), cache.report()["strip"].values()
    with CachedGuidance(every=2).attach(pipe):
        guided = run()
    with StepCache.preset(preset, **params).attach(pipe) as cache, CachedGuidance(every=2).attach(pipe):
        both, strips = run(), cache.report()["strip"]
    strips = {branch: f"{strip:<8}" for branch, strip in strips.items()}
    if "all" in strips:  # calls of one kind or the other at each step
        assert [a if a != " " else b for a, b in zip(strips["all"], strips["cond"], strict=True)] == list(alone)
    else:
        assert strips["cond"] == alone
        assert all(one in (" ", other) for one, other in zip(strips["uncond"], alone, strict=True))
    assert (both - exact).norm() < 2 * ((cached - exact).norm() + (guided - exact).norm())


def test_values_of_both_branches_are_divided_and_joined_again() -> None:
    values = torch.arange(8.0).view(4, 2), torch.arange(4.0)
    first, second = split((*values, torch.zeros(())), 2)
    assert torch.equal(first[0], values[0][:2])
    assert torch.equal(second[1], values[1][2:])
    assert first[2].ndim == second[2].ndim == 0, "what stands for a stream that nothing is taken off"
    assert all(torch.equal(*pair) for pair in zip(join([first[:2], second[:2]]), values, strict=True))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="is empty"):
        CachedGuidance(interval=(0.9, 0.1))
    with pytest.raises(ValueError, match="every is 0"):
        CachedGuidance(every=0)
    with pytest.raises(ValueError, match="no step"):
        guider_interval([1.0, 0.5], (2.0, 3.0))


def test_guiders_of_diffusers_get_the_same_interval_in_steps() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for steps in (7, 28, 50):
        scheduler.set_timesteps(steps)
        sigmas = scheduler.sigmas[:-1].tolist()
        start, stop = guider_interval(sigmas, (0.2, 0.8))
        guider = ClassifierFreeGuidance(start=start, stop=stop)
        guides = []
        for step, timestep in enumerate(scheduler.timesteps):
            guider.set_state(step, steps, timestep)
            guides.append(guider.num_conditions == 2)
        assert guides == [0.2 <= sigma <= 0.8 for sigma in sigmas]


# --------------------------------------------------------------------------------- solver


def solved(scheduler: Any, steps: int, forecast: tuple[int, ...] = ()) -> float:
    """Follow dx / dsigma = cos(3 sigma) x from 1 to 0."""
    scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    x = torch.ones(1, 1, 1, 1)
    for step, timestep in enumerate(scheduler.timesteps):
        if step in forecast:
            scheduler.forecast_output = True
        x = scheduler.step(torch.cos(3 * timestep / 1000) * x, timestep, x, return_dict=False)[0]
        scheduler.forecast_output = False
    return x.item()


def test_ab2_is_of_second_order() -> None:
    truth = math.exp(-math.sin(3) / 3)
    for shift in (1.0, 3.0):
        errors = [abs(solved(FlowMatchAB2Scheduler(shift=shift), steps) - truth) for steps in (80, 160)]
        euler = abs(solved(FlowMatchEulerDiscreteScheduler(shift=shift), 160) - truth)
        assert 2.8 < errors[0] / errors[1] < 6, "halving the steps must about quarter the error"
        assert errors[1] < euler / 5


def test_forecast_velocities_never_become_history() -> None:
    """A wrong velocity that is marked as forecast hurts its own step only."""
    scheduler = FlowMatchAB2Scheduler(shift=1.0)

    def run(marked: bool) -> list[torch.Tensor]:
        scheduler.set_timesteps(4)
        x, found = torch.zeros(1, 1, 1, 1), []
        for step, timestep in enumerate(scheduler.timesteps):
            scheduler.forecast_output = marked and step == 1
            velocity = torch.full_like(x, 1.0 + 5.0 * (step == 1))
            after = scheduler.step(velocity, timestep, x, return_dict=False)[0]
            found.append(after - x)
            x = after
        return found

    clean, mixed = run(True), run(False)
    assert clean[2].item() == pytest.approx(float(scheduler.sigmas[3] - scheduler.sigmas[2]), rel=1e-5)
    assert mixed[2].item() != pytest.approx(clean[2].item(), rel=1e-2)


def test_a_step_cache_tells_the_solver() -> None:
    pipe = tiny_pipeline("text_dit")
    pipe.scheduler = FlowMatchAB2Scheduler.from_config(pipe.scheduler.config)
    told = []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: told.append(pipe.scheduler.forecast_output) or step(*args, **kwargs)
    with StepCache(Mask((True, True, False, True, False, True))).attach(pipe):
        paint(pipe, "text_dit")
    assert told == [False, False, True, False, True, False]


# ------------------------------------------------------------------------------- few steps


@pytest.mark.parametrize("name", few_step_names())
def test_few_step_presets_make_their_scheduler(name: str) -> None:
    preset = few_step(name)
    pipe = tiny_pipeline("flux" if preset.flow else "pixart")
    arguments = preset.apply(pipe)
    assert type(pipe.scheduler).__name__ == preset.scheduler
    for key, value in preset.config.items():
        assert pipe.scheduler.config[key] == pytest.approx(value)
    pipe.scheduler.set_timesteps(**({"timesteps": list(preset.timesteps)} if preset.timesteps else
                                    {"num_inference_steps": preset.steps, **({"mu": 1.0} if
                                     pipe.scheduler.config.get("use_dynamic_shifting") else {})}))  # fmt: skip
    assert len(pipe.scheduler.timesteps) == preset.steps
    if preset.timesteps:
        assert pipe.scheduler.timesteps.tolist() == list(preset.timesteps)
    assert arguments["num_inference_steps" if not preset.timesteps else "timesteps"]


def test_few_step_paints_with_our_pipeline_and_refuses_the_wrong_kind() -> None:
    pipe = tiny_pipeline("text_dit")
    arguments = few_step("flux-turbo").apply(pipe)
    picture = paint(pipe, "text_dit", **arguments)
    assert torch.isfinite(picture).all()
    with pytest.raises(ValueError, match="no few-step preset"):
        few_step("magic")
    with pytest.raises(ValueError, match="noise schedule"):
        few_step("sdxl-lightning").apply(pipe)
    with pytest.raises(ValueError, match="flow"):
        few_step("flux-hyper").apply(tiny_pipeline("pixart"))
