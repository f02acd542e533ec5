"""Profiles of the step cache that a tuning makes beside the model's own, one for each region."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, get_args

from pipelines.acceleration.switch import is_next_scale
from pipelines.step_cache import PROFILE_FILE
from pipelines.tuning.candidates import FEW_STEPS
from pipelines.tuning.conditions import Conditions
from pipelines.tuning.measuring import FAILURES
from pipelines.tuning.workload import Workload
from sampling.step_cache import Profile, calibrate_budget
from sampling.step_cache.regions import RegionName

logger = logging.getLogger(__name__)


def cache_profiles(work: Workload, conditions: Conditions, record: Path, calibrate: bool = True) -> list[str | None]:
    """Return the profiles that budgets can be tried with; those that are missing are calibrated.

    Which region suits depends on the model and on what forecasts cost here, so that both are tried.

    Args:
        work: its prompts are generated once for each region.
        conditions: how the pipeline is called.
        record: file of the tuning; profiles stand beside it.
        calibrate: whether to; else only the model's own counts.

    Returns:
        Files; None is the profile in the model's folder. Regions that can't be calibrated are logged and left out.
    """
    if is_next_scale(work.pipe) or (conditions.steps or 0) < FEW_STEPS:
        return []
    folder = Path(getattr(work.pipe, "name_or_path", None) or "")
    found: list[str | None] = []
    own: str | None = None
    if folder.name and (folder / PROFILE_FILE).is_file():
        own = Profile.load(folder / PROFILE_FILE).region
        found.append(None)
    for region in get_args(RegionName) if calibrate else ():
        if region == own:
            continue
        path = record.with_suffix(f".{region}.safetensors")
        try:
            _make(work, region, path)
        except FAILURES as reason:
            logger.warning("the step cache is not tried on the region %r: %s", region, reason)
            continue
        found.append(path.name if path.parent.resolve() == folder.resolve() else str(path.resolve()))
    return found


def _make(work: Workload, region: Any, path: Path) -> None:
    """Calibrate one region, unless an earlier run did."""
    if path.is_file():
        Profile.load(path).check(work.pipe.transformer)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    calibrate_budget(work.pipe, work.prompts, region=region, seed=work.seed, **work.call).save(path)
