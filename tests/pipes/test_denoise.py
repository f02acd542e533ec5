"""The one denoising loop beside a slow reference, for images and clips: guidance, steps, callbacks and early ends."""

from contextlib import nullcontext

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dit.runtime.step_context import current_step
from sampling.denoise import Denoiser, denoise

STEPS, SCALE = 5, 3.0
SHAPES = {"image": (2, 4, 6, 6), "clip": (2, 4, 3, 6, 6)}


class Network:
    """Predicts something that depends on latents, time and branch; keeps where it was called."""

    def __init__(self):
        self.calls, self.contexts = [], []

    def cache_context(self, name):
        self.contexts.append(name)
        return nullcontext()

    def velocity(self, latents, timestep, shift):
        return torch.tanh(latents) * (timestep / 1000) + shift

    def predict(self, state, timestep, guides):
        here = current_step()
        self.calls.append((here.step, here.branch))
        cond = self.velocity(state["latents"], timestep, 0.1)
        return torch.cat([self.velocity(state["latents"], timestep, -0.2), cond]) if guides else cond


class Control:
    """Keeps the steps; stops before one, finishes after one, or replaces the latents of one."""

    def __init__(self, stop_at=None, finish_after=None, replace=None):
        self.stop_at, self.finish_after, self.replace = stop_at, finish_after, replace or {}
        self.begun, self.ended = 0, 0

    def begin_step(self, timestep):
        self.begun += 1
        return self.begun - 1 != self.stop_at

    def end_step(self, step, timestep, state):
        self.ended += 1
        return {**state, "latents": self.replace.get(step, state["latents"])}

    @property
    def finish_now(self):
        return self.ended == self.finish_after


def scheduler():
    made = FlowMatchEulerDiscreteScheduler(shift=2.0)
    made.set_timesteps(STEPS)
    return made


def noise(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def run(shape, network, control, guides=lambda sigma: True, restore=None):
    flow = scheduler()
    model = Denoiser(
        network=network,
        predict=network.predict,
        guide=lambda uncond, cond: uncond + SCALE * (cond - uncond),
        guides=guides,
        estimate=lambda output, velocity, latents, timestep: latents - timestep / 1000 * velocity,
        restore=restore,
    )
    return denoise({"latents": noise(shape)}, flow.timesteps, flow, model, control)


def reference(shape, guides=lambda sigma: True, last=STEPS):
    """Euler's method written out; returns the latents and the estimate of the result after each step."""
    latents, network, sigmas, found = noise(shape), Network(), scheduler().sigmas, []
    for step in range(last):
        timestep = sigmas[step] * 1000
        velocity = network.velocity(latents, timestep, 0.1)
        if guides(float(sigmas[step])):
            uncond = network.velocity(latents, timestep, -0.2)
            velocity = uncond + SCALE * (velocity - uncond)
        estimate = latents - sigmas[step] * velocity
        latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
        found.append((latents, estimate))
    return found


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_eulers_method_with_guidance(shape):
    network, control = Network(), Control()
    torch.testing.assert_close(run(shape, network, control), reference(shape)[-1][0])
    assert network.calls == [(step, "all") for step in range(STEPS)]
    assert network.contexts == ["guided"] * STEPS
    assert (control.begun, control.ended) == (STEPS, STEPS)


def test_guidance_may_hold_for_some_noise_levels():
    def guides(sigma):
        return sigma > 0.6

    network = Network()
    torch.testing.assert_close(
        run(SHAPES["image"], network, Control(), guides), reference(SHAPES["image"], guides)[-1][0]
    )
    assert {branch for _, branch in network.calls} == {"all", "cond"}
    assert set(network.contexts) == {"guided", "cond"}


def test_it_stops_before_a_step_and_finishes_after_one():
    network = Network()
    assert run(SHAPES["image"], network, Control(stop_at=2)) is None
    assert len(network.calls) == 2
    finished = run(SHAPES["image"], Network(), Control(finish_after=3))
    torch.testing.assert_close(finished, reference(SHAPES["image"], last=3)[-1][1])


def test_a_callback_may_replace_the_latents():
    found = run(SHAPES["image"], Network(), Control(replace={STEPS - 1: torch.ones(SHAPES["image"])}))
    assert torch.equal(found, torch.ones(SHAPES["image"]))


def test_what_is_kept_is_put_back_at_the_level_of_the_following_step():
    levels = []

    def restore(latents, sigma):
        levels.append(round(sigma, 4))
        return latents

    run(SHAPES["image"], Network(), Control(), restore=restore)
    following = [round(float(sigma), 4) for sigma in scheduler().sigmas[1:]]
    assert levels == [level for sigma in following for level in (sigma, 0.0)]  # the latents', then the estimate's
