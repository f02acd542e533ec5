"""The curriculum of sizes: what is left of a spectrum, which steps see what, exact resume."""

import math

import pytest
import torch

from apps.training.config import ConfigError
from apps.training.data.low_frequency import LowFrequencyExamples, crop_spectrum, side_at
from apps.training.loop import Trainer
from apps.training.task import load_config
from tests.training.helpers import TINY_RUN, assert_resumes_exactly
from tests.training.test_representation_alignment import vae_folder  # noqa: F401  (a fixture)
from tests.training.test_tasks import TEXT_TO_IMAGE


@pytest.fixture
def configured(tmp_path, vae_folder):  # noqa: F811
    """Writes a tiny configuration with a curriculum and returns a loader that takes overrides."""

    def load(*overrides, output="runs"):
        path = tmp_path / "growing.toml"
        path.write_text(TINY_RUN + TEXT_TO_IMAGE.replace("VAE", str(vae_folder)))
        settings = ("data.curriculum=[[0.5, 16], [1.0, 32]]", *overrides)
        return load_config(path, [f'run.output="{tmp_path / output}"', *settings])

    return load


def waves(side, rows, columns, phase):
    """A wave of so many periods down and across, seen at the centres of pixels."""
    places = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return torch.cos(2 * math.pi * (rows * places[:, None] + columns * places[None]) + phase)[None, None]


@pytest.mark.parametrize(("size", "side"), [(128, 96), (32, 16), (30, 15), (33, 20)])
def test_low_frequencies_stay_exactly_and_high_ones_go(size, side):
    reach = (side - 1) // 2
    for rows, columns in ((0, 0), (1, 0), (3, 2), (reach, -reach), (-2, reach)):
        small = crop_spectrum(waves(size, rows, columns, 0.7), side)
        torch.testing.assert_close(small, waves(side, rows, columns, 0.7).float(), atol=2e-5, rtol=0)
    for rows, columns in ((reach + 1, 0), (2, reach + 1)):
        assert crop_spectrum(waves(size, rows, columns, 0.7), side).abs().max() < 2e-5
    images = torch.rand(2, 3, size, size)
    torch.testing.assert_close(crop_spectrum(images, side).mean((2, 3)), images.mean((2, 3)))
    assert torch.equal(crop_spectrum(images, size), images)


def test_steps_get_their_sizes():
    parts = [(0.25, 64), (0.5, 96), (1.0, 128)]
    assert [side_at(parts, step, 8, 128) for step in range(8)] == [64] * 2 + [96] * 2 + [128] * 4
    assert side_at([], 0, 8, 128) == 128


def test_batches_have_the_size_of_their_step(configured):
    config = configured("run.gradient_accumulation_steps=2")
    task = Trainer(config).task
    sides = [task.batch(index)["latents"].shape[-1] for index in range(12)]
    assert sides == [2] * 6 + [4] * 6  # of an autoencoder with patches of 8 pixels; steps have two batches
    first, again = task.batch(1), task.batch(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(batch["latents"].shape[-1] == 4 for batch in task._validation.values())


def test_small_latents_are_those_of_the_same_scenes(configured):
    task = Trainer(configured()).task
    images = LowFrequencyExamples(task.pool, 16).images([5])
    with torch.no_grad():
        expected = task.vae.encode(images).latent
    torch.testing.assert_close(task.small_latents[16][5:6].float(), expected, atol=2e-3, rtol=2e-3)
    plain = Trainer(configured("data.curriculum=[]", output="plain")).task
    for name, value in plain.batch(4).items():  # at full size nothing has changed
        assert torch.equal(value, task.batch(4)[name])


@pytest.mark.parametrize("until", [2, 4])
def test_resume_is_bit_identical(configured, until):
    assert_resumes_exactly(lambda output: configured(output=output), until)


@pytest.mark.parametrize(
    ("curriculum", "message"),
    [
        ("[[0.5, 16], [0.9, 32]]", "last one 1"),
        ("[[0.5, 16], [0.5, 16], [1.0, 32]]", "ascending"),
        ("[[0.5, 16], [1.0, 24]]", r"data\.resolution = 32"),
        ("[[0.5, 32], [0.7, 16], [1.0, 32]]", "ascending"),
        ("[[0.5, 24], [1.0, 32]]", "expected multiples of 16"),
    ],
)
def test_errors_say_the_remedy(configured, curriculum, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(configured(f"data.curriculum={curriculum}"))
