"""The maths of flow matching."""

import itertools

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from sampling.objectives import (
    data_from_velocity,
    flow_matching_loss,
    frame_change_loss,
    interpolate,
    logit_normal_grid,
    logit_normal_sigmas,
    shift_sigmas,
    sigmas_after_clean_frames,
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


def test_clips_begin_with_clean_chunks_and_end_with_noise():
    levels = torch.rand(4000, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    drawn = sigmas_after_clean_frames(levels, 0.5, torch.Generator().manual_seed(1))
    clean = (drawn == 0).sum(dim=1)  # (B,)
    assert torch.equal(drawn == 0, torch.arange(4) < clean[:, None])
    assert torch.equal(drawn[drawn > 0], levels[drawn > 0])
    shares = clean.bincount(minlength=5).float() / len(clean)
    assert torch.allclose(shares, torch.tensor([0.625, 0.125, 0.125, 0.125, 0.0]), atol=0.03)
    assert torch.equal(sigmas_after_clean_frames(levels, 0.0), levels)


def test_parts_of_a_sample_have_levels_and_weights_of_their_own():
    data, noise = torch.randn(2, 3, 4, 2), torch.randn(2, 3, 4, 2)
    sigmas = torch.tensor([[0.0, 0.5, 1.0, 0.25]] * 2)[:, None, :, None]
    mixed = interpolate(data, noise, sigmas)
    for part, sigma in enumerate((0.0, 0.5, 1.0, 0.25)):
        alone = interpolate(data[:, :, part], noise[:, :, part], torch.full((2,), sigma))
        assert torch.allclose(mixed[:, :, part], alone)
    predicted = torch.randn(2, 3, 4, 2)
    weighted = flow_matching_loss(predicted, data, noise, sigmas > 0)
    assert torch.allclose(weighted, flow_matching_loss(predicted[:, :, 1:], data[:, :, 1:], noise[:, :, 1:]), atol=1e-6)


def test_frame_change_loss_counts_what_frames_do_not_share():
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(2, 8, 3, 4, 4, generator=generator) for _ in range(2))
    exact = noise - data
    shared = torch.randn(2, 2, 1, 1, 4, 4, generator=generator).expand(2, 2, 3, 4, 4, 4)  # (B, c, T, R, h, w)
    stacked = shared.permute(0, 3, 1, 2, 4, 5).flatten(1, 2)  # (B, R c, T, h, w), R = 4
    assert frame_change_loss(exact + stacked, data, noise, 4).abs().max() < 1e-10
    error = torch.randn(2, 8, 3, 4, 4, generator=generator)
    frames = [error[:, 2 * slot : 2 * slot + 2, group] for group in range(3) for slot in range(4)]  # each (B, c, h, w)
    pairs = list(itertools.pairwise(frames[3:]))  # the first frame fills its group
    expected = sum((later - earlier).square().flatten(1).mean(1) for earlier, later in pairs) / len(pairs) / 2
    torch.testing.assert_close(frame_change_loss(exact + error, data, noise, 4), expected, rtol=1e-5, atol=1e-6)
    assert frame_change_loss(error[:, :, :1], data[:, :, :1], noise[:, :, :1], 4).tolist() == [0.0, 0.0]
