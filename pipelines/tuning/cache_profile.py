"""The profile of the step cache that a tuning makes for a model without one."""

from __future__ import annotations

import logging
from pathlib import Path

from pipelines.acceleration.switch import is_next_scale
from pipelines.tuning.candidates import FEW_STEPS
from pipelines.tuning.conditions import Conditions
from pipelines.tuning.measuring import FAILURES
from pipelines.tuning.workload import Workload

logger = logging.getLogger(__name__)


def make_profile(work: Workload, conditions: Conditions, record: Path) -> str | None:
    """Calibrate the step cache, if its file isn't there from an earlier run.

    Args:
        work: its prompts are generated once.
        conditions: how the pipeline is called.
        record: file of the tuning; the profile stands beside it.

    Returns:
        The file; None for pipelines that have no use for one, or can't be calibrated, which is logged.
    """
    from sampling.step_cache import Profile, calibrate_budget

    if is_next_scale(work.pipe) or (conditions.steps or 0) < FEW_STEPS:
        return None
    path = record.with_suffix(".step_cache.safetensors")
    try:
        if path.is_file():
            Profile.load(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            calibrate_budget(work.pipe, work.prompts, seed=work.seed, **work.call).save(path)
    except FAILURES as reason:
        logger.warning("the step cache gets no profile, so no budgets are tried: %s", reason)
        return None
    return str(path.resolve())
