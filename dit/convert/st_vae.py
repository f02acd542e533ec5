"""LaVin-DiT's published space-time VAE: the keys are diffusers' of CogVideoX, so only the sizes have to be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dit.convert.keymap import KeyMapError
from dit.convert.var import check_has
from dit.tokenizers.st_vae import STAutoencoder

NEST = "state_dict"
"""Entry of the published file that holds the tensors."""

NEEDED = ("encoder.conv_in.conv.weight", "encoder.conv_out.conv.weight", "decoder.conv_out.conv.weight")


def from_official(state: Mapping[str, Tensor]) -> STAutoencoder:
    """Return the network of a published state dict, in the number format of its tensors.

    Args:
        state: as published, 3-D convolutions (C', C, 3, 3, 3).

    Raises:
        KeyMapError: keys or shapes are not those of the layout.
    """
    check_has(state, NEEDED, "LaVin-DiT's space-time VAE")
    with torch.device("meta"):
        model: Any = STAutoencoder(**_sizes(state))
    ours = model.state_dict()
    odd = sorted(set(ours) ^ set(state))
    if odd:
        where = "lacks" if odd[0] in ours else "has unknown"
        raise KeyMapError(f"{len(odd)} keys don't fit: the state dict {where} {odd[0]}; pass the published stvae file")
    for name, tensor in ours.items():
        if state[name].shape != tensor.shape:
            raise KeyMapError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
    model.load_state_dict(state, assign=True)
    return model.eval()


def to_official(model: STAutoencoder) -> dict[str, Tensor]:
    """Return the state dict that the published code loads."""
    return dict(model.state_dict())


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the arguments of `STAutoencoder` off the shapes; the rest is as published."""
    levels = layers = 0
    while f"encoder.down_blocks.{levels}.resnets.0.conv1.conv.weight" in state:
        levels += 1
    while f"encoder.down_blocks.0.resnets.{layers}.conv1.conv.weight" in state:
        layers += 1
    return {
        "in_channels": state["encoder.conv_in.conv.weight"].shape[1],
        "out_channels": state["decoder.conv_out.conv.weight"].shape[0],
        "latent_channels": state["encoder.conv_out.conv.weight"].shape[0] // 2,
        "block_out_channels": tuple(
            state[f"encoder.down_blocks.{level}.resnets.0.conv1.conv.weight"].shape[0] for level in range(levels)
        ),
        "down_block_types": ("CogVideoXDownBlock3D",) * levels,
        "up_block_types": ("CogVideoXUpBlock3D",) * levels,
        "layers_per_block": layers,
    }
