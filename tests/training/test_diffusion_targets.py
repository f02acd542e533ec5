"""Noise and targets of training against the schedulers of diffusers, losses against its training scripts."""

import dataclasses
import itertools
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sampling.diffusion_targets import NoiseProcess, mean_squared_error, noise_process

SHAPE = (5, 4, 6, 8)
FLOWS = {
    "plain": {},
    "shifted": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True},
    "terminal": {"use_dynamic_shifting": True, "shift_terminal": 0.1},
    "few timesteps": {"num_train_timesteps": 100, "shift": 7.0},
}
DIFFUSIONS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "ddpm epsilon": (diffusers.DDPMScheduler, {}),
    "ddpm v": (diffusers.DDPMScheduler, {"prediction_type": "v_prediction"}),
    "ddpm sample": (diffusers.DDPMScheduler, {"prediction_type": "sample"}),
    "ddim zero snr": (diffusers.DDIMScheduler, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    "cogvideox": (
        diffusers.CogVideoXDDIMScheduler,
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 1.0},
    ),
    "cogvideox dpm": (diffusers.CogVideoXDPMScheduler, {"prediction_type": "v_prediction"}),
}


@pytest.fixture
def data() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def predicted() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other.to(one.dtype), atol=1e-5, rtol=1e-5)


def some_timesteps(scheduler: Any) -> Tensor:
    """Timesteps of a flow's own table, in no order."""
    return scheduler.timesteps[torch.tensor([0, 77, 3, 42, -1])]


# -------------------------------------------------------------------------- flows


@pytest.mark.parametrize("settings", FLOWS.values(), ids=FLOWS.keys())
def test_noise_of_flows_is_that_of_the_scheduler(settings, data, noise):
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    process, timesteps = noise_process(scheduler), some_timesteps(scheduler)
    assert process.prediction == "velocity"
    close(process.add_noise(data, noise, timesteps), scheduler.scale_noise(data, timesteps, noise))
    close(process.target(data, noise, timesteps), noise - data)


@pytest.mark.parametrize("settings", FLOWS.values(), ids=FLOWS.keys())
def test_levels_of_flows_are_those_of_a_run(settings):
    """Whatever the shift, at the timesteps of a run the noise is what the scheduler's own table says."""
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    scheduler.set_timesteps(7, **({"mu": 0.9} if settings.get("use_dynamic_shifting") else {}))
    process = noise_process(scheduler)
    close(process.sigmas(scheduler.timesteps), scheduler.sigmas[:-1])
    close(process.timesteps(scheduler.sigmas[:-1]), scheduler.timesteps)


def test_a_multistep_solver_of_a_flow_has_the_same_noise(data, noise):
    """Its timesteps are whole numbers, so its own levels differ by less than half of one."""
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler: Any = diffusers.UniPCMultistepScheduler(**settings)
    scheduler.set_timesteps(7)
    process = noise_process(scheduler)
    assert (process.prediction, process.shift) == ("velocity", 3.0)
    torch.testing.assert_close(process.sigmas(scheduler.timesteps).float(), scheduler.sigmas[:-1], atol=1e-3, rtol=0)
    mine = process.add_noise(data, noise, scheduler.timesteps[:5])
    theirs = scheduler.add_noise(data, noise, scheduler.timesteps[:5])
    torch.testing.assert_close(mine, theirs, atol=1e-2, rtol=0)


def test_time_runs_backwards_where_the_sigmas_are_inverted(data, noise):
    """Mochi's: timestep 0 is noise, and the network predicts the way to data."""
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(5)
    process, timesteps = noise_process(scheduler), scheduler.timesteps
    assert process.prediction == "reversed_velocity"
    assert float(timesteps[0]) < float(timesteps[-1])
    levels = scheduler.sigmas[:-1].reshape(-1, 1, 1, 1)  # of data, here
    noisy = process.add_noise(data, noise, timesteps)
    close(noisy, levels * data + (1 - levels) * noise)
    for row in range(len(timesteps) - 1):
        step = scheduler.step(process.target(data, noise, timesteps)[row], timesteps[row], noisy[row]).prev_sample
        close(step, process.add_noise(data[row : row + 1], noise[row : row + 1], timesteps[row + 1 : row + 2])[0])


@pytest.mark.parametrize("settings", FLOWS.values(), ids=FLOWS.keys())
def test_a_step_along_the_target_is_the_path(settings, data, noise):
    """The scheduler, fed with what the network is trained on, goes from the noise of one timestep to the next one's."""
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    scheduler.set_timesteps(4, **({"mu": 0.9} if settings.get("use_dynamic_shifting") else {}))
    process, times = noise_process(scheduler), scheduler.timesteps
    for now, then in itertools.pairwise(times):
        at, after = (one.expand(len(data)) for one in (now, then))
        made = scheduler.step(process.target(data, noise, at), now, process.add_noise(data, noise, at)).prev_sample
        close(made, process.add_noise(data, noise, after))


# ------------------------------------------------------------------------ diffusion


@pytest.mark.parametrize(("kind", "settings"), DIFFUSIONS.values(), ids=DIFFUSIONS.keys())
def test_noise_of_diffusion_is_that_of_the_scheduler(kind, settings, data, noise):
    scheduler: Any = kind(**settings)
    process, timesteps = noise_process(scheduler), torch.tensor([0, 999, 500, 13, 700])
    close(process.add_noise(data, noise, timesteps), scheduler.add_noise(data, noise, timesteps))
    target = process.target(data, noise, timesteps)
    if settings.get("prediction_type") == "v_prediction":
        close(target, scheduler.get_velocity(data, noise, timesteps))
    else:
        close(target, data if settings.get("prediction_type") == "sample" else noise)


def test_noise_of_diffusion_is_that_of_a_multistep_solver(data, noise):
    """Which finds its levels by position in the table of a run."""
    scheduler: Any = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    scheduler.set_timesteps(5)
    mine = noise_process(scheduler).add_noise(data, noise, scheduler.timesteps)
    close(mine, scheduler.add_noise(data, noise, scheduler.timesteps))


PROCESSES = {
    "velocity": NoiseProcess("velocity", 1000),
    "reversed_velocity": NoiseProcess("reversed_velocity", 1000),
    **{
        kind: noise_process(diffusers.DDPMScheduler(prediction_type=kind))
        for kind in ("epsilon", "v_prediction", "sample")
    },
}


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_timesteps_are_drawn_and_spread_within_bounds(process):
    drawn = process.draw_timesteps(2000, generator=torch.Generator().manual_seed(0))
    even = process.draw_timesteps(2000, std=0, generator=torch.Generator().manual_seed(0))
    for times in (drawn, even, process.grid(8)):
        assert times.dtype == torch.float64
        assert 0 <= float(times.min()) <= float(times.max()) <= 1000
    assert abs(float(even.mean()) - 500) < 25
    assert process.grid(4).unique().tolist() == [125, 375, 625, 875]
    if not process.is_flow:
        assert torch.equal(drawn, drawn.round())
        assert float(drawn.max()) <= 999


BOUNDED = {"velocity": 1.0, "shifted": 5.0, "reversed_velocity": 3.0, "epsilon": None}


@pytest.mark.parametrize("bounds", [(0.0, 875.0), (875.0, 1000.0)])
@pytest.mark.parametrize(("kind", "shift"), BOUNDED.items())
def test_timesteps_of_a_network_for_a_part_of_the_noise_stay_there(kind, shift, bounds):
    whole = PROCESSES.get(kind, PROCESSES["velocity"])
    process = dataclasses.replace(whole, bounds=bounds, shift=shift or 1.0)
    generator = torch.Generator().manual_seed(0)
    for mean, std in [(0.0, 1.0), (-30.0, 1.0), (30.0, 0.1), (0.0, 0.0)]:
        times = process.draw_timesteps(2000, mean, std, generator)
        assert times.dtype == torch.float64
        assert bounds[0] <= float(times.min()) <= float(times.max()) <= bounds[1]
    assert bounds[0] < float(process.grid(8).min()) < float(process.grid(8).max()) < bounds[1]


def test_noise_within_bounds_is_as_likely_as_without():
    whole = NoiseProcess("velocity", 1000, shift=3.0)
    part = dataclasses.replace(whole, bounds=(600.0, 900.0))
    everything = whole.draw_timesteps(60000, 0.5, 0.8, torch.Generator().manual_seed(0))
    wanted = everything[(everything >= 600) & (everything <= 900)].quantile(torch.linspace(0.1, 0.9, 5).double())
    found = part.draw_timesteps(20000, 0.5, 0.8, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found.quantile(torch.linspace(0.1, 0.9, 5).double()), wanted, atol=5, rtol=0)


def test_other_schedulers_are_refused():
    with pytest.raises(ValueError, match=r"SCMScheduler.*distilled to few steps"):
        noise_process(diffusers.SCMScheduler())
    with pytest.raises(ValueError, match=r"prediction_type='v' can't be trained on.*replace the pipeline's scheduler"):
        noise_process(diffusers.DDPMScheduler(prediction_type="v"))  # type: ignore[arg-type]


# ------------------------------------------------------------ diffusers' scripts


def table_sigmas(scheduler: Any, timesteps: Tensor) -> Tensor:
    """`get_sigmas` of the scripts: noise levels by position in the scheduler's table, (B, 1, 1, 1)."""
    places = [(scheduler.timesteps == time).nonzero().item() for time in timesteps]
    return scheduler.sigmas[places].reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("settings", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}])
def test_loss_of_the_script_for_flux(settings, data, noise, predicted):
    """train_dreambooth_lora_flux.py; weighting "none" weighs all alike."""
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    timesteps = some_timesteps(scheduler)
    sigmas = table_sigmas(scheduler, timesteps)  # (B, 1, 1, 1)
    noisy = (1.0 - sigmas) * data + sigmas * noise
    weighting = torch.ones_like(sigmas)
    target = noise - data
    loss = torch.mean((weighting * (predicted - target) ** 2).reshape(target.shape[0], -1), 1).mean()

    process = noise_process(scheduler)
    close(process.add_noise(data, noise, timesteps), noisy)
    close(mean_squared_error(predicted, process.target(data, noise, timesteps)).mean(), loss)


def test_loss_of_the_script_for_sd3(data, noise, predicted):
    """train_dreambooth_lora_sd3.py without its preconditioning, which weighs by the square of the level."""
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    timesteps = some_timesteps(scheduler)
    plain = torch.mean(((predicted - (noise - data)) ** 2).reshape(len(data), -1), 1).mean()
    target = noise_process(scheduler).target(data, noise, timesteps)
    close(mean_squared_error(predicted, target).mean(), plain)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_losses_of_the_script_for_stable_diffusion(kind, data, noise, predicted):
    """train_text_to_image_lora.py without weights by the signal-to-noise ratio."""
    scheduler: Any = diffusers.DDPMScheduler(prediction_type=kind, beta_schedule="scaled_linear", beta_start=0.00085)
    timesteps = torch.tensor([0, 999, 500, 13, 700])
    target = noise if kind == "epsilon" else scheduler.get_velocity(data, noise, timesteps)
    loss = F.mse_loss(predicted.float(), target.float(), reduction="mean")

    process = noise_process(scheduler)
    close(mean_squared_error(predicted, process.target(data, noise, timesteps)).mean(), loss)
    close(process.add_noise(data, noise, timesteps), scheduler.add_noise(data, noise, timesteps))
