"""Distillation to few steps: paths of the teacher, and what the student learns from them."""

import itertools

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open

from apps.training.config import validate_document
from apps.training.loop import train
from apps.training.tasks.few_step import FewStepConfig
from apps.training.trajectories import guided_path, student_sigmas, teacher_sigmas
from sampling.diffusion_targets import NoiseProcess
from tests.families.tiny import tiny_pipeline
from tests.training.helpers import assert_resumes_exactly


def test_path_ends_where_the_exact_flow_does():
    process = NoiseProcess("velocity", 1000, shift=3.0)
    levels = student_sigmas(FlowMatchEulerDiscreteScheduler(shift=3.0), 4)
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    # The velocity of data that are normal with the deviation 0.5, of which the exact path is known.
    def predict(sample, times, arguments):
        sigma = (times / 1000)[:, None]
        spread = (1 - sigma) ** 2 * 0.25 + sigma**2
        return sample * (sigma - (1 - sigma) * 0.25) / spread

    path = guided_path(predict, process, noise, levels, 40, 1.0, [None] * 3, [None] * 3)
    spread = ((1 - levels) ** 2 * 0.25 + levels**2).sqrt()
    torch.testing.assert_close(path, noise[None] * (spread / spread[0])[:, None, None], rtol=2e-3, atol=2e-3)


def test_guidance_pushes_away_from_the_unconditional_branch():
    process, levels = NoiseProcess("velocity", 1000), torch.tensor([1.0, 0.0], dtype=torch.float64)
    noise = torch.zeros(1, 1, dtype=torch.float64)

    def predict(sample, times, arguments):
        return torch.full_like(sample, -2.0 if arguments[0] == "prompt" else -1.0)

    ends = [guided_path(predict, process, noise, levels, 1, scale, ["prompt"], [""])[-1] for scale in (1.0, 3.0)]
    assert [float(end) for end in ends] == [2.0, 4.0]


def test_teacher_visits_the_levels_of_the_student():
    levels = student_sigmas(FlowMatchEulerDiscreteScheduler(shift=3.0), 4)
    for start, end in itertools.pairwise(levels):
        between = teacher_sigmas(float(start), float(end), 5, 3.0)
        assert len(between) == 6
        assert torch.allclose(between[[0, -1]], torch.stack([start, end]))
        assert (between.diff() < 0).all()


@pytest.fixture
def configured(tmp_path):
    tiny_pipeline("text_dit").save_pretrained(tmp_path / "tiny")

    def make(name, steps=6, **run):
        return validate_document(
            {
                "run": {
                    "name": name, "output": str(tmp_path), "steps": steps, "batch_size": 4, "log_every": 1,
                    "validate_every": 3, "preview_every": 6, "save_every": 3, "num_threads": 1, **run,
                },
                "task": {"kind": "few_step", "paths": 24, "substeps": 2, "guidance": 2.0, "preview_images": 1},
                "model": {"pretrained": str(tmp_path / "tiny")},
                "data": {"kind": "stickers", "vocabulary": "starter"},
                "optimizer": {"learning_rate": 5e-3},
                "lora": {"rank": 4, "layers": ["all"]},
            },
            FewStepConfig,
        )  # fmt: skip

    return make


def test_resume_is_bit_identical(configured):
    folder = assert_resumes_exactly(configured, 3)
    with safe_open(folder / "export" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["few_step.steps"] == "4"


def test_student_comes_nearer_to_the_teacher(configured):
    import json

    config = configured("long", 60, validate_every=20, save_every=0, preview_every=0)
    train(config)
    lines = [json.loads(line) for line in (config.run.folder / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "validation"]
    first = next(line["loss"] for line in lines if line["kind"] == "train")
    assert losses[-1] < 0.7 * first
