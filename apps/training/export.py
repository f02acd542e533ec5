"""Writes trained networks as the component folders that diffusers and transformers load."""

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin
from torch import nn

from dit.quant.linear import QuantLinear
from dit.quant.training import convert_trained, trained_layers


def half_precision(module: nn.Module) -> Any:
    """Return a copy on the CPU with bf16 parameters; buffers (statistics, preview maps) keep their precision.

    Layers that were trained rounded are quantized: codes and scales as they were trained.
    """
    copied = copy.deepcopy(module).cpu().eval()
    if trained_layers([copied]):
        convert_trained(copied)
    kept = {id(one) for layer in copied.modules() if isinstance(layer, QuantLinear) for one in layer.stored.values()}
    with torch.no_grad():
        for parameter in copied.parameters():
            if id(parameter) not in kept:
                parameter.data = parameter.data.to(torch.bfloat16)
    if isinstance(copied, ConfigMixin):
        copied.register_to_config(_name_or_path="")  # a path of the machine that trained does not belong in the file
    return copied


def save_component(module: nn.Module, folder: Path) -> None:
    """Save a network as `config.json` and bf16 safetensors.

    Args:
        module: Anything with `save_pretrained`.
        folder: Component folder, e.g. `export/vae`.
    """
    half_precision(module).save_pretrained(str(folder), safe_serialization=True)
