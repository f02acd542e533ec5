"""Scorers of searches, checked like pipelines because they may come from strangers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoConfig

from dit.runtime.json_files import read_object
from pipelines.loading.errors import clear_loading_errors
from pipelines.loading.structure import check_network
from pipelines.loading.weight_files import stored_tensors
from pipelines.loading.weight_values import check_weights
from sampling.inference_search import Reward
from sampling.rewards import ClipReward, as_reward


def read_reward(wanted: Any, device: torch.device) -> Reward:
    """Return the reward of a search.

    Args:
        wanted: a callable, or the folder or Hub id of a CLIP-like model.
        device: where it computes.

    Returns:
        The reward.

    Raises:
        ValueError: the model is damaged or not CLIP-like.
        OSError: there is no such model.
        TypeError: neither a callable nor a name.
    """
    if not isinstance(wanted, str | os.PathLike):
        return as_reward(wanted, device)
    name = f"The scorer {os.fspath(wanted)}"
    with clear_loading_errors(name):
        if Path(wanted).is_dir():
            _check_folder(Path(wanted))
        reward = as_reward(wanted, device)
    if isinstance(reward, ClipReward):
        check_weights(reward.model, name)
    return reward


def _check_folder(folder: Path) -> None:
    """Check the configuration and the weight files."""
    config = read_object(folder / "config.json")
    stored = stored_tensors(folder)
    settings = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    found: Any = MODEL_MAPPING.get(type(settings), None)
    if found is not None:
        check_network(folder, found, config, stored, exact=False)
