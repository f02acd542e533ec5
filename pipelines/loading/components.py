"""One component of a saved pipeline: its files checked before it is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin

from dit.runtime.json_files import read_object
from pipelines.loading.errors import one_line
from pipelines.loading.settings import check_schedule, check_settings
from pipelines.loading.structure import check_network, is_ours
from pipelines.loading.weight_files import component_bytes, stored_tensors

TRIAL_STEPS = 3

LARGE_FILES = ("tokenizer.json", "vocab.json")
"""Read by their own parsers only: they can have tens of megabytes."""


def check_component(
    folder: Path, found: type[Any], dtype: torch.dtype | None, variant: str | None, exact: bool
) -> int | None:
    """Check the files of one component.

    Args:
        folder: of the component.
        found: its class.
        dtype: number format the weights will be loaded in.
        variant: as in `from_pretrained`.
        exact: for pipelines of ours, which know what they mean by every setting.

    Returns:
        Bytes in memory of its weights; None for a component without any.

    Raises:
        OSError: a file is missing or damaged.
        ValueError: its settings are wrong, or don't fit the weights.
    """
    if not issubclass(found, torch.nn.Module):
        if issubclass(found, SchedulerMixin):
            check_scheduler(folder, found, exact)
        else:
            _check_json(folder)
        return None
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: the copy is incomplete, fetch it again.")
    config = read_object(path)
    stored = stored_tensors(folder, variant)
    check_network(folder, found, config, stored, exact)
    return component_bytes(stored, config, dtype)


def check_scheduler(folder: Path, found: type[Any], exact: bool) -> None:
    """Check a scheduler's settings, and that steps can be taken with them.

    Args:
        folder: of the component.
        found: its class.
        exact: take steps too; schedulers of foreign pipelines may need arguments that only those know.

    Raises:
        OSError: its file is missing.
        ValueError: a setting is wrong.
    """
    path = folder / "scheduler_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no scheduler_config.json: the copy is incomplete, fetch it again.")
    config = read_object(path)
    check_schedule(config, path)
    check_settings(found, config, path, exact and is_ours(found))
    try:
        scheduler = found.from_config(dict(config))
        finite = not exact or _takes_finite_steps(scheduler, config)
    except Exception as error:
        raise ValueError(
            f"{path}: no {found.__name__} can be built from it ({one_line(error)}). The file is damaged."
        ) from error
    if not finite:
        raise ValueError(
            f"{path}: the {found.__name__} takes steps to numbers that are not finite; one of its settings is damaged."
        )


@torch.no_grad()
def _takes_finite_steps(scheduler: Any, config: Mapping[str, Any]) -> bool:
    """Run a few scheduler steps on a tiny latent."""
    needs_shift = config.get("use_dynamic_shifting") and "mu" in inspect.signature(scheduler.set_timesteps).parameters
    scheduler.set_timesteps(TRIAL_STEPS, **({"mu": 1.0} if needs_shift else {}))
    learns_variance = str(config.get("variance_type")).startswith("learned")
    sample = torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4)  # (B, C, h, w)
    prediction = torch.cat([sample, sample], dim=1) if learns_variance else sample
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": torch.Generator().manual_seed(0)} if takes_generator else {}  # torch's own is left alone
    for timestep in scheduler.timesteps:
        sample = scheduler.step(prediction, timestep, sample, return_dict=False, **extra)[0]
    tables = [sample, torch.as_tensor(scheduler.timesteps), torch.as_tensor(getattr(scheduler, "sigmas", 0.0))]
    return len(scheduler.timesteps) > 0 and all(bool(torch.isfinite(table).all()) for table in tables)


def _check_json(folder: Path) -> None:
    """Check that the small JSON files of a tokenizer or processor hold objects."""
    for path in sorted(folder.glob("*.json")):
        if path.name not in LARGE_FILES:
            read_object(path)
