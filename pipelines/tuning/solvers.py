"""Fewer steps, of the pipeline's own solver and of others: the rival of every acceleration.

Steps and scheduler are fixed by the user, so these are no part of a setting; the tuner says when they would win.
"""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from pipelines.tuning.measuring import FAILURES, Baseline
from pipelines.tuning.workload import similarity
from sampling.diffusion_targets import is_flow
from sampling.schedulers import FlowMatchAB2Scheduler

SHARES = (0.75, 0.5, 0.35, 0.25)
"""Of the steps."""
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def solvers_of(scheduler: Any) -> dict[str, Any]:
    """Return solvers that fit a scheduler's model, by name, the own one first.

    Args:
        scheduler: of the pipeline.
    """
    if scheduler is None or not hasattr(scheduler, "config"):
        return {}
    found = {type(scheduler).__name__: type(scheduler).from_config(scheduler.config)}
    multistep = (UniPCMultistepScheduler, DPMSolverMultistepScheduler)
    if not is_flow(scheduler):
        return found | {
            kind.__name__: kind.from_config(scheduler.config, variance_type=None)
            for kind in multistep
            if not isinstance(scheduler, kind)
        }
    if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        found["FlowMatchAB2Scheduler"] = FlowMatchAB2Scheduler.from_config(scheduler.config)
    shift = scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))
    if scheduler.config.get("use_dynamic_shifting"):  # the shift follows the size, which these don't know
        return found
    trained = scheduler.config.num_train_timesteps
    return found | {
        kind.__name__: kind(num_train_timesteps=trained, flow_shift=shift, **_FLOW)
        for kind in multistep
        if "flow_shift" in inspect.signature(kind.__init__).parameters
    }


def try_solvers(baseline: Baseline, steps: int, argument: str) -> list[dict[str, Any]]:
    """Run fewer steps of each solver.

    Args:
        baseline: plain runs.
        steps: of these.
        argument: of the call, that sets them.

    Returns:
        For each: "solver", "steps", "share" of the plain time, mean "psnr" to the plain run, or an "error".
    """
    work, rows = baseline.work, []
    own = getattr(work.pipe, "scheduler", None)
    counts = sorted({max(2, round(share * steps)) for share in SHARES} - {steps}, reverse=True)
    try:
        for name, solver in solvers_of(own).items():
            work.pipe.scheduler = solver
            rows += [_try(baseline, name, count, argument) for count in counts]
    finally:
        if own is not None:
            work.pipe.scheduler = own
    return rows


def _try(baseline: Baseline, name: str, count: int, argument: str) -> dict[str, Any]:
    """Run one solver with one number of steps on all prompts."""
    work, row = baseline.work, {"solver": name, "steps": count}
    try:
        plain = baseline.seconds()
        results = [work.generate(index, **{argument: count}) for index in range(len(work.prompts))]
    except FAILURES as reason:
        return {**row, "error": f"{type(reason).__name__}: {reason}".splitlines()[0]}
    alike = [similarity(one.pixels, other.pixels) for one, other in zip(results, baseline.results, strict=True)]
    taken = min(one.times.total(work.clock) for one in results)
    return {**row, "share": taken / plain, "psnr": sum(one["psnr"] for one in alike) / len(alike)}


def winner(rows: list[dict[str, Any]], psnr: float, share: float) -> dict[str, Any] | None:
    """Return the fewest steps of a solver that are at least as near to the plain run and faster than a setting.

    Args:
        rows: of `try_solvers`.
        psnr: of the setting, decibels.
        share: of the plain time that it takes.
    """
    better = [one for one in rows if "error" not in one and one["psnr"] >= psnr and one["share"] < share]
    return min(better, key=lambda one: one["share"], default=None)
