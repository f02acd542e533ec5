"""EasyCache forecasts the difference of output and latents, also where the output has other channels than they have."""

import pytest
import torch

from dit.runtime.step_context import StepContext, next_run, step_scope
from sampling.step_cache import StepCache
from sampling.step_cache.values import as_one, match_latents
from tests.families.networks import tiny_transformer
from tests.families.tiny import tiny_call, tiny_pipeline

STEPS = 8
"""Of which the first three and the last are always computed."""


@pytest.mark.parametrize("name", ["class_dit", "dit", "pixart", "hunyuan_dit", "latte", "z_image", "flux"])
def test_it_skips_on_networks_with_a_variance_and_with_lists(name):
    pipe = tiny_pipeline(name)
    with StepCache.preset("easycache", threshold=1e3, warmup=3).attach(pipe) as cache:
        images = torch.as_tensor(pipe(**tiny_call(name, num_inference_steps=STEPS))[0])
        assert set(cache.report()["strip"].values()) == {"CCC....C"}
    assert torch.isfinite(images).all()


def test_the_variance_is_used_again_and_the_noise_follows_the_latents():
    torch.manual_seed(0)
    network = tiny_transformer("class_dit", objective="epsilon").eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    latents = torch.randn(STEPS, 2, network.config.in_channels, 4, 4)  # (S, B, C, h, w)
    seen = []

    run = next_run()
    with StepCache.preset("easycache", threshold=1e3, warmup=3).attach(network), torch.no_grad():
        for step in range(STEPS):
            sigma = 1 - step / STEPS
            with step_scope(StepContext(run, step, STEPS, sigma, 1000 * sigma, "cond")):
                at, labels = torch.full((2,), 1000 * sigma), torch.tensor([0, 1])
                seen.append(network(latents[step], timestep=at, class_labels=labels, return_dict=False)[0])
    half, newest = network.config.in_channels, 2
    for step in range(3, STEPS - 1):
        moved = seen[newest][:, :half] + latents[step] - latents[newest]
        torch.testing.assert_close(seen[step][:, :half], moved)
        torch.testing.assert_close(seen[step][:, half:], seen[newest][:, half:])


def test_latents_in_the_shape_of_outputs():
    latents = torch.randn(2, 4, 3, 3)
    assert torch.equal(match_latents(latents, (torch.ones(2, 4, 3, 3),))[0], latents)
    longer, shorter = (
        match_latents(latents, (torch.ones(2, 6, 3, 3),))[0],
        match_latents(latents, (torch.ones(2, 2, 3, 3),))[0],
    )
    assert torch.equal(longer[:, :4], latents)
    assert not longer[:, 4:].any()
    assert torch.equal(shorter, latents[:, :2])
    of_samples = match_latents(latents, (torch.ones(4, 3, 3), torch.ones(4, 3, 3)))
    assert torch.equal(as_one(of_samples), latents)
    picture, sound = match_latents(latents, (torch.ones(2, 4, 3, 3), torch.ones(2, 7)))
    assert torch.equal(picture, latents)
    assert not sound.any()
    with pytest.raises(ValueError, match="can't be compared"):
        match_latents(latents, (torch.ones(2, 6, 4, 3),))
