"""`tessera bench speed-up-shapes`: what the tuner predicts for networks of published sizes, beside what is measured.

DiT-XL/2 (arXiv 2212.09748) at 256 pixels, 256 tokens, in its pipeline with an autoencoder of Stable Diffusion's size;
random weights. Their blocks begin as identities, which would make every cache exact, so what scales the blocks' results
is drawn too. What a technique costs depends on sizes and not on weights; what it changes does, so decibels here say
nothing of trained networks and only tell that the setting did something.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import nn

from apps.benchmarks.next_scale import Asked
from apps.environment import describe_machine
from apps.service.devices import resolve_device
from dit.models.dit import DiT
from pipelines.class_to_image import ClassToImagePipeline
from pipelines.tuning.goals import Goal
from pipelines.tuning.record import Choice
from pipelines.tuning.tuner import Tuner
from pipelines.tuning.workload import Workload

STEPS = 8
REQUESTS = 45
"""Plain requests in whose time the tuner has to be done."""
LEARNED, HELD_OUT = [207, 88], [360, 417, 973]
"""Classes."""
CHANNELS = (128, 256, 512, 512)
"""Of Stable Diffusion's autoencoder."""
DEVIATION = 0.02
"""Of the weights that begin as zeros."""


def dit_pipeline(preset: str = "DiT-XL/2", side: int = 256, channels: tuple[int, ...] = CHANNELS) -> Any:
    """Return a pipeline of random weights.

    Args:
        preset: of `dit.models.dit.PRESETS`.
        side: of its images, pixels.
        channels: of the autoencoder, a level each.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scale = 2 ** (len(channels) - 1)
        transformer = DiT.from_preset(preset, sample_size=side // scale)
        for name, weight in transformer.named_parameters():
            if not weight.any() and name.endswith("weight"):
                nn.init.normal_(weight.data, std=DEVIATION)
        sizes: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * len(channels),
            "up_block_types": ("UpDecoderBlock2D",) * len(channels),
            "block_out_channels": channels,
        }
        vae = AutoencoderKL(**sizes, layers_per_block=2, latent_channels=4, norm_num_groups=min(32, channels[0]))
    pipe = ClassToImagePipeline(transformer.eval(), vae.eval(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bench_speed_up_shapes(asked: Asked) -> dict[str, Any]:
    """Tune the pipelines and compare predictions with real runs; on a CPU with one thread half an hour or more."""
    device = torch.device(resolve_device(asked.device or "auto"))
    dtype = torch.float32 if asked.smoke else torch.bfloat16
    name, pipe = ("DiT-S/4", dit_pipeline("DiT-S/4", 32, (8, 16))) if asked.smoke else ("DiT-XL/2", dit_pipeline())
    steps = asked.steps or (4 if asked.smoke else STEPS)
    with torch.no_grad():
        rows, seconds = _tuned(name, pipe.to(device, dtype), steps, asked.smoke)
    return {
        "machine": describe_machine(device, dtype),
        "steps": steps,
        "plain": {"seconds": round(seconds, 2), "clock": "process" if _is_alone(device) else "wall"},
        "tables": {"settings that were verified, and what had been predicted": rows},
    }


def _is_alone(device: torch.device) -> bool:
    return device.type == "cpu" and torch.get_num_threads() == 1


def _tuned(name: str, pipe: Any, steps: int, smoke: bool) -> tuple[list[dict[str, Any]], float]:
    """Tune a pipeline; return a row for each verified setting, and the seconds of a plain request."""
    call = {"num_inference_steps": steps}
    learned, held_out = (LEARNED[:1], HELD_OUT[:1]) if smoke else (LEARNED, HELD_OUT)
    work = Workload(pipe, learned, call)
    work.generate(0)
    times = work.generate(0).times
    minutes = REQUESTS * times.wall / 60
    goals = {f"psnr>={value:g}": Goal("psnr", value) for value in (30.0, 24.0)}
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as folder:
        record = Tuner(pipe, learned, held_out, Path(folder) / "tuning.json", call, minutes).run(goals)
    chosen = {id(one): goal for goal, one in record.profiles.items()}
    front = [*record.profiles.values(), *(one for one in record.front if id(one) not in chosen)]
    rows = [_row(f"{name}: {_named(one)}", chosen.get(id(one), ""), one) for one in front]
    return rows, times.total(work.clock)


def _named(choice: Choice) -> str:
    return ", ".join(choice.parts)


def _row(shape: str, goal: str, choice: Choice) -> dict[str, Any]:
    """Return what was predicted of a setting beside what was measured."""
    gain, predicted = choice.gain or 0.0, choice.predicted_gain or 0.0
    return {
        "shape": shape,
        "chosen for": goal,
        "gain": round(gain, 2),
        "predicted": round(predicted, 2),
        "predicted time, % of measured": round(100 * gain / predicted, 1) if predicted else None,
        "PSNR, dB": round(choice.quality.get("psnr", 0.0), 1),
        "reached": choice.reached,
    }
