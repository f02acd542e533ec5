"""The frozen autoencoder of a run that generates or judges latents."""

import importlib
import json
from pathlib import Path

import torch
from torch import nn

from apps.training.config import ConfigError


def load_autoencoder(folder: Path) -> nn.Module:
    """Load a frozen autoencoder in float32: ours, or any of diffusers.

    Raises:
        ConfigError: If the folder holds none.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"data.vae = {str(folder)!r} has no config.json; give the folder that a run exported as vae")
    name = json.loads(path.read_text())["_class_name"]
    for module in ("dit.tokenizers", "diffusers"):
        found = getattr(importlib.import_module(module), name, None)
        if found is not None:
            return found.from_pretrained(folder, torch_dtype=torch.float32).eval().requires_grad_(False)
    raise ConfigError(f"data.vae = {str(folder)!r} is a {name}, which neither dit.tokenizers nor diffusers has")
