"""The maths of flow matching."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from sampling.objectives import (
    data_from_velocity,
    flow_matching_loss,
    interpolate,
    logit_normal_grid,
    logit_normal_sigmas,
    shift_sigmas,
    velocity,
)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 4, 4, generator=generator), torch.randn(3, 2, 4, 4, generator=generator)


def test_path_runs_from_data_to_noise(pair):
    data, noise = pair
    sigmas = torch.tensor([0.0, 0.3, 1.0])
    sample = interpolate(data, noise, sigmas)
    assert torch.equal(sample[0], data[0])
    assert torch.equal(sample[2], noise[2])
    assert torch.allclose(data_from_velocity(sample, velocity(data, noise), sigmas), data, atol=1e-6)


def test_the_scheduler_walks_back_along_the_true_velocity(pair):
    data, noise = pair
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    sample = noise
    for timestep in scheduler.timesteps:
        sample = scheduler.step(velocity(data, noise), timestep, sample).prev_sample
    assert torch.allclose(sample, data, atol=1e-5)


def test_loss_is_the_mean_square_of_each_sample(pair):
    data, noise = pair
    assert torch.equal(flow_matching_loss(noise - data, data, noise), torch.zeros(3))
    assert torch.allclose(flow_matching_loss((noise - data + 2).bfloat16(), data, noise), torch.tensor(4.0), rtol=0.02)


def test_sigmas_are_logit_normal_and_seeded():
    draws = [logit_normal_sigmas(20_000, 0.5, 0.8, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)
    logits = torch.logit(draws[0])
    assert float(logits.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(logits.std()) == pytest.approx(0.8, abs=0.03)
    grid = logit_normal_grid(20_000, 0.5, 0.8)
    assert torch.allclose(grid, draws[0].sort().values, atol=0.03)


def test_shift_is_that_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigmas = torch.linspace(1, 0.001, 1000)
    assert torch.allclose(shift_sigmas(sigmas, 3.0), scheduler.sigmas, atol=1e-5)
    with pytest.raises(ValueError, match="above 0"):
        shift_sigmas(sigmas, 0.0)
