"""Everything that `tessera bench cache` compares: ours, other people's caches and other solvers, each by its own code.

A candidate is a name, its settings, and a context manager that puts it on a pipeline and takes it off again.
"""

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import diffusers
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

from sampling.schedulers import FlowMatchAB2Scheduler
from sampling.step_cache import Profile, StepCache

Generate = Callable[..., Any]
MODULES = [r"transformer_blocks\.\d+\.(attn|ff)"]


@dataclass(frozen=True)
class Candidate:
    """One way to make a run cheaper.

    Attributes:
        method: whose way.
        settings: its knobs.
        on: puts it on a pipeline for a `with` block.
        steps: of the run; None is that of the uncached run.
    """

    method: str
    settings: dict[str, Any]
    on: Callable[[Any], AbstractContextManager[Any]]
    steps: int | None = None


def ours(profile: Profile, budgets: Sequence[float]) -> list[Candidate]:
    """Return the budget preset, on the region that the profile is of."""
    caches = {budget: StepCache.preset("budget", budget=budget, profile=profile) for budget in budgets}
    name = f"tessera budget, {profile.region}"
    return [Candidate(name, {"budget": round(budget, 4)}, cache.attach) for budget, cache in caches.items()]


def of_diffusers_without_calibration() -> list[Candidate]:
    """FirstBlockCache and TaylorSeer of diffusers, their knobs swept for few steps."""
    first = [(threshold, FirstBlockCacheConfig(threshold=threshold)) for threshold in (0.15, 0.3, 0.5, 0.8, 1.2)]
    found = [Candidate("diffusers FirstBlockCache", {"threshold": t}, _enabled(config)) for t, config in first]
    for every, first_steps in ((2, 1), (3, 1), (2, 2), (3, 2)):
        settings: dict[str, Any] = {"cache_interval": every, "disable_cache_before_step": first_steps, "max_order": 1}
        config = TaylorSeerCacheConfig(**settings, taylor_factors_dtype=torch.float32, cache_identifiers=MODULES)
        found.append(Candidate("diffusers TaylorSeer", settings, _enabled(config)))
    return found


def of_diffusers(magnitudes: Sequence[float], steps: int) -> list[Candidate]:
    """FirstBlockCache, MagCache and TaylorSeer of diffusers, their knobs swept."""
    thresholds = (0.08, 0.15, 0.3, 0.5, 0.8)
    first = [(threshold, FirstBlockCacheConfig(threshold=threshold)) for threshold in thresholds]
    found = [Candidate("diffusers FirstBlockCache", {"threshold": t}, _enabled(config)) for t, config in first]
    for skips, retention, threshold in ((1, 0.2, 1.0), (1, 0.05, 1.0), (2, 0.05, 2.0), (3, 0.05, 3.0), (4, 0.05, 4.0)):
        config = MagCacheConfig(threshold, skips, retention, steps, list(magnitudes))
        settings = {"threshold": threshold, "max_skip_steps": skips, "retention_ratio": retention}
        found.append(Candidate("diffusers MagCache", settings, _enabled(config)))
    for every, first_steps, order in ((2, 2, 1), (3, 2, 1), (5, 2, 1)):
        settings: dict[str, Any] = {
            "cache_interval": every,
            "disable_cache_before_step": first_steps,
            "max_order": order,
        }
        config = TaylorSeerCacheConfig(**settings, taylor_factors_dtype=torch.float32, cache_identifiers=MODULES)
        found.append(Candidate("diffusers TaylorSeer", settings, _enabled(config)))
    return found


@contextmanager
def _enable(config: Any, pipe: Any) -> Iterator[None]:
    pipe.transformer.enable_cache(config)
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


def _enabled(config: Any) -> Callable[[Any], AbstractContextManager[Any]]:
    return lambda pipe: _enable(config, pipe)


def magnitudes_by_diffusers(pipe: Any, prompt: str, steps: int, generate: Generate) -> list[float]:
    """Magnitude ratios as diffusers calibrates them: it prints them, so they are read off its output."""
    calibration = _enable(MagCacheConfig(num_inference_steps=steps, calibrate=True), pipe)
    with contextlib.redirect_stdout(io.StringIO()) as printed, calibration:
        generate([prompt], [0])
    lists = re.findall(r"\[([\d., e+-]+)\]", printed.getvalue())
    if not lists:
        raise ValueError("diffusers' MagCache printed no ratios at the end of its calibration")
    return [float(number) for number in lists[-1].split(",")]


def missing() -> list[str]:
    """Rivals that are not installed, and how to get them."""
    return [] if find_spec("cache_dit") else ["cache-dit: pip install cache-dit"]


MASKS = ((2, 2), (2, 3), (2, 4), (2, 5), (2, 8))


def of_cache_dit(steps: int, masks: Sequence[tuple[int, int]] = MASKS) -> list[Candidate]:
    """DBCache with its TaylorSeer calibrator, dynamic and with masks of steps; empty where it is `missing`.

    Args:
        steps: of a run.
        masks: steps computed first, and of how many later ones one is computed.
    """
    if missing():
        return []
    found = []
    for threshold, warmup, order in ((0.25, 4, 1), (0.4, 2, 1), (0.7, 3, 1)):
        settings = {"residual_diff_threshold": threshold, "max_warmup_steps": warmup, "order": order}
        found.append(Candidate("cache-dit DBCache + TaylorSeer", settings, _with_cache_dit(settings, steps, None)))
    for warmup, every in masks:
        mask = [int(step < warmup or (step - warmup) % every == every - 1) for step in range(steps)]
        settings = {"residual_diff_threshold": 0.9, "max_warmup_steps": warmup, "order": 1}
        candidate = _with_cache_dit(settings, steps, mask)
        found.append(Candidate("cache-dit DBCache + TaylorSeer", {"mask": f"{warmup} + 1 of {every}"}, candidate))
    return found


def _with_cache_dit(
    settings: dict[str, Any], steps: int, mask: list[int] | None
) -> Callable[[Any], AbstractContextManager[Any]]:
    @contextmanager
    def on(pipe: Any) -> Iterator[None]:
        import cache_dit  # pyright: ignore[reportMissingImports]

        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=settings["residual_diff_threshold"],
            max_warmup_steps=settings["max_warmup_steps"],
            num_inference_steps=steps,
            steps_computation_mask=mask,
            steps_computation_policy="dynamic" if mask is None else "static",
            enable_separate_cfg=False,
        )
        adapter = cache_dit.BlockAdapter(
            transformer=pipe.transformer,
            blocks=pipe.transformer.transformer_blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        )
        taylor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=settings["order"])
        cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=taylor)
        try:
            yield
        finally:
            cache_dit.disable_cache(adapter)

    return on


def fewer_steps(counts: Sequence[int]) -> list[Candidate]:
    """Good solvers with fewer steps and no cache."""
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    solvers = {
        "fewer steps, AB2": FlowMatchAB2Scheduler.from_config,
        "fewer steps, DPM++2M": lambda config: diffusers.DPMSolverMultistepScheduler(
            flow_shift=config.get("shift", 1.0), **flow
        ),
        "fewer steps, UniPC": lambda config: diffusers.UniPCMultistepScheduler(
            flow_shift=config.get("shift", 1.0), **flow
        ),
    }
    return [
        Candidate(name, {"steps": count}, _with_scheduler(make), count)
        for name, make in solvers.items()
        for count in counts
    ]


def _with_scheduler(make: Callable[[Any], Any]) -> Callable[[Any], AbstractContextManager[Any]]:
    @contextmanager
    def on(pipe: Any) -> Iterator[None]:
        before = pipe.scheduler
        pipe.scheduler = make(before.config)
        try:
            yield
        finally:
            pipe.scheduler = before

    return on


def reference(steps: int = 84) -> Candidate:
    """Return the image of so many steps that the solver hardly matters."""
    return Candidate("reference, AB2", {"steps": steps}, _with_scheduler(FlowMatchAB2Scheduler.from_config), steps)
