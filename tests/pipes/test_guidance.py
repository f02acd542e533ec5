"""The pure functions behind a step: guidance and the choice of noise levels."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from sampling.guidance import classifier_free_guidance, in_interval, rescale_to
from sampling.timesteps import dynamic_shift, set_timesteps, uniform_sigmas


def pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)


def test_scales_one_and_zero_are_the_branches():
    cond, uncond = pair()
    torch.testing.assert_close(classifier_free_guidance(cond, uncond, 1.0), cond)
    assert torch.equal(classifier_free_guidance(cond, uncond, 0.0), uncond)


def test_full_rescale_restores_the_spread_of_each_sample():
    cond, uncond = pair()
    guided = classifier_free_guidance(cond, uncond, 7.0)
    rescaled = classifier_free_guidance(cond, uncond, 7.0, rescale=1.0)
    assert (guided.std(dim=(1, 2, 3)) > 2 * cond.std(dim=(1, 2, 3))).all()
    torch.testing.assert_close(rescaled.std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)))
    assert torch.equal(rescale_to(guided, cond, 0.0), guided)
    with pytest.raises(ValueError, match=r"rescale strength 1\.5 is outside"):
        rescale_to(guided, cond, 1.5)


def test_interval_includes_its_ends():
    assert in_interval(0.3, None)
    assert [in_interval(sigma, (0.2, 0.6)) for sigma in (0.1, 0.2, 0.6, 0.7)] == [False, True, True, False]


def test_default_sigmas_divide_the_flow_evenly():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    timesteps = set_timesteps(scheduler, 4, num_tokens=16, device="cpu")
    torch.testing.assert_close(timesteps, torch.tensor([1000.0, 750.0, 500.0, 250.0]))
    assert uniform_sigmas(1) == [1.0]


@pytest.mark.parametrize(("strength", "kept"), [(1.0, 10), (0.6, 6), (0.01, 1)])
def test_strength_keeps_the_end_of_the_run(strength, kept):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    timesteps = set_timesteps(scheduler, 10, num_tokens=16, device="cpu", strength=strength)
    assert torch.equal(timesteps, scheduler.timesteps[-kept:])
    assert scheduler.begin_index == 10 - kept


def test_schedulers_without_sigmas_say_so():
    with pytest.raises(ValueError, match="DDPMScheduler takes no custom sigmas"):
        set_timesteps(DDPMScheduler(), 2, num_tokens=16, device="cpu", sigmas=[1.0, 0.5])


def test_dynamic_shift_meets_its_anchors():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert dynamic_shift(256, scheduler) == pytest.approx(0.5)
    assert dynamic_shift(4096, scheduler) == pytest.approx(1.15)
