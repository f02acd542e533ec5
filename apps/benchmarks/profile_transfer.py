"""`tessera bench cache-transfer`: how a step cache's profile carries to what it was not calibrated on.

For each change a profile is calibrated under it too; both plan the same budget, and evenly spaced steps stand beside
them. The figure is the PSNR to the uncached run, mean over images.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from rich.console import Console

from apps.benchmarks.step_cache import CALIBRATION_SEED, STEPS, TEST_SEED, draw, mean_psnr, own_guidance
from apps.commands.loading import load_for_command
from apps.environment import describe_machine
from sampling.schedulers import FlowMatchAB2Scheduler
from sampling.step_cache import Profile, StepCache, calibrate_budget
from sampling.step_cache.forecasters import Newton
from sampling.step_cache.gates import Mask

BUDGETS = (0.5, 0.35)
REGION = "blocks"


@dataclass(frozen=True)
class Change:
    """What differs from the calibration (28 steps, the model's guidance, 128 pixels, shift 3, Euler, all kinds).

    Args:
        settings: arguments of the calls.
        scheduler: makes another scheduler of the pipeline's configuration.
        kind: prompts of one kind only, in the test.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    scheduler: Callable[[Any], Any] | None = None
    kind: str | None = None


CHANGES = {
    "nothing": Change(),
    "prompts: pairs only, calibrated on single stickers": Change(kind="pair"),
    "guidance 1.5": Change({"guidance_scale": 1.5}),
    "guidance 4": Change({"guidance_scale": 4.0}),
    "20 steps": Change({"num_inference_steps": 20}),
    "50 steps": Change({"num_inference_steps": 50}),
    "192 x 192 pixels": Change({"height": 192, "width": 192}),
    "solver AB2": Change(scheduler=FlowMatchAB2Scheduler.from_config),
    "shift 1": Change(scheduler=lambda config: FlowMatchEulerDiscreteScheduler.from_config(config, shift=1.0)),
    "shift 6": Change(scheduler=lambda config: FlowMatchEulerDiscreteScheduler.from_config(config, shift=6.0)),
}


def bench_transfer(model: str, repeats: int, device: str | None, dtype: str | None, prompts: int = 6) -> dict[str, Any]:
    """Measures.

    Args:
        model: built-in name, or a folder with a vocabulary.
        repeats: 1 rehearses with one prompt and two changes.
        device: where to run.
        dtype: of the weights.
        prompts: how many are generated for each figure.
    """
    console = Console(stderr=True, soft_wrap=True)
    pipe = load_for_command(model, device, dtype)
    usual = {"num_inference_steps": STEPS, "guidance_scale": own_guidance(pipe)}
    learned = [request.prompt for request in draw(pipe, 3, 1_000_003)]
    base = _calibrate(pipe, learned, usual)
    single = [request.prompt for request in draw(pipe, 9, 1_000_003) if request.scene.kind == "single"]
    rows = []
    for name in list(CHANGES)[:2] if repeats == 1 else CHANGES:
        change, before = CHANGES[name], pipe.scheduler
        if change.scheduler is not None:
            pipe.scheduler = change.scheduler(before.config)
        settings = {**usual, **change.settings}
        carried = base if change.kind is None else _calibrate(pipe, single, usual)
        own = _calibrate(pipe, learned, settings)
        tested = [request for request in draw(pipe, 3 * prompts, 7) if change.kind in (None, request.scene.kind)]
        wanted = [request.prompt for request in tested][: 1 if repeats == 1 else prompts]
        for budget in BUDGETS:
            row = {"change": name, "budget": budget, **_compare(pipe, wanted, settings, budget, carried, own)}
            rows.append(row)
            console.print(str(row), highlight=False)
        pipe.scheduler = before
    return {
        "machine": describe_machine(torch.device(pipe.device), pipe.transformer.dtype),
        "prompts": prompts,
        "calibration_prompts": len(learned),
        "region": REGION,
        "rows": rows,
        "seconds": {},
    }


def _calibrate(pipe: Any, prompts: list[str], settings: dict[str, Any]) -> Profile:
    return calibrate_budget(pipe, prompts, region=REGION, seed=CALIBRATION_SEED, **settings)


def _compare(
    pipe: Any, prompts: list[str], settings: dict[str, Any], budget: float, carried: Profile, own: Profile
) -> dict[str, float]:
    """PSNR to the uncached run with the carried profile, with its own, and with evenly spaced steps."""

    def generate() -> torch.Tensor:
        noise = [torch.Generator().manual_seed(TEST_SEED + i) for i in range(len(prompts))]
        return pipe(prompt=prompts, generator=noise, output_type="pt", **settings).images.float().cpu()

    uncached = generate()
    steps = settings["num_inference_steps"]
    count = sum(own.mask((), budget))
    evenly = {round(i * (steps - 1) / (count - 1)) for i in range(count)}
    caches = {
        "carried": StepCache.preset("budget", budget=budget, profile=carried, guidance=settings["guidance_scale"]),
        "own": StepCache.preset("budget", budget=budget, profile=own),
        "evenly_spaced_line": StepCache(Mask(tuple(step in evenly for step in range(steps))), Newton(1)),
    }
    found = {}
    for name, cache in caches.items():
        with cache.attach(pipe):
            found[f"{name}_db"] = round(mean_psnr(generate(), uncached), 2)
    return found
