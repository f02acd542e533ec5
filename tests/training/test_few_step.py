"""Distillation to few steps: paths of the teacher, and what the student learns from them."""

import functools
import itertools
import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from rich.console import Console
from safetensors import safe_open

from apps.training.config import ConfigError, validate_document
from apps.training.dry_run import report
from apps.training.loop import train
from apps.training.task import TaskContext
from apps.training.tasks import few_step
from apps.training.tasks.few_step import FewStepConfig, FewStepTask
from apps.training.trajectories import guided_path, teacher_sigmas
from pipelines.network_calls import euler_levels, learn_unguided_call
from sampling.diffusion_targets import NoiseProcess
from sampling.objectives import shift_sigmas
from tests.families.every import build, options, side
from tests.families.tiny import tiny_pipeline
from tests.training.helpers import assert_resumes_exactly

CONTEXT = TaskContext(torch.device("cpu"), 0, 1, nullcontext, nullcontext)
LEVELS = shift_sigmas(torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64), 3.0)  # of four steps, evenly


def test_path_ends_where_the_exact_flow_does():
    process = NoiseProcess("velocity", 1000, shift=3.0)
    levels = LEVELS
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
    levels = LEVELS
    for start, end in itertools.pairwise(levels):
        between = teacher_sigmas(float(start), float(end), 5, 3.0)
        assert len(between) == 6
        assert torch.allclose(between[[0, -1]], torch.stack([start, end]))
        assert (between.diff() < 0).all()


@pytest.mark.parametrize("name", ["text_dit", "flux", "sd3", "wan"])
def test_levels_are_those_of_the_pipeline(name, monkeypatch):
    """The scheduler of a real call sees the same levels: shifted by size (flux), or evenly spread (ours)."""
    pipe = tiny_pipeline(name)
    if name == "flux":
        pipe.scheduler.register_to_config(use_dynamic_shifting=True)
    if name == "wan":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    call = learn_unguided_call(pipe, side(name), side(name), 5 if name == "wan" else None, options=options(name))
    levels = euler_levels(pipe, pipe.transformer, call.pipeline_arguments, 4)
    made, step = [], pipe.scheduler.step

    def seen(output, timestep, sample, *given, **named):
        result = step(output, timestep, sample, *given, **named)
        made.append(((result[0] - sample) / output).double().mean())  # how far the level falls
        return result

    monkeypatch.setattr(pipe.scheduler, "step", functools.wraps(step)(seen))
    pipe(**{**call.pipeline_arguments, "num_inference_steps": 4, "output_type": "latent"})
    torch.testing.assert_close(torch.stack(made), levels.diff(), rtol=1e-3, atol=1e-4)
    if name == "text_dit":
        torch.testing.assert_close(levels, shift_sigmas(torch.linspace(1, 0, 5, dtype=torch.float64), 3.0))


@pytest.mark.gpu
def test_levels_of_a_pipeline_on_a_gpu_are_the_same():
    found = []
    for device in ("cpu", "cuda"):
        pipe = tiny_pipeline("sd3").to(device)
        call = learn_unguided_call(pipe, side("sd3"), side("sd3"), options=options("sd3"))
        found.append(euler_levels(pipe, pipe.transformer, call.pipeline_arguments, 4))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (FlowMatchHeunDiscreteScheduler(), "steps where 4 are asked for"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "Euler's method"),
        (UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "Euler's method"),
    ],
)
def test_other_schedulers_are_refused(scheduler, said):
    pipe = tiny_pipeline("sd3")
    call = learn_unguided_call(pipe, side("sd3"), side("sd3"))
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=said):
        euler_levels(pipe, pipe.transformer, call.pipeline_arguments, 4)


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


def test_dry_run_has_no_files_to_show(configured):
    console = Console(record=True, width=120)
    assert report(configured("dry"), console)["total"] > 0
    shown = console.export_text()
    assert "parameters are trained" in shown
    assert "24 paths are made first, by 30 calls of the network each" in shown


def test_dry_run_makes_no_paths(configured, monkeypatch):
    def refused(*_: object) -> None:
        raise AssertionError("a dry run asked the model for a path")

    config = configured("dry")
    monkeypatch.setattr(few_step, "guided_path", refused)
    dry = FewStepTask(config, replace(CONTEXT, is_dry_run=True))
    assert not list(config.run.output.rglob("paths-*"))
    monkeypatch.undo()
    real = FewStepTask(config, CONTEXT)
    assert {name: part.shape for name, part in dry.largest_batch().items() if name != "arguments"} == {
        name: part.shape for name, part in real.largest_batch().items() if name != "arguments"
    }


def test_resume_is_bit_identical(configured):
    folder = assert_resumes_exactly(configured, 3)
    with safe_open(folder / "export" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["few_step.steps"] == "4"


def test_student_comes_nearer_to_the_teacher(configured):
    config = configured("long", 60, validate_every=60, save_every=0, preview_every=0)
    with torch.no_grad():
        untrained = FewStepTask(config, CONTEXT).validate()["loss"]
    train(config)
    lines = [json.loads(line) for line in (config.run.folder / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "validation"]
    assert losses[-1] < 0.7 * untrained


def test_models_without_guidance_of_two_branches_are_their_own_teachers(configured, tmp_path):
    tiny_pipeline("flux").save_pretrained(tmp_path / "flux")
    document = configured("flux", 1).model_dump(mode="json") | {"model": {"pretrained": str(tmp_path / "flux")}}
    document["data"]["resolution"] = 32
    with pytest.raises(ConfigError, match=r"task.guidance = 2.*model.guidance"):
        FewStepTask(validate_document(document, FewStepConfig), CONTEXT)
    document["task"]["guidance"] = None
    document["run"]["name"] = "distilled"
    config = validate_document(document, FewStepConfig)
    assert train(config) == "finished"
    assert (config.run.folder / "export" / "pytorch_lora_weights.safetensors").is_file()


def test_a_pipeline_of_two_networks_is_refused(configured, tmp_path):
    build("wan22").save_pretrained(tmp_path / "wan")
    document = configured("wan", 1).model_dump(mode="json") | {"model": {"pretrained": str(tmp_path / "wan")}}
    with pytest.raises(ConfigError, match="several networks that share the noise levels"):
        FewStepTask(validate_document(document, FewStepConfig), CONTEXT)
